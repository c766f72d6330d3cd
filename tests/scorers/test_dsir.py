"""DSIR: the worked examples; weights against the sum as it is written; noise; targets; what is refused."""

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from duck_space import DuckSpace
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from test_hashed_ngrams import plain

from scorers.classifiers.dsir import DSIR, log_ratios
from storage.errors import RecipeError

RAW = ["a b a c", "b b d", "c d d a"]
TARGET = ["a b a", "a a b"]


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def weighed(spec: DSIR, texts: list[str], keys: list[int] | None = None) -> list[dict[str, Any]]:
    """The rows of the reduce; each text has its own key unless they are given."""
    uuids = [key.to_bytes(8, "little", signed=True) + bytes(8) for key in keys or range(len(texts))]
    batch = pa.record_batch(
        {"text": pa.array(texts, pa.large_string()), "text_hash": pa.array(uuids, pa.uuid())},
    )
    features = pa.Table.from_batches([spec.maps()["features"].build()(batch)])  # type: ignore[arg-type]
    features = features.append_column("doc_id", pa.array(range(len(texts)), pa.int64()))
    result = spec.reduce(DuckSpace(features=features), extend=False).read_all()
    assert set(result.column_names) == {"doc_id", *(column.name for column in spec.columns)}
    assert all(result.schema.field(column.name).type == column.type for column in spec.columns)
    rows: list[dict[str, Any]] = result.to_pylist()
    return rows


def column(rows: list[dict[str, Any]], name: str) -> list[Any]:
    return [row[name] for row in rows]


def test_the_worked_example(tmp_path: Path) -> None:
    raw, target = np.array([0, 1, 0, 5, 6, 4, 3, 0]), np.array([0, 1, 0, 4, 1, 4, 0, 0])
    expected = [0, 0.641854, 0, 0.418710, -1.149906, 0.641854, -16.574854, 0]
    np.testing.assert_allclose(log_ratios(raw, target), expected, atol=5e-7)
    path = write(tmp_path / "target.jsonl", TARGET)
    for pseudo_count, weights in ((0, [-14.961777, -16.022342, -20.337056]), (1, [-0.679320, -1.480601, -5.114591])):
        rows = weighed(DSIR(targets=path, buckets=8, pseudo_count=pseudo_count), RAW)
        np.testing.assert_allclose(column(rows, "log_weight"), weights, atol=5e-7)
        assert column(rows, "n_tokens") == [4, 3, 4]
    rows = weighed(DSIR(targets=path, buckets=8, per="token"), RAW)
    np.testing.assert_allclose(column(rows, "log_weight"), [-14.961777 / 4, -16.022342 / 3, -20.337056 / 4], atol=5e-7)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text("ab.D ", max_size=20), min_size=1, max_size=8), st.integers(1, 4), st.sampled_from([3, 64]))
def test_weights_are_the_sum_over_ngrams(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], ngram: int, buckets: int
) -> None:
    """As the authors compute it: dense counts, dot product, length from the sum of the counts."""
    target = ["a b", "D. b b"]
    spec = DSIR(targets=write(tmp_path_factory.mktemp("t") / "t.jsonl", target), ngram=ngram, buckets=buckets)
    counts = [np.bincount(plain(text, ngram, buckets), minlength=buckets) for text in texts]
    wanted = sum(np.bincount(plain(text, ngram, buckets), minlength=buckets) for text in target)
    raw = np.sum(counts, axis=0)
    if raw.any():
        log_diff = np.log(wanted / np.sum(wanted) + 1e-8) - np.log(raw / raw.sum() + 1e-8)
    for row, count in zip(weighed(spec, texts), counts, strict=True):
        if count.any():
            assert math.isclose(row["log_weight"], np.dot(log_diff, count), rel_tol=1e-9, abs_tol=1e-9)
            assert row["n_tokens"] == (count.sum() + ngram * (ngram - 1) / 2) // ngram
        else:
            assert row == {"doc_id": row["doc_id"], "log_weight": None, "gumbel": None, "n_tokens": 0}


def test_noise_is_standard_gumbel_of_text_and_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "target.jsonl", TARGET)
    n = 4000
    keys = [-1, -1, *range(n - 2)]

    def noise(seed: int) -> np.ndarray:
        rows = weighed(DSIR(targets=path, buckets=8, seed=seed), ["a"] * n, keys)
        return np.array(column(rows, "gumbel")) - np.array(column(rows, "log_weight"))

    one, other = noise(1), noise(2)
    assert one[0] == one[1]
    assert len(np.unique(one)) == n - 1
    assert np.array_equal(one, noise(1))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.08
    # exp(-exp(-x)) of it is uniform: five standard errors of the Kolmogorov-Smirnov distance.
    for found in (one, other):
        uniform = np.sort(np.exp(-np.exp(-found)))
        assert np.abs(uniform - (np.arange(n) + 0.5) / n).max() < 5 * 0.5 / math.sqrt(n)


