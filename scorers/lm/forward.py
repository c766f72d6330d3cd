"""The one forward pass of a causal language model: texts in, the log-probability of every predicted token out.

    texts -> token ids (Rust) -> windows of at most `context` tokens -> batches of like length, padded on the right
          -> hidden states -> vocabulary, block by block in float32 -> log-probabilities, put back by text

What is predicted. With a BOS every token of the text; without one every token but the first, which nothing precedes.
EOS and other special tokens that a tokenizer would append are no part of the text and are left out.

Long texts are cut into windows that overlap by half and begin, each, with the BOS if there is one. A token is predicted
once, in the first window that holds it, so that from the second window on it has at least half a window before it:

    text     0 1 2 3 4 5 6 7 8 9        (context 4, no BOS)
    window   0[1 2 3]
                 2 3[4 5]
                     4 5[6 7]
                         6 7[8 9]       [predicted here]

Padding stands to the right, where causal attention cannot see it, so no mask is needed and the fast attention kernels
apply. What shares a batch with a text changes its numbers only by the rounding of another kernel shape.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scorers.lm.tokenizer import gguf_file, load_pretrained, quiet
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
TOKENIZE_CHARACTERS = 1 << 22
"""Characters tokenized at once: an encoding takes about a hundred bytes a token until its ids are out."""


class Tokens(NamedTuple):
    """A text as the model reads it. `n_bytes` are the UTF-8 bytes of the tokens that will be predicted."""

    ids: NDArray[np.int64]
    n_bytes: int


@dataclass(frozen=True)
class Predicted:
    """The predicted tokens of one text: natural log-probabilities, float32 [n], and their UTF-8 bytes together."""

    log_probs: NDArray[np.float32]
    n_bytes: int


class Window(NamedTuple):
    """Tokens [start, stop) of text number `text`, of which [first, stop) are predicted here."""

    text: int
    start: int
    stop: int
    first: int


def windows(text: int, n: int, width: int, first: int) -> Iterator[Window]:
    """Windows of at most `width` tokens over a text of `n`, whose tokens from `first` on are each predicted once."""
    start = 0
    while first < n:
        stop = min(start + width, n)
        yield Window(text, start, stop, first)
        first, start = stop, start + max(1, width // 2)


def token_log_probs(logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
    """Natural log-probability of each target [T] under its row of logits [T, V], reduced in float32."""
    from torch.nn.functional import cross_entropy

    return -cross_entropy(logits.float(), targets, reduction="none")


class CausalLM:
    """A Hugging Face causal language model with its tokenizer, ready to predict texts.

    `path`: a folder (config.json, safetensors, tokenizer), a GGUF file, or a folder with one. Nothing is fetched, no
    code of the model's owner is run, no pickle is read. `context`: tokens of a window, BOS included; None for the
    model's own, at most 2048. `bos`: True puts the BOS before every window, False does not, None does what the
    tokenizer itself does with a text. RecipeError when the model cannot be loaded or does not fit these.
    """

    def __init__(
        self, path: str, *, device: str = "cpu", dtype: DType = "float32", context: int | None = None, bos: bool | None
    ) -> None:
        import torch

        tokenizer = load_pretrained(path)
        self._tokenizer = tokenizer.backend_tokenizer
        self.prefix = _prefix(tokenizer, bos)
        self._model = load_model(path, dtype).to(device).eval()
        self._device = torch.device(device)
        self._embeddings: int = self._model.get_input_embeddings().weight.shape[0]
        if self._tokenizer.get_vocab_size(with_added_tokens=False) > self._embeddings:
            raise RecipeError(
                f"the tokenizer in {path!r} has more tokens than the model's {self._embeddings}; use the model's own"
            )
        self.context = _context(self._model.config, context)
        if self.context <= len(self.prefix):
            raise RecipeError(f"context = {self.context} leaves no room beside {len(self.prefix)} BOS tokens; raise it")
        self._logits, self._batch_tokens = self._head()

    def __call__(self, texts: Sequence[str]) -> list[Predicted | None]:
        """The predicted tokens of each text; None for a text with a token that the model has no embedding for."""
        tokens = self.tokenize(texts)
        first = 0 if self.prefix else 1
        width = self.context - len(self.prefix)
        known = [t.ids.size == 0 or int(t.ids.max()) < self._embeddings for t in tokens]
        found = [np.empty(max(0, t.ids.size - first), np.float32) for t in tokens]
        todo = [
            window
            for number, t in enumerate(tokens)
            if known[number]
            for window in windows(number, t.ids.size, width, first)
        ]
        todo.sort(key=lambda w: (w.start - w.stop, w))  # longest first: what does not fit into memory shows at once
        done = 0
        while done < len(todo):
            rows = max(1, self._batch_tokens // (todo[done].stop - todo[done].start))
            batch = todo[done : done + rows]
            done += rows
            values = self._predict([(tokens[w.text].ids[w.start : w.stop], w.first - w.start) for w in batch])
            for w, row in zip(batch, values, strict=True):
                found[w.text][w.first - first : w.stop - first] = row
        return [Predicted(f, t.n_bytes) if k else None for f, t, k in zip(found, tokens, known, strict=True)]

    def tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        """Token ids without special tokens, and the bytes of those that will be predicted.

        Without a BOS those are the bytes after the first token. A character that is cut into several tokens counts
        whole with the last of them, as does white space that a tokenizer leaves out of its offsets, so that the bytes
        of all tokens sum to the text's.
        """
        tokens: list[Tokens] = []
        for group in _groups(texts):
            for text, encoding in zip(
                group, self._tokenizer.encode_batch(group, add_special_tokens=False), strict=True
            ):
                begin = 0 if self.prefix else _after_first(encoding)
                tokens.append(Tokens(np.asarray(encoding.ids, np.int64), len(text[begin:].encode())))
        return tokens

    def _predict(self, rows: list[tuple[NDArray[np.int64], int]]) -> list[NDArray[np.float32]]:
        """Per row (ids of a window, place of the first predicted one) the log-probabilities of the predicted tokens.

        Where the device's memory does not hold the batch, its halves go one after the other, and later batches are
        made as small. ShardError when a single window does not fit.
        """
        import torch

        try:
            return self._forward(rows)
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                raise ShardError(
                    f"a window of {rows[0][0].size} tokens does not fit into the memory of {self._device}: lower "
                    "`context`, or free the device"
                ) from error
        # go on outside of the handler, whose traceback keeps the failed batch's tensors alive
        torch.cuda.empty_cache()
        half = len(rows) // 2
        self._batch_tokens = half * max(ids.size for ids, _ in rows)
        return self._predict(rows[:half]) + self._predict(rows[half:])

    def _forward(self, rows: list[tuple[NDArray[np.int64], int]]) -> list[NDArray[np.float32]]:
        import torch

        # the last token of a window is only ever a target, so it is not fed
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
            wanted = torch.from_numpy(np.concatenate(places)).to(self._device)
            expected = torch.from_numpy(np.concatenate(targets)).to(self._device)
            log_probs = self._logits(torch.from_numpy(inputs).to(self._device), wanted, expected).cpu().numpy()
        return np.split(log_probs, np.cumsum([t.size for t in targets])[:-1])

    def _head(self) -> tuple[Callable[..., "torch.Tensor"], int]:
        """How this model's logits are had, and how many tokens may go through it at once.

        The rule is to run the body and to apply the output embedding to the predicted places, a block at a time. Some
        models do more to their logits (Gemma 2 caps them, Cohere and Granite scale them), so a probe is run both ways,
        and where one bit differs the model's own logits are used for whole batches. The probe
        also shows whether the model is causal: RecipeError where a later token changes an earlier prediction.
        """
        import torch

        kind = "cpu" if self._device.type == "cpu" else "cuda"
        limit = BATCH_TOKENS[kind]
        model, body, head = self._model, self._model.base_model, self._model.get_output_embeddings()

        def hidden_states(ids: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = body(input_ids=ids, use_cache=False)[0]
            return hidden

        def in_blocks(rows: Callable[[slice], torch.Tensor], expected: torch.Tensor) -> torch.Tensor:
            step = max(1, BLOCK[kind] // vocabulary)
            blocks = [slice(start, start + step) for start in range(0, len(expected), step)]
            return torch.cat([token_log_probs(rows(block), expected[block]) for block in blocks])

        def from_hidden(ids: torch.Tensor, wanted: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
            hidden = hidden_states(ids).flatten(0, 1)[wanted]
            return in_blocks(lambda block: head(hidden[block]), expected)

        def from_logits(ids: torch.Tensor, wanted: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
            logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
            return in_blocks(lambda block: logits[wanted[block]], expected)

        with torch.inference_mode():
            probe = torch.arange(8, device=self._device).repeat(2, 1) % self._embeddings
            probe[1, 4:] = 0
            logits = model(input_ids=probe, use_cache=False).logits
            if (logits[0, :4] - logits[1, :4]).abs().max() > 0.05 * logits.abs().max():
                raise RecipeError("the model looks at the tokens that it should predict: name a causal language model")
            vocabulary: int = logits.shape[-1]
            plain = isinstance(head, torch.nn.Module) and body is not model
            if plain and torch.equal(head(hidden_states(probe)), logits):
                return from_hidden, limit
        return from_logits, min(limit, max(1, FULL_LOGITS // vocabulary))


def load_model(path: str, dtype: DType) -> Any:
    """The causal language model at `path` (folder or GGUF), weights from safetensors or GGUF only, never the network.

    RecipeError with the reason when it cannot be loaded, or when weights are missing that would be random.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "local_files_only": True, "output_loading_info": True}
    gguf = gguf_file(path)
    if gguf is None:
        folder = path
        options |= {"use_safetensors": True, "trust_remote_code": False}
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
        raise RecipeError(
            f"no causal language model in {path!r} ({reason}); name a folder with config.json and safetensors, or a "
            "GGUF file"
        ) from error
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


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts in runs of about TOKENIZE_CHARACTERS."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= TOKENIZE_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _after_first(encoding: Any) -> int:
    """The character at which the second token begins to count; with fewer tokens, the text's end or 0."""
    if len(encoding) == 0:
        return 0
    end: int = encoding.token_to_chars(0)[1]
    return end if len(encoding) == 1 else min(end, encoding.token_to_chars(1)[0])
