"""Hugging Face data sets on disk or behind a URL, read without the `datasets` package.

Two shapes: a folder that `save_to_disk` wrote (a state.json names its Arrow files; other Arrow files beside it are
caches), and a folder as on the hub, of Parquet files or of JSON lines, plain or compressed.
"""

import re
from collections.abc import Callable, Iterator
from posixpath import dirname, join

import orjson

from storage.sources.jsonl import read_jsonl
from storage.sources.parquet import read_arrow, read_parquet
from storage.sources.pool import Mapping
from storage.sources.records import Document, Reject
from storage.sources.streams import Input

_DATA = re.compile(r"\.(parquet|arrow|jsonl|ndjson|jsonl?\.(gz|zst|zstd|lz4))$")


def data_files(paths: list[str], read: Callable[[str], bytes]) -> list[str]:
    """Those of a folder's files (all of them, at any depth) that hold the data set's records.

    Args:
        read: the content of a file.
    """
    states = [path for path in paths if path.rsplit("/", 1)[-1] == "state.json"]
    if states:
        named = (
            join(dirname(state), file["filename"])
            for state in states
            for file in orjson.loads(read(state))["_data_files"]
        )
        return sorted(set(named) & set(paths))
    return [path for path in paths if _DATA.search(path) and "/." not in path]


def read_huggingface(file: Input, mapping: Mapping, limit: int) -> Iterator[Document | Reject]:
    """Every record of one of the data set's files, whose format is told by its content."""
    magic = file.read(6)
    file.seek(0)
    if magic.startswith(b"PAR1"):
        return read_parquet(file, mapping)
    if magic == b"ARROW1" or magic.startswith(b"\xff\xff\xff\xff"):
        return read_arrow(file, mapping)
    return read_jsonl(file, mapping, limit)
