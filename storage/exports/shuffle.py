"""The shuffle of an export, in two passes over files and without a global sort.

Copy k of a document that is taken n times stands at the position

    (k + u) / n   in [0, 1),     u = (md5_number_upper(text_hash:record_number:export:seed) >> 11) / 2^53

so that its copies are 1/n of the export apart, and the positions of all copies together are uniform. u hashes the
text and the record's number in its file (the low 32 bits of doc_id): it does not change with the order in which files
arrived, and documents of equal text are spread as well. Shard s of S holds the positions in [s/S, (s+1)/S).

    documents + mixture  --scatter-->  <name>.arrow, record batch s = the rows of shard s     (Arrow IPC, LZ4)
    all *.arrow          --gather--->  <name>-00003-of-00012.jsonl.zst, sorted by (position, doc_id, copy)

An Arrow file finds batch s by number at no cost, where a Parquet footer would have to be parsed for thousands of row
groups by every gather. The rows and order of the export depend on documents, mixture, seed and number of shards alone;
its bytes also on the versions of pyarrow, orjson and zstd.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import SchemaError
from storage.exports.files import FORMATS, ExportFile, Format, describe, written_aside
from storage.schema import DOCUMENTS, MAX_RECORDS
from storage.shards import ROW_GROUP

EXPORT = pa.schema([DOCUMENTS.field(name) for name in ("doc_id", "text", "source", "domain", "url", "crawled_at")])
PLACED = pa.schema([pa.field("position", pa.float64()), pa.field("copy", pa.int32()), *EXPORT])

Numbers = npt.NDArray[Any]  # one-dimensional; integers, but for positions and draws (float64)


@dataclass(frozen=True)
class Scattered:
    """The taken part of a document shard: its file, rows (copies), documents taken, and bytes of text of all copies."""

    path: str
    rows: int
    documents: int
    n_bytes: int


def shard_count(rows: int, n_bytes: int, shard_bytes: int) -> int:
    """How many shards hold `rows` copies with `n_bytes` of text at about `shard_bytes` each; 0 where nothing is taken.

    Gathering a shard takes about four times `shard_bytes` of memory.
    """
    return max(1, math.ceil(n_bytes / shard_bytes)) if rows else 0


def scatter(documents: str, mixture: str, out: str, name: str, shards: int, seed: int) -> Scattered:
    """Place the taken copies of one document shard into `<out>/<name>.arrow`; a file that is there is kept.

    Memory: about three times the text of the documents that are taken from this shard.

    Args:
        documents: a shard of `storage.schema.DOCUMENTS`.
        mixture: the shard aligned with it: `doc_id` and `copies` (integer, from 0) in the same order.
        name: of the file; one for each document shard.
        shards: of the export, the same for all document shards (`shard_count`).

    Raises:
        SchemaError: the mixture is not aligned with the documents, or copies are NULL or negative.
    """
    path = Path(out, f"{name}.arrow")
    if path.exists():
        return _scattered(path)
    taken, copies = _taken(documents, mixture)
    if len(taken) and shards < 1:
        raise ValueError(f"{int(copies.sum())} copies cannot go into {shards} shards")
    row, copy, position, target = _place(taken, copies, shards, seed)
    edges = np.searchsorted(target, np.arange(shards + 1))
    n_bytes = int(taken["n_bytes"].to_numpy() @ copies)
    counts = {"rows": str(len(row)), "documents": str(len(taken)), "n_bytes": str(n_bytes)}
    text = taken.select(EXPORT.names)
    schema, options = PLACED.with_metadata(counts), pa.ipc.IpcWriteOptions(compression="lz4")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside, pa.ipc.new_file(aside, schema, options=options) as writer:
        for first, last in pairwise(edges):
            part = text.take(pa.array(row[first:last]))
            columns = [pa.array(position[first:last]), pa.array(copy[first:last]), *part.columns]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=PLACED))
    return Scattered(str(path), len(row), len(taken), n_bytes)


def gather(scattered: Sequence[str], out: str, name: str, shard: int, shards: int, format: Format) -> ExportFile:
    """Write shard number `shard` (from 0) of the export into `out`; a file that is there is kept.

    Args:
        scattered: the paths of all scattered files, in any order.
        name: the export's: `<name>-00000-of-00012.jsonl.zst`.

    Returns:
        The written file, read back: rows, bytes on disk, and SHA-256.

    Raises:
        SchemaError: a file was scattered into another number of shards.
    """
    writer = FORMATS[format]
    path = Path(out, f"{name}-{shard:05d}-of-{shards:05d}{writer.SUFFIX}")
    if not path.exists():
        rows = _part(scattered, shard, shards)
        order = np.lexsort([rows[key].to_numpy() for key in ("copy", "doc_id", "position")])  # the last key leads
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            writer.write(aside, _in_order(rows.select(EXPORT.names), order), EXPORT)
    return describe(path)


def draw(text_hash: Sequence[Any], doc_id: Numbers, seed: int) -> Numbers:
    """u of each document, uniform in [0, 1); `text_hash` are `uuid.UUID`s."""
    record = doc_id & (MAX_RECORDS - 1)
    salted = (f"{text}:{number}:export:{seed}" for text, number in zip(text_hash, record.tolist(), strict=True))
    upper = (int.from_bytes(hashlib.md5(key.encode(), usedforsecurity=False).digest()[:8], "little") for key in salted)
    return np.fromiter((number >> 11 for number in upper), np.float64, len(record)) / 2**53


def _place(taken: pa.RecordBatch, copies: Numbers, shards: int, seed: int) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Row, number, position and shard of every copy, in the order of (position, doc_id, copy)."""
    doc_id = taken["doc_id"].to_numpy()
    row = np.repeat(np.arange(len(copies)), copies)
    copy = np.arange(len(row)) - np.repeat(np.cumsum(copies) - copies, copies)
    position = (copy + draw(taken["text_hash"].to_pylist(), doc_id, seed)[row]) / copies[row]
    order = np.lexsort((copy, doc_id[row], position))
    row, copy, position = row[order], copy[order].astype(np.int32), position[order]
    target = np.minimum((position * shards).astype(np.int64), shards - 1)  # k + u may round up to n
    return row, copy, position, target


