"""Sequence classifiers of Hugging Face: BERT and its kin with a head, FineWeb-Edu's among them, over whole documents.

    texts -> the first `max_tokens` token ids, special ones included (Rust) -> batches of like length, padded right
          -> logits [documents, outputs] in one pass -> one number (regression), or a probability per label

An encoder looks at every place, so padding is masked, and what shares a batch with a document changes its score only by
the rounding of another kernel shape. Classifiers on top of a decoder read the last token that is no padding, which they
find by the padding's id; where neither model nor tokenizer has one, documents go through one by one.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from scorers.base import Column, MapSpec, ModelPath, Staged
from scorers.device import to_device
from scorers.hub import local
from scorers.lm.forward import DType
from scorers.lm.tokenizer import load_pretrained, quiet
from scorers.lm.windows import batch_size
from storage.errors import RecipeError, ShardError

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = {"cpu": 1024, "cuda": 32768}
"""Places of one forward pass: few for a CPU's cache, many for a GPU, where a small model would wait for its kernels."""
CHARACTERS = 8
"""Characters read at first for each token that is kept; English has 4 to 5 a token."""
MARGIN = 512
"""Characters before a cut, in which a tokenizer may read other tokens than in the whole text."""
GROUP = 1 << 21
"""Characters encoded at once, in parallel; an encoding takes some 600 bytes a token until its ids are out."""

Ids = list[NDArray[np.int64] | None]


class SequenceClassifier(MapSpec):
    """What a Hugging Face sequence classifier says of the first `max_tokens` tokens of a document.

    model: a folder (config.json, safetensors, tokenizer) or "hf://owner/name" (scorers.hub), with its classification
        head. No pickle is read and no code of its owner runs.
    labels: those of the model (id2label in its config.json) that become columns, by their names in lower case with _
        for all that is no letter or digit. Each is a probability in [0, 1]: softmax over all labels of the model, or
        the sigmoid of the label's own logit where the model's problem_type is multi_label_classification.
        Without labels the model must have one output; `score` is that logit as it is (regression).
    dtype: bfloat16 for GPUs; it keeps some three digits of a logit.
    max_tokens: special tokens included; by default what model and tokenizer allow. The rest of the text is not read.
    higher_is_better: which end of the columns is good, if either is.

    NULL for a text without tokens or of white space alone, for a token that the model has no embedding for, and where
    a logit is not finite.

    FineWeb-Edu (Penedo et al. 2024, arXiv 2406.17557) has one output, educational value from 0 to 5, over 512 tokens;
    its authors keep round(clip(score, 0, 5)) >= 3, which is score > 2.5.
    """

    scorer: Literal["sequence_classifier"] = "sequence_classifier"
    model: ModelPath
    labels: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    dtype: DType = "float32"
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    higher_is_better: bool | None = None
    libraries: ClassVar[tuple[str, ...]] = ("transformers",)
    gpu: ClassVar[bool] = True
    batch_rows: ClassVar[int] = 1024  # batches of like length need many to choose from

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [column.name for column in self.columns]
        taken = {"doc_id", "computed"}
        if wrong := sorted({name for name in names if names.count(name) > 1 or name in taken}):
            raise ValueError(f"labels: the columns {', '.join(wrong)} would be there twice; leave a label out")
        return self

    @property
    def columns(self) -> tuple[Column, ...]:
        good = self.higher_is_better
        if not self.labels:
            return (Column("score", pa.float32(), "output of the classifier", "", good),)
        return tuple(Column(_column(label), pa.float32(), f"P({label})", "probability", good) for label in self.labels)

    def problems(self) -> list[str]:
        if (problems := super().problems()) or self.trained:
            return problems
        folder = Path(local(self.model))
        if not (folder / "config.json").exists():
            return [f"model: {self.model!r} has no config.json; name the folder of a Hugging Face model"]
        if not any(folder.glob("*.safetensors")):
            return [f"model: {self.model!r} has no *.safetensors; save the model with save_pretrained"]
        return []

    def build(self, device: str = "cpu") -> Staged[Ids]:
        """Load model and tokenizer. RecipeError when they cannot be loaded, or do not fit each other or the labels."""
        classifier = Classifier(self.model, device=device, dtype=self.dtype, max_tokens=self.max_tokens)
        outputs = _outputs(classifier, self.model, self.labels)
        names = [column.name for column in self.columns]

        def finish(ids: Ids) -> pa.RecordBatch:
            logits = classifier.logits(ids)
            unknown = ~np.isfinite(logits).all(axis=1)
            logits[unknown] = 0
            values: NDArray[np.floating[Any]]
            if not self.labels:
                values = logits
            elif classifier.config.problem_type == "multi_label_classification":
                values = _sigmoid(logits[:, outputs])
            else:
                values = _softmax(logits)[:, outputs]
            arrays = [pa.array(column, pa.float32(), mask=unknown) for column in values.T]
            return pa.record_batch(arrays, names=names)

        return Staged(lambda documents: classifier.tokenize(documents.column("text").to_pylist()), finish)


