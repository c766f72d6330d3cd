"""Parquet shards: written aside, renamed, described by their digest. Complete or absent, never half.

    <data>/main/<table>/<shard>-<8 random hex digits>.parquet

A file name is used once and registered once; what `shards` does not know is an orphan.
"""

import hashlib
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP = 1024


@dataclass(frozen=True)
class ShardFile:
    """A written shard: its name, path relative to the lake's data folder, row count, and SHA-256."""

    table: str
    shard: str
    path: str
    rows: int
    sha256: str


def write_shard(
    data: str, table: str, shard: str, batches: Iterable[pa.RecordBatch], schema: pa.Schema, row_group: int = ROW_GROUP
) -> ShardFile:
    """Write `batches` as one shard of `table` under the data folder and return its description.

    Args:
        data: the lake's data folder, absolute.
        row_group: rows per row group: about a thousand for documents, more for narrow tables.
    """
    folder = Path(data, "main", table)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{shard}-{secrets.token_hex(4)}.parquet"
    aside, final = folder / f".{name}.tmp", folder / name
    rows = 0
    try:
        with pq.ParquetWriter(aside, schema, compression="zstd", **_encodings(schema)) as writer:
            for batch in batches:
                writer.write_batch(batch, row_group)
                rows += batch.num_rows
        with open(aside, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        os.rename(aside, final)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return ShardFile(table, shard, str(final.relative_to(data)), rows, sha256)


def read_shard(data: str, path: str, columns: list[str] | None = None) -> pa.Table:
    """The shard's rows in their order."""
    return pq.read_table(Path(data, path), columns=columns, memory_map=True, partitioning=None)


def _encodings(schema: pa.Schema) -> dict[str, object]:
    """doc_id and ascending lists as deltas; dictionaries for the rest but for what is never repeated."""
    unique = {"doc_id", "text", "text_hash", "text_key", "url", "record_id", "metadata", "offset"}
    ascending = [f"{field.name}.list.element" for field in schema if field.type == pa.list_(pa.uint16())]
    ascending += ["doc_id"] if "doc_id" in schema.names else []
    return {
        "use_dictionary": [f.name for f in schema if f.name not in unique and f.type != pa.large_binary()] or False,
        "column_encoding": dict.fromkeys(ascending, "DELTA_BINARY_PACKED"),
    }
