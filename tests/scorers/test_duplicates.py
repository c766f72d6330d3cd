"""Duplicates: what the signatures find; clusters in SQL against a union-find in Python; extending is a full run."""

import math
import random
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pytest
from duck_space import DuckSpace
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from scorers.duplicates.minhash import Duplicates, DuplicateSignatures

SIGNATURES = pa.schema([("doc_id", pa.int64()), ("exact", pa.int64()), ("bands", pa.list_(pa.int64()))])
RESULT = pa.schema([("doc_id", pa.int64()), ("cluster", pa.int64()), ("cluster_size", pa.int64())])

Row = tuple[int, int | None, list[int] | None]


def table(rows: Sequence[Row]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(SIGNATURES.names, row, strict=True)) for row in rows], SIGNATURES)


def full(rows: Sequence[Row]) -> pa.Table:
    return Duplicates().reduce(DuckSpace(signatures=table(rows)), extend=False).read_all()


def extended(old: pa.Table, rows: Sequence[Row], new: Sequence[Row]) -> pa.Table:
    space = DuckSpace(signatures=table(rows), signatures_new=table(new), old=old)
    return Duplicates().reduce(space, extend=True).read_all()


def union_find(rows: Sequence[Row]) -> list[tuple[int, int, int]]:
    parent: dict[int, int] = {}

    def root(doc: int) -> int:
        while parent[doc] != doc:
            doc = parent[doc]
        return doc

    holder: dict[int, int] = {}
    for doc, exact, bands in sorted(rows, key=lambda row: row[0]):
        parent[doc] = doc
        for bucket in [] if exact is None else [exact, *(bands or [])]:
            first, second = sorted((root(holder.setdefault(bucket, doc)), root(doc)))
            parent[second] = first
    roots = [root(doc) for doc in parent]
    return [(doc, r, roots.count(r)) for doc, r in zip(parent, roots, strict=True) if roots.count(r) > 1]


@st.composite
def graphs(draw: st.DrawFn) -> list[Row]:
    """Documents in few buckets, so that clusters are long chains as well as stars; some without text."""
    n = draw(st.integers(1, 30))
    ids = draw(st.permutations(range(0, 3 * n, 3)))
    buckets = st.integers(-draw(st.integers(1, 2 * n)), n)
    return [
        (i, None, None)
        if draw(st.booleans()) and i % 4 == 0
        else (i, draw(buckets), draw(st.lists(buckets, max_size=3)))
        for i in ids
    ]


def rows_of(result: pa.Table) -> list[tuple[int, int, int]]:
    assert result.schema == RESULT
    return list(zip(*(column.to_pylist() for column in result.columns), strict=True))


@settings(deadline=None, max_examples=60)
@given(graphs())
def test_clusters_are_the_connected_components(rows: list[Row]) -> None:
    assert rows_of(full(rows)) == union_find(rows)


@settings(deadline=None, max_examples=60)
@given(graphs(), st.data())
def test_extending_equals_the_full_run(rows: list[Row], data: st.DataObject) -> None:
    """New documents may have smaller ids than old ones, and may join clusters that were apart."""
    cut = data.draw(st.integers(0, len(rows)))
    old = full(rows[:cut])
    assert extended(old, rows, rows[cut:]).equals(full(rows))
    assert Duplicates.extends


def test_extending_by_nothing_changes_nothing() -> None:
    rows: list[Row] = [(1, 7, [8]), (2, 7, [9]), (5, 3, [9])]
    assert extended(full(rows), rows, []).equals(full(rows))


