"""What a language model says of a document: the scorer that takes any subset of the measures in one pass.

scorers.lm.definitions has the measures, scorers.lm.statistics what they need of a token, scorers.lm.forward the pass.
All but n_tokens are NULL where no token is predicted (an empty text; one token that nothing precedes) and where the
model has no finite probability for the text; all are NULL where the text has a token that the model has no embedding
for.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from scorers.base import Column, MapSpec, ModelPath, Staged
from scorers.hub import local
from scorers.lm import definitions as define
from scorers.lm.definitions import OutsideTopK
from scorers.lm.forward import CausalLM, DType, Predicted
from scorers.lm.reading import Tokens
from scorers.lm.statistics import Statistic
from scorers.lm.tokenizer import gguf_file
from storage.errors import RecipeError

Measure = Literal[
    "bits_per_byte",
    "nats_per_token",
    "nats",
    "n_tokens",
    "loss_quantiles",
    "min_k",
    "min_k_plus_plus",
    "zlib_ratio",
    "lowercase_ratio",
    "token_entropy",
    "el2n",
    "top_k_rank_loss",
]

# Where high says "seen in training", whether that end is wanted is the curator's business; so it is with a sum, which
# grows with the document, and with EL2N, of which authors keep either end.
COLUMNS: Mapping[Measure, Column] = {
    column.name: column  # type: ignore[misc]
    for column in (
        Column("bits_per_byte", pa.float32(), "loss of the predicted tokens over their bytes", "bits/byte", False),
        Column("nats_per_token", pa.float32(), "mean loss of the predicted tokens", "nats/token", False),
        Column("nats", pa.float64(), "loss of the predicted tokens together", "nats"),
        Column("n_tokens", pa.int64(), "predicted tokens", "tokens"),
        Column("loss_quantiles", pa.float32(), "quantile of the predicted tokens' losses", "nats/token", False),
        Column("min_k", pa.float32(), "mean log-probability of the least likely tokens; high: seen", "nats/token"),
        Column(
            "min_k_plus_plus",
            pa.float32(),
            "mean of the least z-scores of the tokens' log-probabilities; high: seen",
            "standard deviations",
        ),
        Column("zlib_ratio", pa.float32(), "mean log-probability over compressed bytes; high: seen", "nats/token/byte"),
        Column("lowercase_ratio", pa.float32(), "loss in lower case over loss; high: seen", "ratio"),
        Column("token_entropy", pa.float32(), "mean entropy of the predictions; high: undecided", "nats/token"),
        Column("el2n", pa.float32(), "mean distance of prediction and token, 0 to 1.41; high: hard", "probability"),
        Column("top_k_rank_loss", pa.float32(), "median loss of tokens in the top k (SALT)", "nats/token", True),
    )
}

NEEDS: Mapping[Measure, Statistic] = {
    "min_k_plus_plus": "z_score",
    "token_entropy": "entropy",
    "el2n": "el2n",
    "top_k_rank_loss": "rank",
}
"""What a measure needs of a token beside its log-probability."""

USED_BY: Mapping[str, tuple[Measure, ...]] = {
    "k": ("min_k", "min_k_plus_plus"),
    "quantiles": ("loss_quantiles",),
    "top_k": ("top_k_rank_loss",),
    "outside_top_k": ("top_k_rank_loss",),
}
"""Parameters that only some measures look at."""

Share = Annotated[float, Field(gt=0, le=1)]
Quantile = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Document:
    """What the measures of one document are taken from. `lower` is `found` itself for a text in lower case."""

    found: Predicted
    lower: Predicted | None
    compressed: int


Value = Callable[[Document], float | int | None]

PLAIN: Mapping[Measure, Value] = {
    "bits_per_byte": lambda d: define.bits_per_byte(d.found.log_probs, d.found.n_bytes),
    "nats_per_token": lambda d: define.nats_per_token(d.found.log_probs),
    "nats": lambda d: define.nats(d.found.log_probs),
    "n_tokens": lambda d: d.found.log_probs.size,
    "zlib_ratio": lambda d: define.zlib_ratio(d.found.log_probs, d.compressed),
    "lowercase_ratio": lambda d: _lowercase_ratio(d),
    "token_entropy": lambda d: define.mean(d.found.statistics["entropy"]),
    "el2n": lambda d: define.mean(d.found.statistics["el2n"]),
}
"""The measures without parameters."""


class Prepared(NamedTuple):
    """A batch whose texts are read.

    Attributes:
        tokens: of the texts, and then of those in lower case that differ.
        differ: the numbers of the texts that do.
        compressed: bytes of the compressed texts, or zeros where nothing asks for them.
    """

    tokens: list[Tokens | None]
    differ: list[int]
    compressed: list[int]


class LanguageModel(MapSpec):
    """Losses of documents under a Hugging Face causal language model, and what is derived from them, in one pass.

    model: safetensors with a tokenizer, GGUF (name the file itself where its folder holds other things), or
    "hf://owner/name" (scorers.hub). The digest of its files is in the fingerprint.
    dtype: bfloat16 for GPUs; the vocabulary is reduced in float32 in any case.
    context: tokens of a window, BOS included; by default the model's own, at most 2048. stride: by how many tokens the
    windows of a longer document advance, half of the context by default; each token is predicted once. With `stride =
    context` they are read as sequences of fixed length, one by one, as in CoLoR-Filter's paper.
    bos: None does as the tokenizer does.
    remote_code: whether Python that the model's owner ships may run. It can do whatever you can.
    k: share of the least likely tokens, for min_k and min_k_plus_plus; a list gives columns min_k_10, min_k_20, ...
    quantiles: of loss_quantiles; columns loss_q10, loss_q50, ...
    top_k, outside_top_k: of top_k_rank_loss; the tokens outside are dropped, or count as losses of zero.

    The version of transformers is in the fingerprint, because the tokenizer of a GGUF file and the models' code come
    from it; torch changes no more than the last bits.
    """

    scorer: Literal["language_model"] = "language_model"
    model: ModelPath
    measures: Annotated[tuple[Measure, ...], Field(min_length=1)] = ("bits_per_byte",)
    dtype: DType = "float32"
    context: Annotated[int, Field(ge=2)] | None = None
    stride: Annotated[int, Field(ge=1)] | None = None
    bos: bool | None = None
    remote_code: bool = False
    k: Share | Annotated[tuple[Share, ...], Field(min_length=1)] = 0.2
    quantiles: Annotated[tuple[Quantile, ...], Field(min_length=1)] = (0.1, 0.5, 0.9)
    top_k: Annotated[int, Field(ge=1)] = 10
    outside_top_k: OutsideTopK = "drop"
    version: ClassVar[int] = 2
    libraries: ClassVar[tuple[str, ...]] = ("transformers",)
    gpu: ClassVar[bool] = True
    batch_rows: ClassVar[int] = 1024  # batches of like length need many to choose from

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [column.name for column in self.columns]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"measures: {', '.join(twice)} would be there twice; name each measure and number once")
        for field, measures in USED_BY.items():
            if getattr(self, field) != type(self).model_fields[field].default and not set(measures) & set(
                self.measures
            ):
                raise ValueError(
                    f"{field}: of use to {' and '.join(measures)} alone; add that to measures, or leave it"
                )
        if self.context is not None and self.stride is not None and self.stride > self.context:
            raise ValueError(f"stride: {self.stride} would skip tokens of a context of {self.context}; lower it")
        return self

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(column for measure in self.measures for column, _ in self._values(measure))

    def problems(self) -> list[str]:
        return super().problems() or ([] if self.trained else model_problems("model", self.model))

    def build(self, device: str = "cpu") -> Staged[Prepared]:
        """Load model and tokenizer. RecipeError when they cannot be loaded or do not fit each other."""
        model = CausalLM(
            self.model,
            device=device,
            dtype=self.dtype,
            context=self.context,
            stride=self.stride,
            bos=self.bos,
            remote_code=self.remote_code,
        )
        columns = [pair for measure in self.measures for pair in self._values(measure)]
        needs = tuple(NEEDS[measure] for measure in self.measures if measure in NEEDS)

        def prepare(documents: pa.RecordBatch) -> Prepared:
            texts: list[str] = documents.column("text").to_pylist()
            lower = [text.lower() for text in texts] if "lowercase_ratio" in self.measures else texts
            differ = [i for i, (text, low) in enumerate(zip(texts, lower, strict=True)) if text != low]
            zipped = [define.compressed_bytes(t) if "zlib_ratio" in self.measures else 0 for t in texts]
            return Prepared(model.tokenize([*texts, *(lower[i] for i in differ)]), differ, zipped)

        def finish(prepared: Prepared) -> pa.RecordBatch:
            predicted = model.predict(prepared.tokens, needs)
            n = len(prepared.compressed)
            lower = predicted[:n]
            for i, found in zip(prepared.differ, predicted[n:], strict=True):
                lower[i] = found
            documents = [
                Document(found, low, size) if found is not None else None
                for found, low, size in zip(predicted[:n], lower, prepared.compressed, strict=True)
            ]
            return pa.record_batch(
                [pa.array([_value(column, value, d) for d in documents], column.type) for column, value in columns],
                names=[column.name for column, _ in columns],
            )

        return Staged(prepare, finish)

    def _values(self, measure: Measure) -> Iterator[tuple[Column, Value]]:
        """The columns of a measure, each with how its value comes out of a document."""
        column = COLUMNS[measure]
        if measure in ("min_k", "min_k_plus_plus"):
            for k in self.k if isinstance(self.k, tuple) else (self.k,):
                name = f"{measure}_{_percent(k)}" if isinstance(self.k, tuple) else measure
                yield replace(column, name=name), partial(_lowest, measure=measure, k=k)
        elif measure == "loss_quantiles":
            for q in self.quantiles:
                yield replace(column, name=f"loss_q{_percent(q)}"), partial(_quantile, q=q)
        elif measure == "top_k_rank_loss":
            yield column, partial(_top_k_rank_loss, k=self.top_k, outside=self.outside_top_k)
        else:
            yield column, PLAIN[measure]


def _lowest(document: Document, measure: Measure, k: float) -> float:
    found = document.found
    return define.min_k(found.log_probs if measure == "min_k" else found.statistics["z_score"], k)


def _quantile(document: Document, q: float) -> float:
    return define.loss_quantile(document.found.log_probs, q)


def _top_k_rank_loss(document: Document, k: int, outside: OutsideTopK) -> float | None:
    found = document.found
    return define.top_k_rank_loss(found.log_probs, found.statistics["rank"], k, outside)


def _lowercase_ratio(document: Document) -> float | None:
    """1 for a text in lower case, which is not read twice."""
    if document.lower is document.found:
        return 1.0
    if document.lower is None or not _usable(document.lower):
        return None
    return define.lowercase_ratio(document.found.log_probs, document.lower.log_probs)


def _value(column: Column, value: Value, document: Document | None) -> float | int | None:
    if document is None or (column.name != "n_tokens" and not _usable(document.found)):
        return None
    return value(document)


def _usable(predicted: Predicted) -> bool:
    return bool(predicted.log_probs.size and np.isfinite(predicted.log_probs).all())


def _percent(share: float) -> str:
    """A share as it stands in a column's name: 0.2 as 20, 0.125 as 12_5."""
    return f"{100 * share:.6f}".rstrip("0").rstrip(".").replace(".", "_")


def model_problems(field: str, path: str) -> list[str]:
    """What a look at the file names can tell: is what `field` names a model whose weights we would load?"""
    try:
        gguf, folder = gguf_file(path), Path(local(path))
    except RecipeError as error:
        return [f"{field}: {error}"]
    if gguf is not None:
        with gguf.open("rb") as file:
            return [] if file.read(4) == b"GGUF" else [f"{field}: {str(gguf)!r} is no GGUF file; correct the path"]
    if not (folder / "config.json").exists():
        return [f"{field}: {path!r} has no config.json; name a Hugging Face model folder or a GGUF file"]
    if not any(folder.glob("*.safetensors")):
        return [f"{field}: {path!r} has no *.safetensors; save the model with save_pretrained, or name a GGUF file"]
    return []
