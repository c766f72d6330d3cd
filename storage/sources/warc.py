"""Crawl files: WARC (ISO 28500), its older brother ARC, and WET (a WARC of conversion records, text as it is).

    WARC/1.0 \\r\\n   Name: value \\r\\n ...   \\r\\n   <Content-Length bytes>   \\r\\n \\r\\n         a WARC record
    url ip date type ... length \\n           <length bytes>                  \\n               an ARC record

The framing is read here and not by fastwarc or warcio because the books must balance: on real files fastwarc takes a
WARC with bare line feeds for one empty record, or (in its quirks mode) skips what it cannot read without a word, and
both end at the first broken compressed frame. Here every byte belongs to a record or to a stretch that is one reject,
and reading goes on at the next line, or the next frame, that begins a record.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn

from storage.errors import SourceError
from storage.sources.extract import Page
from storage.sources.http import Response, decode_body, decode_text, parse_fields, parse_response
from storage.sources.records import Document, Reject, clean, parse_date, registered_domain
from storage.sources.streams import Cursor, Input

_WARC = re.compile(rb"WARC/\d+\.\d+\s*$", re.IGNORECASE)
_ARC = re.compile(
    rb"(?P<url>[a-z][a-z0-9+.-]*:\S?.*) (?P<ip>\S+) (?P<date>\d{12,17}) (?P<type>\S+)(?: .*)? (?P<length>\d+)\s*$"
)
_OPENING = re.compile(rb"WARC/\d|filedesc://|[a-z]{3,5}://?\S+ \d[\d.]+ \d{12,17} ")
_LINE, _HEAD = 1 << 16, 1 << 20  # bytes of a line and of a record's header at most
_HTML = {"text/html", "application/xhtml+xml", "application/vnd.wap.xhtml+xml"}
_UNTYPED = {"", "unknown", "unknown/unknown", "application/unknown", "*/*", "application/octet-stream", "no-type"}
_MARKUP = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html|head|body|meta|title)\b", re.IGNORECASE)
_RIGHTS = {"x-robots-tag": "x_robots_tag", "tdm-reservation": "tdm_reservation", "tdm-policy": "tdm_policy"}


@dataclass(frozen=True)
class _Head:
    """A record's header: WARC fields by lower-case name (an ARC's put into them), and where the record begins."""

    fields: dict[str, str]
    offset: int | None
    length: int
    arc: bool = False

    @property
    def kind(self) -> str:
        return self.fields.get("warc-type", "").lower()

    @property
    def url(self) -> str | None:
        return self.fields.get("warc-target-uri", "").strip("<> ") or None

    @property
    def record_id(self) -> str | None:
        return self.fields.get("warc-record-id") or None

    def reject(self, reason: str, detail: str | None = None) -> Reject:
        return Reject(reason, detail, self.url, self.offset, self.record_id, self.length)


def read_warc(file: Input, limit: int, extract: Callable[[str], Page], extractor: str) -> Iterator[Document | Reject]:
    """Every record of a WARC, ARC or WET file, compressed or not, in its order.

    Args:
        limit: bytes of a record's payload, as stored and as decoded.
        extract: from HTML to the page (storage.sources.extract).
        extractor: its name and version, kept with each document.
    """
    framing = _Framing(file)
    while True:
        head = None
        try:
            head = framing.head()
            if head is None:
                return
            unwanted = _unwanted(head, limit)
            block = framing.block(head, keep=unwanted is None)
            yield unwanted or _document(head, block, limit, extract, extractor)
        except SourceError as error:
            yield head.reject(error.reason, error.detail) if head else framing.lost(error)


class _Framing:
    """Where records begin and end."""

    def __init__(self, file: Input) -> None:
        self._cursor = Cursor(file, _OPENING)
        self._line = b""  # a line that was read on the way and begins the next record
        self._offset: int | None = None  # of that line, or of the last one read
        self._began: int | None = None  # where the record, or the stretch, that is being read began
        self._fresh = True  # nothing of the file has been read

    def lost(self, error: SourceError) -> Reject:
        """The reject for a stretch that has no header."""
        return Reject(error.reason, error.detail, offset=self._began)

    def head(self) -> _Head | None:
        """The header of the next record; None at the end. SourceError for a stretch that begins no record."""
        line, self._line = self._line, b""
        fresh, self._fresh = self._fresh, False
        self._began = None
        while not line.strip():
            self._offset = self._cursor.offset
            line = self._cursor.line(_LINE)
            if not line:
                if fresh:
                    raise SourceError("bad_format", "an empty file")
                return None
        self._began = self._offset
        if _WARC.match(line):
            return self._warc_head()
        if found := _ARC.match(line):
            text = {name: value.decode("utf-8", "replace") for name, value in found.groupdict().items()}
            kind = "warcinfo" if text["url"].startswith("filedesc:") else "response"
            fields = {"warc-type": kind, "warc-target-uri": text["url"], "warc-date": text["date"]}
            fields |= {"warc-ip-address": text["ip"], "content-type": text["type"]}
            return _Head(fields, self._began, int(text["length"]), arc=True)
        if fresh:
            self._resync(line, "bad_format", f"neither WARC nor ARC: the file begins with {line[:40]!r}")
        self._resync(line, "broken_record", f"these bytes begin no record: {line[:40]!r}")

    def _warc_head(self) -> _Head:
        lines: list[bytes] = []
        size = 0
        while (line := self._cursor.line(_LINE)).strip():
            if _WARC.match(line):
                self._line, self._offset = line, None
                raise SourceError("broken_record", "a header without its end: another record begins in it")
            lines.append(line)
            size += len(line)
            if size > _HEAD:
                self._resync(b"", "broken_record", f"a header of more than {_HEAD} bytes")
        if not line:
            raise SourceError("truncated", "the file ends inside a record's header")
        fields = parse_fields(lines)
        stated = {length.strip() for length in fields.get("content-length", "").split(",")}
        length = stated.pop() if len(stated) == 1 else ""
        if not re.fullmatch(r"[0-9]{1,18}", length):
            self._resync(b"", "broken_record", f"Content-Length: {fields.get('content-length', '(missing)')}")
        return _Head(fields, self._began, int(length))

    def _resync(self, line: bytes, reason: str, detail: str) -> NoReturn:
        """Skip to the next line that begins a record, and report the stretch as one."""
        lost = len(line)
        while True:
            offset = self._cursor.offset
            line = self._cursor.line(_LINE)
            if not line or _WARC.match(line) or _ARC.match(line):
                break
            lost += len(line)
        self._line, self._offset = line, offset
        raise SourceError(reason, f"{detail} ({lost} bytes)")

    def block(self, head: _Head, *, keep: bool) -> bytes:
        """The record's content; without `keep` it is passed over."""
        parts: list[bytes] = []
        size = 0
        for piece in self._cursor.pieces(head.length):
            size += len(piece)
            if keep:
                parts.append(piece)
        if size < head.length:
            cut = f"{size} of {head.length} bytes"
            if self._cursor.opens:
                raise SourceError("broken_record", f"Content-Length is wrong: the next record begins after {cut}")
            raise SourceError("truncated", f"the file ends after {cut}")
        return b"".join(parts)


