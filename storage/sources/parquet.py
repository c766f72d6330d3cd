"""Parquet files and Arrow streams (what Hugging Face data sets are made of), batch by batch.

A row group that cannot be decoded is one reject; the next ones come in.
"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.sources.pool import Mapping
from storage.sources.records import Document, Reject
from storage.sources.streams import Input

ROWS = 256
"""Rows held as Python objects at a time."""

_BROKEN = (pa.ArrowException, OSError, UnicodeDecodeError)  # the last: a damaged name of a column
_ODD = (ValueError, ArithmeticError, pa.ArrowException)  # bytes that are no text, dates and decimals beyond Python's


def read_parquet(file: Input, mapping: Mapping) -> Iterator[Document | Reject]:
    """Every row of the file in its order."""
    try:
        # Row groups of pools can be gigabytes: pages are read as they are needed, not a column at a time.
        opened = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
    except _BROKEN as error:
        yield Reject("bad_format", f"no Parquet file: {error}"[:300])
        return
    with opened:
        for group in range(opened.num_row_groups):
            rows = 0
            try:
                for batch in opened.iter_batches(ROWS, row_groups=[group], use_threads=False):
                    for row in _rows(batch):
                        rows += 1
                        yield mapping.record(row)
            except _BROKEN as error:
                yield Reject("broken_record", f"row group {group} from its row {rows} on: {error}"[:300])


def read_arrow(file: Input, mapping: Mapping) -> Iterator[Document | Reject]:
    """Every row of an Arrow IPC stream or file in its order."""
    magic = file.read(6)
    file.seek(0)
    rows = 0
    try:
        for batch in _batches(file, magic):
            try:
                batch.validate(full=True)  # offsets are taken as they are stored: a wrong one would end the process
            except pa.ArrowInvalid as error:
                yield Reject("broken_record", f"a batch of {batch.num_rows} rows after row {rows}: {error}"[:300])
                continue
            for start in range(0, batch.num_rows, ROWS):
                for row in _rows(batch.slice(start, ROWS)):
                    rows += 1
                    yield mapping.record(row)
    except _BROKEN as error:
        yield Reject("broken_record" if rows else "bad_format", f"from row {rows} on: {error}"[:300])


def _batches(file: Input, magic: bytes) -> Iterator[pa.RecordBatch]:
    if magic != b"ARROW1":
        yield from pa.ipc.open_stream(file)
        return
    reader = pa.ipc.open_file(file)
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    names = batch.schema.names
    yield from (dict(zip(names, row, strict=True)) for row in zip(*map(_values, batch.columns), strict=True))


def _values(column: pa.Array) -> list[Any]:
    """Python values of a column. Strings that are not UTF-8 stay bytes; dates that Python has not become text."""
    try:
        return list(column.to_pylist())
    except _ODD:
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        if isinstance(scalar, pa.StructScalar):
            return {name: _value(scalar[name]) for name in scalar}
        if isinstance(scalar, pa.ListScalar):
            return [_value(inner) for inner in scalar.values]
        return scalar.as_buffer().to_pybytes()
    except _ODD:
        return str(scalar.cast(pa.string()))
