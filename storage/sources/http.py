"""An HTTP response as a crawler stored it: head and body, the body decoded and then made text.

Crawlers disagree on what they keep: some store the body as it came over the wire, some decode it and leave the headers
that say otherwise. So a coding that the body does not show is taken for one that was undone, and one that it shows and
that breaks off is an error. Decoding stops at a limit: what a bomb would become is never held.
"""

import io
import re
from dataclasses import dataclass
from typing import Any

from storage.errors import SourceError

_STATUS = re.compile(rb"HTTP/\d(?:\.\d)?\s+(\d{3})")
_END = re.compile(rb"\r?\n\r?\n|\A\r?\n")
_CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([A-Za-z0-9_.:-]+)", re.IGNORECASE)
_META = re.compile(rb"<meta[^>]{0,512}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_.:-]+)", re.IGNORECASE)
_CHUNK = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\n]*)?\r?\n")
_BOMS = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}


@dataclass(frozen=True)
class Response:
    """Status (None where there is no HTTP head), header values by lower-case name, and the body as stored."""

    status: int | None
    headers: dict[str, str]
    body: bytes

    @property
    def content_type(self) -> str:
        """The media type in lower case, without parameters; empty if unknown."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def charset(self) -> str | None:
        """The charset that the header declares."""
        found = _CHARSET.search(self.headers.get("content-type", ""))
        return found[1] if found else None


def parse_response(block: bytes) -> Response:
    """The response in a record's block. SourceError("broken_http") where no status line begins it."""
    found = _STATUS.match(block)
    if not found:
        raise SourceError("broken_http", f"no status line: {block[:40]!r}")
    end = _END.search(block)
    head, body = (block[: end.start()], block[end.end() :]) if end else (block, b"")
    return Response(int(found[1]), parse_fields(head.split(b"\n")[1:]), body)


def parse_fields(lines: list[bytes]) -> dict[str, str]:
    """Header fields by lower-case name. Folded lines are joined, repeated fields too, with ", "."""
    fields: dict[str, str] = {}
    name = ""
    for raw in lines:
        line = _header_text(raw)
        if line[:1] in (" ", "\t"):
            if name:
                fields[name] = f"{fields[name]} {line.strip()}".strip()
            continue
        name, colon, value = line.partition(":")
        name = name.strip().lower() if colon else ""
        if name:
            fields[name] = f"{fields[name]}, {value.strip()}" if name in fields else value.strip()
    return fields


def _header_text(raw: bytes) -> str:
    raw = raw.rstrip(b"\r\n").replace(b"\0", b"")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def decode_body(response: Response, limit: int, *, cut: bool) -> bytes:
    """The body without its transfer and content codings.

    Args:
        limit: bytes; more is SourceError("oversize").
        cut: the crawler says that it stopped early, so that a body that breaks off is kept up to there. Otherwise it is
            SourceError("truncated").
    """
    body = response.body
    if "chunked" in response.headers.get("transfer-encoding", "").lower():
        body = _unchunk(body, cut)
    codings = [coding.strip().lower() for coding in response.headers.get("content-encoding", "").split(",")]
    for coding in reversed(codings[:4]):
        body = _decode(body, coding, limit, cut)
    if len(body) > limit:
        raise SourceError("oversize", f"{len(body)} bytes")
    return body


def _unchunk(body: bytes, cut: bool) -> bytes:
    """RFC 9112, section 7.1. A body that does not begin with a chunk was stored without its chunks."""
    if not _CHUNK.match(body):
        return body
    chunks: list[bytes] = []
    at = 0
    while True:
        size = _CHUNK.match(body, at)
        if not size:
            if cut or at >= len(body):
                break
            raise SourceError("broken_http", f"no chunk begins at byte {at} of the body")
        length = int(size[1], 16)
        if length == 0:
            return b"".join(chunks)
        chunks.append(body[size.end() : size.end() + length])
        at = size.end() + length
        if at <= len(body):
            at += 2 if body.startswith(b"\r\n", at) else body.startswith(b"\n", at)
    if not cut:
        raise SourceError("truncated", "the last chunk is missing")
    return b"".join(chunks)


