"""Laws of reading crawl files: every record is a document or a reject, and damage costs no more than it touches."""

import gzip
import io
import random
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from fastwarc.stream_io import BrotliReader, Lz4Writer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from warcio.archiveiterator import ArchiveIterator
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter
from xxhash import xxh3_128_hexdigest

from storage.sources.extract import html_extractor
from storage.sources.records import REASONS, Document, Reject
from storage.sources.streams import Input
from storage.sources.warc import read_warc

LIMIT = 1_000_000
SENTENCE = "The river carried the boats of the merchants past the old mill and down to the sea every spring. "


def page(words: str, head: str = "") -> bytes:
    body = f"<body><p>{words}: {SENTENCE * 4}</body>"
    return f"<html lang=en><head><title>{words}</title>{head}</head>{body}</html>".encode()


def record(kind: str, url: str, block: bytes, *fields: str) -> bytes:
    lines = ["WARC/1.0", f"WARC-Type: {kind}", f"WARC-Target-URI: {url}", "WARC-Date: 2024-05-18T05:48:54Z", *fields]
    lines.append(f"WARC-Record-ID: <urn:uuid:{xxh3_128_hexdigest(block + url.encode() + kind.encode())}>")
    lines.append(f"Content-Length: {len(block)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + block + b"\r\n\r\n"


def records_of(*pages: tuple[str, bytes, dict[str, str]], status: str = "200 OK") -> list[bytes]:
    """A crawl: a warcinfo record, then for each page (url, body, headers) a request and its response."""
    records = [record("warcinfo", "", b"software: test\r\n", "Content-Type: application/warc-fields")]
    for url, body, headers in pages:
        ask = b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n"
        records.append(record("request", url, ask, "Content-Type: application/http; msgtype=request"))
        fields = {"Content-Type": "text/html; charset=utf-8", **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        block = f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body
        records.append(record("response", url, block, "Content-Type: application/http; msgtype=response"))
    return records


def warc(*pages: tuple[str, bytes, dict[str, str]], status: str = "200 OK", gz: bool = False) -> bytes:
    records = records_of(*pages, status=status)
    return b"".join(map(gzip.compress, records) if gz else records)


def read(content: bytes, tmp_path: Path, limit: int = LIMIT) -> list[Document | Reject]:
    path = tmp_path / "crawl"
    path.write_bytes(content)
    with Input(str(path)) as file:
        return list(read_warc(file, limit, html_extractor("resiliparse"), "resiliparse x"))


def documents(records: list[Document | Reject]) -> list[Document]:
    return [record for record in records if isinstance(record, Document)]


def reasons(records: list[Document | Reject]) -> Counter[str]:
    return Counter(record.reason for record in records if isinstance(record, Reject))


THREE = [(f"https://www.site{n}.co.uk/a", page(f"Page {n}"), {}) for n in range(3)]


def lz4(crawl: bytes) -> bytes:
    out = io.BytesIO()
    writer = Lz4Writer(out)
    writer.write(crawl)
    writer.close()
    return out.getvalue()


def zstd_with_dictionary(records: list[bytes]) -> bytes:
    trained = zstandard.train_dictionary(4096, [SENTENCE.encode() * 3 + bytes([i]) * 40 for i in range(200)])
    raw = zstandard.compress(trained.as_bytes())
    compressor = zstandard.ZstdCompressor(dict_data=trained)
    return b"\x5d\x2a\x4d\x18" + len(raw).to_bytes(4, "little") + raw + b"".join(map(compressor.compress, records))


@pytest.mark.parametrize(
    "pack",
    [
        b"".join,
        lambda records: b"".join(map(gzip.compress, records)),
        lambda records: gzip.compress(b"".join(records)),
        lambda records: gzip.compress(b"".join(records)) + b"\0" * 512,
        lambda records: b"".join(map(zstandard.compress, records)),
        lambda records: zstandard.compress(b"".join(records)),
        zstd_with_dictionary,
        lambda records: lz4(b"".join(records)),
        lambda records: b"".join(records).replace(b"WARC/1.0\r\nWARC-Type", b"warc/0.18\r\nWARC-TYPE"),
    ],
    ids=[
        "plain",
        "gzip",
        "one gzip member",
        "zero padding",
        "zstd",
        "one zstd frame",
        "zstd dictionary",
        "lz4",
        "case",
    ],
)
def test_the_packing_of_a_crawl_does_not_change_its_records(pack, tmp_path):
    records = read(pack(records_of(*THREE)), tmp_path)
    assert [d.text for d in documents(records)] == [d.text for d in documents(read(warc(*THREE), tmp_path))]
    assert len(documents(records)) == 3
    assert reasons(records) == {"record_type": 4}


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("gz", [False, True])
def test_what_warcio_writes_is_read(gz, tmp_path):
    """Another author's idea of the format. (warcio leaves its temporary files to the garbage collector.)"""
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=gz)
    for url, body, _ in THREE:
        head = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.1")
        writer.write_record(writer.create_warc_record(url, "response", io.BytesIO(body), http_headers=head))
    assert [document.url for document in documents(read(out.getvalue(), tmp_path))] == [url for url, _, _ in THREE]


def test_a_document_carries_what_cannot_be_had_again(tmp_path):
    body = page(
        "Rights",
        '<meta name="Robots" content="noai"><meta name="tdm-policy" content="https://x/p">'
        '<link rel="license" href="https://creativecommons.org/licenses/by/4.0/">',
    )
    headers = {"X-Robots-Tag": "noindex", "TDM-Reservation": "1", "Content-Language": "en-GB"}
    (document,) = documents(read(warc(("https://news.example.co.uk/x?y", body, headers), gz=True), tmp_path))
    assert document.url == "https://news.example.co.uk/x?y"
    assert document.domain == "example.co.uk"
    assert str(document.crawled_at) == "2024-05-18 05:48:54+00:00"
    assert (document.record_id or "").startswith("<urn:uuid:")
    assert document.extractor == "resiliparse x"
    assert document.rights == {
        "robots": "noai",
        "tdm_policy": "https://x/p",
        "license": ["https://creativecommons.org/licenses/by/4.0/"],
        "x_robots_tag": "noindex",
        "tdm_reservation": "1",
    }
    kept = {key: document.metadata[key] for key in ("status", "title", "language", "content_language", "charset_from")}
    assert kept == {
        "status": 200, "title": "Rights", "language": "en", "content_language": "en-GB", "charset_from": "http"
    }  # fmt: skip


@pytest.mark.parametrize("gz", [False, True])
def test_the_offset_is_where_the_record_begins(gz, tmp_path):
    crawl = warc(*THREE, gz=gz)
    for known in read(crawl, tmp_path):
        found = next(iter(ArchiveIterator(io.BytesIO(crawl[known.offset :]))))
        assert found.rec_headers.get_header("WARC-Record-ID") == known.record_id


def test_a_record_inside_a_frame_has_no_offset(tmp_path):
    records = read(gzip.compress(warc(*THREE)), tmp_path)
    assert [record.offset for record in records] == [0] + [None] * 6


def test_what_is_no_page_says_why(tmp_path):
    html = {"Content-Type": "text/html"}
    crawl = warc(
        ("https://a.org/pdf", b"%PDF-1.4 ...", {"Content-Type": "application/pdf"}),
        ("https://a.org/lie", b"%PDF-1.4 ...", html),
        ("https://a.org/untyped", b"GIF89a", {"Content-Type": ""}),
        ("https://a.org/none", b"", html),
        ("https://a.org/blank", b"<html><body> <script>1</script></body></html>", html),
        ("https://a.org/large", b"<p>" + b"x" * LIMIT, html),
        ("https://a.org/nested", b"<div>" * 5000 + b"text", html),
        ("https://a.org/endless", b"<p " + b" ".join(b"a%d" % i for i in range(50_000)) + b">text", html),
        ("https://a.org/sniffed", page("Sniffed"), {"Content-Type": ""}),
    )
    records = read(crawl, tmp_path)
    assert len(documents(records)) == 1
    assert reasons(records) == {"record_type": 10, "not_html": 3, "empty": 2, "oversize": 1, "broken_html": 2}
    assert reasons(read(warc(THREE[0], status="404 Not Found"), tmp_path))["status"] == 1


def chunked(body: bytes) -> bytes:
    return b"".join(b"%x;ext=1\r\n%s\r\n" % (len(c), c) for c in (body[:100], body[100:])) + b"0\r\nTrailer: x\r\n\r\n"


@pytest.mark.parametrize(
    ("encode", "headers"),
    [
        (gzip.compress, {"Content-Encoding": "gzip"}),
        (lambda b: gzip.compress(b[:99]) + gzip.compress(b[99:]), {"Content-Encoding": "gzip"}),
        (lambda b: gzip.zlib.compress(b), {"Content-Encoding": "deflate"}),
        (lambda b: gzip.zlib.compress(b)[2:-4], {"Content-Encoding": "deflate"}),
        (zstandard.compress, {"Content-Encoding": "zstd"}),
        (chunked, {"Transfer-Encoding": "chunked"}),
        (lambda b: chunked(gzip.compress(b)), {"Transfer-Encoding": "chunked", "Content-Encoding": "gzip"}),
        (lambda b: b, {"Transfer-Encoding": "chunked", "Content-Encoding": "gzip, br"}),
        (lambda b: b, {"Content-Encoding": "utf-8"}),
    ],
    ids=["gzip", "members", "deflate", "raw deflate", "zstd", "chunked", "chunked gzip", "undone before", "nonsense"],
)
def test_content_and_transfer_codings_are_undone(encode, headers, tmp_path):
    body = page("Coded")
    plain = documents(read(warc(("https://a.org/", body, {})), tmp_path))[0].text
    coded = documents(read(warc(("https://a.org/", encode(body), headers)), tmp_path))
    assert [document.text for document in coded] == [plain]


def test_brotli_is_undone(tmp_path):
    # "<p>" and 16 x "x" as one stored metablock: RFC 7932, written by hand because no package here encodes it.
    raw = b"<p>" + b"word " * 40
    size = len(raw) - 1
    bits = 0 | (0 << 1) | (0 << 2) | (size << 4) | (1 << 20)  # WBITS=16, not last, 4 nibbles, uncompressed
    stored = bits.to_bytes(3, "little") + raw + b"\x03"
    assert BrotliReader(io.BytesIO(stored)).read(len(raw)) == raw
    crawl = warc(("https://a.org/", stored, {"Content-Encoding": "br"}))
    assert documents(read(crawl, tmp_path))[0].text.startswith(b"word word")


@pytest.mark.parametrize("bomb", [gzip.compress, zstandard.compress])
def test_a_bomb_is_rejected_without_being_held(bomb, tmp_path):
    coding = {"Content-Encoding": "gzip" if bomb is gzip.compress else "zstd"}
    crawl = warc(("https://a.org/bomb", bomb(b"<p>" + b"\0" * 50_000_000), coding), *THREE)
    records = read(crawl, tmp_path)
    assert reasons(records)["oversize"] == 1
    assert len(documents(records)) == 3


def test_a_cut_body_is_kept_only_where_the_crawler_says_so(tmp_path):
    body = gzip.compress(page("Cut") + random.Random(1).randbytes(4000).hex().encode())[:-1500]
    crawl = warc(("https://a.org/", body, {"Content-Encoding": "gzip"}))
    assert reasons(read(crawl, tmp_path))["truncated"] == 1
    said = crawl.replace(b"WARC-Type: response\r\n", b"WARC-Type: response\r\nWARC-Truncated: length\r\n")
    (document,) = documents(read(said, tmp_path))
    assert document.metadata["truncated"] == "length"


@pytest.mark.parametrize(
    ("body", "header", "letters"),
    [
        ("Größe".encode("latin-1"), "text/html; charset=ISO-8859-1", "Größe"),
        ("Größe".encode("latin-1"), "text/html; charset=utf-8", "Größe"),
        ("Größe".encode(), "text/html; charset=ISO-8859-1", "Größe"),
        (b"\xef\xbb\xbf" + "Größe".encode(), "text/html; charset=koi8-r", "Größe"),
        (b"\xff\xfe" + "Größe".encode("utf-16-le"), "text/html", "Größe"),
        (b'<meta charset="windows-1251">' + "размер".encode("cp1251"), "text/html", "размер"),
        ("大きさと色".encode("shift_jis"), "text/html; charset=Shift_JIS", "大きさと色"),
        ("Größe".encode(), "text/html; charset=bogus", "Größe"),
        ("Größe".encode(), "text/html; charset=hex", "Größe"),
        ("Größe\0 NUL &#0; &#xD800;".encode(), "text/html", "Größe"),
    ],
)
def test_letters_survive_true_false_and_missing_charsets(body, header, letters, tmp_path):
    utf16 = body.startswith(b"\xff\xfe")
    filler = SENTENCE.encode("utf-16-le" if utf16 else "ascii") * 3
    (document,) = documents(read(warc(("https://a.org/", body + filler, {"Content-Type": header})), tmp_path))
    assert letters in document.text.decode()
    assert b"\0" not in document.text


def test_wet_is_text_as_it_is(tmp_path):
    text = "  Erste Zeile\n\n<b>kein HTML</b> größer\n"
    fields = "Content-Type: text/plain", "WARC-Identified-Content-Language: deu"
    (document,) = documents(read(record("conversion", "https://www.example.de/", text.encode(), *fields), tmp_path))
    assert document.text == text.encode()
    assert document.extractor is None
    assert document.metadata["identified_language"] == "deu"


def arc(gz: bool = False) -> bytes:
    version = b"1 0 Test\nURL IP-address Archive-date Content-type Archive-length\n"
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + page("Old")
    parts = [b"filedesc://x.arc 0.0.0.0 20080430204825 text/plain %d\n%s\n" % (len(version), version)]
    urls = ("http://www.old.org/a b", "http://www.old.org/c")
    parts += [b"%s 1.2.3.4 20080430204826 text/html %d\n%s\n" % (url.encode(), len(http), http) for url in urls]
    parts += [b"dns:www.old.org 1.2.3.4 20080430204826 text/dns 4\nabcd\n"]
    return b"".join(map(gzip.compress, parts) if gz else parts)


@pytest.mark.parametrize("gz", [False, True])
def test_arc_is_read(gz, tmp_path):
    records = read(arc(gz), tmp_path)
    assert [document.url for document in documents(records)] == ["http://www.old.org/a b", "http://www.old.org/c"]
    assert {str(document.crawled_at) for document in documents(records)} == {"2008-04-30 20:48:26+00:00"}
    assert reasons(records) == {"record_type": 1, "not_html": 1}


def test_bare_line_feeds_are_read(tmp_path):
    head = "WARC/1.0\nWARC-Type: response\nWARC-Target-URI: <http://a.org/>\nContent-Type: application/http\n"
    block = "HTTP/1.1 200 OK\nContent-Type:\n text/html\n\n" + page("Feeds").decode()
    crawl = f"{head}Content-Length: {len(block)}\n\n{block}\n\n" * 3
    assert [document.url for document in documents(read(crawl.encode(), tmp_path))] == ["http://a.org/"] * 3


@pytest.mark.parametrize("wrong", [-40, -1, 1, 40, None])
def test_a_wrong_length_costs_its_own_record(wrong, tmp_path):
    parts = records_of(*THREE)
    at = parts[4].index(b"Content-Length: ") + 16
    end = parts[4].index(b"\r\n", at)
    length = b"none" if wrong is None else b"%d" % (int(parts[4][at:end]) + wrong)
    parts[4] = parts[4][:at] + length + parts[4][end:]
    urls = [document.url for document in documents(read(b"".join(parts), tmp_path))]
    assert THREE[0][0] in urls
    assert THREE[2][0] in urls  # a longer one swallows the header of the request between


def test_too_long_a_length_stops_at_the_next_frame(tmp_path):
    parts = records_of(*THREE)
    at = parts[4].index(b"Content-Length: ") + 16
    parts[4] = parts[4][:at] + b"9" + parts[4][at:]
    records = read(b"".join(map(gzip.compress, parts)), tmp_path)
    assert len(documents(records)) == 2
    assert reasons(records) == {"record_type": 4, "broken_record": 1}


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor(write_checksum=True).compress])
def test_a_flipped_byte_costs_one_record(pack, tmp_path):
    parts = list(map(pack, records_of(*THREE)))
    middle = bytearray(parts[4])
    middle[len(middle) // 2] ^= 255
    records = read(b"".join([*parts[:4], bytes(middle), *parts[5:]]), tmp_path)
    assert [document.url for document in documents(records)] == [THREE[0][0], THREE[2][0]]
    assert reasons(records) == {"record_type": 4, "broken_compression": 1}


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"PK\x03\x04" + bytes(range(256)) * 9, b"\x1f\x8b", b"plain\ntext\n"]
)
def test_another_format_is_one_reject(content, tmp_path):
    (record,) = read(content, tmp_path)
    assert isinstance(record, Reject)
    assert record.reason in ("bad_format", "truncated")


