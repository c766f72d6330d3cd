"""An export under its name: complete or absent, with a manifest that says what is in it.

    <final>/manifest.json                        written last; who reads it first reads a complete export
    <final>/<name>-00000-of-00012.jsonl.zst ...
    <final>/../.<final>.replaced                 the export of before, for the moment between two renames

manifest.json = {"format_version": 1, what the caller tells (recipe, snapshot, mixture, seed, counts ...),
                 "files": [{"path", "rows", "n_bytes", "sha256"}], "totals": {"files", "rows", "n_bytes"}}
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import zstandard

from storage.errors import RecipeError, SchemaError
from storage.exports.files import ExportFile, describe, sync, written_aside

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


def finish(out: str, final: str, files: Sequence[ExportFile], manifest: Mapping[str, Any]) -> None:
    """Write the manifest into the working folder `out` and give the folder the name `final`.

    An older export of that name is moved aside first and removed after. A kill leaves the older one, the new one or,
    between the two renames, none; `settle` puts that right, and no moment shows an incomplete export. Two runs must
    not finish one name at once: the caller holds a lock.

    Args:
        out: the folder that `gather` wrote into, on the file system of `final`; it is gone afterwards.
        files: what `gather` returned for every shard; none for an empty mixture.
        manifest: what else the manifest tells, as JSON.

    Raises:
        SchemaError: the folder holds other files than `files`.
        RecipeError: something that is no export stands under the name `final`.
    """
    folder, target = Path(out), Path(final)
    settle(final)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.tmp"):  # of a killed gather
        leftover.unlink()
    names = sorted(file.path for file in files)
    present = sorted(entry.name for entry in folder.iterdir() if entry.name != MANIFEST)
    if names != present:
        raise SchemaError(f"{out} holds other files than the export's: {sorted(set(names) ^ set(present))[:5]}")
    listed = [asdict(file) for file in sorted(files, key=lambda file: file.path)]
    totals = {"files": len(files), "rows": sum(f.rows for f in files), "n_bytes": sum(f.n_bytes for f in files)}
    content = {"format_version": FORMAT_VERSION, **manifest, "files": listed, "totals": totals}
    with written_aside(folder / MANIFEST) as aside:
        aside.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    target.parent.mkdir(parents=True, exist_ok=True)
    replaced = _replaced(target)
    if target.exists():
        os.rename(target, replaced)
    os.rename(folder, target)
    sync(target.parent)
    _discard(replaced)


def settle(final: str) -> dict[str, Any] | None:
    """Put right what a kill inside `finish` left, and return the manifest of the export under the name `final`.

    Call it before any work: an equal manifest means that nothing is to be done.

    Raises:
        RecipeError: something that is no export stands there; it would be replaced.
    """
    target = Path(final)
    replaced = _replaced(target)
    manifest = read_manifest(final)
    if manifest is None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RecipeError(f"{final} is no export of ours: remove it, or choose another folder")
    if manifest is None and read_manifest(str(replaced)) is not None:
        os.rename(replaced, target)
        return read_manifest(final)
    _discard(replaced)
    return manifest


def read_manifest(final: str) -> dict[str, Any] | None:
    """The manifest of a finished export; None where there is none.

    Raises:
        RecipeError: the file is no manifest, or one of a newer format.
    """
    path = Path(final, MANIFEST)
    if not path.is_file():
        return None
    try:
        manifest = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise RecipeError(f"{path} is no JSON ({error}): remove the folder and export again") from error
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise RecipeError(f"{path} is no manifest of format {FORMAT_VERSION}: remove the folder and export again")
    return manifest


def verify(final: str) -> list[str]:
    """Read the export's files again; one line for each difference from the manifest, none where all is well."""
    manifest = read_manifest(final)
    if manifest is None:
        return [f"{final} has no {MANIFEST}"]
    listed = {entry["path"]: ExportFile(**entry) for entry in manifest["files"]}
    present = {entry.name for entry in Path(final).iterdir()} - {MANIFEST}
    differences = [f"{name} is missing" for name in sorted(listed.keys() - present)]
    differences += [f"{name} is not in the manifest" for name in sorted(present - listed.keys())]
    for name in sorted(listed.keys() & present):
        try:
            found = describe(Path(final, name))
        except (zstandard.ZstdError, pa.ArrowInvalid) as error:
            differences.append(f"{name} cannot be read: {error}")
            continue
        for key, value in asdict(listed[name]).items():
            if (now := getattr(found, key)) != value:
                differences.append(f"{name}: {key} is {now}, the manifest says {value}")
    return differences


def _replaced(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _discard(folder: Path) -> None:
    """Remove an export, its manifest first: what a kill leaves of it is not taken for an export."""
    if folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
