"""The one forward pass of a causal language model: texts in, statistics of every predicted token out.

    texts -> token ids (Rust) -> windows of at most `context` tokens -> batches of like length, padded on the right
          -> hidden states -> vocabulary, block by block in float32 -> statistics of the targets, put back by text

What is predicted. With a BOS every token of the text; without one every token but the first, which nothing precedes.
EOS and other special tokens that a tokenizer would append are no part of the text and are left out. Long texts are read
in windows (scorers.lm.windows), each of which begins with the BOS if there is one.

Padding stands to the right, where causal attention cannot see it, so no mask is needed and the fast attention kernels
apply. What shares a batch with a text changes its numbers only by the rounding of another kernel shape.

Two halves, so that one thread can read the next texts while another predicts: `tokenize` needs no device, and `predict`
waits for it once, at its end.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from scorers.device import to_device
from scorers.hub import local
from scorers.lm.reading import Tokens, read
from scorers.lm.statistics import Statistic, token_statistics
from scorers.lm.tokenizer import gguf_file, load_pretrained, quiet
from scorers.lm.windows import batch_size, longest_first, windows
from storage.errors import RecipeError, ShardError

if TYPE_CHECKING:
    import torch

DType = Literal["float32", "bfloat16"]

CONTEXT = 2048
"""Tokens of a window when the recipe names none and the model allows it: attention's cost grows with the window, while
tokens gain little from more context than this."""
BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Tokens of one forward pass, padding included. A CPU is fastest while a layer's activations stay in its cache."""
BLOCK = {"cpu": 1 << 23, "cuda": 1 << 28}
"""Float32 logits held at once (32 MiB: the cache again; 1 GiB: the output embedding is read once a block)."""
FULL_LOGITS = 1 << 29
"""The same, for a model whose logits cannot be had block by block (2 GiB)."""


@dataclass(frozen=True)
class Predicted:
    """The predicted tokens of one text.

    Attributes:
        log_probs: natural log-probabilities, float32 [n].
        n_bytes: their UTF-8 bytes together.
        statistics: what else was asked for (scorers.lm.statistics), float32 [n] each.
    """

    log_probs: NDArray[np.float32]
    n_bytes: int
    statistics: Mapping[Statistic, NDArray[np.float32]] = field(default_factory=dict)


Rows = list[tuple[NDArray[np.int64], int]]
"""Windows as they are fed: ids, and the place of the first that is predicted."""


