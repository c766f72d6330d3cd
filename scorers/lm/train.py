"""Training of a small language model: a corpus of tokens in, a Hugging Face directory with its training record out.

    sequences [batch, context + 1] -> hidden states -> logits and their gradient, block by block -> one gradient vector
        -> summed over ranks -> clipped -> AdamW

All weights are views into one vector, and so are their gradients and both moments: a step clips, reduces and updates
whole vectors, and a checkpoint is three of them. The logits' gradient is written down where the logits are (softmax
minus one-hot), so that float32 logits exist for one block of tokens at a time and the head runs once forward.

The order of sequences hangs on the seed and the epoch alone, and nothing else is drawn after the first weights: a run
that was stopped and goes on from its checkpoint writes the same bits as one that was not (on one machine, with the same
threads). A base is trained without its dropout, for the same reason and because one epoch needs none.
"""

import json
import math
import os
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scorers.lm.corpus import Corpus, first_answer_token, held_out, open_corpus, prepare
from scorers.lm.forward import CausalLM, load_model
from scorers.lm.tokenizer import load_tokenizer, quiet
from scorers.lm.training import LADDER, Settings, Training, context_of, resolve
from storage.errors import RecipeError, ShardError

if TYPE_CHECKING:
    import torch

MICRO_TOKENS = {"cpu": 2048, "cuda": 65_536}
"""Tokens of one forward and backward pass. A CPU is fastest while a layer's activations stay in its cache."""
BLOCK = {"cpu": 1 << 21, "cuda": 1 << 28}
"""Float32 logits held at once (8 MiB: the cache again; 1 GiB)."""
CHECKPOINT_SECONDS = 300.0
LOG_SECONDS = 1.0
CURVE = 300
"""Points of the loss curve in the record."""
ALIGN = 16
"""Weights begin at multiples of 64 bytes."""


def train(
    training: Training,
    texts: str,
    work: str,
    out: str,
    *,
    base: str | None,
    tokenizer: str | None,
    seed: int,
    device: str,
    threads: int,
    rank: int = 0,
    world: int = 1,
) -> dict[str, Any]:
    """Trains on the Parquet file `texts` (text, prompt, heldout; in training order) and writes the folder `out`.

    `base` and `tokenizer` are those of `training` as paths. `work`, a folder for this training alone, keeps the tokens,
    the checkpoint and log.jsonl (a line per logged step: step, steps, tokens, loss, lr, tokens_per_second); a run that
    finds them there goes on. `out` is complete or absent: config, float32 safetensors, tokenizer, and training.json,
    the record that is returned. Losses are in nats per target token, low is good.

    With several ranks torch.distributed is set up by the caller, `work` is one folder for all, each rank computes its
    share of every batch, rank 0 writes, and the others return an empty record; a corpus that was prepared before they
    start keeps them from waiting. RecipeError for input that cannot be trained on, and for a loss that is no longer
    finite; ShardError where one sequence does not fit into memory.
    """
    import torch

    torch.set_num_threads(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if threads > 1 else "false")
    if rank == 0:
        prepare(training, texts, work, base=base, tokenizer=tokenizer)
    if world > 1:
        torch.distributed.barrier()
    corpus = open_corpus(work)
    model = _base(base, corpus) if base is not None else _from_random(training, corpus, seed)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    context = context_of(training, positions)
    if base is not None and positions is not None and context > positions:
        raise RecipeError(f"context = {context} is more than the base's {positions} positions; lower it")
    sequences = corpus.sequences(context)
    settings = resolve(training, parameters=_multiplied(model), context=context, epoch=sequences)
    learner = Learner(model, settings, device)
    checkpoint = Checkpoint(Path(work, "checkpoint.safetensors"), json.dumps([repr(training), seed, corpus.key]))
    progress = checkpoint.read(learner) or Progress(micro=learner.micro)
    learner.micro = progress.micro

    tokens, mask = corpus.tokens, corpus.mask
    last_log = last_write = began = time.monotonic()
    logged, spent = progress.step, progress.seconds
    for step in range(progress.step, settings.steps):
        first = step * settings.batch_sequences
        numbers = np.arange(first, min(first + settings.batch_sequences, settings.sequences))
        places = np.array([_order(int(n) // sequences, sequences, seed)[n % sequences] for n in numbers])
        index = places[:, None] * context + np.arange(context + 1)
        wanted = None if mask is None else mask[index[:, 1:]]
        targets = len(numbers) * context if wanted is None else int(wanted.sum())
        mine = np.array_split(np.arange(len(numbers)), world)[rank]
        lr = learning_rate(settings, step)
        loss = learner.step(
            tokens[index[mine]].astype(np.int64), None if wanted is None else wanted[mine], targets, lr, world
        )
        if not math.isfinite(loss):
            raise RecipeError(
                f"learning_rate = {settings.learning_rate:.3g}: the loss is {loss} at step {step + 1} of "
                f"{settings.steps}; lower learning_rate, or raise warmup_tokens"
            )
        now = time.monotonic()
        progress.step, progress.seconds, progress.micro = step + 1, spent + now - began, learner.micro
        progress.losses.append(loss)
        if rank == 0 and (now - last_log >= LOG_SECONDS or step + 1 == settings.steps):
            done = (step + 1 - logged) * settings.batch_sequences * context
            _log(work, settings, step, loss, lr, done / max(now - last_log, 1e-9))
            last_log, logged = now, step + 1
        if rank == 0 and now - last_write >= CHECKPOINT_SECONDS:
            checkpoint.write(learner, progress)
            last_write = time.monotonic()
    if rank != 0:
        return {}
    model = learner.release()
    del learner  # its vectors are four times the model
    aside = _write(model, corpus, out)
    record = _record(training, settings, corpus, model, progress) | {
        "held_out_before": held_out_loss(base, texts, corpus, context, device) if base is not None else None,
        "held_out": held_out_loss(str(aside), texts, corpus, context, device),
        "seed": seed,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "ranks": world,
    }
    Path(aside, "training.json").write_text(json.dumps(record, indent=1))
    shutil.rmtree(out, ignore_errors=True)
    aside.rename(out)
    return record


def learning_rate(settings: Settings, step: int) -> float:
    """Of step 0, 1, ...: a linear rise over the warmup, then half a cosine down to min_lr_ratio at the last step."""
    warmup = settings.warmup_tokens // (settings.batch_sequences * settings.context)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, settings.steps - 1 - warmup)
    low = settings.min_lr_ratio
    return settings.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * done)) / 2)


