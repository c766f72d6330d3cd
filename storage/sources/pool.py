"""Finished pools: records that are text already (JSONL, Parquet, Hugging Face data sets), by the recipe's mapping.

The text, the url, the id, the domain and the crawl time come from the fields that the source maps; columns that it
adopts become scores; every other field is kept as metadata. A path with dots reaches into nested fields, and into a
field that holds JSON as a string.
"""

import math
from collections.abc import Callable
from datetime import UTC, date, datetime
from typing import Any

import orjson

from storage.sources import AdoptedType, Source
from storage.sources.records import Document, Reject, clean, parse_date, registered_domain, to_json


class Mapping:
    """A source's fields, ready to turn records into documents."""

    def __init__(self, source: Source, limit: int) -> None:
        self._text = source.columns.get("text", "text")
        self._url = source.columns.get("url", "url")
        self._id = source.columns.get("id", "id")
        self._domain = source.columns.get("domain")
        self._crawled_at = source.columns.get("crawled_at")
        self._adopt = [(path, path.rpartition(".")[2], _TO[kind]) for path, kind in source.adopt.items()]
        self._limit = limit

    def record(self, fields: dict[str, Any], offset: int | None = None) -> Document | Reject:
        """The document of one record; `fields` is used up. `offset`: its byte in the file, if it can be sought."""
        names = list(fields)
        text = _take(fields, self._text)
        url, record_id = _string(_take(fields, self._url)), _string(_take(fields, self._id))
        if isinstance(text, bytes):
            try:
                text = text.decode()
            except UnicodeDecodeError as error:
                return Reject("bad_encoding", str(error)[:200], url, offset, record_id, len(text))
        if not isinstance(text, str):
            what = f"{self._text!r} is {_kind(text)}; the record has {', '.join(names)}"
            return Reject("no_text_field", clean(what)[:300], url, offset, record_id)
        data = clean(text).encode()
        if len(data) > self._limit:
            return Reject("oversize", f"{len(data)} bytes", url, offset, record_id, len(data))
        if not data.strip():
            return Reject("empty", None, url, offset, record_id, len(data))
        if self._domain is not None:
            domain = _string(_take(fields, self._domain))
        else:
            domain = registered_domain(url) if url else None
            if domain is None and isinstance(fields.get("domain"), str):
                domain = clean(fields.pop("domain"))
        crawled_at = _moment(_take(fields, self._crawled_at)) if self._crawled_at else None
        adopted = {}
        for path, name, convert in self._adopt:
            value = _take(fields, path)
            adopted[name] = convert(value)
            if adopted[name] is None and value is not None:
                fields[path] = value  # what no score can hold stays readable
        return Document(data, url, domain, crawled_at, offset, record_id, metadata=fields, adopted=adopted)


def _take(fields: Any, path: str) -> Any:
    """The value at `path`, removed from `fields`; None if there is none."""
    if path in fields:
        return fields.pop(path)
    head, dot, rest = path.partition(".")
    inner = fields.get(head) if dot else None
    if isinstance(inner, str) and inner.startswith("{"):
        try:
            inner = orjson.loads(inner)
        except orjson.JSONDecodeError:
            return None
        fields[head] = inner
    return _take(inner, rest) if isinstance(inner, dict) else None


def _string(value: Any) -> str | None:
    if value is None or value == "":
        return None
    return clean(
        value if isinstance(value, str) else value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    )


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


def _moment(value: Any) -> datetime | None:
    if isinstance(value, datetime):
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC)
    return parse_date(value) if isinstance(value, str) else None


def _double(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _bigint(value: Any) -> int | None:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    exact = isinstance(value, str) or number == value
    return number if exact and -(1 << 63) <= number < 1 << 63 else None


def _boolean(value: Any) -> bool | None:
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower())
    return bool(value) if value in (0, 1) else None


def _varchar(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, dict | list):
        return to_json({"": value})[4:-1]  # type: ignore[index]
    return clean(value) if isinstance(value, str) else str(value)


_TO: dict[AdoptedType, Callable[[Any], Any]] = {
    "double": _double,
    "bigint": _bigint,
    "boolean": _boolean,
    "varchar": _varchar,
}
