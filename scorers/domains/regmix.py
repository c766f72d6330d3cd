"""RegMix: the losses of small runs on random mixtures, regressed on these (Liu et al., ICLR 2025, arXiv 2407.01492).

    sample              mixtures to train on, by the authors' rules
    fit                 what the loss of a mixture will be, by one of two regressors
    rank_correlation    how well runs that were left out are ranked
    optimum             the mixture with the lowest predicted loss, under caps, and not too far from a prior

Two regressors that rank unseen runs alike can recommend quite different mixtures. The log-linear law falls all the way
to a vertex, so that its optimum without caps and prior is one single group; the quadratic one is little bound where no
run was. So both are fitted always, and how far their optima are apart belongs to the result.

A mixture is a share of tokens per group, [groups], and sums to 1. Losses are [runs, targets]; low is good.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from scorers.correlation import estimate
from scorers.domains.projection import ROUNDING
from scorers.domains.weights import natural, temperature, water_fill
from storage.errors import RecipeError

Array = NDArray[np.float64]
Regressor = Literal["log_linear", "quadratic"]

SUM_TOLERANCE = 0.01
"""How far the sum of a mixture may be from 1: the authors' 17 shares, rounded to three digits, are within 0.004."""
LEAST_SHARE = 2e-4
"""Shares are multiples of it: 100 of the 512,000 sequences of the authors' runs."""
MOST = 15.0
"""A share is at most so many times the natural one."""
STRENGTHS = (0.1, 5.0, 15)
"""Of the Dirichlet distribution: from nearly one group to nearly the prior, and how many between them."""
OVERSAMPLED = 100
DELTA = 0.01
"""Where the log-linear law's loss goes over from squares to absolute values, in the unit of the losses."""
RIDGES = np.geomspace(1e-4, 1.0, 13)
"""Penalties that the quadratic regressor chooses from, for features that are shares of tokens."""
STEPS = 400
"""Of the log-linear law's fit at most; the authors' runs take 90."""
FLOOR = 1e-12
"""A share below which a descent does not go, for from 0 it could not come back."""


def sample(shares: Array, runs: int, seed: int = 42) -> Array:
    """Mixtures [runs, groups] for small runs, all different, around the natural shares [groups] of the tokens.

    Dirichlet(strength x prior) with the prior at temperature 2 and a strength drawn anew each time; none has a group at
    more than 15 times its share; shares below 2e-4 become 0, and all are multiples of it before they are made to sum to
    1. RecipeError: a share that is not above 0, or too few mixtures within these bounds.
    """
    if not (shares > 0).all():
        raise RecipeError("a group has no tokens, so no share can be drawn for it; leave it out")
    rng = np.random.default_rng(seed)
    bounds, prior = np.minimum(MOST * natural(shares), 1.0), temperature(shares, 2.0)
    strengths = np.geomspace(*STRENGTHS)
    counts = np.bincount(rng.integers(len(strengths), size=OVERSAMPLED * runs), minlength=len(strengths))
    drawn = np.vstack([rng.dirichlet(prior * s, count) for s, count in zip(strengths, counts, strict=True)])
    drawn = drawn[(drawn <= bounds).all(axis=1)]
    drawn = np.where(drawn < LEAST_SHARE, 0.0, drawn)
    distinct = np.unique(np.round(drawn / drawn.sum(axis=1, keepdims=True) / LEAST_SHARE), axis=0)
    if len(distinct) < runs:
        raise RecipeError(f"only {len(distinct)} different mixtures were drawn; ask for fewer runs than {runs}")
    chosen = distinct[rng.choice(len(distinct), runs, replace=False)]
    return np.asarray(chosen / chosen.sum(axis=1, keepdims=True))


