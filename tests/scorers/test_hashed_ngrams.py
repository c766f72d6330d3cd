"""Hashed n-grams: the authors' buckets bit by bit, whatever the texts and whatever was seen before."""

import hashlib
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scorers.classifiers import hashed_ngrams
from scorers.classifiers.hashed_ngrams import HashedNgrams, Hasher
from storage.shards import write_shard


def plain(text: str, ngram: int = 2, buckets: int = 10_000) -> list[int]:
    """As data-selection 1.0.3 writes it, n-gram by n-gram."""
    tokens = re.findall(r"\w+|[^\w\s]+", text.lower())
    ngrams = [" ".join(tokens[i : i + n]) for n in range(1, ngram + 1) for i in range(len(tokens) - n + 1)]
    return sorted(int(hashlib.sha256(each.encode()).hexdigest(), 16) % buckets for each in ngrams)


def hashed(hasher: Hasher, texts: list[str]) -> list[list[int]]:
    counts, found = hasher(texts)
    ends = counts.cumsum()
    return [found[end - count : end].tolist() for end, count in zip(ends, counts, strict=True)]


def test_the_authors_buckets() -> None:
    assert hashed(Hasher(1), ["alice", "Alice"]) == [[6720], [6720]]
    assert hashed(Hasher(2), ["alice went"]) == [sorted([6720, 114, *hashed(Hasher(1), ["went"])[0]])]
    assert len(hashed(Hasher(2), ["Alice went to the store"])[0]) == 9
    assert len(hashed(Hasher(1), ["Alice walked into the store\n\n()()($#%@?)@(#(*"])[0]) == 6


# Letters and signs of every kind, and often the same ones, so that n-grams come again.
characters = st.characters(exclude_categories=["Cs"]) | st.sampled_from("ab A.'_\n\u0130\u03a3\u0301")


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.text(characters, max_size=40), max_size=6), st.integers(1, 4), st.sampled_from([2, 8, 9_973, 65_535])
)
def test_equal_to_the_plain_loop(texts: list[str], ngram: int, buckets: int) -> None:
    hasher = Hasher(ngram, buckets)
    expected = [plain(text, ngram, buckets) for text in texts]
    assert hashed(hasher, texts) == expected
    assert hashed(hasher, texts) == expected  # now out of the table


def test_a_crowded_table_forgets_and_never_errs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashed_ngrams, "SLOT_BITS", 16)
    hasher, rng = Hasher(), random.Random(1)
    texts = [" ".join(str(rng.randrange(10**6)) for _ in range(5000)) for _ in range(20)]
    expected = [plain(text) for text in texts]  # 200,000 n-grams, nearly all different, for 65,536 slots
    assert hashed(hasher, texts) == expected
    assert hashed(hasher, texts) == expected


def test_texts_beyond_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are cut between texts: the last token of one never meets the first of the next."""
    monkeypatch.setattr("scorers.words.groups.__defaults__", (10,))
    texts = ["one two three", "", "four", "  ", "five six", "a" * 100, ""]
    assert hashed(Hasher(3), texts) == [plain(text, 3) for text in texts]


def test_a_great_many_short_texts() -> None:
    texts = ["", "b a"] * 35_000 + ["c"]
    counts, found = Hasher()(texts)
    assert counts.tolist() == [0, 3] * 35_000 + [1]
    assert (found[:-1].reshape(-1, 3) == plain("b a")).all()
    assert found[-1:].tolist() == plain("c")


def test_the_map() -> None:
    keys = [bytes(range(16)), b"\xff" * 16]
    batch = pa.record_batch(
        {"text": pa.array(["alice", " "], pa.large_string()), "text_hash": pa.array(keys, pa.uuid())}
    )
    found = HashedNgrams(ngram=1).build()(batch)
    assert found.to_pylist() == [
        {"ngrams": [6720], "text_key": int.from_bytes(bytes(range(8)), "little")},
        {"ngrams": [], "text_key": -1},
    ]


def test_a_shard_keeps_them_as_differences(tmp_path: Path) -> None:
    """Ascending numbers of 14 bits, two thousand to a document, take less than a byte each."""
    rng = random.Random(1)
    texts = [" ".join(str(rng.randrange(10**6)) for _ in range(2000)) for _ in range(20)]
    hashes = pa.array([bytes(16)] * 20, pa.uuid())
    batch = pa.record_batch({"text": pa.array(texts, pa.large_string()), "text_hash": hashes})
    found = HashedNgrams(ngram=1).build()(batch)
    shard = write_shard(str(tmp_path), "features", "a", [found], found.schema)
    assert pq.read_table(tmp_path / shard.path).to_batches() == [found]
    column = pq.ParquetFile(tmp_path / shard.path).metadata.row_group(0).column(0)
    assert column.path_in_schema == "ngrams.list.element"
    assert "DELTA_BINARY_PACKED" in column.encodings
    assert column.total_compressed_size < 20 * 2000
