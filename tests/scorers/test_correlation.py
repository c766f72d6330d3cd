"""Perplexity correlations: worked numbers, what the estimators tend to, laws of the projections, what is missing."""

import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scorers.correlation import Array, Estimator, benchmark_error, estimate, held_out, intervals, observed
from scorers.domains.projection import PROJECTIONS, l2, linear
from storage.errors import RecipeError

X = np.array(
    [[1.0, 2.0, 0.9, 1.5], [0.8, 2.2, 1.0, 1.1], [0.9, 1.7, 1.3, 1.2], [0.5, 1.9, 1.1, 0.7], [0.6, 2.1, 0.7, 0.9]]
)
Y = np.array([0.60, 0.50, 0.55, 0.30, 0.40])
TIED = np.array([0.5, 0.5, 0.3, 0.4, 0.3])
ESTIMATORS: tuple[Estimator, ...] = ("product", "sign", "sign_cdf", "sign_sign", "spearman")


@pytest.mark.parametrize(
    ("estimator", "errors", "expected"),
    [
        ("product", Y, [0.377, 0.929, 0.473, 0.536]),
        ("sign", Y, [0.26, -0.04, 0.04, 0.38]),
        ("sign_cdf", Y, [0.4, -0.04, 0.0, 0.4]),
        ("sign_sign", Y, [1.0, 0.0, 0.0, 1.0]),
        ("spearman", Y, [1.0, -0.1, 0.0, 1.0]),
        ("sign_cdf", TIED, [0.12, 0.18, -0.06, 0.12]),
        ("spearman", TIED, [0.316228, 0.474342, -0.158114, 0.316228]),
    ],
)
def test_worked_examples(estimator: Estimator, errors: Array, expected: list[float]) -> None:
    assert estimate(X, errors, estimator) == pytest.approx(expected, abs=5e-7)


def by_pairs(x: Array, y: Array, estimator: Estimator) -> float:
    """The definitions, for one text, pair by pair."""
    n = len(y)
    rank = [sum(other < one for other in x) + (sum(other == one for other in x) + 1) / 2 for one in x]
    value = {"sign": list(x), "sign_cdf": [r / n for r in rank]}.get(estimator)
    total = 0.0
    for i, j in itertools.combinations(range(n), 2):
        apart = value[j] - value[i] if value else np.sign(x[j] - x[i])
        total += np.sign(y[j] - y[i]) * apart
    return float(2 * total / (n * (n - 1)))


@given(
    st.integers(3, 8).flatmap(
        lambda n: st.tuples(
            st.lists(st.lists(st.integers(0, 5), min_size=n, max_size=n), min_size=1, max_size=4),
            st.lists(st.integers(0, 4), min_size=n, max_size=n),
            st.permutations(range(n)),
        )
    )
)
@settings(max_examples=60, deadline=None)
def test_the_closed_forms_are_the_loops_over_pairs(drawn: tuple[list[list[int]], list[int], list[int]]) -> None:
    """With ties in both; and in whichever order the models come."""
    columns, errors, order = drawn
    x, y = np.array(columns, float).T / 4, np.array(errors, float)
    for estimator in ESTIMATORS:
        found = estimate(x, y, estimator)
        assert estimate(x[order], y[order], estimator) == pytest.approx(found, abs=1e-12, nan_ok=True)
        for d, value in enumerate(found):
            if np.ptp(y) == 0 or np.ptp(x[:, d]) == 0:
                assert math.isnan(value)
            elif estimator not in ("product", "spearman"):
                assert value == pytest.approx(by_pairs(x[:, d], y, estimator), abs=1e-12)
            elif estimator == "spearman":
                assert -1 - 1e-12 <= value <= 1 + 1e-12


@pytest.mark.parametrize("sigma", [0.0, 0.5])
@pytest.mark.parametrize("increasing", [lambda v: v, lambda v: 2 / (1 + np.exp(-v)) - 1, lambda v: 3.0**v])
def test_what_the_estimators_tend_to(sigma: float, increasing: object) -> None:
    """Planted weights w, y = f(<w, x> + noise): product and sign are proportional to w, the others known functions."""
    rng = np.random.default_rng(3)
    w = np.array([0.0, 1, 2, 3, 4, 5, 6, 7, -8, -9])
    w /= np.linalg.norm(w)
    x = rng.standard_normal((10_000, 10))
    y = increasing(x @ w + sigma * rng.standard_normal(10_000))  # type: ignore[operator]
    noise = math.sqrt(1 + sigma**2)
    expected = {"sign_cdf": 2 / np.pi * np.arcsin(w / (2 * noise)), "sign_sign": 2 / np.pi * np.arcsin(w / noise)}
    if not sigma:
        expected["spearman"] = 6 / np.pi * np.arcsin(w / 2)
    for estimator, values in expected.items():
        sample = slice(0, 2000) if estimator == "sign_sign" else slice(None)
        found = estimate(x[sample], y[sample], estimator)  # type: ignore[arg-type]
        assert found == pytest.approx(values, abs=0.06 if estimator == "sign_sign" else 0.03)
    for estimator in ("product", "sign"):
        found = estimate(x, y, estimator)
        assert found / np.linalg.norm(found) == pytest.approx(w, abs=0.05)


