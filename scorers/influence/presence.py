"""PRESENCE: weights of micro-batches out of their self-influence (Thakkar et al., EMNLP 2023, arXiv 2311.00913).

Early in training the most novel micro-batches weigh most, later the most stable ones. The paper's offline filter
("sequential") needs no function: it is a mixture that keeps the lowest `self_influence` of a partly trained model.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from storage.errors import RecipeError

STAGES = (1.0, -1.0)
"""The temperatures of the paper's two stages."""
SWITCH = 100_000
"""The last step of its first stage, of a million."""
EQUAL = 1e-6
"""Spread over mean below which scores count as equal."""


def presence_weights(
    scores: ArrayLike, step: int, *, temperatures: tuple[float, float] = STAGES, switch: int = SWITCH
) -> NDArray[np.float64]:
    """Weights [n], which sum to 1, of a batch's n micro-batches at a training step.

        z = (scores - mean) / sqrt(variance + e),   w = softmax(t z),   t = temperatures[0] up to `switch`, then [1]

    `scores`: squared norms of the micro-batches' mean gradients over the chosen layers [n]. The variance is that of
    the population. The paper leaves e open: here it is (EQUAL * mean)^2, so that a change of the loss's unit changes no
    weight, and equal scores weigh equally. A base that sums micro-batches' gradients must multiply by n. With n = 2 the
    z-scores are always -1 and 1, whatever the gap.

    RecipeError for no scores, and for any that is negative or not finite.
    """
    found = np.asarray(scores, np.float64)
    if found.ndim != 1 or not found.size or not np.isfinite(found).all() or (found < 0).any():
        raise RecipeError("scores: squared norms, one per micro-batch, finite and not negative, are needed")
    largest = found.max()
    found = found / largest if largest > 0 else found  # squares of large numbers overflow
    mean = found.mean()
    spread = np.hypot(found.std(), EQUAL * mean)
    z = (found - mean) / spread if spread > 0 else np.zeros_like(found)
    exponent = temperatures[0 if step <= switch else 1] * z
    weights = np.exp(exponent - exponent.max())
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares
