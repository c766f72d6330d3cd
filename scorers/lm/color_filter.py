"""CoLoR-Filter and its variants: how much a document tells of the target texts, out of losses that are already there.

    prior, conditional      prior - conditional      CoLoR: the conditional model is the prior, trained on target texts
    current, conditional    current - conditional    RHO: the current one is the checkpoint that is being trained
    conditional             - conditional            conditional-only: the ablation

High is good in all three. The losses are columns of `language_model` entries, each computed once whatever else reads
it. What to keep is a mixture's business.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AfterValidator

from scorers.base import Column, ColumnsSpec, Score

VARIANTS = {
    frozenset({"prior", "conditional"}): "CoLoR: loss of the prior minus that of the conditional",
    frozenset({"current", "conditional"}): "RHO: loss of the current model minus that of the conditional",
    frozenset({"conditional"}): "minus the loss of the conditional",
}
UNITS = {"token": "nats/token", "sequence": "nats"}


def _a_variant(inputs: Mapping[str, str]) -> Mapping[str, str]:
    if frozenset(inputs) not in VARIANTS:
        raise ValueError(
            'name the models: { prior = "entry.column", conditional = "entry.column" }; or current and conditional '
            "(RHO); or conditional alone"
        )
    return inputs


class ColorFilter(ColumnsSpec):
    """Prior loss minus conditional loss (Brandfonbrener et al., NeurIPS 2024, arXiv 2406.10670), RHO, conditional-only.

    inputs: the models' roles decide the variant; each names a column of losses.
    per: "token" takes mean losses in nats per token, as `nats_per_token` of a language_model entry; "sequence" takes
    losses of whole texts in nats, as its `nats`. The paper sums over sequences of one length, where both rank alike.
    Documents differ in length, and a sum ranks the longest first or last; so the mean is the default.

    The sign is that of the authors' code; the paper's equation is its negative. NULL where a loss is.
    """

    scorer: Literal["color_filter"] = "color_filter"
    inputs: Annotated[Mapping[str, str], AfterValidator(_a_variant)]
    per: Literal["token", "sequence"] = "token"
    version: ClassVar[int] = 1

    @property
    def unit(self) -> str:
        return UNITS[self.per]

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column("score", pa.float32(), VARIANTS[frozenset(self.inputs)], self.unit, True),)

    def build(self) -> Score:
        before = next((role for role in self.inputs if role != "conditional"), None)

        def score(losses: pa.RecordBatch) -> pa.RecordBatch:
            conditional = losses.column("conditional").cast(pa.float64())
            gain = (
                pc.subtract(losses.column(before).cast(pa.float64()), conditional) if before else pc.negate(conditional)
            )
            return pa.record_batch([gain.cast(pa.float32())], names=["score"])

        return score
