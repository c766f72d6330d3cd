"""Which files a source's patterns name: local globs, fsspec URLs, and the files of Hugging Face data set folders."""

import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.errors import RecipeError, ShardError

if TYPE_CHECKING:
    from storage.sources import Source


@dataclass(frozen=True, order=True)
class FoundFile:
    """An input file: absolute path or URL, bytes, and a stamp that changes when its content does.

    The stamp is the time of the last change in nanoseconds; for a URL its ETag, or else a hash of what the store says.
    """

    path: str
    size: int
    stamp: str


def list_files(source: "Source") -> list[FoundFile]:
    """The source's files, each once, sorted by path. RecipeError names each pattern that matches nothing."""
    found: dict[str, FoundFile] = {}
    problems: list[str] = []
    for pattern in source.paths:
        try:
            files = _matching(pattern, source.format == "huggingface")
        except RecipeError as error:
            problems.extend(f"sources.{source.name}.path: {problem}" for problem in error.problems)
            continue
        found |= {file.path: file for file in files}
    if problems:
        raise RecipeError(*problems)
    return sorted(found.values())


def file_digest(found: FoundFile) -> str:
    """32 hex digits that identify the file's content: xxh3-128 of it; for a URL of its path, size and stamp."""
    from xxhash import xxh3_128

    if "://" in found.path:
        return xxh3_128(f"{found.path} {found.size} {found.stamp}".encode()).hexdigest()
    hasher = xxh3_128()
    try:
        with open(found.path, "rb") as file:
            while piece := file.read(1 << 20):
                hasher.update(piece)
    except OSError:
        # It will be rejected as unreadable; until then its name stands for it.
        return xxh3_128(f"{found.path} {found.size} {found.stamp}".encode()).hexdigest()
    return hasher.hexdigest()


def _matching(pattern: str, folders: bool) -> list[FoundFile]:
    files, matched_folder = (_remote if "://" in pattern else _local)(pattern, folders)
    if files:
        return files
    if folders:
        raise RecipeError(f"{pattern!r} is no folder with Parquet, JSON lines or Arrow files; correct the path")
    if matched_folder:
        raise RecipeError(f"{pattern!r} is a folder; name its files, for instance {pattern.rstrip('/') + '/**/*.gz'!r}")
    raise RecipeError(f"nothing matches {pattern!r}; correct the path (relative ones count from the recipe's folder)")


def _local(pattern: str, folders: bool) -> tuple[list[FoundFile], bool]:
    pattern = os.path.abspath(os.path.expanduser(pattern))
    matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    inside = [match for match in matches if os.path.isdir(match)]
    if folders:
        from storage.sources.huggingface import data_files

        matches = [
            path
            for folder in inside
            for path in data_files(
                sorted(str(p) for p in Path(folder).rglob("*") if p.is_file()), lambda p: Path(p).read_bytes()
            )
        ]
    files = []
    for path in matches:
        if os.path.isfile(path):
            stat = os.stat(path)
            files.append(FoundFile(path, stat.st_size, str(stat.st_mtime_ns)))
    return files, bool(inside)


def _remote(pattern: str, folders: bool) -> tuple[list[FoundFile], bool]:
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(pattern)
    except ImportError as error:
        raise RecipeError(f"{pattern!r}: {error}") from error
    except ValueError as error:
        raise RecipeError(f"{pattern!r}: {error}; correct the URL") from error
    try:
        if folders:
            from storage.sources.huggingface import data_files

            infos: dict[str, Any] = fs.find(path, detail=True)
            infos = {name: infos[name] for name in data_files(sorted(infos), fs.cat_file)}
        else:
            infos = fs.glob(path, detail=True)
    except FileNotFoundError:
        infos = {}
    except OSError as error:
        raise ShardError(f"{pattern}: {error}") from error
    files = [
        FoundFile(fs.unstrip_protocol(name), int(info.get("size") or 0), _stamp(info))
        for name, info in infos.items()
        if info.get("type") == "file"
    ]
    return files, bool(infos)


def _stamp(info: dict[str, Any]) -> str:
    from xxhash import xxh3_128

    for key in ("ETag", "etag", "md5Hash", "content_md5", "mtime"):
        if info.get(key):
            return str(info[key]).strip('"')
    return xxh3_128(str(sorted((key, str(value)) for key, value in info.items())).encode()).hexdigest()
