"""What a row of logits says of its target: the reductions of the vocabulary, in float32, a few passes over each row.

A row of logits z_1..z_V predicts the token y. With m = max z, p = softmax(z) and s = sum exp(z - m):

    log_prob   log p_y = (z_y - m) - log s
    entropy    -mu = log s - E1              mu = sum p log p;    E1 = sum p (z - m)
    z_score    (log p_y - mu) / sigma        sigma^2 = sum p (log p)^2 - mu^2 = E2 - E1^2;    E2 = sum p (z - m)^2
    el2n       |p - onehot(y)|               = sqrt((sum_{v != y} p_v)^2 + sum_{v != y} p_v^2)
    rank       how many logits are greater than the target's: 0 where it is the likeliest

The variance does not change when a row is shifted, so no log-probability of another token than the target is ever
formed, and [tokens, vocabulary] is only held for the few rows that fit into a cache. Degenerate rows:

    uniform    log p_y - mu is formed as (z_y - m) - E1, which is exactly 0: z_score 0, not 0/0
    one-hot    sigma is at least SIGMA: the z_score is large, and finite
    -inf       (a masked token of the vocabulary) is lifted to FLOOR below the maximum, where p is 0 and 0 * z is 0;
               a masked target keeps log_prob -inf, and its text has no score
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Statistic = Literal["log_prob", "entropy", "z_score", "el2n", "rank"]

SIGMA = 1e-6
"""Least standard deviation of a row's log-probabilities, in nats."""
FLOOR = 1e4
"""Nats below the row's maximum at which a logit is cut: exp of it is 0 in float32 from 104 on."""
ROWS = {"cpu": 1 << 19, "cuda": 1 << 28}
"""Float32 numbers of a temporary: 2 MiB of a CPU's cache; a GPU has no use for small pieces."""


def token_statistics(
    logits: "torch.Tensor", targets: "torch.Tensor", wanted: Sequence[Statistic] = ("log_prob",)
) -> "torch.Tensor":
    """The wanted statistics [len(wanted), T], float32, of targets [T] under their rows of logits [T, V].

    The logits may be of any floating type, and are left as they are. Only what is wanted is computed.
    """
    import torch

    if not set(wanted) - {"log_prob"}:
        return _log_probs(logits, targets).expand(len(wanted), -1)
    step = max(1, ROWS["cpu" if logits.device.type == "cpu" else "cuda"] // logits.shape[1])
    parts = [slice(start, start + step) for start in range(0, max(1, len(targets)), step)]
    return torch.cat([_reduce(logits[part], targets[part, None], wanted) for part in parts], dim=1)


def _log_probs(logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
    from torch.nn.functional import cross_entropy

    return -cross_entropy(logits.float(), targets, reduction="none")


def _reduce(logits: "torch.Tensor", targets: "torch.Tensor", wanted: Sequence[Statistic]) -> "torch.Tensor":
    """Statistics [len(wanted), T] of targets [T, 1]; two buffers of the rows' size are its memory."""
    import torch

    found: dict[Statistic, torch.Tensor] = {}
    buffer = torch.empty_like(logits, dtype=torch.float32)
    if "rank" in wanted:  # as numbers: to sum booleans is slower than all the rest
        found["rank"] = torch.gt(logits, logits.gather(1, targets), out=buffer).sum(1)
    if not {"entropy", "z_score", "el2n"} & set(wanted):
        found["log_prob"] = _log_probs(logits, targets[:, 0])
        return torch.stack([found[name] for name in wanted])
    maximum = logits.amax(1, keepdim=True).float()
    masked = (logits.gather(1, targets) - maximum)[:, 0]
    z = torch.sub(logits, maximum).clamp_(min=-FLOOR)
    p = torch.exp(z, out=buffer)  # times s
    z_target, p_target = z.gather(1, targets)[:, 0], p.gather(1, targets)
    # without the target both sums are small where it is near certain, and nothing is lost by a difference from 1
    p.scatter_(1, targets, 0.0)
    others = p.sum(1)
    s = others + p_target[:, 0]
    if "el2n" in wanted:
        found["el2n"] = torch.hypot(others, torch.linalg.vector_norm(p, dim=1)) / s
    found["log_prob"] = masked - s.log()
    if {"entropy", "z_score"} & set(wanted):
        p.scatter_(1, targets, p_target)
        e1 = p.mul_(z).sum(1) / s
        found["entropy"] = s.log() - e1
        if "z_score" in wanted:
            e2 = p.mul_(z).sum(1) / s
            sigma = (e2 - e1 * e1).clamp_(min=SIGMA * SIGMA).sqrt_()
            found["z_score"] = (z_target - e1) / sigma
    return torch.stack([found[name] for name in wanted])