def _taken(documents: str, mixture: str) -> tuple[pa.RecordBatch, Numbers]:
    """The documents that are taken at least once, and how often; row groups without any are not read."""
    file, mixed = pq.ParquetFile(documents, memory_map=True), pq.ParquetFile(mixture).read(["doc_id", "copies"])
    schema = pa.schema([*EXPORT, DOCUMENTS.field("text_hash"), DOCUMENTS.field("n_bytes")])
    has = {field.name: field.type for field in file.schema_arrow}
    if wrong := [field.name for field in schema if has.get(field.name) != field.type]:
        raise SchemaError(f"{documents} is no document shard: {', '.join(wrong)} missing or of another type")
    ids, mixed_ids = file.read(columns=["doc_id"])["doc_id"].to_numpy(), mixed["doc_id"].to_numpy()
    if len(ids) != len(mixed_ids):
        raise SchemaError(f"{mixture} has {len(mixed_ids)} rows, its documents {documents} {len(ids)}")
    if (different := np.flatnonzero(ids != mixed_ids)).size:
        row = different[0]
        raise SchemaError(
            f"{mixture} is not aligned with {documents}: row {row} has doc_id {mixed_ids[row]}, not {ids[row]}"
        )
    if mixed["copies"].null_count or not pa.types.is_integer(mixed["copies"].type):
        raise SchemaError(f"{mixture}: copies must be integers, 0 where a document is not taken, and never NULL")
    copies = mixed["copies"].to_numpy().astype(np.int64)
    if (copies < 0).any():
        raise SchemaError(f"{mixture}: copies is negative for doc_id {ids[np.argmin(copies)]}")
    batches, first = [_none(schema)], 0
    for number in range(file.num_row_groups):
        last = first + file.metadata.row_group(number).num_rows
        if (chosen := copies[first:last] > 0).any():
            group = file.read_row_group(number, columns=schema.names).select(schema.names).cast(schema)
            batches += group.filter(pa.array(chosen)).to_batches()
        first = last
    return pa.concat_batches(batches), copies[copies > 0]


def _scattered(path: Path) -> Scattered:
    with pa.memory_map(str(path)) as source:
        counts = pa.ipc.open_file(source).schema.metadata
    return Scattered(str(path), *(int(counts[key]) for key in (b"rows", b"documents", b"n_bytes")))


def _part(scattered: Sequence[str], shard: int, shards: int) -> pa.RecordBatch:
    """The rows of one shard out of all files."""
    batches = [_none(PLACED)]
    for path in scattered:
        with pa.memory_map(path) as source:
            reader = pa.ipc.open_file(source)
            if reader.num_record_batches != shards:
                raise SchemaError(
                    f"{path} was scattered into {reader.num_record_batches} shards, not {shards}: "
                    "remove the export's working folder and run again"
                )
            batches.append(reader.get_batch(shard).replace_schema_metadata())
    return pa.concat_batches(batches)


def _in_order(rows: pa.RecordBatch, order: Numbers) -> Iterator[pa.RecordBatch]:
    for first in range(0, len(order), ROW_GROUP):
        yield rows.take(pa.array(order[first : first + ROW_GROUP]))


def _none(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], schema=schema)
