"""Where documents come from: crawl files and finished pools, named in the recipe and listed before any work.

Source ──list_files──> FoundFile ... ──(storage.intake)──> documents + rejects = records read, always

warc          WARC, ARC and WET, each plain, gzip, zstd or LZ4 (told by content)
jsonl         one JSON object a line, plain or compressed
parquet
huggingface   a data set's folder: Arrow as save_to_disk writes it, or Parquet or JSON lines as on the hub
"""

import hashlib
import json
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

from storage.paths import beside_recipe
from storage.sources.listing import FoundFile, file_digest, list_files
from storage.sources.records import REASONS

AdoptedType = Literal["double", "bigint", "boolean", "varchar"]
MappedField = Literal["text", "url", "id", "domain", "crawled_at"]


def _with_types(adopt: Any) -> Any:
    return dict.fromkeys(adopt, "double") if isinstance(adopt, list | tuple) else adopt


def _each_beside_recipe(path: Any, info: Any) -> Any:
    return beside_recipe(path, info) if isinstance(path, str) else tuple(beside_recipe(p, info) for p in path)


class Source(BaseModel):
    """A recipe's [[sources]] entry: files of one format, and how their records become documents."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
    """The corpus, as documents.source and queries call it."""
    format: Literal["warc", "jsonl", "parquet", "huggingface"]
    path: Annotated[str | tuple[str, ...], AfterValidator(_each_beside_recipe)]
    """Local globs (with **) or fsspec URLs (with globs); for huggingface, folders. Relative to the recipe."""
    columns: dict[MappedField, Annotated[str, Field(min_length=1)]] = {}
    """Which field of a pool's record is what; dots reach into nested fields.

    Unnamed, text, url and id are the fields of these names. The domain is the registered domain of the url, or without
    a url the field `domain`. The crawl time is NULL unless it is named.
    """
    adopt: Annotated[dict[str, AdoptedType], BeforeValidator(_with_types)] = {}
    """Fields that become columns of the score table `adopted`, under the last part of their name.

    A list means double. A value that cannot be converted is NULL there and stays in the metadata.
    """

    @model_validator(mode="after")
    def _fits_format(self) -> "Source":
        if not self.paths:
            raise ValueError("path: name at least one file")
        if self.format == "warc" and (self.columns or self.adopt):
            raise ValueError("columns and adopt: WARC records have no fields to map; remove them")
        names = [path.rpartition(".")[2].lower() for path in self.adopt]
        for name in names:
            if name in ("doc_id", "computed", "") or names.count(name) > 1:
                raise ValueError(f"adopt: {name!r} cannot be a column's name, or is one twice; adopt another field")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def adopted(self) -> dict[str, AdoptedType]:
        """The columns that the source adopts, by the name that they get."""
        return {path.rpartition(".")[2]: kind for path, kind in self.adopt.items()}

    def settings_digest(self) -> str:
        """32 hex digits over what can change a document: format, columns and adopt; not the name, not the path."""
        return _digest(self.model_dump(mode="json", include={"format", "columns", "adopt"}))


class Intake(BaseModel):
    """A recipe's [ingest] table: how records become documents."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    extractor: Literal["resiliparse", "trafilatura"] = "resiliparse"
    """HTML to main text: the first is nine times faster, the second a little more exact (storage.sources.extract)."""
    max_record_bytes: PositiveInt = 20_000_000
    """A record's payload, decoded. What is larger is rejected, and never held."""
    shard_bytes: PositiveInt = 256_000_000
    """Text per shard of documents, uncompressed."""

    def fingerprint(self) -> str:
        """32 hex digits over what can change the documents table.

        `shard_bytes` is part of it: every score table is aligned with the shards of documents, row by row, so that
        another layout is another table.
        """
        from importlib.metadata import version

        libraries = (self.extractor, "resiliparse", "tldextract")
        return _digest(self.model_dump() | {name: version(name) for name in libraries} | {"version": _VERSION})

    def problems(self) -> list[str]:
        """What keeps this from running here, one line each with its remedy."""
        from storage.sources.extract import INSTALL_TRAFILATURA

        if self.extractor == "trafilatura" and find_spec("trafilatura") is None:
            return [f"ingest.extractor: trafilatura is not installed; {INSTALL_TRAFILATURA}"]
        return []


_VERSION = 1  # bumped by hand when the same file begins to give other documents


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


__all__ = [
    "REASONS",
    "AdoptedType",
    "FoundFile",
    "Intake",
    "Source",
    "file_digest",
    "list_files",
]
