"""Perplexity correlations: which texts have losses that rank models as a benchmark does (arXiv 2409.05816, ICLR 2025).

X [models, texts] are losses, in bits per byte; y [models] are benchmark errors; low is good in both. An estimate is
high for a text on which the better models have the lower losses. With N models, sgn the sign, r_i the rank of y_i and
R_id that of X_id in its column, 1 to N, ranks of equal values averaged:

    product     mean over i of y_i X_id
    sign        2 / (N (N - 1)) sum over i < j of sgn(y_j - y_i) (X_jd - X_id)
    sign_cdf    the same with R / N for X
    sign_sign   the same with sgn(X_jd - X_id): Kendall's tau-a
    spearman    Pearson's correlation of R_d and r; without ties 1 - 6 sum (r_i - R_id)^2 / (N (N^2 - 1))

The authors' loops over pairs have closed forms. With s_j = sum over i of sgn(y_j - y_i) = 2 r_j - N - 1, sign is
2 / (N (N - 1)) s X, sign_cdf the same with R / N, and spearman s R over the norms: a vector times a matrix. Where
nothing ties, sign_cdf is (N + 1) / (3 N) times spearman. Averaged ranks do not depend on the order of models; the
authors' ordinal ones do, and differ from one processor to another.

In arrays NaN stands for NULL: in losses and errors "not measured", which takes a policy, and in an estimate "cannot be
computed": fewer than three models, or models that all have one loss there or all one error.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from storage.errors import RecipeError

Array = NDArray[np.float64]
Estimator = Literal["product", "sign", "sign_cdf", "sign_sign", "spearman"]
Measure = Literal["error", "accuracy", "perplexity"]
Missing = Literal["drop_model", "drop_text", "pairwise"]

LEAST = 3
"""Models below which nothing is estimated: two are always in perfect order or perfect disorder."""
BLOCK = 2048
"""Texts that are ranked at once: their ranks stay in a processor's cache."""


@dataclass(frozen=True)
class Observed:
    """Losses and errors that an estimate can be made from, and what was left out to get there.

    losses: [models, texts], NaN only under "pairwise"; errors: [models].
    models, texts: indices of what was kept. missing: losses and errors that were not measured.
    """

    losses: Array
    errors: Array
    models: NDArray[np.intp]
    texts: NDArray[np.intp]
    missing: int
    dropped_models: int
    dropped_texts: int


