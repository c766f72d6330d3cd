"""Laws of taking files in: aligned shards, ids that name their record, the same shards each time, balanced books."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from xxhash import xxh3_128_digest

from storage.errors import ShardError
from storage.intake import FileCount, InputFile, Taken, take_in
from storage.schema import DOCUMENTS, REJECTS, Column, score_schema
from storage.sources import Intake, Source

TABLES = {"documents": "documents__1", "rejects": "rejects__1", "adopted": "adopted__1"}
SCORES = (Column("score", pa.float64(), "of the pool"), Column("other", pa.string(), "of another pool"))


def take(
    tmp_path: Path, files, *, shard_bytes: int = 1 << 30, adopt=(), adopted=(), format="jsonl", limit=1000
) -> Taken:
    source = Source(name="pool", format=format, path="unused", adopt=adopt)
    intake = Intake(shard_bytes=shard_bytes, max_record_bytes=limit)
    return take_in([InputFile(*file) for file in files], source, intake, str(tmp_path / "data"), TABLES, adopted)


def rows(tmp_path: Path, shards) -> pa.Table:
    return pa.concat_tables(pq.read_table(tmp_path / "data" / shard.path, partitioning=None) for shard in shards)


def pool(path: Path, texts) -> str:
    path.write_text("\n".join(json.dumps(t) if isinstance(t, dict) else json.dumps({"text": t}) for t in texts))
    return str(path)


def test_every_record_is_a_row_of_one_of_the_two(tmp_path):
    files = [(7, pool(tmp_path / "a", ["one", "", "two"])), (9, pool(tmp_path / "b", [])), (10, str(tmp_path / "gone"))]
    taken = take(tmp_path, files)
    documents, rejects = rows(tmp_path, taken.documents), rows(tmp_path, taken.rejects)
    assert documents.schema.equals(DOCUMENTS)
    assert rejects.schema.equals(REJECTS)
    assert documents["doc_id"].to_pylist() == [7 << 32, 7 << 32 | 2]
    assert rejects["doc_id"].to_pylist() == [7 << 32 | 1, 10 << 32]
    assert rejects["reason"].to_pylist() == ["empty", "unreadable"]
    assert [(c.number, c.records, c.documents, c.rejects) for c in taken.counts] == [
        (7, 3, 2, 1), (9, 0, 0, 0), (10, 1, 0, 1)
    ]  # fmt: skip


def test_the_text_is_identified_by_its_bytes(tmp_path):
    documents = rows(tmp_path, take(tmp_path, [(0, pool(tmp_path / "a", ["größer", "größer", "x"]))]).documents)
    assert documents["text"].to_pylist() == ["größer", "größer", "x"]
    assert documents["n_bytes"].to_pylist() == [8, 8, 1]
    assert [value.bytes for value in documents["text_hash"].to_pylist()] == [
        xxh3_128_digest(text.encode()) for text in ("größer", "größer", "x")
    ]


def test_shards_roll_over_and_stay_aligned(tmp_path):
    texts = [{"text": f"{n} " * 40, "score": n / 2} for n in range(5000)]
    files = [(3, pool(tmp_path / "a", texts[:2000])), (4, pool(tmp_path / "b", texts[2000:]))]
    taken = take(tmp_path, files, shard_bytes=200_000, adopt=["score"], adopted=SCORES)
    assert [shard.shard for shard in taken.documents] == [f"00000003-{n:03d}" for n in range(len(taken.documents))]
    assert len(taken.documents) > 2
    for shard, scores in zip(taken.documents, taken.adopted, strict=True):
        assert (shard.shard, shard.rows) == (scores.shard, scores.rows)
        assert rows(tmp_path, [shard])["doc_id"].equals(rows(tmp_path, [scores])["doc_id"])
    scores = rows(tmp_path, taken.adopted)
    assert scores.schema.equals(score_schema(SCORES))
    assert scores["score"].to_pylist() == [n / 2 for n in range(5000)]
    assert set(scores["computed"].to_pylist()) == {True}
    assert scores["other"].null_count == 5000
    assert rows(tmp_path, taken.documents)["text"].to_pylist() == [record["text"] for record in texts]


def test_a_source_without_adopted_columns_says_so(tmp_path):
    taken = take(tmp_path, [(0, pool(tmp_path / "a", ["x", "y"]))], adopted=SCORES)
    assert rows(tmp_path, taken.adopted)["computed"].to_pylist() == [False, False]
    assert not take(tmp_path, [(0, pool(tmp_path / "a", ["x"]))], adopt=["score"]).adopted


def test_the_same_files_give_the_same_shards(tmp_path):
    files = [(0, pool(tmp_path / "a", [f"text {n}" for n in range(3000)])), (1, pool(tmp_path / "b", ["", "z"]))]
    first, second = (take(tmp_path / name, files, shard_bytes=5000) for name in ("x", "y"))
    for kind in ("documents", "rejects"):
        assert [(s.shard, s.rows, s.sha256) for s in getattr(first, kind)] == [
            (s.shard, s.rows, s.sha256) for s in getattr(second, kind)
        ]
    assert first.counts == second.counts


def test_a_call_without_documents_writes_none(tmp_path):
    taken = take(tmp_path, [(0, pool(tmp_path / "a", [""]))], adopt=["score"], adopted=SCORES)
    assert (taken.documents, taken.adopted, len(taken.rejects)) == ([], [], 1)
    nothing = take(tmp_path, [(0, pool(tmp_path / "b", []))])
    assert nothing == Taken(counts=[FileCount(0)])


def test_row_groups_are_as_long_as_readers_expect(tmp_path):
    (shard,) = take(tmp_path, [(0, pool(tmp_path / "a", ["x"] * 3000))]).documents
    metadata = pq.ParquetFile(tmp_path / "data" / shard.path).metadata
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [1024, 1024, 952]


def test_nothing_is_left_when_reading_fails(tmp_path, monkeypatch):
    """A remote file that fails may be there next time: no reject, no shard, and the caller tries again."""
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe("/pool/a.jsonl", b'{"text": "a"}\n')
    good = take(tmp_path, [(0, "memory://pool/a.jsonl")])
    assert rows(tmp_path, good.documents)["text"].to_pylist() == ["a"]
    with pytest.raises(ShardError):
        take(tmp_path / "y", [(0, "memory://pool/a.jsonl"), (1, "memory://pool/gone.jsonl")])
    assert not [path for path in (tmp_path / "y").rglob("*") if path.is_file()]
    fs.rm("/pool", recursive=True)


def test_a_page_of_a_crawl_becomes_a_document(tmp_path):
    http = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nX-Robots-Tag: noai\r\n\r\n<title>T</title><p>" + b"Word " * 99
    )
    head = "WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: https://w.a.org/\r\nWARC-Record-ID: <urn:x>\r\n"
    record = f"{head}Content-Length: {len(http)}\r\n\r\n".encode() + http + b"\r\n\r\n"
    (tmp_path / "crawl").write_bytes(gzip.compress(record) * 2)
    taken = take(tmp_path, [(5, str(tmp_path / "crawl"))], format="warc")
    first, second = rows(tmp_path, taken.documents).to_pylist()
    assert (second["doc_id"], second["offset"]) == (5 << 32 | 1, len(gzip.compress(record)))
    assert (first["domain"], first["record_id"]) == ("a.org", "<urn:x>")
    assert first["extractor"].startswith("resiliparse ")
    assert json.loads(first["rights"]) == {"x_robots_tag": "noai"}
    assert json.loads(first["metadata"])["title"] == "T"
    assert first["crawled_at"] is None


def test_the_other_extractor_is_an_option(tmp_path):
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html><body><article><p>" + b"Some words here. " * 40
    head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.org/\r\nContent-Length: {len(http)}\r\n\r\n"
    (tmp_path / "crawl").write_bytes(head.encode() + http)
    source = Source(name="pool", format="warc", path="unused")
    intake = Intake(extractor="trafilatura")
    taken = take_in([InputFile(0, str(tmp_path / "crawl"))], source, intake, str(tmp_path / "data"), TABLES)
    (document,) = rows(tmp_path, taken.documents).to_pylist()
    assert document["extractor"].startswith("trafilatura ")
    assert document["text"].startswith("Some words here.")