def normalised(mixtures: Array, names: Sequence[str]) -> tuple[Array, Array]:
    """The mixtures [runs, groups] made to sum to 1, and the sums [runs] that they had.

    RecipeError names a run whose shares are negative, missing (NaN), or sum to something that rounding cannot explain.
    """
    sums = mixtures.sum(axis=1)
    for row in np.flatnonzero(~(mixtures >= 0).all(axis=1))[:1]:
        raise RecipeError(
            f"run {names[row]!r}: a share is missing or below 0; write 0 for a group that it did not have"
        )
    for row in np.flatnonzero(np.abs(sums - 1) > SUM_TOLERANCE)[:1]:
        raise RecipeError(
            f"run {names[row]!r}: its shares sum to {sums[row]:.6g}, not 1; put in the groups that were left out, "
            "or divide by the sum where none were"
        )
    return mixtures / sums[:, None], sums


class Fitted(Protocol):
    """What a regressor has learned: the loss of mixtures, mean over targets."""

    def losses(self, mixtures: Array) -> Array:
        """[runs] of mixtures [runs, groups]."""

    def slope(self, mixture: Array) -> Array:
        """[groups]: the loss's derivative by each share, at a mixture [groups] without zeros."""


@dataclass(frozen=True)
class LogLinear:
    """loss = c + exp(sum of t x), per target; the data mixing law (Ye et al., arXiv 2403.16952) with k in t, for shares
    sum to 1. levels: c [targets]; slopes: t [groups, targets]."""

    levels: Array
    slopes: Array

    def losses(self, mixtures: Array) -> Array:
        return np.asarray((self.levels + np.exp(mixtures @ self.slopes)).mean(axis=1))

    def slope(self, mixture: Array) -> Array:
        return np.asarray((np.exp(mixture @ self.slopes) * self.slopes).mean(axis=1))


@dataclass(frozen=True)
class Quadratic:
    """loss = level + sum of s sqrt(x) + sum of t x + sum of q x x: ridge regression of the mean over targets.

    roots: s [groups]; slopes: t [groups]; products: q + q' [groups, groups], symmetric.
    """

    level: float
    roots: Array
    slopes: Array
    products: Array

    def losses(self, mixtures: Array) -> Array:
        linear = np.sqrt(mixtures) @ self.roots + mixtures @ self.slopes
        return np.asarray(self.level + linear + np.einsum("ri,ij,rj->r", mixtures, self.products, mixtures) / 2)

    def slope(self, mixture: Array) -> Array:
        return np.asarray(self.roots / (2 * np.sqrt(mixture)) + self.slopes + self.products @ mixture)


def fit(regressor: Regressor, mixtures: Array, losses: Array) -> Fitted:
    """Fit to mixtures [runs, groups] and losses [runs, targets]."""
    if regressor == "quadratic":
        return _quadratic(mixtures, losses.mean(axis=1))
    laws = np.array([_log_linear(mixtures, target) for target in losses.T])
    return LogLinear(laws[:, 0], laws[:, 1:].T)


REGRESSORS: tuple[Regressor, ...] = ("log_linear", "quadratic")


def _log_linear(x: Array, y: Array) -> Array:
    """(c, t...) [1 + groups] with the least summed Huber loss: Levenberg-Marquardt with Huber's weights.

    Where losses are linear in the shares the best c is -infinity, which the steps go towards until there are no more.
    """
    level = y.min() - 0.1 * (np.ptp(y) + 1e-6)
    law = np.append(level, np.linalg.lstsq(x, np.log(y - level))[0])

    def off(law: Array) -> tuple[Array, float]:
        residual = law[0] + np.exp(np.minimum(x @ law[1:], 300)) - y
        a = np.abs(residual)
        return residual, float(np.where(a < DELTA, a * a / 2, DELTA * (a - DELTA / 2)).sum())

    (residual, value), damping = off(law), 1e-3
    for _ in range(STEPS):
        jacobian = np.column_stack([np.ones(len(x)), np.exp(np.minimum(x @ law[1:], 300))[:, None] * x])
        weighted = jacobian * np.minimum(1.0, DELTA / np.maximum(np.abs(residual), 1e-300))[:, None]
        hessian = weighted.T @ jacobian
        step = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian) + 1e-9), weighted.T @ residual)
        tried, lower = off(law - step)
        if not lower < value:
            damping *= 4
            if damping > 1e12:
                break
            continue
        done = value - lower <= 1e-9 * value
        law, residual, value, damping = law - step, tried, lower, max(damping / 3, 1e-9)
        if done:
            break
    return law


