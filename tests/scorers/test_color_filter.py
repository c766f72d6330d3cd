"""CoLoR-Filter: the sign of the authors' code, its variants, NULL where a loss is, what a recipe must name."""

import pickle

import pyarrow as pa
import pytest
from pydantic import ValidationError

from scorers.lm.color_filter import ColorFilter

INPUTS = {"prior": "small.nats_per_token", "conditional": "tuned.nats_per_token"}


def losses(prior: list[float | None], conditional: list[float | None]) -> pa.RecordBatch:
    return pa.record_batch({"prior": pa.array(prior, pa.float32()), "conditional": pa.array(conditional, pa.float32())})


def test_worked_example() -> None:
    """Seven documents; the best two are numbers 2 and 6."""
    scores = ColorFilter(inputs=INPUTS).build()(
        losses([3.20, 2.95, 3.60, 2.10, 4.00, 3.05, 2.80], [3.00, 3.05, 3.10, 2.05, 4.50, 3.04, 2.50])
    )
    found = scores["score"].to_pylist()
    assert found == pytest.approx([0.20, -0.10, 0.50, 0.05, -0.50, 0.01, 0.30], abs=1e-6)
    assert sorted(range(7), key=found.__getitem__)[-2:] == [6, 2]


def test_null_where_a_loss_is() -> None:
    scores = ColorFilter(inputs=INPUTS).build()(losses([None, 2.0, None, 2.0], [1.0, None, None, 1.0]))
    assert scores["score"].to_pylist() == [None, None, None, 1.0]
    assert ColorFilter(inputs=INPUTS).build()(losses([], [])).num_rows == 0


def test_the_roles_decide_the_variant() -> None:
    conditional = pa.array([3.0, 3.5, None], pa.float32())
    for role, expected in (("prior", [0.5, -1.5, None]), ("current", [0.5, -1.5, None]), (None, [-3.0, -3.5, None])):
        other = {role: pa.array([3.5, 2.0, 1.0], pa.float32())} if role else {}
        spec = ColorFilter(inputs={name: f"{name}.nats_per_token" for name in ("conditional", *other)})
        batch = pa.record_batch({"conditional": conditional} | other)
        assert spec.build()(batch)["score"].to_pylist() == expected


def test_the_unit_is_that_of_its_inputs() -> None:
    assert ColorFilter(inputs=INPUTS).unit == ColorFilter(inputs=INPUTS).columns[0].unit == "nats/token"
    whole = ColorFilter(inputs=INPUTS, per="sequence")
    assert whole.unit == whole.columns[0].unit == "nats"
    assert whole.fingerprint() != ColorFilter(inputs=INPUTS).fingerprint()


def test_the_spec() -> None:
    spec = ColorFilter(inputs=INPUTS)
    [column] = spec.columns
    assert (column.name, column.higher_is_better) == ("score", True)
    assert spec.build()(losses([1.0], [1.0])).schema == pa.schema([pa.field("score", column.type)])
    assert pickle.loads(pickle.dumps(spec)) == spec == ColorFilter.model_validate_json(spec.model_dump_json())
    for bad in ({}, {"prior": "a.n"}, INPUTS | {"current": "b.n"}, {"prior": "a.n", "marginal": "b.n"}):
        with pytest.raises(ValidationError, match="name the models"):
            ColorFilter(inputs=bad)