def _decode(body: bytes, coding: str, limit: int, cut: bool) -> bytes:
    if coding in ("gzip", "x-gzip") and body.startswith(b"\x1f\x8b"):
        return _inflate(body, 31, limit, cut)
    if coding == "deflate" and body:
        wrapped = (body[0] & 15) == 8 and int.from_bytes(body[:2], "big") % 31 == 0
        return body if body.lstrip().startswith(b"<") else _inflate(body, 15 if wrapped else -15, limit, cut)
    if coding == "zstd" and body.startswith(b"\x28\xb5\x2f\xfd"):
        import zstandard

        return _read(zstandard.ZstdDecompressor().stream_reader(body), limit, cut, zstandard.ZstdError)
    if coding == "br" and body and not body.lstrip().startswith(b"<"):
        from fastwarc.stream_io import BrotliReader

        return _read(BrotliReader(io.BytesIO(body)), limit, cut, OSError)
    return body


def _inflate(body: bytes, window: int, limit: int, cut: bool) -> bytes:
    from isal import igzip_lib, isal_zlib

    refused: type[Exception] = igzip_lib.IsalError  # type: ignore[assignment]
    parts: list[bytes] = []
    room = limit + 1
    while body and room and (not parts or body.startswith(b"\x1f\x8b")):  # a gzip body may have several members
        decoder = isal_zlib.decompressobj(wbits=window)
        try:
            parts.append(decoder.decompress(body, room))
        except refused as error:
            raise SourceError("broken_http", f"content coding: {error}") from error
        room -= len(parts[-1])
        if room and not (decoder.eof or cut):
            raise SourceError("truncated", "the compressed body breaks off")
        body = decoder.unused_data
    if not room:
        raise SourceError("oversize", f"more than {limit} bytes when decoded")
    return b"".join(parts)


def _read(reader: Any, limit: int, cut: bool, error_type: type[Exception]) -> bytes:
    parts: list[bytes] = []
    room = limit + 1
    try:
        while room and (piece := reader.read(min(1 << 16, room))):
            parts.append(piece)
            room -= len(piece)
    except error_type as error:
        if not (cut and parts):
            raise SourceError("broken_http", f"content coding: {error}") from error
    if not room:
        raise SourceError("oversize", f"more than {limit} bytes when decoded")
    return b"".join(parts)


def decode_text(data: bytes, declared: str | None = None) -> tuple[str, str, str]:
    """Text of a page's bytes, the encoding it was read with, and how that was found: bom, http, meta, content.

    The byte order mark goes first, then the header, then the page's own meta element: unless the bytes contradict them.
    They do where a single-byte encoding is declared and the bytes are valid UTF-8 with letters beyond ASCII (no other
    text looks like it by chance), and where more than one character in a thousand cannot be decoded. Then, and where
    nothing is declared, the bytes decide (uchardet). Never an error: what is left undecodable becomes U+FFFD.
    """
    from resiliparse.parse.encoding import detect_encoding

    for bom, encoding in _BOMS.items():
        if data.startswith(bom):
            return data[len(bom) :].decode(encoding, "replace"), encoding, "bom"
    claims = [("http", _known(declared)), ("meta", _declared_in_page(data))]
    for found, claimed in claims:
        if claimed is None:
            continue
        if claimed not in _MULTI_BYTE and not data.isascii():
            try:
                return data.decode(), "utf-8", "content"
            except UnicodeDecodeError:
                pass
        text = data.decode(claimed, "replace")
        if text.count("\ufffd") * 1000 <= len(text):
            return text, claimed, found
    try:
        return data.decode(), "utf-8", "content"
    except UnicodeDecodeError:
        guess = str(detect_encoding(data))
        return data.decode(guess, "replace"), guess, "content"


_MULTI_BYTE = {
    *("utf-8", "utf-16-le", "utf-16-be", "gbk", "gb18030", "big5"),
    *("shift_jis", "euc_jp", "iso2022_jp", "euc_kr"),
}  # whose short texts can be valid UTF-8 by chance


def _known(label: str | None) -> str | None:
    """Python's name of a charset label that the web knows (WHATWG), in Python's normal form."""
    import codecs

    from resiliparse.parse.encoding import map_encoding_to_html5

    name = map_encoding_to_html5(label, fallback_utf8=False) if label else None
    return codecs.lookup(name).name if name else None


def _declared_in_page(data: bytes) -> str | None:
    """The charset in the page's first 4 KB. One that could be read as ASCII is not UTF-16, whatever it says."""
    found = _META.search(data[:4096])
    encoding = _known(found[1].decode("ascii")) if found else None
    return "utf-8" if encoding and encoding.startswith("utf-16") else encoding