def test_blocks_and_many_models() -> None:
    """More texts than a block, and ranks that no byte holds."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 90, (140, 2500)).astype(float), rng.random(140)
    for estimator in ESTIMATORS:
        whole = estimate(x, y, estimator)
        assert estimate(x[:, 2040:2060], y, estimator) == pytest.approx(whole[2040:2060])
    assert estimate(x, y, "sign_sign")[2047] == pytest.approx(by_pairs(x[:, 2047], y, "sign_sign"))


@given(st.lists(st.integers(0, 11), min_size=3, max_size=140), st.randoms())
@settings(max_examples=40, deadline=None)
def test_ranks_see_the_last_bit(drawn: list[int], random: object) -> None:
    """Neighbours among floats, zeros of both signs, losses below 0: whatever the ranks are sorted by."""
    near = [np.nextafter(value, toward) for value in (-1.5, 1e-300, 1.0) for toward in (-9.0, 9.0)]
    values = np.array([*near, -1.5, 0.0, -0.0, 1.0, 5e-324, 1e300])
    x = values[[drawn, drawn[::-1]]].T
    y = np.arange(len(drawn)) // 2 * 1.0
    random.shuffle(y)  # type: ignore[attr-defined]
    found = estimate(x, y, "sign_cdf")
    for column, value in zip(x.T, found, strict=True):
        assert math.isnan(value) if np.ptp(column) == 0 else value == pytest.approx(by_pairs(column, y, "sign_cdf"))


def test_projections_of_the_worked_example() -> None:
    tau, values = np.array([0.2, 0.5, 0.9, 0.4, 1.0]), np.array([-0.3, 4, 1, 0.9, 0])
    assert linear(values, tau) == pytest.approx([0, 0.5, 0.5, 0, 0], abs=1e-12)
    assert l2(values, tau) == pytest.approx([0, 0.5, 0.3, 0.2, 0], abs=1e-12)
    assert linear(estimate(X, Y), np.array([0.5, 0.6, 0.7, 0.3])) == pytest.approx([0.5, 0, 0.2, 0.3], abs=1e-12)


@pytest.mark.parametrize("project", PROJECTIONS.values())
def test_projections_where_the_authors_code_fails(project: object) -> None:
    """Caps that sum to 1 but for rounding; estimates whose spacing is coarser than a bisection's tolerance."""
    tenths = np.full(10, 0.1)
    for values in (np.arange(10.0), np.zeros(10), np.arange(10) * 1e5 + 0.3):
        assert project(values, tenths) == pytest.approx(tenths)  # type: ignore[operator]
    large = project(np.array([1e5, 1e5 - 0.125, 99_999.0, -1e5]), np.full(4, 0.5625))  # type: ignore[operator]
    assert large == pytest.approx([0.5625, 0.4375, 0, 0], abs=1e-12)
    tied = project(np.array([1.0, 2.0, 1.0, 0.0]), np.array([0.4, 0.25, 0.8, 0.9]))  # type: ignore[operator]
    assert tied.sum() == pytest.approx(1)
    assert project(np.array([np.nan, 1.0, np.nan]), np.ones(3)).tolist() == [0, 1, 0]  # type: ignore[operator]


def test_ties_share_in_proportion_to_their_caps() -> None:
    assert linear(np.array([1.0, 2, 1, 0]), np.array([0.5, 0.25, 1.0, 0.9])) == pytest.approx([0.25, 0.25, 0.5, 0])


VALUES = st.floats(-1e12, 1e12) | st.floats(-1.0, 1.0) | st.sampled_from([0.0, 1e-9, 1e5, 1e5 + 1e-3, -1e299])


@given(st.lists(st.tuples(VALUES, st.floats(0, 2) | st.floats(0, 0.2)), min_size=1, max_size=30), st.randoms())
@settings(max_examples=200, deadline=None)
def test_projections_give_weights_within_caps(drawn: list[tuple[float, float]], random: object) -> None:
    values, caps = (np.array(column) for column in zip(*drawn, strict=True))
    if np.minimum(caps, 1.0).sum() < 1.0:
        caps = np.append(caps, 1.0)
        values = np.append(values, 0.5)
    order = list(range(len(values)))
    random.shuffle(order)  # type: ignore[attr-defined]
    for project in PROJECTIONS.values():
        weights = project(values, caps)
        assert weights.sum() == pytest.approx(1.0, abs=1e-12)
        assert (weights >= 0).all()
        assert (weights <= caps * (1 + 1e-12)).all()
        assert project(values[order], caps[order]) == pytest.approx(weights[order], abs=1e-9)


