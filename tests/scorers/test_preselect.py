"""PreSelect: the worked numbers, strict order, NULL where a loss is, what a recipe must name."""

import random
from fractions import Fraction
from itertools import combinations

import pyarrow as pa
import pytest
from pydantic import ValidationError

from scorers.preselect import PreSelect

# Means that a comment of the authors quotes, for six models from 7B to 65B.
ABILITY = dict(zip("abcdef", (75.38, 76.30, 77.27, 79.46, 80.47, 81.19), strict=True))
INPUTS = {model: f"loss_{model}.nats" for model in ABILITY}


def strength(*rows: list[float | None]) -> list[float | None]:
    columns = {model: pa.array([row[k] for row in rows], pa.float32()) for k, model in enumerate("abcdef")}
    scores = PreSelect(inputs=INPUTS, ability=ABILITY).build()(pa.record_batch(columns))
    found: list[float | None] = scores.column("score").to_pylist()
    return found


@pytest.mark.parametrize(
    ("losses", "alike"),
    [
        ([100, 98, 95, 90, 85, 80], 15),
        ([100, 98, 98, 90, 91, 80], 13),
        ([80, 85, 90, 95, 98, 100], 0),
        ([50, 50, 50, 50, 50, 50], 0),
        # bits per character on three corpora, as published
        ([0.629, 0.612, 0.609, 0.581, 0.577, 0.557], 15),
        ([0.379, 0.354, 0.356, 0.334, 0.321, 0.308], 14),
        ([0.510, 0.500, 0.487, 0.475, 0.456, 0.441], 15),
    ],
)
def test_worked_numbers(losses: list[float | None], alike: int) -> None:
    assert strength(losses) == pytest.approx([alike / 15])


def test_it_is_the_count_of_pairs() -> None:
    rng = random.Random(1)
    rows: list[list[float | None]] = [[rng.randrange(8) for _ in range(6)] for _ in range(50)]
    counts = [sum(row[j] < row[i] for i, j in combinations(range(6), 2)) for row in rows]  # type: ignore[operator]
    assert strength(*rows) == pytest.approx([float(Fraction(count, 15)) for count in counts])


def test_null_where_a_loss_is() -> None:
    whole: list[float | None] = [100, 98, 95, 90, 85, 80]
    assert strength([*whole[:5], None], whole, [None, *whole[1:]], [float("nan"), *whole[1:]]) == [
        None,
        1.0,
        None,
        None,
    ]
    scores = PreSelect(inputs=INPUTS, ability=ABILITY).build()
    assert scores(pa.record_batch({model: pa.array([], pa.float32()) for model in ABILITY})).num_rows == 0


def test_equal_abilities_order_nothing() -> None:
    spec = PreSelect(inputs={m: f"{m}.nats" for m in "abc"}, ability={"a": 1.0, "b": 1.0, "c": 2.0})
    batch = pa.record_batch({"c": pa.array([1.0, 1.0]), "b": pa.array([2.0, 5.0]), "a": pa.array([3.0, 1.0])})
    assert spec.build()(batch).column("score").to_pylist() == pytest.approx([2 / 3, 1 / 3])


def test_the_spec() -> None:
    spec = PreSelect(inputs=INPUTS, ability=ABILITY)
    assert spec.unit == "nats"
    assert spec.columns[0].higher_is_better
    assert PreSelect(inputs=INPUTS, ability=ABILITY, per="byte").unit == "bits/byte"
    assert spec.fingerprint() != PreSelect(inputs=INPUTS, ability=ABILITY | {"a": 90.0}).fingerprint()
    for inputs, ability, told in (
        (INPUTS, {m: v for m, v in ABILITY.items() if m != "c"}, "only one of them has c"),
        (INPUTS, dict.fromkeys(ABILITY, 1.0), "equally able"),
        ({"a": "a.nats", "b": "b.nats"}, {"a": 1.0, "b": 2.0}, "at least 3"),
        (INPUTS, ABILITY | {"a": float("nan")}, "finite"),
    ):
        with pytest.raises(ValidationError, match=told):
            PreSelect(inputs=inputs, ability=ability)
