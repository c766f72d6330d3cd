"""The files of an export: the formats by their names, written aside, and read back before they count."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from storage.exports import jsonl, parquet

Format = Literal["jsonl.zst", "parquet"]
FORMATS: dict[str, ModuleType] = {"jsonl.zst": jsonl, "parquet": parquet}


@dataclass(frozen=True)
class ExportFile:
    """A shard of an export: its file name, rows (copies of documents), bytes on disk, and SHA-256."""

    path: str
    rows: int
    n_bytes: int
    sha256: str


def describe(path: Path) -> ExportFile:
    """Read a written shard back. Raises `zstandard.ZstdError` or `pyarrow.ArrowInvalid` where it is broken."""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    rows = next(kind for kind in FORMATS.values() if path.name.endswith(kind.SUFFIX)).count_rows(path)
    return ExportFile(path.name, rows, path.stat().st_size, sha256)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path to write to; the file is forced to disk and takes its name at the end, or nothing stays."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # a retry may overlap a lost worker
    try:
        yield aside
        sync(aside)
        os.rename(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