@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(0.05, 1)), min_size=2, max_size=8))
@settings(max_examples=60, deadline=None)
def test_each_projection_is_the_best(drawn: list[tuple[float, float]]) -> None:
    """No other weights within the caps, tried along the lines that move weight between two texts, are better."""
    values, caps = (np.array(column) for column in zip(*drawn, strict=True))
    caps = caps / min(1.0, caps.sum())
    best, near = linear(values, caps), l2(values, caps)
    for i, j in itertools.permutations(range(len(values)), 2):
        for weights, worth in ((best, lambda w: w @ values), (near, lambda w: -((w - values) ** 2).sum())):
            moved = weights.copy()
            step = min(weights[i], caps[j] - weights[j]) / 2
            moved[i] -= step
            moved[j] += step
            assert worth(moved) <= worth(weights) + 1e-9


@pytest.mark.parametrize("project", PROJECTIONS.values())
def test_what_gets_nothing_gets_exactly_nothing(project: object) -> None:
    """A weight above 0 makes a text a good example for a page classifier: what rounding leaves over is no reason."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        values, caps = rng.normal(size=15), 5 * rng.dirichlet(np.ones(15))
        weights = project(values, caps)  # type: ignore[operator]
        assert weights.sum() == pytest.approx(1.0, abs=1e-12)
        assert (weights[weights > 0] > 1e-9 * caps[weights > 0]).all()
    assert linear(np.arange(10.0), np.full(10, 0.2)).tolist() == pytest.approx([0] * 5 + [0.2] * 5)
    assert (linear(np.arange(20.0), np.full(20, 0.1)) > 0).sum() == 10  # ten tenths sum to less than 1


def test_caps_that_do_not_do() -> None:
    for project in PROJECTIONS.values():
        with pytest.raises(RecipeError, match=r"2 texts with an estimate sum to 0\.9, .* more epochs"):
            project(np.array([1.0, np.nan, 2.0]), np.array([0.4, 5.0, 0.5]))
        with pytest.raises(RecipeError, match="the cap of text 1 is -1"):
            project(np.array([1.0, 2.0]), np.array([4.0, -1.0]))
        with pytest.raises(RecipeError, match="beyond 1e"):
            project(np.array([np.inf, 2.0]), np.ones(2))


HOLES = X.copy()
HOLES[1, 2] = HOLES[4, 2] = HOLES[1, 0] = np.nan


def test_missing_values_take_a_policy() -> None:
    names = {"models": ["a", "b", "c", "d", "e"], "texts": ["w", "x", "y", "z"]}
    with pytest.raises(RecipeError, match=r"model 'b', text 'w': no loss \(3 missing in all\).*drop_model"):
        observed(HOLES, Y, **names)
    models = observed(HOLES, Y, "drop_model")
    assert (models.models.tolist(), models.texts.tolist()) == ([0, 2, 3], [0, 1, 2, 3])
    assert (models.missing, models.dropped_models, models.dropped_texts) == (3, 2, 0)
    assert models.losses.tolist() == X[[0, 2, 3]].tolist()
    texts = observed(HOLES, Y, "drop_text")
    assert (texts.texts.tolist(), texts.dropped_models, texts.dropped_texts) == ([1, 3], 0, 2)
    pairs = observed(HOLES, Y, "pairwise")
    assert (pairs.missing, pairs.dropped_models, pairs.dropped_texts) == (3, 0, 0)
    unknown = observed(X, np.where(Y == 0.55, np.nan, Y), "pairwise")
    assert (unknown.models.tolist(), unknown.missing, unknown.dropped_models) == ([0, 1, 3, 4], 1, 1)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_pairwise_estimates_each_text_from_the_models_that_have_it(estimator: Estimator) -> None:
    found = estimate(HOLES, Y, estimator)
    for d in range(4):
        rows = ~np.isnan(HOLES[:, d])
        assert found[d] == pytest.approx(estimate(HOLES[rows][:, [d]], Y[rows], estimator)[0])
    two = HOLES.copy()
    two[0, 2] = np.nan
    assert np.isnan(estimate(two, Y, estimator)).tolist() == [False, False, True, False]


def test_a_text_with_one_loss_has_no_estimate() -> None:
    flat = X.copy()
    flat[:, 1] = 1.25
    for estimator in ESTIMATORS:
        assert np.isnan(estimate(flat, Y, estimator)).tolist() == [False, True, False, False]


def test_bad_input_is_named() -> None:
    names = {"models": ["a", "b", "c", "d", "e"], "texts": ["w", "x", "y", "z"]}
    bad = X.copy()
    for value, said in ((-0.5, "-0.5"), (np.inf, "inf")):
        bad[3, 1] = value
        with pytest.raises(RecipeError, match=f"model 'd', text 'x': a loss of {said}; take out"):
            observed(bad, Y, "pairwise", **names)
    with pytest.raises(RecipeError, match=r"2 models .* at least 3"):
        observed(X[:2], Y[:2])
    with pytest.raises(RecipeError, match=r"2 models with losses and errors \(3 left out\)"):
        observed(X, np.array([0.1, 0.2, np.nan, np.nan, np.nan]), "drop_model")
    with pytest.raises(RecipeError, match=r"all 5 models have the error 0\.25"):
        observed(X, np.full(5, 0.25))
    with pytest.raises(RecipeError, match="model 'c': an error of inf"):
        observed(X, np.array([0.1, 0.2, np.inf, 0.3, 0.4]), **names)
    with pytest.raises(RecipeError, match="no text has the losses of all models"):
        observed(np.where(np.eye(5, 4) + np.eye(5, 4, 1) > 0, np.nan, X), Y, "drop_text")


def test_benchmarks_become_one_error() -> None:
    values = np.array([[0.9, 0.5, 0.7, 0.6], [0.2, 0.4, 0.4, np.nan], [5.0, 1e6, 30.0, 7.0]])
    names, models = ["arc", "wrong", "lambada"], ["a", "b", "c", "d"]
    assert benchmark_error(values[:1], names[:1], ["accuracy"]) == pytest.approx([0.1, 0.5, 0.3, 0.4])
    two = benchmark_error(values[:2], names[:2], ["accuracy", "error"])
    assert two == pytest.approx([0.15, 0.45, 0.35, np.nan], nan_ok=True)
    mixed = benchmark_error(values, names, ["accuracy", "error", "perplexity"])
    ranks = np.array([[0.5, 3.5, 1.5, 2.5], [0.5, 2, 2, np.nan], [0.5, 3.5, 2.5, 1.5]]) / [[4], [3], [4]]
    assert mixed == pytest.approx(ranks.mean(axis=0), nan_ok=True)
    with pytest.raises(RecipeError, match="benchmark 'lambada', model 'a': 5 is no accuracy"):
        benchmark_error(values[2:], names[2:], ["accuracy"], models)
    with pytest.raises(RecipeError, match="model 1: -3 is no perplexity"):
        benchmark_error(np.array([[2.0, -3.0]]), ["p"], ["perplexity"])


def test_intervals_are_seeded_and_hold_what_is_true() -> None:
    rng = np.random.default_rng(5)
    skill = rng.random(40)
    x = np.stack([skill + 1, skill + 1 + 0.3 * rng.standard_normal(40) ** 2, 1 + rng.random(40), np.ones(40)], axis=1)
    lower, upper = intervals(x, skill, samples=60, seed=1)
    again = intervals(x, skill, samples=60, seed=1)
    assert np.array_equal([lower, upper], again, equal_nan=True)
    assert (lower[0], upper[0]) == pytest.approx((1, 1))
    assert lower[1] < estimate(x, skill)[1] < upper[1]
    assert lower[2] < 0.0 < upper[2]
    assert np.isnan([lower[3], upper[3]]).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few = intervals(X[:3], Y[:3], samples=30)  # many draws are of one model
    assert (few[0] <= few[1]).all()


def test_held_out_ranks_beside_the_mean_loss() -> None:
    """A text that tells good models from bad among many that tell the opposite: only the estimates find it."""
    rng = np.random.default_rng(2)
    skill = rng.permutation(30) / 30
    x = np.stack([1 + skill] + [1 + 0.4 * (1 - skill) + 0.05 * rng.random(30) for _ in range(6)], axis=1)
    found = held_out(x, skill, estimate)
    assert found.r2 == pytest.approx(1.0)
    assert found.baseline_r2 < 0
    assert found.folds == 5
    projected = held_out(x, skill, lambda losses, errors: linear(estimate(losses, errors), np.ones(7)))
    assert projected.r2 == pytest.approx(1.0)
    holes = np.column_stack([x, np.where(np.arange(30) < 1, np.nan, 1 + skill)])
    assert held_out(holes, skill, estimate) == found
    for models, folds in ((6, 5), (4, 2)):
        with pytest.raises(RecipeError, match="take fewer folds"):
            held_out(x[:models], skill[:models], estimate, folds=folds)
    with pytest.raises(RecipeError, match="missing policy"):
        held_out(np.full((30, 1), np.nan), skill, estimate)
