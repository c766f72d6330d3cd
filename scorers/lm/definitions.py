"""The measures of a document as their authors define them: statistics of its n >= 1 predicted tokens in, a number out.

With lp_t the natural log-probability of token t, and the other statistics of a token as in scorers.lm.statistics:

    nats               -sum lp
    nats_per_token     -mean lp
    bits_per_byte      -sum lp / (ln 2 * UTF-8 bytes of those same tokens)
    loss quantile q    quantile of -lp, between two tokens in proportion
    min_k              mean of the max(1, floor(k n)) smallest lp           Shi et al., ICLR 2024, section 3
    min_k_plus_plus    mean of the max(1, floor(k n)) smallest z_scores     Zhang et al., ICLR 2025, section 4
    zlib_ratio         mean lp / bytes of the compressed text               Carlini et al. 2021; as Shi et al. code it
    lowercase_ratio    loss of the text in lower case / loss                Carlini et al. 2021
    token_entropy      mean entropy of the predictions
    el2n               mean |p - onehot(y)|                                 Paul et al. 2021; Marion et al. 2023
    top_k_rank_loss    median -lp of the tokens of rank < k                 SALT, Rawat et al. 2024

Min-K%, Min-K%++, zlib and lower case ask whether the text was in the training data; their member end is the high one.
On members and non-members of one distribution they are near chance: hints, no verdicts.
"""

import math
import zlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
OutsideTopK = Literal["drop", "zero"]


def nats(log_probs: Array) -> float:
    """Loss of the whole text, in nats."""
    return -float(log_probs.sum(dtype=np.float64))


def nats_per_token(log_probs: Array) -> float:
    """Mean loss of a token, in nats."""
    return -float(log_probs.mean(dtype=np.float64))


def bits_per_byte(log_probs: Array, n_bytes: int) -> float | None:
    """Bits that the model needs for a byte of the tokens' text; None for no bytes. Compares across tokenizers."""
    return nats(log_probs) / (math.log(2) * n_bytes) if n_bytes else None


def loss_quantile(log_probs: Array, quantile: float) -> float:
    """The loss, in nats, that the share `quantile` of the tokens does not exceed; linear between two tokens."""
    return float(np.quantile(-log_probs.astype(np.float64), quantile))


def min_k(values: Array, k: float) -> float:
    """Mean of the floor(k n) smallest values: of log-probabilities it is Min-K%, of z-scores Min-K%++.

    At least one token is taken; the authors' code takes none from fewer than 1 / k tokens and returns NaN. High is the
    member end, as in the papers; the first authors' code negates it.
    """
    n = max(1, math.floor(k * values.size + 1e-9))  # 0.29 * 100 is 28.999...
    return float(np.partition(values, n - 1)[:n].mean(dtype=np.float64))


def compressed_bytes(text: str) -> int:
    """Bytes of the text as zlib compresses it at its default level; 8 for no text."""
    return len(zlib.compress(text.encode()))


def zlib_ratio(log_probs: Array, compressed: int) -> float:
    """Mean log-probability over the bytes of the compressed text: a mean over a total, as the authors define it."""
    return -nats_per_token(log_probs) / compressed


def lowercase_ratio(log_probs: Array, lower: Array) -> float | None:
    """Loss of the text in lower case over its loss; None where the loss is 0. Shi et al. negate it."""
    loss = nats_per_token(log_probs)
    return nats_per_token(lower) / loss if loss else None


def mean(values: Array) -> float:
    return float(values.mean(dtype=np.float64))


def top_k_rank_loss(log_probs: Array, ranks: Array, k: int, outside: OutsideTopK) -> float | None:
    """Median loss, in nats, of the tokens that are among the model's k likeliest; None where no token is.

    The paper masks the others, which can be read in two ways: they are left out ("drop"), or they count as
    losses of 0 ("zero").
    """
    inside = ranks < k
    if not inside.any():
        return None
    losses = -log_probs.astype(np.float64)
    return float(np.median(losses[inside] if outside == "drop" else np.where(inside, losses, 0.0)))
