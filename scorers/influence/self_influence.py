"""Self-influence: the squared norm of a document's own gradient (TracIn; the score of PRESENCE)."""

from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from scorers.base import Column, Staged
from scorers.influence.gradients import squared_norms
from scorers.influence.spec import Documents, GradientSpec, staged

UNITS = {"document": "nats^2", "token": "nats^2/token"}


class SelfInfluence(GradientSpec):
    """How strongly a document would change the model that it is scored by: squared gradient norm over the chosen layers
    (TracIn, Pruthi et al. 2020, arXiv 2002.08484; PRESENCE, Thakkar et al. 2023, arXiv 2311.00913).

    Low is clean or already known, high is novel, hard, rare or noise, so neither end is good in itself: look at the
    languages and domains of what you drop.

    per: "document" is |g|^2 of the loss summed over tokens, TracIn as defined, and the diagonal of an unprojected
        `gradients` index; it grows with length. "token" is |g|^2 / n_tokens, about what one token adds: tokens'
        gradients point in many directions, so |g|^2 grows about as their number (measured on SmolLM2-135M and texts of
        12 to 400 tokens: to the power 0.9; rank correlation with length 0.90 before and -0.09 after). The squared norm
        of the *mean* loss is |g|^2 / n_tokens^2, which mostly ranks short texts first (-0.93); divide once more by
        n_tokens for it.

    n_tokens counts the predicted tokens. The score is NULL without one, and where the gradient is not finite; both are
    NULL where the text has a token that the model has no embedding for.
    """

    scorer: Literal["self_influence"] = "self_influence"
    per: Literal["document", "token"] = "document"
    version: ClassVar[int] = 1

    @property
    def columns(self) -> tuple[Column, ...]:
        return (
            Column("score", pa.float64(), "squared norm of the loss's gradient; high: novel or noise", UNITS[self.per]),
            Column("n_tokens", pa.int64(), "predicted tokens", "tokens"),
        )

    def build(self, device: str = "cpu") -> Staged[Documents]:
        """RecipeError when the model cannot be loaded or a layer cannot be captured."""
        model = self.load(device)

        def finish(documents: Documents) -> pa.RecordBatch:
            n_tokens = np.array([model.n_predicted(d) if d else 0 for d in documents], np.int64)
            norms = squared_norms(model, documents)
            scores = norms / np.maximum(n_tokens, 1) if self.per == "token" else norms
            unknown = (n_tokens == 0) | ~np.isfinite(scores)
            return pa.record_batch(
                [
                    pa.array(scores, pa.float64(), mask=unknown),
                    pa.array(n_tokens, pa.int64(), mask=np.array([d is None for d in documents], np.bool_)),
                ],
                names=["score", "n_tokens"],
            )

        return staged(model, finish)