def observed(
    losses: Array,
    errors: Array,
    missing: Missing | None = None,
    models: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> Observed:
    """Check losses [models, texts] and errors [models], and do with what is missing (NaN) as the policy says.

    drop_model: models that lack a loss are left out. drop_text: texts that lack one. pairwise: nothing is; each text
    is estimated from the models that have it, so that estimates rest on different models. A model without an error is
    left out under any policy. RecipeError, by the names of `models` and `texts`: a value is missing and no policy is
    given; a loss is negative or infinite; an error is infinite or all are equal; fewer than three models remain.
    """
    losses, errors = np.asarray(losses, float), np.asarray(errors, float)
    if losses.ndim != 2 or errors.shape != losses.shape[:1]:
        raise ValueError(f"losses {losses.shape} and errors {errors.shape} must be [models, texts] and [models]")

    def at(row: int, column: int | None = None) -> str:
        model = f"model {models[row] if models else int(row)!r}"
        return model if column is None else f"{model}, text {texts[column] if texts else int(column)!r}"

    for row, column in np.argwhere(np.isinf(losses) | (losses < 0))[:1]:
        raise RecipeError(f"{at(row, column)}: a loss of {losses[row, column]:g}; take out the model or the text")
    for row in np.flatnonzero(np.isinf(errors))[:1]:
        raise RecipeError(f"{at(row)}: an error of {errors[row]:g}; take out the model")
    holes, unknown = np.isnan(losses), np.isnan(errors)
    count = int(holes.sum() + unknown.sum())
    if count and missing is None:
        where = at(*map(int, np.argwhere(holes)[0])) if holes.any() else at(int(unknown.argmax()))
        raise RecipeError(
            f"{where}: {'no loss' if holes.any() else 'no error'} ({count} missing in all); measure it, or say "
            'missing = "drop_model", "drop_text" or "pairwise"'
        )
    rows, columns = np.ones(len(errors), bool), np.ones(losses.shape[1], bool)
    rows[unknown | (holes.any(axis=1) if missing == "drop_model" else False)] = False
    if missing == "drop_text":
        columns[holes[rows].any(axis=0)] = False
    if rows.sum() < LEAST:
        raise RecipeError(
            f"{rows.sum()} models with losses and errors ({(~rows).sum()} left out); "
            f"give at least {LEAST}, or another policy for missing values"
        )
    if not columns.any():
        raise RecipeError("no text has the losses of all models; measure them, or take another policy than drop_text")
    if np.ptp(errors[rows]) == 0:
        raise RecipeError(f"all {rows.sum()} models have the error {errors[rows][0]:g}; give models that differ")
    kept = np.flatnonzero(rows), np.flatnonzero(columns)
    dropped = int((~rows).sum()), int((~columns).sum())
    return Observed(losses[np.ix_(*kept)], errors[rows], *kept, count, *dropped)


def benchmark_error(
    values: Array, benchmarks: Sequence[str], measures: Sequence[Measure], models: Sequence[str] = ()
) -> Array:
    """One error per model [models] out of benchmarks [benchmarks, models]; low is good, NaN is NULL.

    An accuracy a is the error 1 - a; both are from 0 to 1, and their mean is taken. A perplexity has no scale in common
    with them and would outweigh them all: where there is one, the mean is over ranks, (rank - 1/2) / models, of every
    benchmark. A model that lacks a benchmark has no error. RecipeError: a value that its measure cannot have.
    """
    errors = np.array(values, float)
    for row, (benchmark, measure) in enumerate(zip(benchmarks, measures, strict=True)):
        wrong = errors[row] < 0 if measure == "perplexity" else (errors[row] < 0) | (errors[row] > 1)
        for column in np.flatnonzero(wrong | np.isinf(errors[row]))[:1]:
            model = models[column] if models else int(column)
            raise RecipeError(
                f"benchmark {benchmark!r}, model {model!r}: {errors[row, column]:g} is no {measure}; "
                "errors and accuracies are from 0 to 1, perplexities above 0"
            )
        if measure == "accuracy":
            errors[row] = 1.0 - errors[row]
    if "perplexity" in measures:
        for row in errors:
            there = ~np.isnan(row)
            row[there] = (_doubled_ranks(row[there, None])[0] - 1.0) / (2 * there.sum())
    return np.asarray(errors.mean(axis=0))


def estimate(losses: Array, errors: Array, estimator: Estimator = "spearman") -> Array:
    """Estimates [texts] from losses [models, texts] and errors [models]; high is good; NaN is NULL.

    Losses that are NaN are left out text by text.
    """
    values = np.full(losses.shape[1], np.nan)
    for rows, columns in _complete(losses):
        if rows.sum() < LEAST or np.ptp(errors[rows]) == 0:
            continue
        whole = bool(rows.all())
        y = errors[rows]
        for part in (columns[first : first + BLOCK] for first in range(0, len(columns), BLOCK)):
            run = slice(part[0], part[-1] + 1)  # neighbours need no copy
            x = losses[:, run] if whole and len(part) == run.stop - run.start else losses[np.ix_(rows, part)]
            values[part] = _estimate(x, y, estimator)
            alike = np.flatnonzero(x[0] == x[1])
            values[part[alike[np.ptp(x[:, alike], axis=0) == 0]]] = np.nan
    return values


def _complete(losses: Array) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.intp]]]:
    """Per set of models that share the texts they are measured on: that set [models], and those texts."""
    there = ~np.isnan(losses)
    if there.all():
        yield np.ones(len(losses), bool), np.arange(losses.shape[1])
        return
    patterns, which = np.unique(np.packbits(there, axis=0), axis=1, return_inverse=True)
    order = np.argsort(which.ravel(), kind="stable")
    ends = np.cumsum(np.bincount(which.ravel(), minlength=patterns.shape[1]))
    for pattern, columns in zip(patterns.T, np.split(order, ends[:-1]), strict=True):
        yield np.unpackbits(pattern, count=len(losses)).astype(bool), columns


