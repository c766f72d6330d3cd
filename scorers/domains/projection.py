"""From estimates to weights: the distribution that likes the best texts most and takes none beyond its cap.

A cap is the greatest weight that the data allow: max_epochs * tokens / budget. An estimate that is NaN is NULL, and
gets 0. Both projections are of arXiv 2409.05816, appendix; in float64, and they end on every input.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from storage.errors import RecipeError

Array = NDArray[np.float64]
Projection = Literal["linear", "l2"]

ROUNDING = 1e-9
"""How far below 1 the sum of caps may be and still count as 1."""
NOTHING = 1e-12
"""A weight below it is what rounding left over."""
LARGEST = 1e300
"""Estimates beyond it have no differences in float64."""


def linear(estimates: Array, caps: Array) -> Array:
    """Weights [texts] that sum to 1, of which each is at most its cap, with the greatest weighted sum of estimates.

    The best texts get their caps until the weights sum to 1; only the order of estimates matters. Texts that tie
    where it ends share what is left in proportion to their caps. A NULL estimate gets 0. RecipeError: see `l2`.
    """
    known, e, tau = _feasible(estimates, caps)
    order = np.argsort(-e, kind="stable")
    starts = np.flatnonzero(np.diff(e[order], prepend=np.inf) != 0)
    room = np.add.reduceat(tau[order], starts)  # per distinct estimate, best first
    share = np.clip(1.0 - (np.cumsum(room) - room), 0.0, room)
    share[share < NOTHING] = 0.0
    filled = np.divide(share, room, out=np.zeros_like(room), where=room > 0)
    weights = np.zeros(len(e))
    weights[order] = tau[order] * np.repeat(filled, np.diff(starts, append=len(e)))
    return _spread(_settle(weights, tau), known)


def l2(estimates: Array, caps: Array) -> Array:
    """Weights [texts] that sum to 1, of which each is at most its cap, nearest to the estimates: clip(estimate + c).

    The sum of clip(estimate + c, 0, cap) grows with the offset c, and is a straight line between offsets at which a
    text starts or stops to grow. Bisection over those ends after log2(2 texts) steps, whatever the values are.
    A NULL estimate gets 0. RecipeError: caps that are negative or sum to less than 1 over the texts with an estimate,
    or estimates beyond LARGEST.
    """
    known, e, tau = _feasible(estimates, caps)
    pivots = np.tile(np.arange(len(e)), 2)
    heights = np.concatenate([np.zeros(len(e)), tau])
    order = np.argsort(heights - e[pivots], kind="stable")

    def lifted(k: int) -> Array:
        """estimate + c where the pivot's weight is its height: differences, so that large estimates lose nothing."""
        pivot = pivots[order[k]]
        above: Array = e - e[pivot] + heights[order[k]]
        return above

    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        if np.clip(lifted(middle), 0.0, tau).sum() <= 1.0:
            low = middle
        else:
            high = middle
    at = lifted(low)
    growing = int(((at >= 0) & (at < tau)).sum())
    rest = 1.0 - np.clip(at, 0.0, tau).sum()
    weights = np.clip(at + rest / max(1, growing), 0.0, tau)
    return _spread(_settle(weights, tau), known)


PROJECTIONS: dict[Projection, Callable[[Array, Array], Array]] = {"linear": linear, "l2": l2}


def _feasible(estimates: Array, caps: Array) -> tuple[NDArray[np.bool_], Array, Array]:
    """Which estimates are known, those estimates, and their caps: at most 1 each, and 1 or more in sum."""
    known = ~np.isnan(estimates)
    e, tau = np.asarray(estimates, float)[known], np.minimum(np.asarray(caps, float)[known], 1.0)
    for index in np.flatnonzero(~(np.asarray(caps) >= 0))[:1]:
        raise RecipeError(f"the cap of text {index} is {caps[index]:g}; give caps of at least 0")
    if not (np.abs(e) < LARGEST).all():
        raise RecipeError(f"an estimate is beyond {LARGEST:g}; look at the losses and errors that it comes from")
    total = float(tau.sum())
    if total < 1.0 - ROUNDING:
        raise RecipeError(
            f"the caps of the {len(e)} texts with an estimate sum to {total:.6g}, and weights sum to 1; "
            "allow more epochs, a smaller budget, or more texts"
        )
    return known, e, tau / total if total < 1.0 else tau


def _settle(weights: Array, tau: Array) -> Array:
    """What rounding left below or above 1, spread over the room of those that have weight: to have any means chosen."""
    for _ in range(2):
        rest = 1.0 - weights.sum()
        room = np.where(weights > 0, tau - weights, 0.0) if rest > 0 else weights
        if rest and room.sum() > 0:
            weights = np.clip(weights + rest * (room / room.sum()), 0.0, tau)
    return weights


def _spread(weights: Array, known: NDArray[np.bool_]) -> Array:
    spread = np.zeros(len(known))
    spread[known] = weights
    return spread
