"""Hashed n-grams: the authors' buckets bit by bit, whatever the texts and whatever was seen before."""

import hashlib
import random
import re

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scorers.classifiers import hashed_ngrams
from scorers.classifiers.hashed_ngrams import HashedNgrams, Hasher


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