CRAWLS = {"plain": warc(*THREE), "gzip": warc(*THREE, gz=True), "arc": arc(True)}


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(CRAWLS)), data=st.data())
def test_the_books_balance_over_any_damage(name, data, tmp_path):
    """Whatever bytes are changed, cut or lost: no exception, known reasons, and all that stood before is unharmed."""
    crawl = bytearray(CRAWLS[name])
    whole = read(bytes(crawl), tmp_path)
    at = data.draw(st.integers(0, len(crawl) - 1))
    if data.draw(st.booleans()):
        del crawl[at : at + data.draw(st.integers(1, len(crawl)))]
    else:
        noise = data.draw(st.binary(min_size=1, max_size=64))
        crawl[at : at + data.draw(st.sampled_from([0, len(noise)]))] = noise
    records = read(bytes(crawl), tmp_path)
    assert set(reasons(records)) <= set(REASONS)
    assert len(documents(records)) + reasons(records).total() == len(records)
    begins = [record.offset for record in whole[1:]] + [len(CRAWLS[name])]
    sound = sum(end is not None and end <= at for end in begins)
    assert records[:sound] == whole[:sound]


@pytest.mark.parametrize("cut", range(20, 2000, 97))
def test_a_file_that_breaks_off_keeps_its_good_records_and_rejects_the_rest_once(cut, tmp_path):
    crawl = warc(*THREE, gz=True)
    whole = read(crawl, tmp_path)
    records = read(crawl[:-cut], tmp_path)
    assert records[:-1] == whole[: len(records) - 1]
    last = records[-1]
    assert (isinstance(last, Reject) and last.reason == "truncated") or last == whole[len(records) - 1]