def _estimate(x: Array, y: Array, estimator: Estimator) -> Array:
    n = len(y)
    if estimator == "product":
        return np.asarray(y @ x / n)
    s = _doubled_ranks(y[:, None])[0].astype(float) - n - 1
    if estimator == "sign":
        return np.asarray(2 * (s @ x) / (n * (n - 1)))
    if estimator == "sign_sign":
        return _tau(x, y)
    ranks = _doubled_ranks(x)
    dot: Array = ranks.astype(float) @ s  # s sums to 0, so the ranks need not be centred; integers, so exact
    if estimator == "sign_cdf":
        return dot / (n * n * (n - 1))
    centred = ranks.astype(float) - n - 1
    squares = np.einsum("dn,dn->d", centred, centred)
    correlation: Array = np.divide(dot, np.sqrt(squares * (s @ s)), out=np.full(len(dot), np.nan), where=squares > 0)
    return correlation


def _doubled_ranks(x: Array) -> NDArray[np.unsignedinteger]:
    """Twice the averaged ranks of each column of x [N, D], as rows: [D, N], in integers as small as will do.

    Plain sorts of integers, which processors do many at a time, in place of argsort and a scatter: of the losses' bits
    with the model in the lowest ones, which gives models in the order of loss; then of (model, rank).
    """
    rows = np.ascontiguousarray(x.T) + 0.0  # -0.0 becomes 0.0
    d, n = rows.shape
    low = (1 << (n - 1).bit_length()) - 1
    keys = rows.view(np.int64)
    keys ^= (keys >> 63) & np.iinfo(np.int64).max  # negative floats rise with falling bits
    keys &= ~low
    keys |= np.arange(n)
    keys.sort(axis=1)
    starts = np.ones((d, n), bool)
    np.greater((keys[:, 1:] ^ keys[:, :-1]).view(np.uint64), low, out=starts[:, 1:])
    kind = np.min_scalar_type(2 * n)
    ranks = np.arange(2, 2 * n + 2, 2, dtype=kind)
    if not starts.all():
        again = np.flatnonzero(~starts)
        column, model = again // n, keys.ravel() & low
        if (x[model[again], column] != x[model[again - 1], column]).any():  # they differ in bits that made room
            return _doubled_ranks(np.unique(x, return_inverse=True)[1].reshape(x.shape).astype(float))
        first = np.flatnonzero(starts)
        size = np.diff(first, append=d * n)
        ranks = np.repeat((2 * (first % n) + size + 1).astype(kind), size).reshape(d, n)
    bits = 8 * kind.itemsize
    places = (keys & low).astype(np.min_scalar_type(n << bits))
    places <<= bits
    places |= ranks
    places.sort(axis=1)
    by_model: NDArray[np.unsignedinteger] = places.astype(kind)  # without the model's bits
    return by_model


def _tau(x: Array, y: Array) -> Array:
    """Kendall's tau-a of each column of x [N, D] with y: pairs ordered alike less pairs ordered otherwise, of all."""
    order = y.argsort(kind="stable")
    n, y = len(y), y[order]
    above = np.searchsorted(y, y, side="right")  # the first model that is worse than model i
    ranks = np.ascontiguousarray(_doubled_ranks(x).T)[order]
    untied = n * (n + 1) * (4 * n + 2) / 3  # 4 (1 + 4 + 9 + ...), which ties make less
    tied = bool((np.square(ranks, dtype=float).sum(axis=0) < untied).any())
    count = np.min_scalar_type(n)
    alike = np.zeros(x.shape[1], np.int64)
    for i in range(n - 1):
        worse = ranks[above[i] :]
        alike += np.add.reduce((worse > ranks[i]).view(np.uint8), axis=0, dtype=count)
        alike -= np.add.reduce((worse < ranks[i]).view(np.uint8), axis=0, dtype=count) if tied else 0
    if not tied:  # who does not rank above ranks below
        alike = 2 * alike - (n - above).sum()
    tau: Array = 2 * alike / (n * (n - 1))
    return tau


def intervals(
    losses: Array,
    errors: Array,
    estimator: Estimator = "spearman",
    *,
    level: float = 0.95,
    samples: int = 200,
    seed: int = 0,
) -> tuple[Array, Array]:
    """Per text the lower and upper end of the estimate's bootstrap percentile interval over models; NaN is NULL.

    Models are drawn with replacement, the same draws for every text. Models of one family are no independent
    observations, so the intervals are too narrow rather than too wide. Draws without an estimate do not count.
    """
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(errors), (samples, len(errors)))
    lower, upper = np.full((2, losses.shape[1]), np.nan)
    tails = [(1 - level) / 2, (1 + level) / 2]
    for first in range(0, losses.shape[1], BLOCK):
        part = slice(first, first + BLOCK)
        found = np.stack([estimate(losses[draw, part], errors[draw], estimator) for draw in draws])
        some = ~np.isnan(found).all(axis=0)
        lower[part][some], upper[part][some] = np.nanquantile(found[:, some], tails, axis=0)
    return lower, upper


@dataclass(frozen=True)
class HeldOut:
    """R^2 of predicted ranks of held-out models, mean over folds: by the estimates, and by mean loss.

    Both are at most 1, and below 0 when worse than no prediction. Where they are equal the estimates add nothing to
    "the model with the lower loss is better".
    """

    r2: float
    baseline_r2: float
    folds: int


def held_out(
    losses: Array, errors: Array, weigh: Callable[[Array, Array], Array], *, folds: int = 5, seed: int = 42
) -> HeldOut:
    """Predict how held-out models rank by losses @ weigh(losses, errors of the others), K-fold over models.

    `weigh` gives weights [texts]: estimates, as the authors' script has it, or projected ones, as the paper. Only texts
    that every model has take part. The folds are those of scikit-learn's KFold(folds, shuffle=True, random_state=seed).
    RecipeError: fewer than two models in a fold, or fewer than three outside it.
    """
    n = len(errors)
    if not 2 <= folds <= n // 2 or n - -(-n // folds) < LEAST:
        raise RecipeError(f"{folds} folds of {n} models; a fold needs 2 models and leaves {LEAST}: take fewer folds")
    losses = losses[:, ~np.isnan(losses).any(axis=0)]
    if not losses.shape[1]:
        raise RecipeError("no text has the losses of all models, so none can be held out; take another missing policy")
    scores = []
    for fold in np.array_split(np.random.RandomState(seed).permutation(n), folds):
        rest = np.setdiff1d(np.arange(n), fold)
        weights = np.nan_to_num(weigh(losses[rest], errors[rest]))
        truth = _doubled_ranks(errors[fold, None])[0].astype(float)
        spread = ((truth - truth.mean()) ** 2).sum()
        if not spread:
            continue  # all models of the fold are equally good
        for predicted in (losses[fold] @ weights, losses[fold].mean(axis=1)):
            wrong = truth - _doubled_ranks(predicted[:, None])[0].astype(float)
            scores.append(1.0 - wrong @ wrong / spread)
    if not scores:
        raise RecipeError("the models of every fold have one error; give models that differ")
    r2, baseline = np.reshape(scores, (-1, 2)).mean(axis=0).tolist()
    return HeldOut(r2, baseline, folds)