class Classifier:
    """A Hugging Face sequence classifier with its tokenizer: `tokenize` needs no device, `logits` runs the model.

    RecipeError when it cannot be loaded, lacks weights, or cannot read `max_tokens` tokens.
    """

    def __init__(
        self, path: str, *, device: str = "cpu", dtype: DType = "float32", max_tokens: int | None = None
    ) -> None:
        import torch

        tokenizer = load_pretrained(path)
        self._tokenizer = tokenizer.backend_tokenizer
        self._model = _load(path, dtype).to(device).eval()
        self._device = torch.device(device)
        self.config = self._model.config
        self.config.use_cache = False
        self._embeddings: int = self._model.get_input_embeddings().weight.shape[0]
        if self._tokenizer.get_vocab_size(with_added_tokens=False) > self._embeddings:
            raise RecipeError(
                f"the tokenizer in {path!r} has more tokens than the model's {self._embeddings}; use the model's own"
            )
        self._specials = self._tokenizer.num_special_tokens_to_add(False)
        self.max_tokens = _limit(self._model, tokenizer.model_max_length, max_tokens)
        if self.max_tokens <= self._specials:
            raise RecipeError(f"max_tokens = {self.max_tokens} leaves no token of the text; raise it")
        self._tokenizer.enable_truncation(self.max_tokens)
        text = self.config.get_text_config()
        if text.pad_token_id is None:
            text.pad_token_id = tokenizer.pad_token_id
        pad = text.pad_token_id
        self._pad: int | None = pad if pad is not None and 0 <= pad < self._embeddings else None
        self._batch_tokens = BATCH_TOKENS["cpu" if self._device.type == "cpu" else "cuda"]

    def tokenize(self, texts: Sequence[str]) -> Ids:
        """The ids of each text that the model reads; None for a text without any, or of white space alone."""
        cut = CHARACTERS * self.max_tokens + MARGIN
        step = max(1, GROUP // cut)
        found: Ids = []
        for start in range(0, len(texts), step):
            group = texts[start : start + step]
            for text, encoding in zip(group, self._tokenizer.encode_batch([t[:cut] for t in group]), strict=True):
                ids = encoding.ids
                if len(text) > cut and (
                    len(ids) < self.max_tokens or max(stop for _, stop in encoding.offsets) > cut - MARGIN
                ):
                    ids = self._tokenizer.encode(text).ids  # the cut may have changed what is kept
                readable = len(ids) > self._specials and not text.isspace() and max(ids) < self._embeddings
                found.append(np.array(ids, np.int64) if readable else None)
        return found

    def logits(self, ids: Ids) -> NDArray[np.float32]:
        """What the model puts out for each text, [texts, outputs]; NaN where there are no ids."""
        import torch

        todo = sorted(((n, i) for n, i in enumerate(ids) if i is not None), key=lambda item: -item[1].size)
        lengths = [i.size for _, i in todo]
        values: list[torch.Tensor] = []
        done = 0
        while done < len(todo):
            rows = 1 if self._pad is None else batch_size(lengths, done, self._batch_tokens)
            values += self._run([i for _, i in todo[done : done + rows]])
            done += rows
        found = np.full((len(ids), self.config.num_labels), np.nan, np.float32)
        if todo:
            found[[n for n, _ in todo]] = torch.cat(values).cpu().numpy()
        return found

    def _run(self, rows: list[NDArray[np.int64]]) -> list["torch.Tensor"]:
        """Logits [rows, outputs] on the device, maybe in parts.

        Where the device's memory does not hold the batch, its halves go one after the other, and later batches are
        made as small. ShardError when a single document does not fit.
        """
        import torch

        try:
            return [self._forward(rows)]
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                raise ShardError(
                    f"{rows[0].size} tokens do not fit into the memory of {self._device}: lower `max_tokens`, or free "
                    "the device"
                ) from error
        # go on outside of the handler, whose traceback keeps the failed batch's tensors alive
        torch.cuda.empty_cache()
        half = len(rows) // 2
        self._batch_tokens = half * rows[0].size
        return self._run(rows[:half]) + self._run(rows[half:])

    def _forward(self, rows: list[NDArray[np.int64]]) -> "torch.Tensor":
        import torch

        length = max(row.size for row in rows)
        ids = np.full((len(rows), length), self._pad or 0, np.int64)
        mask = np.zeros((len(rows), length), np.int64)
        for number, row in enumerate(rows):
            ids[number, : row.size] = row
            mask[number, : row.size] = 1
        moved = {"input_ids": to_device(ids, self._device), "attention_mask": to_device(mask, self._device)}
        with torch.inference_mode():
            found: torch.Tensor = self._model(**moved).logits.float()
        return found


def _load(path: str, dtype: DType) -> Any:
    """The sequence classifier at `path`, from safetensors. RecipeError when it cannot be loaded or lacks weights."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification

    try:
        with quiet():
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                local(path),
                dtype=getattr(torch, dtype),
                local_files_only=True,
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if "trust_remote_code" in str(error):
            reason = "it needs its owner's code, which is not run"
        raise RecipeError(
            f"model: no sequence classifier in {path!r} ({reason}); name a folder with config.json and safetensors"
        ) from error
    if missing := sorted(loaded["missing_keys"]) + sorted(str(m) for m in loaded["mismatched_keys"]):
        raise RecipeError(
            f"model: {path!r} lacks weights of a sequence classifier: {', '.join(missing[:5])}; name a model that was "
            "trained with its classification head"
        )
    return model


def _limit(model: Any, of_tokenizer: int, wanted: int | None) -> int:
    """Tokens of a text: what the recipe wants, within what the model has positions for."""
    import torch

    own: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            padding = module.padding_idx  # RoBERTa counts its positions from the one behind the padding's
            own = module.num_embeddings - (0 if padding is None else padding + 1)
    if wanted is None:
        limit = min(of_tokenizer, own or of_tokenizer)
        if limit > 1 << 30:  # what a tokenizer says that knows no limit
            raise RecipeError("max_tokens: the model has no limit of its own; name one")
        return limit
    if own is not None and wanted > own:
        raise RecipeError(f"max_tokens = {wanted} is more than the model's {own} positions; lower it")
    return wanted


def _outputs(classifier: Classifier, path: str, labels: Sequence[str]) -> list[int]:
    """The outputs of the labels. RecipeError names the label that the model does not have, and the nearest."""
    config = classifier.config
    own = [str(config.id2label[number]) for number in range(config.num_labels)]
    if not labels:
        if len(own) > 1:
            raise RecipeError(f"labels: {path!r} has {len(own)}; name some of {', '.join(map(repr, own[:20]))}")
        return [0]
    if len(own) == 1 and config.problem_type != "multi_label_classification":
        raise RecipeError(f"labels: {path!r} has one output, which is `score`; leave labels out")
    for label in labels:
        if label not in own:
            near = difflib.get_close_matches(label, own, 1, 0.0)
            raise RecipeError(f"labels: {path!r} has no label {label!r}; did you mean {near[0]!r}?")
    return [own.index(label) for label in labels]


def _column(label: str) -> str:
    name = re.sub(r"\W+", "_", label.lower()).strip("_")
    return name if name.isidentifier() else f"label_{name}"


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shares: NDArray[np.float64] = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return shares


def _sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    probabilities: NDArray[np.float64] = 0.5 + 0.5 * np.tanh(0.5 * logits.astype(np.float64))  # never overflows
    return probabilities
