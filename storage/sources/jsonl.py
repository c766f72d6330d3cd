"""JSON lines: one object a line, UTF-8, plain, gzip, zstd or LZ4. Blank lines are no records."""

import json
from collections.abc import Iterator
from typing import Any

import orjson

from storage.errors import SourceError
from storage.sources.pool import Mapping
from storage.sources.records import Document, Reject
from storage.sources.streams import Cursor, Input


def read_jsonl(file: Input, mapping: Mapping, limit: int) -> Iterator[Document | Reject]:
    """Every line of the file in its order.

    Args:
        limit: bytes of a line; a longer one is passed over without being held.
    """
    cursor = Cursor(file)
    try:
        head = cursor.peek()[:4096]
        if b"\0" in head and not head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            yield Reject("bad_format", f"no JSON lines in UTF-8: the file begins with {head[:40]!r}", offset=0)
            return
        offset = cursor.offset
        while line := cursor.line(limit + 1):
            size = len(line)
            if size > limit and not line.endswith(b"\n"):
                line = b""
                while (rest := cursor.line(limit)) and not rest.endswith(b"\n"):
                    size += len(rest)
                yield Reject("oversize", f"a line of {size + len(rest)} bytes", offset=offset, n_bytes=size + len(rest))
            elif line.strip():
                record = _parse(line.removeprefix(b"\xef\xbb\xbf"))
                if isinstance(record, Reject):
                    record.offset, record.n_bytes = offset, size
                    yield record
                else:
                    yield mapping.record(record, offset)
            offset = cursor.offset
    except SourceError as error:
        yield Reject(error.reason, error.detail)


def _parse(line: bytes) -> dict[str, Any] | Reject:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        # What orjson refuses and others write: NaN, infinity, lone surrogates.
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            return Reject("bad_encoding", str(error)[-200:])
        except (ValueError, RecursionError) as error:
            return Reject("not_json", str(error)[:200])
    if not isinstance(record, dict):
        return Reject("not_json", f"a {type(record).__name__}, not an object")
    return record
