"""RegMix: laws of the sampled mixtures, of the two regressors and of their optima."""

import numpy as np
import pytest

from scorers.domains.regmix import (
    LEAST_SHARE,
    REGRESSORS,
    LogLinear,
    fit,
    normalised,
    optimum,
    rank_correlation,
    sample,
    spearman,
)
from storage.errors import RecipeError

SHARES = np.array([0.5, 0.2, 0.2, 0.08, 0.02])
# The methods page's example of the data mixing law: 2 + 1.5 exp(t x), k goes into t since shares sum to 1.
LAW = LogLinear(np.array([2.0]), np.log(1.5) + np.array([[-1.2], [0.3], [-0.1]]))


def mixtures(runs: int = 60, groups: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(groups), runs)


def test_sampled_mixtures_keep_the_authors_rules():
    found = sample(SHARES, 64, seed=1)
    assert found.shape == (64, 5)
    assert found.sum(axis=1) == pytest.approx(np.ones(64))
    assert (found[:, 4] <= 15 * 0.02 + LEAST_SHARE).all()
    assert ((found == 0) | (found >= 0.99 * LEAST_SHARE)).all()
    assert (found == 0).any()
    assert len(np.unique(found, axis=0)) == 64
    assert (found == sample(SHARES, 64, seed=1)).all()
    assert (found != sample(SHARES, 64, seed=2)).any()
    # about the square roots of the shares on average: flatter than the shares themselves
    assert SHARES[0] * 0.6 < found[:, 0].mean() < SHARES[0]


def test_what_cannot_be_sampled_is_refused():
    with pytest.raises(RecipeError, match=r"a group has no tokens"):
        sample(np.array([1.0, 0.0]), 4)
    with pytest.raises(RecipeError, match=r"only 1 different mixtures were drawn; ask for fewer runs than 3"):
        sample(np.array([1.0]), 3)


def test_shares_that_rounding_explains_are_made_to_sum_to_one():
    found, sums = normalised(np.array([[0.996, 0.0], [0.5, 0.503]]), ["a", "b"])
    assert found.tolist() == [[1.0, 0.0], pytest.approx([0.498504, 0.501496], abs=1e-6)]
    assert sums == pytest.approx([0.996, 1.003])
    with pytest.raises(RecipeError, match=r"run 'human': its shares sum to 0\.7868, not 1; put in the groups"):
        normalised(np.array([[0.5, 0.5], [0.5, 0.2868]]), ["ok", "human"])
    for wrong in (-0.1, np.nan):
        with pytest.raises(RecipeError, match=r"run 'a': a share is missing or below 0"):
            normalised(np.array([[wrong, 1.1]]), ["a"])


def test_the_log_linear_law_by_the_worked_example():
    at = np.array([[1, 0, 0], [0.5, 0.3, 0.2], [0, 1, 0]])
    losses = [2.45179132, 2.88290745, 4.02478821]
    assert LAW.losses(at) == pytest.approx(losses)
    x = mixtures()
    found = fit("log_linear", x, LAW.losses(x)[:, None])
    assert found.losses(at) == pytest.approx(losses, abs=1e-4)


def test_the_log_linear_law_does_not_follow_an_outlier():
    x = mixtures()
    y = LAW.losses(x)
    y[7] += 5
    assert fit("log_linear", x, y[:, None]).losses(x) == pytest.approx(LAW.losses(x), abs=0.02)


def test_the_quadratic_regressor_finds_what_it_can_express():
    x = mixtures(80)
    y = 3 + np.sqrt(x) @ [-0.4, 0.1, 0.2] + 2 * x[:, 0] * x[:, 1] - x[:, 2] ** 2
    found, unseen = fit("quadratic", x, y[:, None]), mixtures(40, seed=1)
    expected = 3 + np.sqrt(unseen) @ [-0.4, 0.1, 0.2] + 2 * unseen[:, 0] * unseen[:, 1] - unseen[:, 2] ** 2
    assert found.losses(unseen) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("regressor", REGRESSORS)
def test_slopes_are_those_of_the_losses_and_targets_are_averaged(regressor):
    x = mixtures(40)
    y = np.stack([LAW.losses(x), 4 - x[:, 1] + x[:, 2] ** 2], axis=1)
    found, at, step = fit(regressor, x, y), np.array([0.3, 0.6, 0.1]), 1e-6
    ends = [found.losses(at + sign * step * np.eye(3)) for sign in (1, -1)]
    assert found.slope(at) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-7)
    assert found.losses(x) == pytest.approx(y.mean(axis=1), abs=0.2)


@pytest.mark.parametrize("regressor", REGRESSORS)
def test_unseen_runs_are_ranked_where_losses_follow_mixtures_and_only_there(regressor):
    x, rng = mixtures(60), np.random.default_rng(3)
    assert rank_correlation(regressor, x, LAW.losses(x)[:, None]) > 0.97
    assert abs(rank_correlation(regressor, x, rng.normal(3, 0.1, (60, 1)))) < 0.4
    assert spearman(np.array([1.0, 2, 3]), np.array([5.0, 7, 6])) == pytest.approx(0.5)


PRIOR = np.array([0.2, 0.5, 0.3])


def test_a_log_linear_law_falls_to_its_vertex_unless_caps_or_a_prior_hold_it():
    assert optimum(LAW, PRIOR, np.ones(3), 0.0) == pytest.approx([1, 0, 0], abs=1e-6)
    assert optimum(LAW, PRIOR, np.array([0.5, 0.9, 0.2]), 0.0) == pytest.approx([0.5, 0.3, 0.2], abs=1e-6)
    held = optimum(LAW, PRIOR, np.ones(3), 0.5)
    slope = LAW.slope(held) + 0.5 * np.log(held / PRIOR)
    assert slope == pytest.approx(np.full(3, slope.mean()), abs=1e-4)  # no exchange of shares lowers the sum
    assert optimum(LAW, PRIOR, np.ones(3), 1e6) == pytest.approx(PRIOR, abs=1e-5)


def test_an_optimum_is_no_worse_than_any_mixture_that_the_caps_allow():
    x = mixtures(80)
    hilly = fit("quadratic", x, (3 + 2 * x[:, 0] * x[:, 1] - x[:, 2] ** 2 + 0.3 * np.sqrt(x[:, 0]))[:, None])
    caps, starts = np.array([0.9, 0.7, 0.5]), x[:8]
    found = optimum(hilly, PRIOR, caps, 0.01, starts)
    tried = mixtures(20_000, seed=5)
    tried = tried[(tried <= caps).all(axis=1)]
    divergence = (tried * np.log(tried / PRIOR)).sum(axis=1)
    own = found[found > 0] @ np.log(found[found > 0] / PRIOR[found > 0])
    assert (found <= caps + 1e-9).all()
    assert found.sum() == pytest.approx(1)
    assert hilly.losses(found[None])[0] + 0.01 * own <= (hilly.losses(tried) + 0.01 * divergence).min() + 1e-6


def test_a_group_without_tokens_gets_nothing_and_caps_must_hold_a_mixture():
    found = optimum(LAW, np.array([0.0, 0.5, 0.5]), np.ones(3), 0.0)
    assert found == pytest.approx([0, 0, 1], abs=1e-6)
    with pytest.raises(RecipeError, match=r"the caps sum to 0\.9, and weights sum to 1; allow more epochs"):
        optimum(LAW, PRIOR, np.array([0.3, 0.3, 0.3]), 0.0)
    assert optimum(LAW, PRIOR, np.array([0.2, 0.5, 0.3]), 0.0) == pytest.approx(PRIOR)
