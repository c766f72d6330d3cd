"""What a language model says of a document: the measures, and the scorer that takes any subset of them in one pass.

Each measure reduces the log-probabilities lp_1..lp_n of a document's n predicted tokens (scorers.lm.forward says which
those are) to one number:

    nats_per_token   -mean(lp)
    bits_per_byte    -sum(lp) / (ln 2 * UTF-8 bytes of those same tokens)
    n_tokens         n
    min_k            mean of the max(1, floor(ratio * n)) smallest lp

All but n_tokens are NULL where n = 0 (an empty text; one token that nothing precedes) and where the model has no finite
probability for the text; all are NULL where the text has a token that the model has no embedding for.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from scorers.base import Column, MapSpec, ModelPath, Score
from scorers.lm.forward import CausalLM, DType, Predicted
from scorers.lm.tokenizer import gguf_file
from storage.errors import RecipeError

Measure = Literal["bits_per_byte", "nats_per_token", "n_tokens", "min_k"]

COLUMNS: Mapping[Measure, Column] = {
    column.name: column  # type: ignore[misc]
    for column in (
        Column("bits_per_byte", pa.float32(), "loss of the predicted tokens over their bytes", "bits/byte", False),
        Column("nats_per_token", pa.float32(), "mean loss of the predicted tokens", "nats/token", False),
        Column("n_tokens", pa.int64(), "predicted tokens", "tokens"),
        # high says "seen in training" (Shi et al.); whether that end is wanted is the curator's business
        Column("min_k", pa.float32(), "mean log-probability of the least likely tokens; high: seen", "nats/token"),
    )
}


def nats_per_token(log_probs: NDArray[np.float32]) -> float:
    """Mean negative log-probability of n >= 1 tokens, in nats."""
    return -float(log_probs.mean(dtype=np.float64))


def bits_per_byte(log_probs: NDArray[np.float32], n_bytes: int) -> float | None:
    """Bits that the model needs for a byte of the tokens' text; None for no bytes. Compares across tokenizers."""
    return -float(log_probs.sum(dtype=np.float64)) / (math.log(2) * n_bytes) if n_bytes else None


def min_k(log_probs: NDArray[np.float32], ratio: float) -> float:
    """Min-K% Prob (Shi et al., ICLR 2024, section 3): mean of the floor(ratio * n) smallest log-probabilities, in nats.

    At least one token is taken; the authors' code takes none from fewer than 1 / ratio tokens and returns NaN. High is
    the member end, as in the paper; the authors' first code negates it. On members and non-members of one distribution
    it is near chance: a hint, no verdict.
    """
    k = max(1, math.floor(ratio * log_probs.size + 1e-9))  # 0.29 * 100 is 28.999...
    return float(np.partition(log_probs, k - 1)[:k].mean(dtype=np.float64))


def _distinct(measures: tuple[Measure, ...]) -> tuple[Measure, ...]:
    if len(set(measures)) < len(measures):
        raise ValueError("a measure is named twice")
    return measures


class LanguageModel(MapSpec):
    """Losses of documents under a Hugging Face causal language model: safetensors with a tokenizer, or GGUF.

    The digest of the model's files is in the fingerprint, so name the GGUF file itself where its folder holds other
    things. dtype: bfloat16 for GPUs; the vocabulary is reduced in float32 in any case. context: tokens of a window, BOS
    included; by default the model's own, at most 2048; longer documents are read in windows that overlap by half, each
    token predicted once. bos: None does as the tokenizer does. min_k: share of the least likely tokens.

    The version of transformers is in the fingerprint, because the tokenizer of a GGUF file and the models' code come
    from it; torch changes no more than the last bits.
    """

    scorer: Literal["language_model"] = "language_model"
    model: ModelPath
    measures: Annotated[tuple[Measure, ...], Field(min_length=1), AfterValidator(_distinct)] = ("bits_per_byte",)
    dtype: DType = "float32"
    min_k: Annotated[float, Field(gt=0, le=1)] = 0.2
    context: Annotated[int, Field(ge=2)] | None = None
    bos: bool | None = None
    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("transformers",)
    gpu: ClassVar[bool] = True
    batch_rows: ClassVar[int] = 256  # enough for batches of like length; a CPU takes minutes for more

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(COLUMNS[measure] for measure in self.measures)

    def problems(self) -> list[str]:
        return super().problems() or ([] if self.trained else _model_problems(self.model))

    def build(self, device: str = "cpu") -> Score:
        """Load model and tokenizer. RecipeError when they cannot be loaded or do not fit each other."""
        model = CausalLM(self.model, device=device, dtype=self.dtype, context=self.context, bos=self.bos)
        measures: dict[Measure, Callable[[Predicted], float | None]] = {
            "nats_per_token": lambda p: nats_per_token(p.log_probs),
            "bits_per_byte": lambda p: bits_per_byte(p.log_probs, p.n_bytes),
            "min_k": lambda p: min_k(p.log_probs, self.min_k),
        }

        def value(measure: Measure, predicted: Predicted | None) -> float | int | None:
            if predicted is None:
                return None
            if measure == "n_tokens":
                return predicted.log_probs.size
            if predicted.log_probs.size == 0 or not np.isfinite(predicted.log_probs).all():
                return None
            return measures[measure](predicted)

        def score(documents: pa.RecordBatch) -> pa.RecordBatch:
            predicted = model(documents.column("text").to_pylist())
            return pa.record_batch(
                [pa.array([value(c.name, p) for p in predicted], c.type) for c in self.columns],  # type: ignore[arg-type]
                names=[c.name for c in self.columns],
            )

        return score


def _model_problems(path: str) -> list[str]:
    """What a look at the file names can tell: is this a model whose weights we would load?"""
    try:
        gguf = gguf_file(path)
    except RecipeError as error:
        return [f"model: {error}"]
    if gguf is not None:
        with gguf.open("rb") as file:
            return [] if file.read(4) == b"GGUF" else [f"model: {str(gguf)!r} is no GGUF file; correct the path"]
    folder = Path(path)
    if not (folder / "config.json").exists():
        return [f"model: {path!r} has no config.json; name a Hugging Face model folder or a GGUF file"]
    if not any(folder.glob("*.safetensors")):
        return [f"model: {path!r} has no *.safetensors; save the model with save_pretrained, or name a GGUF file"]
    return []
