"""Laws of finished pools: mapped fields, adopted columns, metadata; bad lines and row groups cost only themselves."""

import datetime
import decimal
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.sources import REASONS, Source
from storage.sources.huggingface import read_huggingface
from storage.sources.jsonl import read_jsonl
from storage.sources.parquet import read_parquet
from storage.sources.pool import Mapping
from storage.sources.records import Document, Reject, to_json
from storage.sources.streams import Input

LIMIT = 10_000


def mapping(**settings: Any) -> Mapping:
    return Mapping(Source(name="pool", format="jsonl", path="x", **settings), LIMIT)


def jsonl(content: bytes | str, tmp_path: Path, **settings: Any) -> list[Document | Reject]:
    path = tmp_path / "pool"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with Input(str(path)) as file:
        return list(read_jsonl(file, mapping(**settings), LIMIT))


def parquet(table: pa.Table, tmp_path: Path, reader: Any = read_parquet, **settings: Any) -> list[Document | Reject]:
    pq.write_table(table, tmp_path / "pool.parquet", row_group_size=10)
    with Input(str(tmp_path / "pool.parquet")) as file:
        return list(reader(file, mapping(**settings)))


def reasons(records: list[Document | Reject]) -> Counter[str]:
    return Counter(record.reason for record in records if isinstance(record, Reject))


def texts(records: list[Document | Reject]) -> list[str]:
    return [record.text.decode() for record in records if isinstance(record, Document)]


def test_fields_are_mapped_and_the_rest_is_kept(tmp_path):
    line = {
        "content": "Hello",
        "meta": {"source": {"link": "https://blog.example.com/1"}, "lang": "en"},
        "raw": '{"key": "k7", "more": 1}',
        "date": "2013-05-18T05:48:54Z",
        "tags": [1, None, "x"],
    }
    columns = {"text": "content", "url": "meta.source.link", "id": "raw.key", "crawled_at": "date"}
    (document,) = jsonl(json.dumps(line), tmp_path, columns=columns)
    assert isinstance(document, Document)
    assert (document.text, document.url, document.record_id) == (b"Hello", "https://blog.example.com/1", "k7")
    assert document.domain == "example.com"
    assert str(document.crawled_at) == "2013-05-18 05:48:54+00:00"
    assert document.metadata == {"meta": {"source": {}, "lang": "en"}, "raw": {"more": 1}, "tags": [1, None, "x"]}
    assert document.extractor is None


@pytest.mark.parametrize(
    ("line", "columns", "domain"),
    [
        ({"url": "http://www.bbc.co.uk/a", "domain": "news"}, {}, "bbc.co.uk"),
        ({"url": "http://www.bbc.co.uk/a", "topic": "news"}, {"domain": "topic"}, "news"),
        ({"domain": "novels"}, {}, "novels"),
        ({"url": "http://127.0.0.1:80/"}, {}, "127.0.0.1"),
        ({"url": "https://LOCALHOST/"}, {}, "localhost"),
        ({"url": "https://A.B.Example.COM./"}, {}, "example.com"),
        ({"url": "http://[broken"}, {}, None),
        ({"url": "no url"}, {}, None),
        ({}, {}, None),
    ],
)
def test_the_domain_is_registered_mapped_or_the_pools_own(line, columns, domain, tmp_path):
    (document,) = jsonl(json.dumps({"text": "x", **line}), tmp_path, columns=columns)
    assert isinstance(document, Document)
    assert document.domain == domain


def test_bad_lines_cost_only_themselves(tmp_path):
    lines = [
        b'{"text": "first"}',
        b"not json",
        b'{"text": "\xff\xfe"}',
        b"[1, 2]",
        b'{"body": "no text"}',
        b'{"text": 7}',
        b'{"text": " \\n\\u0000"}',
        b'{"text": "' + b"x" * (LIMIT + 1) + b'"}',
        b'{"text": "' + b"y" * (3 * LIMIT) + b'"}',
        b"[" * 100_000,
        b"",
        b"   ",
        b'{"text": "last"}',
    ]
    records = jsonl(b"\n".join(lines), tmp_path)
    assert texts(records) == ["first", "last"]
    assert reasons(records) == {
        "not_json": 2, "bad_encoding": 1, "no_text_field": 2, "empty": 1, "oversize": 3
    }  # fmt: skip
    assert [record.offset for record in records][:3] == [0, 18, 27]


