"""Input files into shards: every record becomes a row of documents or a row of rejects, never both, never neither.

    files of one source, in their order ──> documents   <first file's number>-<part>    rolled over by text size
                                       ├──> adopted     shards of the same names, rows and order
                                       └──> rejects     one shard

Rows leave as they come: held are one batch of documents, and on disk what waits for its shard to be finished.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import IO, Any, Literal

import pyarrow as pa
from xxhash import xxh3_128_digest

from storage.errors import SourceError
from storage.schema import DOCUMENTS, RECORD_BITS, REJECTS, Column, score_schema
from storage.shards import ShardFile, write_shard
from storage.sources import Intake, Source
from storage.sources.records import Document, Reject, clean, to_json
from storage.sources.streams import Input

BATCH_ROWS, BATCH_BYTES = 1024, 32_000_000
NARROW_ROWS = 1 << 14


@dataclass(frozen=True)
class InputFile:
    """A file and its number in the lake, the upper half of its documents' ids.

    `stop` ends a trial early: no record is begun that far into the file, in bytes.
    """

    number: int
    path: str
    stop: int | None = None


@dataclass
class FileCount:
    """The books of one file: records = documents + rejects."""

    number: int
    records: int = 0
    documents: int = 0
    rejects: int = 0


@dataclass(frozen=True)
class Taken:
    """What `take_in` wrote. documents and adopted (empty where nothing is adopted) go pairwise."""

    documents: list[ShardFile] = field(default_factory=list)
    rejects: list[ShardFile] = field(default_factory=list)
    adopted: list[ShardFile] = field(default_factory=list)
    counts: list[FileCount] = field(default_factory=list)


def take_in(
    files: Sequence[InputFile],
    source: Source,
    intake: Intake,
    data: str,
    tables: Mapping[Literal["documents", "rejects", "adopted"], str],
    adopted: tuple[Column, ...] = (),
) -> Taken:
    """Read `files` in their order and write their shards under the lake's data folder; nothing is committed.

    The same files give the same rows in the same shards, however often and wherever they are read.

    Args:
        tables: physical names of the three tables.
        adopted: the columns of the table `adopted`, over all sources of the recipe. A row's `computed` is false where
            this source has none of them; a value that is missing or no number is NULL.

    Raises:
        RecipeError: the extractor is not installed.
        ShardError: a remote file fails in a way that may pass, so that its records are not taken for lost.
    """
    taken = Taken()
    first = f"{files[0].number:08d}"
    reader = _reader(source, intake)
    with _Spool(REJECTS) as rejects, _Spool(score_schema(adopted)) as scores:
        rows = _documents(files, reader, source.name, rejects, taken.counts)
        batches = _batches(rows, source, scores if adopted else None, adopted)
        while (batch := next(batches, None)) is not None:
            shard = f"{first}-{len(taken.documents):03d}"
            part = _until(chain([batch], batches), intake.shard_bytes)
            taken.documents.append(write_shard(data, tables["documents"], shard, part, DOCUMENTS))
            if adopted:
                taken.adopted.append(
                    write_shard(data, tables["adopted"], shard, scores.drain(), scores.schema, NARROW_ROWS)
                )
        if rejects.rows:
            taken.rejects.append(
                write_shard(data, tables["rejects"], f"{first}-000", rejects.drain(), REJECTS, NARROW_ROWS)
            )
    return taken


Reader = Callable[[Input], Iterator[Document | Reject]]


def _reader(source: Source, intake: Intake) -> Reader:
    limit = intake.max_record_bytes
    if source.format == "warc":
        from storage.sources.extract import extractor_version, html_extractor
        from storage.sources.warc import read_warc

        extract, name = html_extractor(intake.extractor), extractor_version(intake.extractor)
        return lambda file: read_warc(file, limit, extract, name)
    from storage.sources.pool import Mapping as Fields

    fields = Fields(source, limit)
    if source.format == "jsonl":
        from storage.sources.jsonl import read_jsonl

        return lambda file: read_jsonl(file, fields, limit)
    if source.format == "parquet":
        from storage.sources.parquet import read_parquet

        return lambda file: read_parquet(file, fields)
    from storage.sources.huggingface import read_huggingface

    return lambda file: read_huggingface(file, fields, limit)


def _records(wanted: InputFile, reader: Reader) -> Iterator[Document | Reject]:
    try:
        with Input(wanted.path) as file:
            for record in reader(file):
                yield record
                if wanted.stop is not None and file.tell() >= wanted.stop:
                    return
    except SourceError as error:
        yield Reject(error.reason, error.detail)


def _documents(
    files: Sequence[InputFile], reader: Reader, source: str, rejects: "_Spool", counts: list[FileCount]
) -> Iterator[tuple[int, Document]]:
    """The documents with their ids; rejects and counts are kept on the way."""
    for file in files:
        count = FileCount(file.number)
        counts.append(count)
        for record in _records(file, reader):
            doc_id = file.number << RECORD_BITS | count.records
            count.records += 1
            if isinstance(record, Document):
                count.documents += 1
                yield doc_id, record
            else:
                count.rejects += 1
                detail, url = (text and clean(text) for text in (record.detail, record.url))
                rejects.add(
                    (doc_id, source, record.reason, detail, url, record.offset, record.record_id, record.n_bytes)
                )


def _batches(
    rows: Iterator[tuple[int, Document]], source: Source, scores: "_Spool | None", adopted: tuple[Column, ...]
) -> Iterator[pa.RecordBatch]:
    """Batches of documents; their adopted columns go to `scores`."""
    held: list[tuple[int, Document]] = []
    size = 0
    has_any = any(column.name in source.adopted for column in adopted)
    for doc_id, document in rows:
        held.append((doc_id, document))
        size += len(document.text)
        if scores is not None:
            scores.add((doc_id, has_any, *(document.adopted.get(column.name) for column in adopted)))
        if len(held) == BATCH_ROWS or size >= BATCH_BYTES:
            yield _batch(held, source.name)
            held, size = [], 0
    if held:
        yield _batch(held, source.name)


def _batch(rows: list[tuple[int, Document]], source: str) -> pa.RecordBatch:
    documents = [document for _, document in rows]
    texts = [document.text for document in documents]
    hashes = pa.array([xxh3_128_digest(text) for text in texts], pa.binary(16))
    columns: dict[str, Any] = {
        "doc_id": [doc_id for doc_id, _ in rows],
        "source": [source] * len(rows),
        "text": pa.array(texts, pa.large_binary()).cast(pa.large_string()),
        "n_bytes": [len(text) for text in texts],
        "text_hash": pa.ExtensionArray.from_storage(pa.uuid(), hashes),
        "parent_doc_id": [None] * len(rows),
        "rights": [to_json(document.rights) for document in documents],
        "metadata": [to_json(document.metadata) for document in documents],
    }
    arrays = [
        columns[name]
        if isinstance(columns.get(name), pa.Array)
        else pa.array(
            columns.get(name) or [getattr(document, name) for document in documents], DOCUMENTS.field(name).type
        )
        for name in DOCUMENTS.names
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=DOCUMENTS)


def _until(batches: Iterator[pa.RecordBatch], size: int) -> Iterator[pa.RecordBatch]:
    """Batches up to `size` bytes of text."""
    while size > 0 and (batch := next(batches, None)) is not None:
        size -= sum(batch.column("n_bytes").to_pylist())
        yield batch


class _Spool:
    """Rows that wait on disk until their shard's turn."""

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self.rows = 0
        self._held: list[tuple[Any, ...]] = []
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._writer = pa.ipc.new_stream(self._file, schema)

    def add(self, row: tuple[Any, ...]) -> None:
        self.rows += 1
        self._held.append(row)
        if len(self._held) == NARROW_ROWS:
            self._flush()

    def _flush(self) -> None:
        columns = zip(*self._held, strict=True)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self.schema, strict=True)]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self.schema))
        self._held = []

    def drain(self) -> Iterator[pa.RecordBatch]:
        """The rows, in their order; the spool is empty afterwards."""
        if self._held:
            self._flush()
        self._writer.close()
        self._file.seek(0)
        yield from pa.ipc.open_stream(self._file)
        self._file.seek(0)
        self._file.truncate()
        self._writer = pa.ipc.new_stream(self._file, self.schema)
        self.rows = 0

    def __enter__(self) -> "_Spool":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
