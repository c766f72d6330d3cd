"""The contract, over every scorer of the table: what pipelines may rely on whatever is computed.

A new scorer joins by an entry in EXAMPLES (scorer_examples.py).
"""

import hashlib
import math
import pickle
from importlib import import_module
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scorer_examples import EXAMPLES

from scorers import SCORERS
from scorers.base import MapSpec, ReduceSpec, Score, Spec, checked
from storage.schema import score_schema

TEXTS = (
    "",
    "  \n\t ",
    "The water wheel turns slowly, and the stones grind barley with care.",
    "to be or not to be that is the question " * 40,
    "Der Müller mahlt; das Mühlrad dreht sich — naïve café, 1.234,5 Säcke…",
    "मिल का पहिया धीरे-धीरे घूमता है और पत्थर जौ पीसते हैं।",
    "水车慢慢地转动，石磨磨着大麦。今天的天气很好。",
    "🎉👩‍👩‍👧‍👦 e\u0301 \ufeff\u200b\u00a0",
    "line\r\nline\x0bline\x0cline\x85line\u2028line\n\n\nline",
    "a\x00b\x1c __label__good <|endoftext|> </s> [PAD]",
    "x" * 3000,
    "def f(x):\n    return x ** 2  # square\n" * 8,
    "1 2 3 4 5 6 7 8 9 10 11 12",
)


def test_every_scorer_has_an_example() -> None:
    assert EXAMPLES.keys() == SCORERS.keys()


@pytest.fixture(scope="module", params=EXAMPLES)
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Spec:
    name: str = request.param
    module, _, kind = SCORERS[name].partition(":")
    found: Spec = getattr(import_module(module), kind)(**EXAMPLES[name](tmp_path_factory.mktemp(name)))
    assert found.model_dump()["scorer"] == name
    return found


@pytest.fixture(scope="module")
def maps(spec: Spec) -> list[tuple[MapSpec, Score]]:
    """The spec and its function where it is a map, those of its maps where it is a reduce."""
    found = spec.maps().values() if isinstance(spec, ReduceSpec) else [spec]
    return [(each, each.build()) for each in found if isinstance(each, MapSpec)]


def documents(texts: tuple[str, ...] = TEXTS) -> pa.RecordBatch:
    hashes = pa.array([hashlib.md5(text.encode()).digest() for text in texts], pa.uuid())
    return pa.record_batch(
        {"doc_id": range(len(texts)), "text": pa.array(texts, pa.large_string()), "text_hash": hashes}
    )


def same(left: Any, right: Any) -> bool:
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-5, abs_tol=1e-6)
    if isinstance(left, bytes) and isinstance(right, bytes):  # rows of float16, rounded on either side of a half
        return np.allclose(np.frombuffer(left, "<f2"), np.frombuffer(right, "<f2"), rtol=2e-3, atol=1e-5)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


def rows(scores: pa.RecordBatch) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = scores.to_pylist()
    return found


def test_one_row_per_document_of_the_promised_types(maps: list[tuple[MapSpec, Score]]) -> None:
    for spec, score in maps:
        for texts in (TEXTS, (), ("",)):
            checked(score(documents(texts)), spec.columns, len(texts), type(spec).__name__)


def test_a_batch_of_one_equals_its_row_in_the_whole(maps: list[tuple[MapSpec, Score]]) -> None:
    for _, score in maps:
        whole = rows(score(documents()))
        assert all(same(rows(score(documents((text,))))[0], row) for text, row in zip(TEXTS, whole, strict=True))


def test_the_order_of_documents_does_not_matter(maps: list[tuple[MapSpec, Score]]) -> None:
    for _, score in maps:
        forwards, backwards = rows(score(documents())), rows(score(documents(TEXTS[::-1])))
        assert all(map(same, forwards, backwards[::-1]))


def test_a_slice_is_a_batch(maps: list[tuple[MapSpec, Score]]) -> None:
    """Arrow slices share their parent's buffers, at an offset."""
    for _, score in maps:
        assert all(map(same, rows(score(documents().slice(3, 4))), rows(score(documents()))[3:7]))


def test_the_same_numbers_twice(maps: list[tuple[MapSpec, Score]]) -> None:
    for spec, score in maps:
        once = score(documents())
        assert score(documents()).equals(once)
        assert spec.build()(documents()).equals(once)


def test_null_only_where_documented_not_by_accident(maps: list[tuple[MapSpec, Score]]) -> None:
    """Plain English prose has every score."""
    for _, score in maps:
        [row] = rows(score(documents((TEXTS[2] * 3,))))
        assert None not in row.values()


def test_the_input_is_left_alone(maps: list[tuple[MapSpec, Score]]) -> None:
    for _, score in maps:
        batch = documents()
        score(batch)
        assert batch.equals(documents())


def test_specs_travel(spec: Spec) -> None:
    """Through pickle to a worker, through JSON to Prefect: the same spec, the same fingerprint."""
    for found in (pickle.loads(pickle.dumps(spec)), type(spec).model_validate_json(spec.model_dump_json())):
        assert found == spec
        assert hash(found) == hash(spec)
        assert found.fingerprint("input") == spec.fingerprint("input")
    assert spec.fingerprint("another") != spec.fingerprint("input")


def test_a_good_spec_has_no_problems(spec: Spec) -> None:
    assert spec.problems() == []


def test_every_column_says_what_it_is(spec: Spec, maps: list[tuple[MapSpec, Score]]) -> None:
    for each in (spec, *(found for found, _ in maps)):
        score_schema(each.columns, sparse=isinstance(each, ReduceSpec))
        names = [column.name for column in each.columns]
        assert names
        assert len(set(names)) == len(names)
        assert all(column.name.isidentifier() and column.name.islower() for column in each.columns)
        assert all(column.description for column in each.columns)


def test_a_reduce_gives_each_column_a_default(spec: Spec) -> None:
    if isinstance(spec, ReduceSpec):
        assert list(spec.defaults()) == [column.name for column in spec.columns]
