"""How a small language model is trained: what the recipe says, and by a published rule what it leaves open.

    size = "10m", tokenizer or vocabulary       from random weights, Llama-style, a rung of the ladder
    base = FOLDER or "models.x"                 from a model that is there

From random weights, N counting the weights that multiply every token (the layers and the output embedding):

    batch            327,680 (N / 108e6)^(2/3) tokens        that is 160 sequences of 2048 at 108M
    learning rate    0.0047 (N / 108e6)^(-1/3)
    beta2            0.99 for a batch under 524,288 tokens, else 0.95
    warmup           N tokens

(Porian et al., NeurIPS 2024, arXiv 2406.19146, tables 2 and 4, as OLMo's model ladder and DataDecide write them down);
cosine decay to a tenth, AdamW with weight decay 0.1 except on embeddings and norms, gradient norm clipped at 1 (OLMo).

Fine-tuning: batch 131,072 (N / 203e6)^(2/3) tokens, learning rate 0.001 (N / 203e6)^(-1/3), beta2 0.95, warmup and
cosine to a tenth, no weight decay, as the conditional model of CoLoR-Filter (Brandfonbrener et al., NeurIPS 2024, arXiv
2406.10670), whose z-loss is left out. It had 203M such parameters; that other sizes follow the exponents above is ours.
(2M parameters, 80,000 tokens of medical answers: 0.05 bits a byte less on held-out ones without them, 0.25 with them.)

Runs that are short beside what the rules were fitted on: the batch leaves at least 200 steps (the CoLoR-Filter run had
190) and the warmup takes at most a tenth of the tokens; these two limits are ours. A batch smaller than the rule's has
its learning rate by the square root of the ratio, which is how Adam's noise scales (Malladi et al., NeurIPS 2022, arXiv
2205.10287).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple, Self, get_args

from pydantic import Field, model_validator

from scorers.base import ModelPath, Parameters
from scorers.lm.forward import DType

SizeName = Literal["1m", "4m", "10m", "20m", "40m", "60m", "90m", "150m"]


class Size(NamedTuple):
    """A rung of the ladder: layers, hidden width, attention heads, width of the gated feed-forward layer (8/3)."""

    layers: int
    width: int
    heads: int
    feed_forward: int
    tied: bool  # one matrix for both embeddings: they are the larger part of a small model

    @property
    def parameters(self) -> int:
        """Of the layers: attention 4 width^2, feed-forward 3 width * feed_forward. No embeddings, no norms."""
        return self.layers * self.width * (4 * self.width + 3 * self.feed_forward)


LADDER: Mapping[SizeName, Size] = {
    "1m": Size(5, 128, 4, 344, tied=True),
    "4m": Size(5, 256, 4, 688, tied=True),
    "10m": Size(6, 384, 6, 1024, tied=True),
    "20m": Size(6, 512, 8, 1408, tied=True),
    "40m": Size(8, 640, 10, 1728, tied=True),
    "60m": Size(10, 704, 11, 1920, tied=True),
    "90m": Size(13, 768, 12, 2048, tied=True),
    "150m": Size(12, 1024, 16, 2736, tied=False),
}

CONTEXT = 512
MOMENTS = "moments.safetensors"
"""In a model's folder, Adam's moments at the end of its training."""
LEAST_STEPS = 200
MOST_WARMUP = 0.1


class Training(Parameters):
    """How a model is trained. What is None follows the rules of this module; the record holds what they gave.

    size: a rung of the ladder, named by its parameters without embeddings. base: a model to go on with instead, whose
    tokenizer and shape stay. tokenizer: a folder or tokenizer.json with an end-of-text token. vocabulary: an own
    byte-level BPE of that many tokens instead, end-of-text among them, fitted to the training texts. context: tokens of
    a sequence (512, or the base's own if smaller). tokens: training tokens in all, in as many passes over the texts as
    that takes; epochs: passes instead (1), each without the few tokens after the last whole sequence. batch_tokens:
    tokens of an optimizer step; it and tokens are rounded down to whole sequences. learning_rate: the peak.
    min_lr_ratio: where the cosine ends, over the peak. warmup_tokens: of the linear rise. dtype: bfloat16 computes in
    mixed precision (GPUs, and CPUs that have it); weights, moments and the written model are float32 in any case.
    answers_only: of texts with a prompt, the prompt's tokens are no targets. keep_moments: Adam's moments stay beside
    the weights, twice their size, for gradients as the optimizer sees them.
    """

    size: SizeName | None = None
    base: ModelPath | None = None
    tokenizer: ModelPath | None = None
    vocabulary: Annotated[int, Field(ge=257)] | None = None
    context: Annotated[int, Field(ge=2)] | None = None
    tokens: Annotated[int, Field(ge=1)] | None = None
    epochs: Annotated[int, Field(ge=1)] | None = None
    batch_tokens: Annotated[int, Field(ge=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    warmup_tokens: Annotated[int, Field(ge=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    beta2: Annotated[float, Field(gt=0, lt=1)] | None = None
    clip: Annotated[float, Field(gt=0)] = 1.0
    dtype: DType = "float32"
    answers_only: bool = False
    keep_moments: bool = False

    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("transformers", "tokenizers")
    """Not torch, which changes no more than rounding; nobody wants to train anew for that."""

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        if (self.size is None) == (self.base is None):
            raise ValueError(f"name one of size ({', '.join(get_args(SizeName))}) and base (a model to go on with)")
        named = [field for field in ("tokenizer", "vocabulary") if getattr(self, field) is not None]
        if self.base is not None and named:
            raise ValueError(f"{named[0]}: a base keeps its own tokenizer; leave it out")
        if self.base is None and len(named) != 1:
            raise ValueError("with size name one of tokenizer (a folder or tokenizer.json) and vocabulary (a number)")
        if self.tokens is not None and self.epochs is not None:
            raise ValueError("name one of tokens and epochs; either says how long the training is")
        sequence = self.context or (CONTEXT if self.base is None else 2)  # a base may have room for fewer
        for field in ("tokens", "batch_tokens"):
            if (getattr(self, field) or sequence) < sequence:
                raise ValueError(f"{field} must hold a sequence of {sequence} tokens; raise it, or lower context")
        return self

    def problems(self) -> list[str]:
        from scorers.lm.measures import model_problems

        told = super().problems()
        return told if told or self.base is None or "base" in self.trained else model_problems("base", self.base)


@dataclass(frozen=True)
class Settings:
    """A Training with nothing left open."""

    context: int
    sequences: int
    """Trained on in all, each of `context` targets."""
    batch_sequences: int
    learning_rate: float
    min_lr_ratio: float
    warmup_tokens: int
    weight_decay: float
    beta1: float
    beta2: float
    clip: float
    dtype: DType

    @property
    def tokens(self) -> int:
        return self.sequences * self.context

    @property
    def steps(self) -> int:
        return -(-self.sequences // self.batch_sequences)


def context_of(training: Training, positions: int | None) -> int:
    """Tokens of a sequence, for a base with room for `positions`."""
    return training.context or min(CONTEXT, positions or CONTEXT)


def resolve(training: Training, *, parameters: int, context: int, epoch: int) -> Settings:
    """The settings for so many parameters (those that multiply every token) and `epoch` sequences of text."""
    sequences = training.tokens // context if training.tokens is not None else epoch * (training.epochs or 1)
    sequences = max(1, sequences)
    fine_tuning = training.base is not None
    scale = parameters / (203e6 if fine_tuning else 108e6)
    rule = (131_072 if fine_tuning else 327_680) * scale ** (2 / 3)
    if training.batch_tokens is not None:
        batch = training.batch_tokens // context
    else:
        batch = min(round(rule / context), sequences // LEAST_STEPS)
    batch = max(1, min(batch, sequences))
    learning_rate = (1e-3 if fine_tuning else 0.0047) * scale ** (-1 / 3)
    learning_rate *= min(1.0, (batch * context / rule) ** 0.5)
    most_warmup = int(MOST_WARMUP * sequences * context)

    def chosen(own: float | None, rule: float) -> float:
        return rule if own is None else own

    small = batch * context < 524_288
    return Settings(
        context=context,
        sequences=sequences,
        batch_sequences=batch,
        learning_rate=chosen(training.learning_rate, learning_rate),
        min_lr_ratio=training.min_lr_ratio,
        warmup_tokens=int(chosen(training.warmup_tokens, most_warmup if fine_tuning else min(parameters, most_warmup))),
        weight_decay=chosen(training.weight_decay, 0.0 if fine_tuning else 0.1),
        beta1=0.9,
        beta2=chosen(training.beta2, 0.99 if small and not fine_tuning else 0.95),
        clip=training.clip,
        dtype=training.dtype,
    )
