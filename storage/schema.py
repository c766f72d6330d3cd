"""The columns of what is on disk: documents, rejects, and what a score column says of itself.

doc_id = file_number << 32 | record_number      (both from 0; BIGINT, never negative)
"""

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

RECORD_BITS = 32
MAX_RECORDS = 1 << RECORD_BITS

DOCUMENTS = pa.schema(
    [
        pa.field("doc_id", pa.int64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # the recipe's name for the corpus
        pa.field("domain", pa.string()),  # registered domain of the url, or the mapped field
        pa.field("url", pa.string()),
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("n_bytes", pa.int64(), nullable=False),  # of the text in UTF-8
        pa.field("text_hash", pa.uuid(), nullable=False),  # identity of content: xxh3-128 of the text in UTF-8
        pa.field("crawled_at", pa.timestamp("us", tz="UTC")),
        pa.field("parent_doc_id", pa.int64()),  # the document that this one was derived from
        pa.field("offset", pa.int64()),  # byte where the record begins in its (compressed) file
        pa.field("record_id", pa.string()),  # WARC-Record-ID, or the record's own id
        pa.field("extractor", pa.string()),  # name and version; NULL where the source was text
        pa.field("rights", pa.string()),  # JSON: x_robots_tag, tdm_reservation, robots, license
        pa.field("metadata", pa.string()),  # JSON: every other field of the record
    ]
)

REJECTS = pa.schema(
    [
        pa.field("doc_id", pa.int64(), nullable=False),  # the id that the document would have had
        pa.field("source", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),  # a word of storage.sources.REASONS
        pa.field("detail", pa.string()),
        pa.field("url", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("record_id", pa.string()),
        pa.field("n_bytes", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Column:
    """A score column: its name, Arrow type, unit, and which end is good (None: it has no direction)."""

    name: str
    type: pa.DataType
    description: str
    unit: str = ""
    higher_is_better: bool | None = None

    @property
    def comment(self) -> str:
        """What the lake keeps as the column's comment."""
        good = {True: "higher is better", False: "lower is better", None: ""}[self.higher_is_better]
        return "; ".join(part for part in (self.description, self.unit, good) if part)


Kind = Literal["map", "columns", "reduce"]


def score_schema(columns: tuple[Column, ...], *, sparse: bool = False) -> pa.Schema:
    """The schema of a score table: doc_id, then (unless sparse) computed, then the scorer's columns.

    computed is false where the entry's `where` left the document out or it was not reached; true beside NULL
    columns says that the score cannot be computed.
    """
    head = [pa.field("doc_id", pa.int64(), nullable=False)]
    if not sparse:
        head.append(pa.field("computed", pa.bool_(), nullable=False))
    return pa.schema(head + [pa.field(column.name, column.type) for column in columns])