class Learner:
    """A model with its weights, gradients and AdamW moments as vectors, and one optimizer step over a batch."""

    def __init__(self, model: Any, settings: Settings, device: str) -> None:
        import torch

        self.model = model.to(device).eval()  # eval: no dropout
        self.settings, self.device = settings, torch.device(device)
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        self.micro = max(1, MICRO_TOKENS[kind] // settings.context)
        """Sequences of a pass; halved where the memory does not hold them."""
        embedding = model.get_input_embeddings().weight
        groups = ([], [])  # type: tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]
        for weight in model.parameters():
            groups[weight.ndim < 2 or weight is embedding].append(weight)
        places = [-(-weight.numel() // ALIGN) * ALIGN for group in groups for weight in group]
        decayed = sum(places[: len(groups[0])])
        self.weights = torch.zeros(sum(places), device=self.device)
        self.gradient, self.mean, self.square = (torch.zeros_like(self.weights) for _ in range(3))
        begin = 0
        for weight, places_taken in zip(groups[0] + groups[1], places, strict=True):
            own = slice(begin, begin + weight.numel())
            self.weights[own] = weight.data.flatten()
            weight.data = self.weights[own].view_as(weight)
            weight.grad = self.gradient[own].view_as(weight)
            begin += places_taken
        self._optimizer = self._adamw((slice(0, decayed), settings.weight_decay), (slice(decayed, begin), 0.0))
        head = model.get_output_embeddings()
        self._body = model.base_model
        self._head = head.weight if self._plain_head(head) else None
        vocabulary = model.config.get_text_config().vocab_size
        self._rows = max(1, BLOCK[kind] // vocabulary)
        if kind == "cuda":
            self._body = torch.compile(self._body, dynamic=False)

    def step(
        self, ids: NDArray[np.int64], wanted: NDArray[np.bool_] | None, targets: int, lr: float, world: int
    ) -> float:
        """One AdamW step on sequences [n, context + 1], this rank's share of a batch with so many `targets`.

        `wanted` [n, context] says which targets count. Returns the batch's mean loss, nats per target, before the
        step; where it is not finite no step is made.
        """
        import torch

        total = self._gradients(ids, wanted, targets)
        if world > 1:
            torch.distributed.all_reduce(self.gradient)
            torch.distributed.all_reduce(total)
        loss = total.item() / max(1, targets)
        norm = torch.linalg.vector_norm(self.gradient).item()
        if not math.isfinite(loss + norm):
            return math.nan if math.isfinite(loss) else loss
        if norm > self.settings.clip:
            self.gradient.mul_(self.settings.clip / norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        return loss

    def restore(self, weights: "torch.Tensor", mean: "torch.Tensor", square: "torch.Tensor", step: int) -> None:
        """Sets weights and moments to those after `step` steps."""
        for own, other in ((self.weights, weights), (self.mean, mean), (self.square, square)):
            own.copy_(other)
        for state in self._optimizer.state.values():
            state["step"].fill_(step)

    def release(self) -> Any:
        """The model on the CPU, each weight a tensor of its own again. The learner is of no further use."""
        for weight in self.model.parameters():
            weight.data, weight.grad = weight.data.cpu().clone(), None
        return self.model

    def _adamw(self, *groups: tuple[slice, float]) -> "torch.optim.Optimizer":
        import torch

        made = []
        for own, decay in groups:
            vector = torch.nn.Parameter(self.weights[own])
            vector.grad = self.gradient[own]
            made.append((vector, own, decay))
        optimizer = torch.optim.AdamW(
            [{"params": [vector], "weight_decay": decay} for vector, _, decay in made],
            lr=self.settings.learning_rate,
            betas=(self.settings.beta1, self.settings.beta2),
            fused=True,
        )
        for vector, own, _ in made:
            optimizer.state[vector] = {
                "step": torch.zeros((), device=self.device),
                "exp_avg": self.mean[own],
                "exp_avg_sq": self.square[own],
            }
        return optimizer

    def _gradients(self, ids: NDArray[np.int64], wanted: NDArray[np.bool_] | None, targets: int) -> "torch.Tensor":
        """Fills the gradient of the mean loss over `targets`; returns the sum of losses, float64, one element."""
        import torch

        while True:
            try:
                self.gradient.zero_()
                total = torch.zeros(1, dtype=torch.float64, device=self.device)
                for begin in range(0, len(ids), self.micro):
                    some = slice(begin, begin + self.micro)
                    total += self._backward(ids[some], None if wanted is None else wanted[some], 1 / max(1, targets))
                return total
            except torch.OutOfMemoryError as error:
                rows = min(self.micro, len(ids))
                if rows == 1:
                    raise ShardError(
                        f"a sequence of {ids.shape[1]} tokens does not fit into the memory of {self.device}: lower "
                        "`context`, or free the device"
                    ) from error
            # go on outside of the handler, whose traceback keeps the failed batch's tensors alive
            torch.cuda.empty_cache()
            self.micro = rows // 2

    def _backward(self, ids: NDArray[np.int64], wanted: NDArray[np.bool_] | None, scale: float) -> "torch.Tensor":
        """Adds the gradient of scale * (sum of losses) of sequences [n, context + 1]; returns the sum."""
        import torch

        sequences = torch.from_numpy(ids).to(self.device)
        inputs, targets = sequences[:, :-1], sequences[:, 1:].flatten()
        chosen = None if wanted is None else torch.from_numpy(wanted.flatten().nonzero()[0]).to(self.device)
        if chosen is not None:
            targets = targets[chosen]
        half = self.settings.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext():
            if self._head is None:
                logits = self.model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
                logits = logits if chosen is None else logits[chosen]
                loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
                (loss * scale).backward()  # type: ignore[no-untyped-call]
                return loss.detach()
            hidden = self._body(input_ids=inputs, use_cache=False)[0].flatten(0, 1)
            hidden = hidden if chosen is None else hidden[chosen]
        total, gradient = self._head_gradients(hidden.detach(), targets, scale, half)
        hidden.backward(gradient)
        return total

    def _head_gradients(
        self, hidden: "torch.Tensor", targets: "torch.Tensor", scale: float, half: bool
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """The sum of losses, and the gradient with respect to `hidden` [n, width]; the head's own is added to it.

        With logits z = hidden W^T the gradient with respect to z is scale * (softmax(z) - one-hot(target)).
        """
        import torch

        head = self._head
        assert head is not None
        kind = torch.bfloat16 if half else torch.float32
        weight, rows = head.detach().to(kind), hidden.to(kind)
        gradient = torch.empty_like(hidden)
        total = torch.zeros(1, dtype=torch.float64, device=self.device)
        for begin in range(0, len(rows), self._rows):
            block = slice(begin, begin + self._rows)
            log_probs = (rows[block] @ weight.T).float().log_softmax(-1)
            expected = targets[block, None]
            total -= log_probs.gather(1, expected).sum(dtype=torch.float64)
            slope = log_probs.exp_()
            slope.scatter_add_(1, expected, torch.full_like(expected, -1, dtype=slope.dtype))
            slope = slope.mul_(scale).to(kind)
            gradient[block] = slope @ weight
            if half:
                head.grad += slope.T @ rows[block]
            else:
                head.grad.addmm_(slope.T, rows[block])
        return total, gradient

    def _plain_head(self, head: Any) -> bool:
        """Whether the logits are the body's states times the head and no more (Gemma 2 caps them, Granite scales)."""
        import torch

        if not isinstance(head, torch.nn.Linear) or head.bias is not None or self._body is self.model:
            return False
        probe = torch.arange(8, device=self.device)[None] % head.out_features
        with torch.no_grad():
            states = self._body(input_ids=probe, use_cache=False)[0]
            return torch.equal(head(states), self.model(input_ids=probe, use_cache=False).logits)


class Progress:
    """How far a run has come."""

    def __init__(self, *, micro: int) -> None:
        self.step = 0
        self.seconds = 0.0
        self.micro = micro
        self.losses: list[float] = []


class Checkpoint(NamedTuple):
    """A run's state in one safetensors file: the three vectors, and the progress as its metadata.

    `key` says what is trained; a file with another key is of another run and is not read.
    """

    path: Path
    key: str

    def write(self, learner: Learner, progress: Progress) -> None:
        """Writes aside and renames, so that a run that is killed leaves this state or the one before."""
        from safetensors.torch import save_file

        aside = self.path.with_suffix(".part")
        vectors = {"weights": learner.weights, "mean": learner.mean, "square": learner.square}
        save_file(vectors, aside, metadata={"key": self.key, "progress": json.dumps(vars(progress))})
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, self.path)

    def read(self, learner: Learner) -> Progress | None:
        """Restores the learner; None where there is no checkpoint of this run."""
        from safetensors import safe_open

        if not self.path.exists():
            return None
        with safe_open(self.path, framework="pt", device=str(learner.device)) as file:
            told = file.metadata()
            if told["key"] != self.key:
                return None
            progress = Progress(micro=learner.micro)
            vars(progress).update(json.loads(told["progress"]))
            weights, mean, square = (file.get_tensor(name) for name in ("weights", "mean", "square"))
            learner.restore(weights, mean, square, progress.step)
        return progress


def held_out_loss(path: str, texts: str, corpus: Corpus, context: int, device: str) -> dict[str, Any] | None:
    """Mean loss of the model at `path` over the held-out texts: texts, tokens, nats_per_token, bits_per_byte.

    Each text alone, as scorers.lm.forward reads it; with a masked corpus the answers' tokens only, after their prompts.
    None where no text is held out.
    """
    model = CausalLM(path, device=device, context=context, bos=None)
    rust = load_tokenizer(corpus.tokenizer)
    n_texts = n_tokens = n_bytes = 0
    nats = 0.0
    for group in held_out(texts):
        whole = [prompt + text for prompt, text in group]
        encodings = rust.encode_batch(whole, add_special_tokens=False) if corpus.masked else [None] * len(group)
        for (prompt, _), joined, encoding, predicted in zip(group, whole, encodings, model(whole), strict=True):
            if predicted is None or not predicted.log_probs.size:
                continue
            log_probs, size = predicted.log_probs, predicted.n_bytes
            if encoding is not None and prompt:
                first = first_answer_token(encoding, len(prompt))
                log_probs = log_probs[max(0, log_probs.size - len(encoding) + first) :]
                size = len(joined[encoding.offsets[first][0] :].encode()) if log_probs.size else 0
            n_texts, n_tokens, n_bytes = n_texts + 1, n_tokens + log_probs.size, n_bytes + size
            nats -= float(log_probs.sum(dtype=np.float64))
    if not n_tokens or not n_bytes:
        return None
    return {
        "texts": n_texts,
        "tokens": n_tokens,
        "nats_per_token": nats / n_tokens,
        "bits_per_byte": nats / (math.log(2) * n_bytes),
    }


def _from_random(training: Training, corpus: Corpus, seed: int) -> Any:
    """A Llama of the ladder with the library's random weights. Ids up to a multiple of 64 exist and are never seen."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    assert training.size is not None
    size = LADDER[training.size]
    end = corpus.separator[0]
    config = LlamaConfig(
        vocab_size=-(-corpus.vocabulary // 64) * 64,
        hidden_size=size.width,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=context_of(training, None),
        tie_word_embeddings=size.tied,
        bos_token_id=end,
        eos_token_id=end,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _base(base: str, corpus: Corpus) -> Any:
    model = load_model(base, "float32")
    embeddings = model.get_input_embeddings().weight.shape[0]
    if corpus.vocabulary > embeddings:
        raise RecipeError(
            f"base: the tokenizer in {base!r} has {corpus.vocabulary} tokens, more than the model's {embeddings}; name "
            "a model with its own tokenizer"
        )
    return model


def _multiplied(model: Any) -> int:
    """Weights that multiply every token: all but an input embedding of its own."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    apart = head is None or head.weight is not embedding
    total: int = sum(weight.numel() for weight in model.parameters())
    return total - (embedding.numel() if apart else 0)


@lru_cache(maxsize=2)
def _order(epoch: int, sequences: int, seed: int) -> NDArray[np.int64]:
    """The order of an epoch: as the texts came, then permuted by seed and epoch."""
    return np.arange(sequences) if epoch == 0 else np.random.default_rng([seed, epoch]).permutation(sequences)


def _log(work: str, settings: Settings, step: int, loss: float, lr: float, speed: float) -> None:
    tokens = min((step + 1) * settings.batch_sequences, settings.sequences) * settings.context
    line = {"step": step + 1, "steps": settings.steps, "tokens": tokens, "loss": loss, "lr": lr}
    with open(Path(work, "log.jsonl"), "a") as file:
        file.write(json.dumps(line | {"tokens_per_second": round(speed, 1)}) + "\n")


def _write(model: Any, corpus: Corpus, out: str) -> Path:
    """Writes model and tokenizer into a folder beside `out`."""
    import torch

    aside = Path(f"{out}.part")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(corpus.tokenizer, aside)
    model.config.dtype = torch.float32
    with quiet():
        model.save_pretrained(aside)
    return aside


def _record(training: Training, settings: Settings, corpus: Corpus, model: Any, progress: Progress) -> dict[str, Any]:
    """What was done, in numbers. FLOPs are the model's, forward and backward (PaLM, arXiv 2204.02311, appendix B)."""
    config = model.config.get_text_config()
    multiplied = _multiplied(model)
    attention = 12 * config.num_hidden_layers * config.hidden_size * settings.context
    curve = np.array_split(np.array(progress.losses), min(CURVE, len(progress.losses)))
    ends = np.cumsum([len(part) for part in curve])
    return {
        "training": training.model_dump(mode="json"),
        "settings": asdict(settings) | {"tokens": settings.tokens, "steps": settings.steps},
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "parameters_without_embeddings": multiplied - model.get_output_embeddings().weight.numel(),
        "vocabulary": corpus.vocabulary,
        "documents": corpus.documents,
        "empty": corpus.empty,
        "corpus_tokens": corpus.n_tokens,
        "corpus_targets": corpus.targets,
        "tokens": settings.tokens,
        "epochs": settings.sequences / corpus.sequences(settings.context),
        "loss": [
            {"step": int(end), "nats_per_token": float(part.mean())} for end, part in zip(ends, curve, strict=True)
        ],
        "seconds": progress.seconds,
        "tokens_per_second": settings.tokens / progress.seconds,
        "model_flops": (6 * multiplied + attention) * settings.tokens,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }
