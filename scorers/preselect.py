"""PreSelect's predictive strength: how far the order of models by their loss on a document is their order by ability.

Shum et al., ICML 2025, arXiv 2503.00808, equation 1. Documents on which the better model always has the lower loss are
what a classifier then learns as positives. The losses are columns of `language_model` entries, of each document by
itself; the authors' come from a stream of documents, so that one is conditioned on those before it.
"""

from collections.abc import Mapping
from itertools import combinations
from typing import Annotated, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from scorers.base import Column, ColumnsSpec, Score

LEAST = 3
UNITS = {"document": "nats", "byte": "bits/byte"}


class PreSelect(ColumnsSpec):
    """Share of the model pairs of which the abler model has the lower loss, 0 to 1; high is good.

    inputs: per model a column of losses. ability: per model its mean benchmark score; high is able.
    per: "document" takes losses of whole documents in nats, as `nats` of a language_model entry; "byte" takes
    `bits_per_byte`, which is fairer between tokenizers, since no model predicts a document's first token. Nats per
    token do not compare between tokenizers, and are refused.

    As in the paper the order is strict: a pair of equal loss or equal ability does not count as ordered alike, so a
    document that all models find equally hard has 0, not 1/2. NULL where a loss is.
    """

    scorer: Literal["preselect"] = "preselect"
    inputs: Annotated[Mapping[str, str], Field(min_length=LEAST)]
    ability: Mapping[str, float]
    per: Literal["document", "byte"] = "document"
    version: ClassVar[int] = 1

    @model_validator(mode="after")
    def _every_model_in_both(self) -> "PreSelect":
        if apart := sorted(self.inputs.keys() ^ self.ability.keys()):
            raise ValueError(f"inputs and ability must name the same models; only one of them has {', '.join(apart)}")
        if len(set(self.ability.values())) < 2:
            raise ValueError("ability: all models are equally able; give models that differ")
        return self

    @property
    def unit(self) -> str:
        return UNITS[self.per]

    @property
    def columns(self) -> tuple[Column, ...]:
        what = f"share of the pairs of {len(self.inputs)} models of which the abler has the lower loss"
        return (Column("score", pa.float32(), what, "share", True),)

    def build(self) -> Score:
        models = sorted(self.inputs, key=lambda model: (self.ability[model], model))
        all_pairs = list(combinations(range(len(models)), 2))
        pairs = [(less, more) for less, more in all_pairs if self.ability[models[less]] < self.ability[models[more]]]

        def score(batch: pa.RecordBatch) -> pa.RecordBatch:
            losses = [batch.column(model).to_numpy(zero_copy_only=False).astype(float) for model in models]
            alike = np.zeros(batch.num_rows, np.int32)
            for less, more in pairs:
                alike += losses[more] < losses[less]
            unknown = np.isnan(losses).any(axis=0)
            return pa.record_batch([pa.array((alike / len(all_pairs)).astype("f4"), mask=unknown)], names=["score"])

        return score