def _quadratic(x: Array, y: Array) -> Quadratic:
    """The penalty, one for all but the level, is the one with the least squared error on runs left out one by one."""
    groups = x.shape[1]
    i, j = np.triu_indices(groups)
    features = np.hstack([np.sqrt(x), x, x[:, i] * x[:, j]])
    means, level = features.mean(axis=0), y.mean()
    u, singular, v = np.linalg.svd(features - means, full_matrices=False)
    along, errors = u.T @ (y - level), []
    for ridge in RIDGES:
        kept = singular**2 / (singular**2 + ridge)
        leverage = 1 / len(y) + u**2 @ kept
        left_out = (y - level - u @ (kept * along)) / np.maximum(1 - leverage, 1e-9)
        errors.append(float(left_out @ left_out))
    ridge = RIDGES[int(np.argmin(errors))]
    found = v.T @ (singular / (singular**2 + ridge) * along)
    products = np.zeros((groups, groups))
    products[i, j] = found[2 * groups :]
    roots, slopes = found[:groups], found[groups : 2 * groups]
    return Quadratic(float(level - means @ found), roots, slopes, products + products.T)


def rank_correlation(regressor: Regressor, mixtures: Array, losses: Array, folds: int = 5, seed: int = 0) -> float:
    """Spearman's rank correlation of predicted and measured mean losses of runs that were left out of the fit.

    Every run is left out once, together with those of its fold. NaN where all have one loss.
    """
    predicted = np.empty(len(losses))
    for fold in np.array_split(np.random.default_rng(seed).permutation(len(losses)), folds):
        rest = np.setdiff1d(np.arange(len(losses)), fold)
        predicted[fold] = fit(regressor, mixtures[rest], losses[rest]).losses(mixtures[fold])
    return spearman(predicted, losses.mean(axis=1))


def spearman(predicted: Array, measured: Array) -> float:
    """Of two arrays [runs]."""
    return float(estimate(predicted[:, None], measured, "spearman")[0])


def optimum(fitted: Fitted, prior: Array, caps: Array, kl: float, starts: Iterable[Array] = ()) -> Array:
    """The mixture x [groups] with the least loss(x) + kl KL(x || prior), each share at most its cap.

    Exponentiated gradient: x exp(-rate slope), brought under the caps by water-filling, which is the projection that
    goes with it. From the prior and from near each of `starts`: only the log-linear law has no local minima.

    Args:
        prior: [groups], sums to 1; a group without prior gets nothing.
        caps: [groups], see water_fill. kl: in the unit of the losses per nat.

    Raises RecipeError where the caps leave no mixture.
    """
    there = (prior > 0) & (caps > 0)
    room = float(caps[there].sum())
    if room < 1.0 - ROUNDING:
        raise RecipeError(
            f"the caps sum to {room:.6g}, and weights sum to 1; allow more epochs, a smaller budget, or train runs "
            "with larger shares of the groups that have more tokens"
        )
    caps = caps / min(room, 1.0)

    def inside(x: Array) -> Array:
        filled = water_fill(natural(np.where(there, np.maximum(x, FLOOR), 0.0)), caps)
        return caps * there if filled is None else filled

    def divergence(x: Array) -> Array:
        return np.log(np.maximum(x, FLOOR) / np.where(there, prior, 1.0))

    def value(x: Array) -> float:
        return float(fitted.losses(x[None])[0]) + kl * float(x @ divergence(x))

    def descended(x: Array) -> Array:
        least, rate = value(x), 1.0
        while rate > 1e-9:
            slope = np.where(there, fitted.slope(np.maximum(x, FLOOR)) + kl * divergence(x), 0.0)
            moved = inside(x * np.exp(np.clip(rate * (x @ slope - slope), -50, 50)))
            if (tried := value(moved)) < least:
                far = least - tried > 1e-12
                x, least, rate = moved, tried, 1.5 * rate
                if not far:
                    break
            else:
                rate /= 2
        return x

    best = min((descended(inside(0.9 * start + 0.1 * prior)) for start in (prior, *starts)), key=value)
    return natural(np.where(best > 2 * FLOOR, best, 0.0))
