"""What a source yields for each record of a file, in the file's order: a document, or a reject with its reason.

Every record is one of the two, so the books balance by construction: records read = documents + rejects. A stretch of
a file that cannot be read is one record, rejected.
"""

import base64
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import orjson

REASONS = {
    "record_type": "not a page: a WARC record of another type (request, warcinfo, metadata, revisit, continuation)",
    "status": "an HTTP response other than 2xx; the detail is the status",
    "not_html": "a page of another type (PDF, image, script, plain text); the detail is the type",
    "broken_html": "HTML that cannot be parsed in reasonable time: nested too deep, or a tag without end",
    "empty": "no text, or none that the extractor takes for the main content",
    "oversize": "larger than the recipe's max_record_bytes, as stored or as decoded",
    "truncated": "the file ends, or its content breaks off, inside the record",
    "broken_record": "bytes that begin no record, or a record whose header contradicts itself",
    "broken_http": "the record's HTTP message, or its chunked or compressed body, cannot be decoded",
    "broken_compression": "a stretch of the file that its own compression (gzip, zstd, LZ4) refuses",
    "bad_encoding": "text that is not UTF-8 where it must be",
    "not_json": "a line that is not a JSON object",
    "no_text_field": "the mapped text field is missing or no string",
    "bad_format": "the file is not of the source's format",
    "unreadable": "the file cannot be opened or read",
}


@dataclass(slots=True)
class Document:
    """A record with text. `text` is UTF-8 without NUL; `adopted` holds scores that came along, by column."""

    text: bytes
    url: str | None = None
    domain: str | None = None
    crawled_at: datetime | None = None
    offset: int | None = None  # byte in the (compressed) file; None where the record cannot be sought
    record_id: str | None = None
    extractor: str | None = None  # name and version; None where the source was text
    rights: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    adopted: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Reject:
    """A record without a document; `reason` is a key of REASONS."""

    reason: str
    detail: str | None = None
    url: str | None = None
    offset: int | None = None
    record_id: str | None = None
    n_bytes: int | None = None


def clean(text: str) -> str:
    """Text that Parquet, SQL and tokenizers can all hold.

    NUL says nothing in text and ends C strings, so it is dropped. Surrogates are joined where they pair, and become
    U+FFFD where they stand alone. Nothing else is touched: what a pool's text looks like is the pool's affair.
    """
    if "\0" in text:
        text = text.replace("\0", "")
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def to_json(value: dict[str, Any]) -> str | None:
    """JSON for a column of the lake; None for an empty one. NaN and infinity become null, bytes text or base64."""
    if not value:
        return None
    try:
        return orjson.dumps(value, default=_plain, option=_JSON).decode()
    except TypeError:  # an integer beyond 64 bits, a lone surrogate, or nested too deep
        return orjson.dumps(_sound(value, 0), default=_plain, option=_JSON).decode()


_JSON = orjson.OPT_NON_STR_KEYS | orjson.OPT_UTC_Z
_DEPTH = 100  # orjson writes 254 levels, DuckDB reads fewer than it writes


def _plain(value: Any) -> Any:
    """What orjson does not know: bytes, decimals, spans of time."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return str(value)


def _sound(value: Any, depth: int) -> Any:
    if depth > _DEPTH:
        return f"(nested deeper than {_DEPTH})"
    if isinstance(value, dict):
        return {clean(str(key)): _sound(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_sound(inner, depth + 1) for inner in value]
    if isinstance(value, str):
        return clean(value)
    return str(value) if isinstance(value, int) and abs(value) >= 1 << 63 else value


def parse_date(text: str) -> datetime | None:
    """An ISO 8601 date and time, UTC unless it says otherwise; None if it is none."""
    try:
        moment = datetime.fromisoformat(text.strip())
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None


def registered_domain(url: str) -> str | None:
    """`bbc.co.uk` for https://www.bbc.co.uk/news; the host itself for an IP address or a name without public suffix.

    By the public-suffix list that tldextract ships (ICANN part): no network, nothing written.
    """
    try:
        host = urlsplit(url.strip()).hostname
    except ValueError:  # brackets that enclose no IPv6 address
        return None
    return _domain_of_host(host.rstrip(".")) if host else None


@lru_cache(maxsize=1 << 16)
def _domain_of_host(host: str) -> str | None:
    return _suffixes().extract_str(host).top_domain_under_public_suffix.lower() or host or None


@lru_cache(maxsize=1)
def _suffixes() -> Any:
    from tldextract import TLDExtract

    return TLDExtract(suffix_list_urls=(), cache_dir=None)