@pytest.mark.parametrize("order", ["ascending", "descending", "random", "zigzag"])
def test_a_chain_takes_logarithmic_many_statements(order: str) -> None:
    """Document i shares a bucket with i + 1 only: labels that spread one step a round would need 4,000 rounds."""
    n = 4096
    ids = {
        "ascending": list(range(n)),
        "descending": list(range(n))[::-1],
        "random": random.Random(1).sample(range(n), n),
        "zigzag": [i // 2 if i % 2 else n - 1 - i // 2 for i in range(n)],
    }[order]
    rows: list[Row] = [(doc, -place - 1, [place, place + 1]) for place, doc in enumerate(ids)]
    space = DuckSpace(signatures=table(rows))
    result = Duplicates().reduce(space, extend=False).read_all()
    assert rows_of(result) == [(doc, 0, n) for doc in range(n)]
    assert space.statements < 5 * math.log2(n)


def signatures(*texts: str, **parameters: int) -> list[dict[str, Any]]:
    batch = pa.record_batch({"text": pa.array(texts, pa.large_string())})
    found: list[dict[str, Any]] = DuplicateSignatures(**parameters).build()(batch).to_pylist()
    return found


def near(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return bool(set(left["bands"]) & set(right["bands"]))


def prose(words: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [f"w{rng.randrange(5000)}" for _ in range(words)]


def test_equal_but_for_case_white_space_and_composition_is_exact() -> None:
    text = "Straße  am\tCafé\n\nnoir"
    variants = ["straße am café noir ", "STRASSE AM CAFÉ NOIR", unicodedata.normalize("NFD", text), "\u00a0" + text]
    original, *others = signatures(text, *variants)
    assert all(other == original for other in others)
    assert signatures("straße am café, noir")[0]["exact"] != original["exact"]


def edits(words: list[str], seed: int) -> Iterator[str]:
    """The text with one word replaced, dropped, or put in, at a place by chance."""
    place = random.Random(seed).randrange(len(words))
    yield " ".join([*words[:place], "edited", *words[place + 1 :]])
    yield " ".join([*words[:place], *words[place + 1 :]])
    yield " ".join([*words[:place], "edited", *words[place:]])


def test_one_edited_word_in_two_hundred_is_found() -> None:
    """The edit changes 5 of 196 runs of five words: J >= 0.95, so a pair is missed once in 4 million."""
    for seed in range(100):
        words = prose(200, seed)
        original, *others = signatures(" ".join(words), *edits(words, seed))
        assert all(other["exact"] != original["exact"] and near(original, other) for other in others)


def test_pairs_are_found_as_often_as_the_formula_says() -> None:
    """Texts that share a known part of their runs: the share that is found follows 1 - (1 - J^rows)^bands."""
    trials = 300
    for shared in (120, 180, 196):
        pairs = [prose(shared, seed) for seed in range(trials)]
        rows = signatures(
            *(" ".join([*words, *prose(200 - shared, 10_000 + i)]) for i, words in enumerate(pairs)),
            *(" ".join([*words, *prose(200 - shared, 20_000 + i)]) for i, words in enumerate(pairs)),
        )
        jaccard = (shared - 4) / (2 * 196 - (shared - 4))
        expected = 1 - (1 - jaccard**8) ** 14
        found = sum(near(rows[i], rows[trials + i]) for i in range(trials)) / trials
        assert abs(found - expected) < 5 * math.sqrt(max(expected * (1 - expected), 1 / trials) / trials)


def test_different_texts_share_nothing() -> None:
    rows = signatures(*(" ".join(prose(200, seed)) for seed in range(200)))
    buckets = [bucket for row in rows for bucket in [row["exact"], *row["bands"]]]
    assert len(set(buckets)) == len(buckets)


def test_a_text_below_the_n_gram_is_near_its_equals_alone() -> None:
    one, equal, other, symbols, others = signatures("log in", "Log  in", "log out", "***", "!!!")
    assert near(one, equal)
    assert not near(one, other)
    assert not near(symbols, others)


def test_white_space_duplicates_nothing() -> None:
    assert signatures("", " \n\t ") == [{"exact": None, "bands": None}] * 2
    assert rows_of(full([(0, None, None), (1, None, None)])) == []


def test_signatures_are_the_same_on_every_machine() -> None:
    [row] = signatures("The quick brown fox jumps over the lazy dog and runs away.", bands=2, rows=4)
    assert row == {"exact": 5703323712031023032, "bands": [3008522288422818958, 8556113552999583583]}


def test_parameters_reach_the_signatures() -> None:
    spec = Duplicates(bands=3, rows=2, ngram=7, seed=9)
    [(name, found)] = spec.maps().items()
    assert name == "signatures"
    assert found == DuplicateSignatures(bands=3, rows=2, ngram=7, seed=9)
    text = " ".join(prose(50, 1))
    assert len(signatures(text, bands=3, rows=2)[0]["bands"]) == 3
    assert not near(signatures(text, seed=1)[0], signatures(text, seed=2)[0])
    for bad in ({"bands": 0}, {"rows": -1}, {"ngram": 0}, {"seed": -1}):
        with pytest.raises(ValidationError, match=re.escape(next(iter(bad)))):
            Duplicates(**bad)


def test_from_texts_to_clusters() -> None:
    words = prose(200, 3)
    texts = [
        "other " + " ".join(prose(60, 4)),
        " ".join(words),
        *edits(words, 3),
        "",
        "Other " + " ".join(prose(60, 4)),
    ]
    rows = [(3 * i, row["exact"], row["bands"]) for i, row in enumerate(signatures(*texts))]
    assert rows_of(full(rows)) == [(0, 0, 2), (3, 3, 4), (6, 3, 4), (9, 3, 4), (12, 3, 4), (18, 0, 2)]