def _unwanted(head: _Head, limit: int) -> Reject | None:
    """Why a record can be no document, as far as its header tells."""
    if head.kind not in ("response", "resource", "conversion"):
        return head.reject("record_type", head.kind or None)
    if head.length > limit + _LINE:
        return head.reject("oversize", f"{head.length} bytes as stored")
    return None


def _document(
    head: _Head, block: bytes, limit: int, extract: Callable[[str], Page], extractor: str
) -> Document | Reject:
    """The document in a response, resource or conversion record, or why there is none."""
    cut = "warc-truncated" in head.fields
    stated = Response(None, {"content-type": head.fields.get("content-type", "")}, block)
    # dns and whois records have no HTTP head, nor has an ARC's page of a server older than HTTP/1.0.
    web = not head.arc and (head.url or "").lower().startswith(("http:", "https:"))
    promised = web and stated.content_type in ("", "application/http")
    http = head.kind == "response" and (promised or block.startswith(b"HTTP/"))
    response = parse_response(block) if http else stated
    if response.status is not None and not 200 <= response.status < 300:
        return head.reject("status", str(response.status))
    plain = head.kind == "conversion" and response.content_type == "text/plain"
    if not plain and response.content_type not in _HTML | _UNTYPED:
        return head.reject("not_html", response.content_type)
    body = decode_body(response, limit, cut=cut)
    if not body.strip():
        return head.reject("empty", "no body")
    if not plain and (body.startswith(_BINARY) or (response.content_type in _UNTYPED and not _MARKUP.match(body))):
        return head.reject("not_html", response.content_type or None)
    text, charset, found = decode_text(body, "utf-8" if plain else response.charset)
    page = Page(text) if plain else extract(text)
    main = clean(page.text)
    if not main.strip():
        return head.reject("empty", "no main content")
    metadata: dict[str, Any] = {
        "status": response.status,
        "content_type": response.content_type,
        "charset": charset,
        "charset_from": found,
        "title": page.title,
        "language": page.language,
        "content_language": response.headers.get("content-language"),
        "identified_language": head.fields.get("warc-identified-content-language"),
        "last_modified": response.headers.get("last-modified"),
        "truncated": head.fields.get("warc-truncated"),
        "payload_digest": head.fields.get("warc-payload-digest"),
        "refers_to": head.fields.get("warc-refers-to"),
    }
    rights = {name: response.headers[header] for header, name in _RIGHTS.items() if header in response.headers}
    return Document(
        text=main.encode(),
        url=head.url,
        domain=registered_domain(head.url) if head.url else None,
        crawled_at=_moment(head),
        offset=head.offset,
        record_id=head.record_id,
        extractor=None if plain else extractor,
        rights=page.rights | rights,
        metadata={name: value for name, value in metadata.items() if value is not None},
    )


_BINARY = (b"%PDF-", b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"PK\x03\x04", b"\x1f\x8b", b"RIFF", b"\x00\x00\x01\x00")


def _moment(head: _Head) -> datetime | None:
    date = head.fields.get("warc-date", "")
    if head.arc:
        try:
            return datetime.strptime(date[:14].ljust(14, "0"), "%Y%m%d%H%M%S").replace(tzinfo=UTC)
        except ValueError:
            return None
    return parse_date(date)