def test_the_largest_is_drawn_in_proportion_to_its_weight(tmp_path: Path) -> None:
    """Pairs of documents, of weights w and v: the first of a pair is larger with probability w / (w + v)."""
    path = write(tmp_path / "target.jsonl", ["x x y"])
    n = 3000
    rows = weighed(DSIR(targets=path, ngram=1, buckets=64), ["x", "y"] * n, list(range(2 * n)))
    weights = np.exp(column(rows, "log_weight")[:2])
    np.testing.assert_allclose(weights, [4 / 3, 2 / 3], rtol=1e-6)
    gumbel = np.array(column(rows, "gumbel")).reshape(n, 2)
    assert abs((gumbel[:, 0] > gumbel[:, 1]).mean() - 2 / 3) < 5 * math.sqrt(2 / 9 / n)


def test_several_targets(tmp_path: Path) -> None:
    paths = {"fruit": write(tmp_path / "fruit.jsonl", ["apple pear"]), "ore": write(tmp_path / "ore.jsonl", ["iron"])}
    texts = ["apple apple", "iron ore", "", "pear tree", "stone"]
    both = weighed(DSIR(targets=paths), texts)
    assert column(both, "target")[:4] == ["fruit", "ore", None, "fruit"]
    for name, path in paths.items():
        alone = weighed(DSIR(targets=path), texts)
        assert column(both, f"log_weight_{name}") == column(alone, "log_weight")
        for row, single in zip(both, alone, strict=True):
            if row["target"] == name:
                assert (row["log_weight"], row["gumbel"]) == (single["log_weight"], single["gumbel"])
                assert row["log_weight"] == max(row["log_weight_fruit"], row["log_weight_ore"])
    assert [c.name for c in DSIR(targets=paths).columns if c.higher_is_better] == [
        "log_weight",
        "gumbel",
        "log_weight_fruit",
        "log_weight_ore",
    ]


def test_a_corpus_without_a_word(tmp_path: Path) -> None:
    spec = DSIR(targets=write(tmp_path / "target.jsonl", TARGET))
    assert column(weighed(spec, ["", " "]), "log_weight") == [None, None]


def test_the_content_of_each_target_is_in_the_fingerprint(tmp_path: Path) -> None:
    paths = {name: write(tmp_path / f"{name}.jsonl", TARGET) for name in ("a", "b")}
    spec = DSIR(targets=paths)
    before, features = spec.fingerprint(), spec.maps()["features"].fingerprint()
    moved = write(tmp_path / "moved.jsonl", TARGET)
    assert DSIR(targets=paths | {"b": moved}).fingerprint() == before
    write(tmp_path / "b.jsonl", [*TARGET, "more"])
    assert spec.fingerprint() != before
    assert spec.maps()["features"].fingerprint() == features  # no text is read again
    assert DSIR(targets={"a": paths["a"], "c": moved}).fingerprint() != before


def test_bad_targets_are_told(tmp_path: Path) -> None:
    assert DSIR(targets={"a": str(tmp_path / "none.jsonl")}).problems() == [
        f"targets: no file or folder '{tmp_path}/none.jsonl'; correct the path"
    ]
    assert DSIR(targets={}).problems() == ["targets: names no file; give one, or { name = FILE }"]
    for content, told in (
        ('{"text": "a"}\n{"contents": "b"}\n', r"record 2 .*\(no_text_field 'text' is missing"),
        ('{"text": "a"}\nword\n', r"record 2 .*\(not_json"),
        ('{"text": " "}\n', "has no word"),
        ("", "has no word"),
    ):
        path = tmp_path / "bad.jsonl"
        path.write_text(content)
        with pytest.raises(RecipeError, match=told):
            weighed(DSIR(targets=str(path)), RAW)
        early = DSIR(targets={"bad": str(path)}).problems()
        assert [bool(re.search(told, problem)) for problem in early] == [True] * ("record 2" not in told)
    assert DSIR(targets=str(tmp_path)).problems() == [
        f"targets: '{tmp_path}' cannot be read (Is a directory); name a file of JSON lines"
    ]
    for bad in ({"targets": {"A b": "x"}}, {"buckets": 1}, {"buckets": 70_000}, {"ngram": 0}, {"pseudo_count": -1}):
        with pytest.raises(ValidationError):
            DSIR(**{"targets": "x"} | bad)


def test_compressed_targets(tmp_path: Path) -> None:
    path = tmp_path / "target.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a b a"}\n\n{"text": "a a b"}'))
    rows = weighed(DSIR(targets=str(path), buckets=8), RAW)
    np.testing.assert_allclose(column(rows, "log_weight"), [-14.961777, -16.022342, -20.337056], atol=5e-7)
