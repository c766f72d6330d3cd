"""CoLoR-Filter: how much more likely a document is under a model that has seen the target texts.

    score = loss under the prior model - loss under the conditional model        (nats per token, high is good)

Both losses are columns of `language_model` entries, each computed once whatever else reads it. The conditional model is
the prior, trained on for a while with texts of the kind that is wanted. What to keep is a mixture's business.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AfterValidator

from scorers.base import Column, ColumnsSpec, Score

ROLES = ("prior", "conditional")


def _both_models(inputs: Mapping[str, str]) -> Mapping[str, str]:
    if set(inputs) != set(ROLES):
        raise ValueError('inputs must name the two models: { prior = "entry.column", conditional = "entry.column" }')
    return inputs


class ColorFilter(ColumnsSpec):
    """Prior loss minus conditional loss (Brandfonbrener et al., NeurIPS 2024, arXiv 2406.10670).

    inputs: `prior` and `conditional`, each a column of mean losses in nats per token, as `nats_per_token` of a
    language_model entry. The sign is that of the authors' code; the paper's equation is its negative. The paper sums
    over sequences of one length; documents differ in length, so the mean per token is what compares them. NULL where a
    loss is.
    """

    scorer: Literal["color_filter"] = "color_filter"
    inputs: Annotated[Mapping[str, str], AfterValidator(_both_models)]
    version: ClassVar[int] = 1

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column("score", pa.float32(), "loss of the prior minus that of the conditional", "nats/token", True),)

    def build(self) -> Score:
        def score(losses: pa.RecordBatch) -> pa.RecordBatch:
            prior, conditional = (losses.column(role).cast(pa.float64()) for role in ROLES)
            return pa.record_batch([pc.subtract(prior, conditional).cast(pa.float32())], names=["score"])

        return score
