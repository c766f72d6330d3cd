"""JSON Lines in one Zstandard frame: a document per line, keys in the order of the columns.

    {"doc_id":4294967296,"text":"...","source":"cc","domain":"example.org","url":"https://...","crawled_at":"...Z"}

doc_id is a JSON integer below 2^63: exact in Python, Rust, Java and DuckDB, not above 2^53 in JavaScript. A missing
value is null, not an absent key, so that every line has one schema. Times are ISO 8601 in UTC.
"""

from collections.abc import Iterable
from pathlib import Path

import orjson
import pyarrow as pa
import zstandard

SUFFIX = ".jsonl.zst"
LEVEL = 3


def write(path: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> None:
    """Write the rows. One frame with a checksum: many readers stop, without a word, after the first of several."""
    names = schema.names
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)
    with open(path, "wb") as file, compressor.stream_writer(file, closefd=False) as out:
        for batch in batches:
            columns = [column.to_pylist() for column in batch.columns]
            for row in zip(*columns, strict=True):
                record = dict(zip(names, row, strict=True))
                out.write(orjson.dumps(record, option=orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE))


def count_rows(path: Path) -> int:
    """Lines of the file; it is decompressed whole, so a broken one raises `zstandard.ZstdError`."""
    with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as lines:
        return sum(block.count(b"\n") for block in iter(lambda: lines.read(1 << 20), b""))