def test_what_json_does_not_allow_but_pools_contain(tmp_path):
    lines = (
        '\ufeff{"text": "mark"}\r\n'
        '{"text": "nan", "score": NaN, "far": -Infinity}\n'
        '{"text": "lone \\ud800 pair \\ud83d\\ude00 nul \\u0000.", "k\\udfff": "v\\ud800"}\n'
        '{"text": "big", "n": 123456789012345678901234567890}'
    )
    records = jsonl(lines, tmp_path)
    assert texts(records) == ["mark", "nan", "lone \ufffd pair 😀 nul .", "big"]
    kept = [to_json(record.metadata) for record in records if isinstance(record, Document)]
    assert kept[1] == '{"score":null,"far":null}'
    assert kept[2] == '{"k\ufffd":"v\ufffd"}'
    assert all(text is None or json.loads(text) for text in kept)


@pytest.mark.parametrize(
    "pack", [gzip.compress, zstandard.compress, lambda b: gzip.compress(b[:9]) + gzip.compress(b[9:])]
)
def test_compressed_lines_are_the_same_lines(pack, tmp_path):
    lines = "".join(json.dumps({"text": f"line {n}", "id": n}) + "\n" for n in range(5000)).encode()
    plain, packed = jsonl(lines, tmp_path), jsonl(pack(lines), tmp_path)
    assert texts(plain) == texts(packed)
    assert len(plain) == 5000
    assert {record.offset for record in packed[1:]} == {None}


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_pool_that_breaks_off_keeps_its_good_lines(pack, tmp_path):
    lines = [json.dumps({"text": f"{n} {hash((n, 'x'))}", "id": n}) for n in range(20_000)]
    packed = pack("\n".join(lines).encode())
    records = jsonl(packed[: len(packed) // 2], tmp_path)
    good = texts(records)
    assert good == [json.loads(line)["text"] for line in lines[: len(good)]]
    assert len(good) > 1000
    assert reasons(records) == {"truncated": 1}


def test_another_format_is_one_reject(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "x.parquet")
    for content in ((tmp_path / "x.parquet").read_bytes(), '{"text": "a"}\n'.encode("utf-16")):
        assert reasons(jsonl(content, tmp_path)) == {"bad_format": 1}
    (tmp_path / "x").write_text('{"text": "a"}\n')
    with Input(str(tmp_path / "x")) as file:
        assert reasons(list(read_parquet(file, mapping()))) == {"bad_format": 1}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), packed=st.booleans())
def test_the_books_balance_over_any_damage(data, packed, tmp_path):
    """Whatever bytes are changed, cut or lost: no exception, known reasons, and the lines before it are unharmed."""
    lines = [json.dumps({"text": f"text {n}", "url": f"https://a{n}.org", "n": [n, {"m": n}]}) for n in range(30)]
    content = bytearray("\n".join(lines).encode())
    at = data.draw(st.integers(0, len(content) - 1))
    before = bytes(content[:at]).count(b"\n")
    target = bytearray(gzip.compress(bytes(content), mtime=0)) if packed else content
    at = at % len(target)
    if data.draw(st.booleans()):
        del target[at : at + data.draw(st.integers(1, len(target)))]
    else:
        target[at:at] = data.draw(st.binary(min_size=1, max_size=64))
    records = jsonl(bytes(target), tmp_path)
    assert set(reasons(records)) <= set(REASONS)
    if not packed and before and b"\0" not in target[: len(lines[0]) + 1]:
        assert texts(records[:before]) == [f"text {n}" for n in range(before)]


def table(rows: int = 25) -> pa.Table:
    return pa.table(
        {
            "text": [f"row {n}" for n in range(rows)],
            "meta": [{"url": f"https://x{n}.org/", "score": float(n), "tags": ["a", str(n)]} for n in range(rows)],
            "when": pa.array([n * 1_000_000_001 for n in range(rows)], pa.timestamp("ns")),
            "day": [datetime.date(2024, 1, 1)] * rows,
            "price": [decimal.Decimal("1.50")] * rows,
            "blob": [b"\xff\x00"] * rows,
            "nan": [float("nan")] * rows,
            "map": pa.array([[("k", 1)]] * rows, pa.map_(pa.string(), pa.int64())),
            "none": pa.nulls(rows),
        }
    )


