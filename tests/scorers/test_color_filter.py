"""CoLoR-Filter: the sign of the authors' code, NULL where a loss is, and what a recipe must name."""

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


def test_the_spec() -> None:
    spec = ColorFilter(inputs=INPUTS)
    [column] = spec.columns
    assert (column.name, column.higher_is_better) == ("score", True)
    assert spec.build()(losses([1.0], [1.0])).schema == pa.schema([pa.field("score", column.type)])
    assert pickle.loads(pickle.dumps(spec)) == spec == ColorFilter.model_validate_json(spec.model_dump_json())
    for bad in ({"prior": "a.n"}, INPUTS | {"third": "b.n"}, {"prior": "a.n", "marginal": "b.n"}):
        with pytest.raises(ValidationError, match="the two models"):
            ColorFilter(inputs=bad)
