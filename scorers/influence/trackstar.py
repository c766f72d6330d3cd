"""TrackStar's mixed normalisation: what all gradients have in common counts less, in the projected space.

    R = m R_target + (1 - m) R_index         each E[g g^T] over projected gradients, block by block of the layers
    score = cosine of (R + d I)^-1/2 g  and  (R + d I)^-1/2 q                     -1 to 1, high is good

Chang et al. 2024, arXiv 2410.17413, section 3 and appendix A.1.3: m is chosen so that the two spectra, m R_target and
(1 - m) R_index, cross at their k-th eigenvalue; what the target's documents share (a template) is in the first k. The
roots go on both sides, since both are then scaled to length 1; the inverse on one side is another score and another
order. The paper first divides gradients by the root of the optimizer's second moment (scorers.influence.adam).

That is made for a target each of whose texts asks for facts of its own. Where the target is a domain, and what its
texts share is what is looked for, take m = 0: what all documents share counts less, what the domain shares does not.
(14 domains, 32 target texts of one, 560 documents, a model of 1M: of the first 7%, 0.51 were of the domain with m = 0,
0.43 with the paper's m, 0.34 without R, 0.07 at random; with 4 target texts 0.36, 0.25, 0.29.)

All of it is numpy on rows of a gradient index: no model is needed.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scorers.influence.curvature import DAMPING
from scorers.influence.projection import Projection
from storage.errors import RecipeError

SHARE = 1000 / 65536
"""The paper's k, over the numbers of its rows."""
ROWS = 2048
"""Of an index, multiplied at once: 64 MiB of float64 at 4,096 numbers a row."""

Blocks = tuple[NDArray[np.float64], ...]
"""One symmetric matrix per block of a row."""


@dataclass(frozen=True)
class Whitening:
    """R^-1/2, by blocks.

    Attributes:
        at: the columns of a row that each block takes.
        roots: a symmetric matrix for each.
        mixing: the target's share in R, 0 to 1.
    """

    at: tuple[slice, ...]
    roots: Blocks
    mixing: float

    def __call__(self, rows: NDArray[np.floating]) -> NDArray[np.float32]:
        """Rows [n, d] whitened and at length 1, float32; zeros stay zeros. The rows' own lengths do not matter."""
        found = np.zeros(rows.shape, np.float32)
        roots = [root.astype(np.float32) for root in self.roots]
        for start in range(0, len(rows), ROWS):
            some, white = rows[start : start + ROWS].astype(np.float32), found[start : start + ROWS]
            for columns, root in zip(self.at, roots, strict=True):
                white[:, columns] = some[:, columns] @ root
            lengths = np.linalg.norm(white, axis=1, keepdims=True)
            white /= np.where(lengths > 0, lengths, 1)
        return found


def blocks(projection: Projection) -> tuple[slice, ...]:
    """The columns of each block of a projection's rows: one a layer, or the one that all are added into."""
    return tuple({columns.start: columns for columns in projection.at.values()}.values())


def second_moments(rows: Iterable[NDArray[np.floating]], at: Sequence[slice]) -> Blocks:
    """E[g g^T] over all rows for each block `at` of them.

    `rows`: pieces [n, d] of an index, at the gradients' own lengths; of them only ROWS stand in memory as float64.
    RecipeError when there is no row or one is not finite.
    """
    sums: Blocks = tuple(np.zeros((columns.stop - columns.start,) * 2) for columns in at)
    n = 0
    for piece in rows:
        for start in range(0, len(piece), ROWS):
            some = piece[start : start + ROWS].astype(np.float64)
            n += len(some)
            for columns, total in zip(at, sums, strict=True):
                block = some[:, columns]
                total += block.T @ block
    if not n or not all(np.isfinite(total).all() for total in sums):
        raise RecipeError("second moments need at least one projected gradient, and finite ones; give others")
    return tuple(total / n for total in sums)


def mixing(target: Blocks, index: Blocks, components: int | None = None) -> float:
    """The target's share m: m t_k = (1 - m) r_k, of the k-th largest eigenvalues of all blocks of each together.

    components: k; None for the paper's share of them, SHARE. A target of n documents has at most n eigenvalues a block
    that are not zero. k is taken no larger than the rank of either side: beyond it m would be 0 or 1, and R singular.
    """
    spectra = [np.sort(np.concatenate([np.linalg.eigvalsh(b) for b in side]))[::-1] for side in (target, index)]
    ranks = [int((s > s[0] * len(s) * np.finfo(np.float64).eps).sum()) for s in spectra]
    if not min(ranks):
        raise RecipeError("mixed normalisation needs gradients that are not all zero; give other documents or layers")
    wanted = math.ceil(SHARE * len(spectra[0])) if components is None else components
    t, r = (s[min(wanted, *ranks) - 1] for s in spectra)
    return float(r / (t + r))


def whitening(
    target: Blocks,
    index: Blocks,
    at: Sequence[slice],
    *,
    share: float | None = None,
    components: int | None = None,
    damping: float = DAMPING,
) -> Whitening:
    """(R + d I)^-1/2 of the two sides' second moments; d is `damping` times the mean eigenvalue of each block.

    share: the target's in R, 0 to 1; None for that of `mixing`, with its `components`.

    A block in which all gradients are zero stays so. RecipeError as `mixing`, and where with no damping R is singular.
    """
    m = mixing(target, index, components) if share is None else share
    roots = tuple(_root(m * t + (1 - m) * r, damping) for t, r in zip(target, index, strict=True))
    return Whitening(tuple(at), roots, m)


def _root(matrix: NDArray[np.float64], damping: float) -> NDArray[np.float64]:
    if not matrix.any():
        return matrix
    values, vectors = np.linalg.eigh(matrix)
    values = values.clip(min=0)
    values += damping * values.mean()
    if damping < 0 or values[0] <= 0:
        raise RecipeError("damping: the gradients' second moments are singular; raise it")
    root: NDArray[np.float64] = (vectors / np.sqrt(values)) @ vectors.T
    return root
