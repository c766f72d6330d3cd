"""Tokens a second of training, against the bare loop: model(ids, labels=ids).loss.backward(), clip, AdamW.

    python tests/benchmarks/training.py [--sizes 1m 4m 10m] [--vocabulary 8192] [--context 512] [--batch 8]
        [--threads 2] [--device cpu] [--dtype float32] [--seconds 20]

Both train the same random weights on the same random tokens, a batch of --batch sequences a step, in turn in one
process; the ratio is what to watch, since the speed is the machine's and its load's. The bare loop is what a page of
transformers' documentation shows, with AdamW as torch makes it by default.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scorers.lm.learner import Learner
from scorers.lm.training import LADDER, Settings


def llama(size: str, vocabulary: int, context: int) -> LlamaForCausalLM:
    rung = LADDER[size]
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=rung.width,
            intermediate_size=rung.feed_forward,
            num_hidden_layers=rung.layers,
            num_attention_heads=rung.heads,
            max_position_embeddings=context,
            tie_word_embeddings=rung.tied,
        )
    )


def bare(model: LlamaForCausalLM, device: str, half: bool) -> Callable[[np.ndarray], None]:
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def step(ids: np.ndarray) -> None:
        sequences = torch.from_numpy(ids).to(device)
        with torch.autocast(device, torch.bfloat16) if half else nullcontext():
            loss = model(input_ids=sequences, labels=sequences).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1m", "4m", "10m"])
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, default=20.0)
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    rng = np.random.default_rng(0)
    print(f"vocabulary {o.vocabulary}, batch {o.batch} x {o.context}, {o.threads} threads, {o.device}, {o.dtype}")
    for size in o.sizes:
        settings = Settings(o.context, 10**9, o.batch, 1e-4, 0.1, 0, 0.1, 0.9, 0.95, 1.0, o.dtype)
        learner = Learner(llama(size, o.vocabulary, o.context), settings, o.device)
        loop = bare(llama(size, o.vocabulary, o.context), o.device, o.dtype == "bfloat16")
        targets = o.batch * o.context
        ways = {
            "bare loop": loop,
            "this one": lambda ids, learner=learner, n=targets: learner.step(ids, None, n, 1e-4, world=1),
        }
        fastest = dict.fromkeys(ways, (float("inf"), float("inf")))
        began = time.perf_counter()
        while time.perf_counter() - began < o.seconds:
            ids = rng.integers(0, o.vocabulary, (o.batch, o.context + 1))
            for name, way in ways.items():  # in turn, so that the machine's other work falls on both
                wall, cpu = time.perf_counter(), time.process_time()
                way(ids)
                took = time.perf_counter() - wall, time.process_time() - cpu
                fastest[name] = min(fastest[name], took)
        for what, number in (("wall clock", 0), ("of a core", 1)):
            ours, loops = (targets / fastest[name][number] for name in ("this one", "bare loop"))
            print(f"{size:>5}  {ours:10,.0f} tokens/s {what:10}   bare loop {loops:10,.0f}   ratio {ours / loops:5.2f}")


if __name__ == "__main__":
    main()