class CausalLM:
    """A Hugging Face causal language model with its tokenizer, ready to predict texts.

    `path`: a folder (config.json, safetensors, tokenizer), a GGUF file, a folder with one, or a name (scorers.hub).
    No pickle is read, and code of the model's owner is run only where `remote_code` says so. `context`: tokens of a
    window, BOS included; None for the model's own, at most 2048. `stride`: by how many tokens windows advance, half of
    the context by default; with `stride = context` they are sequences of fixed length that share nothing but, without a
    BOS, the one token that the next begins with. `bos`: True puts the BOS before every window, False does not, None
    does what the tokenizer itself does with a text. RecipeError when the model cannot be loaded or does not fit these.

    `places` and `fed` count, over all calls, the places of the forward passes and those of them that held a token.
    `model` is transformers' own, `tokenizer` the Rust one, `embeddings` the number of input embeddings; `blockwise`
    says whether its logits are no more than the output embedding applied to its body's hidden states.
    """

    def __init__(
        self,
        path: str,
        *,
        device: str = "cpu",
        dtype: DType = "float32",
        context: int | None = None,
        stride: int | None = None,
        bos: bool | None = None,
        remote_code: bool = False,
    ) -> None:
        import torch

        tokenizer = load_pretrained(path, remote_code=remote_code)
        self.tokenizer = tokenizer.backend_tokenizer
        self.prefix = _prefix(tokenizer, bos)
        self.model = load_model(path, dtype, remote_code=remote_code).to(device).eval()
        self.device = torch.device(device)
        self.embeddings: int = self.model.get_input_embeddings().weight.shape[0]
        if self.tokenizer.get_vocab_size(with_added_tokens=False) > self.embeddings:
            raise RecipeError(
                f"the tokenizer in {path!r} has more tokens than the model's {self.embeddings}; use the model's own"
            )
        self.context = _context(self.model.config, context)
        if self.context <= max(1, len(self.prefix)):
            raise RecipeError(f"context = {self.context} leaves no token to predict; raise it")
        self.stride = self.context // 2 if stride is None else stride
        if not 1 <= self.stride <= self.context:
            raise RecipeError(f"stride = {stride} is not between 1 and the context, {self.context}; correct it")
        self.places = self.fed = 0
        self._logits, self._batch_tokens, self.blockwise = self._head()

    @property
    def padding(self) -> float:
        """The share of the places of all forward passes so far that held no token."""
        return 1 - self.fed / self.places if self.places else 0.0

    def __call__(self, texts: Sequence[str], statistics: Sequence[Statistic] = ()) -> list[Predicted | None]:
        """The predicted tokens of each text with their statistics. See `tokenize` and `predict`."""
        return self.predict(self.tokenize(texts), statistics)

    def tokenize(self, texts: Sequence[str]) -> list[Tokens | None]:
        """The texts' tokens, which a thread of its own may ask for; None for a string that is no Unicode text."""
        return read(self.tokenizer, texts, skip_first=not self.prefix)

    def predict(self, tokens: Sequence[Tokens | None], statistics: Sequence[Statistic] = ()) -> list[Predicted | None]:
        """The predicted tokens of each text; None for no text, and for a token that the model has no embedding for."""
        import torch

        wanted: tuple[Statistic, ...] = ("log_prob", *(s for s in statistics if s != "log_prob"))
        first = 0 if self.prefix else 1
        width = self.context - len(self.prefix)
        known = [t if t and (t.ids.size == 0 or t.ids.max() < self.embeddings) else None for t in tokens]
        ids = [t.ids if t else np.empty(0, np.int64) for t in known]
        todo = longest_first([w for i, n in enumerate(ids) for w in windows(i, n.size, width, self.stride, first)])
        lengths = [w.stop - w.start + len(self.prefix) - 1 for w in todo]  # the last token is only ever a target
        values: list[torch.Tensor] = []
        done = 0
        while done < len(todo):
            batch = todo[done : done + batch_size(lengths, done, self._batch_tokens)]
            values += self._predict([(ids[w.text][w.start : w.stop], w.first - w.start) for w in batch], wanted)
            done += len(batch)
        found = [np.empty((len(wanted), max(0, i.size - first)), np.float32) for i in ids]
        if todo:
            on_host, at = torch.cat(values, dim=1).cpu().numpy(), 0
            for w in todo:
                n = w.stop - w.first
                found[w.text][:, w.first - first : w.stop - first] = on_host[:, at : at + n]
                at += n
        return [
            Predicted(f[0], t.n_bytes, dict(zip(wanted[1:], f[1:], strict=True))) if t else None
            for f, t in zip(found, known, strict=True)
        ]

    def _predict(self, rows: Rows, wanted: Sequence[Statistic]) -> list["torch.Tensor"]:
        """The statistics [len(wanted), n] of the rows' predicted tokens, in order, on the device and maybe in parts.

        Where the device's memory does not hold the batch, its halves go one after the other, and later batches are
        made as small. ShardError when a single window does not fit.
        """
        import torch

        try:
            return [self._forward(rows, wanted)]
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                raise ShardError(
                    f"a window of {rows[0][0].size} tokens does not fit into the memory of {self.device}: lower "
                    "`context`, or free the device"
                ) from error
        # go on outside of the handler, whose traceback keeps the failed batch's tensors alive
        torch.cuda.empty_cache()
        half = len(rows) // 2
        self._batch_tokens = half * max(ids.size for ids, _ in rows)
        return self._predict(rows[:half], wanted) + self._predict(rows[half:], wanted)

    def _forward(self, rows: Rows, wanted: Sequence[Statistic]) -> "torch.Tensor":
        import torch

        shift = len(self.prefix) - 1
        length = max(ids.size for ids, _ in rows) + shift
        inputs = np.zeros((len(rows), length), np.int64)  # padding: any id does, nothing looks at it
        inputs[:, : len(self.prefix)] = self.prefix
        places, targets = [], []
        for number, (ids, first) in enumerate(rows):
            inputs[number, len(self.prefix) : ids.size + shift] = ids[:-1]
            places.append(number * length + np.arange(first + shift, ids.size + shift))
            targets.append(ids[first:])
        with torch.inference_mode():
            moved = [to_device(a, self.device) for a in (inputs, np.concatenate(places), np.concatenate(targets))]
            values = self._logits(*moved, wanted)
        self.places += inputs.size
        self.fed += sum(ids.size + shift for ids, _ in rows)
        return values

    def _head(self) -> tuple[Callable[..., "torch.Tensor"], int, bool]:
        """How this model's logits are had, how many tokens may go through it at once, and whether by blocks.

        The rule is to run the body and to apply the output embedding to the predicted places, a block at a time. Some
        models do more to their logits (Gemma 2 caps them, Cohere and Granite scale them), so a probe is run both ways,
        and where one bit differs the model's own logits are used for whole batches. The probe
        also shows whether the model is causal: RecipeError where a later token changes an earlier prediction.
        """
        import torch

        kind = "cpu" if self.device.type == "cpu" else "cuda"
        limit = BATCH_TOKENS[kind]
        model, body, head = self.model, self.model.base_model, self.model.get_output_embeddings()

        def hidden_states(ids: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = body(input_ids=ids, use_cache=False)[0]
            return hidden

        def in_blocks(
            rows: Callable[[slice], torch.Tensor], targets: torch.Tensor, wanted: Sequence[Statistic]
        ) -> torch.Tensor:
            step = max(1, BLOCK[kind] // vocabulary)
            blocks = [slice(start, start + step) for start in range(0, len(targets), step)]
            return torch.cat([token_statistics(rows(block), targets[block], wanted) for block in blocks], dim=1)

        def from_hidden(
            ids: torch.Tensor, places: torch.Tensor, targets: torch.Tensor, wanted: Sequence[Statistic]
        ) -> torch.Tensor:
            hidden = hidden_states(ids).flatten(0, 1)[places]
            return in_blocks(lambda block: head(hidden[block]), targets, wanted)

        def from_logits(
            ids: torch.Tensor, places: torch.Tensor, targets: torch.Tensor, wanted: Sequence[Statistic]
        ) -> torch.Tensor:
            logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
            return in_blocks(lambda block: logits[places[block]], targets, wanted)

        with torch.inference_mode():
            probe = torch.arange(8, device=self.device).repeat(2, 1) % self.embeddings
            probe[1, 4:] = 0
            logits = model(input_ids=probe, use_cache=False).logits
            if (logits[0, :4] - logits[1, :4]).abs().max() > 0.05 * logits.abs().max():
                raise RecipeError("the model looks at the tokens that it should predict: name a causal language model")
            vocabulary: int = logits.shape[-1]
            plain = isinstance(head, torch.nn.Module) and body is not model
            if plain and torch.equal(head(hidden_states(probe)), logits):
                return from_hidden, limit, True
        return from_logits, min(limit, max(1, FULL_LOGITS // vocabulary)), False


def load_model(path: str, dtype: DType, *, remote_code: bool = False) -> Any:
    """The causal language model at `path` (folder, GGUF or name), weights from safetensors or GGUF only.

    RecipeError with the reason when it cannot be loaded, or when weights are missing that would be random.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "local_files_only": True, "output_loading_info": True}
    gguf = gguf_file(path)
    if gguf is None:
        folder = local(path)
        options |= {"use_safetensors": True, "trust_remote_code": remote_code}
    else:
        folder = str(gguf.parent)
        options |= {"gguf_file": gguf.name}
        if hasattr(transformers, "GgufConfig"):  # newer ones may keep weights packed, with kernels from the network
            options |= {"quantization_config": transformers.GgufConfig(dequantize=True)}
    try:
        with quiet():
            model, loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, struct.error, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        remedy = "name a folder with config.json and safetensors, or a GGUF file"
        if "trust_remote_code" in str(error):
            reason, remedy = "it needs its owner's code", "remote_code = true runs that, if you trust it"
        raise RecipeError(f"no causal language model in {path!r} ({reason}); {remedy}") from error
    if missing := sorted(loaded["missing_keys"]) + sorted(str(m) for m in loaded["mismatched_keys"]):
        raise RecipeError(f"{path!r} lacks weights of its model: {', '.join(missing[:5])}; complete the folder")
    return model


def _context(config: Any, wanted: int | None) -> int:
    """Tokens of a window: what the recipe wants, within what the model has positions for."""
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    if wanted is None:
        return min(own or CONTEXT, CONTEXT)
    if own is not None and wanted > own:
        raise RecipeError(f"context = {wanted} is more than the model's {own} positions; lower it")
    return wanted


def _prefix(tokenizer: Any, bos: bool | None) -> tuple[int, ...]:
    """The special tokens put before a text: the tokenizer's own habit, its BOS, or none."""
    if bos is None:
        encoding = tokenizer.backend_tokenizer.encode("a")
        n = next((i for i, special in enumerate(encoding.special_tokens_mask) if not special), 0)
        return tuple(encoding.ids[:n])
    if bos and tokenizer.bos_token_id is None:
        raise RecipeError("bos = true, but the model's tokenizer has no BOS token; leave `bos` out")
    return (tokenizer.bos_token_id,) if bos else ()