def test_parquet_rows_become_documents_with_all_their_columns(tmp_path):
    records = parquet(table(), tmp_path, columns={"url": "meta.url"}, adopt={"meta.score": "bigint", "nan": "double"})
    assert texts(records) == [f"row {n}" for n in range(25)]
    last = records[-1]
    assert isinstance(last, Document)
    assert last.url == "https://x24.org/"
    assert last.adopted == {"score": 24, "nan": None}
    assert json.loads(to_json(last.metadata) or "") == {
        "meta": {"tags": ["a", "24"]},
        "when": "1970-01-01 00:00:24.000000024",
        "day": "2024-01-01",
        "price": "1.50",
        "blob": "/wA=",
        "nan": None,
        "map": [["k", 1]],
        "none": None,
    }


def test_a_text_column_may_be_bytes_and_must_be_utf8(tmp_path):
    good, bad = pa.py_buffer("größer".encode()), pa.py_buffer(b"gr\xf6\xdfer")
    offsets = pa.py_buffer(pa.array([0, len(good), len(good) + len(bad)], pa.int32()).buffers()[1])
    data = pa.py_buffer(bytes(good) + bytes(bad))
    for kind in (pa.string(), pa.binary()):
        rows = pa.table({"text": pa.Array.from_buffers(kind, 2, [None, offsets, data])})
        records = parquet(rows, tmp_path)
        assert texts(records) == ["größer"]
        assert reasons(records) == {"bad_encoding": 1}


def test_a_missing_column_rejects_each_row_and_names_what_is_there(tmp_path):
    records = parquet(table(), tmp_path, columns={"text": "content"})
    assert reasons(records) == {"no_text_field": 25}
    assert "'content' is missing; the record has text, meta" in (records[0].detail or "")  # type: ignore[union-attr]


def test_a_broken_row_group_costs_only_itself(tmp_path):
    path = tmp_path / "pool.parquet"
    pq.write_table(table(), path, row_group_size=10, compression="zstd", use_dictionary=False)
    place = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    at = place.data_page_offset + place.total_compressed_size // 2
    content[at : at + 20] = bytes(20)
    path.write_bytes(content)
    with Input(str(path)) as file:
        records = list(read_parquet(file, mapping()))
    assert texts(records) == [f"row {n}" for n in (*range(10), *range(20, 25))]
    assert reasons(records) == {"broken_record": 1}


def test_adopted_values_are_converted_or_null_and_then_kept(tmp_path):
    rows = [
        {"d": 1, "i": "7", "b": True, "s": "x"},
        {"d": "0.5", "i": 7.0, "b": 0, "s": [1, "a"]},
        {"d": "high", "i": 7.5, "b": "maybe", "s": None},
        {"d": float("nan"), "i": 2**63, "b": 2},
    ]
    lines = "\n".join(json.dumps({"text": "x", **row}) for row in rows)
    adopt = {"d": "double", "i": "bigint", "b": "boolean", "s": "varchar"}
    documents = [record for record in jsonl(lines, tmp_path, adopt=adopt) if isinstance(record, Document)]
    assert [tuple(document.adopted.values()) for document in documents] == [
        (1.0, 7, True, "x"),
        (0.5, 7, False, '[1,"a"]'),
        (None, None, None, None),
        (None, None, None, None),
    ]
    assert documents[0].metadata == {}
    assert documents[2].metadata == {"d": "high", "i": 7.5, "b": "maybe"}


@pytest.mark.parametrize("write", ["stream", "file", "parquet", "jsonl"])
def test_a_hugging_face_file_is_told_by_its_content(write, tmp_path):
    path = tmp_path / "data"
    if write == "parquet":
        pq.write_table(table(), path)
    elif write == "jsonl":
        path.write_bytes(gzip.compress(b"".join(b'{"text": "row %d"}\n' % n for n in range(25))))
    else:
        with {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}[write](str(path), table().schema) as writer:
            writer.write_table(table(), max_chunksize=7)
    with Input(str(path)) as file:
        assert texts(list(read_huggingface(file, mapping(), LIMIT))) == [f"row {n}" for n in range(25)]


def test_a_cut_arrow_stream_keeps_its_whole_batches(tmp_path):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table().schema) as writer:
        writer.write_table(table(), max_chunksize=5)
    (tmp_path / "x.arrow").write_bytes(sink.getvalue().to_pybytes()[:-400])
    with Input(str(tmp_path / "x.arrow")) as file:
        records = list(read_huggingface(file, mapping(), LIMIT))
    assert texts(records) == [f"row {n}" for n in range(20)]
    assert reasons(records) == {"broken_record": 1}
