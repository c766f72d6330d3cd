"""What a mixture costs: the best until the budget (order_by) against the draw, over the same candidates.

    python tests/benchmarks/mixing.py [--documents 2000000] [--rounds 2]

Documents of a few bytes in a pool of Parquet, with a normal score of its own each and a tenth of them tied, are read
once; then both kinds of mixture are made in turn, in one process, also with weights and an order per group. The best of
the rounds each; the ratio is what to watch, since the speed is the machine's. `sorted` sorts all of the documents.
"""

import argparse
import gc
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import best_first
from pipelines.execute import Serial
from pipelines.graph import Graph
from pipelines.mix import mix
from pipelines.recipe import Recipe
from pipelines.run import Run, perform, steps
from storage.lake import Lake

FILE_ROWS = 250_000
SHARD_BYTES = 4_000_000


def write_pool(folder: Path, documents: int) -> None:
    rng = np.random.default_rng(7)
    for start in range(0, documents, FILE_ROWS):
        n = min(FILE_ROWS, documents - start)
        score = rng.normal(-0.1, 0.4, n)
        score[: n // 10] = score[: n // 10].round(1)
        columns = {
            "text": [f"document {number}" for number in range(start, start + n)],
            "score": score,
            "n": rng.lognormal(6, 1, n).astype(np.int64),
            "topic": rng.integers(0, 1000, n).astype(str),
        }
        pq.write_table(pa.table(columns), folder / f"{start:012d}.parquet")


def recipe(folder: Path, weights: bool, **mixture: Any) -> Recipe:
    adopt = {"score": "double", "n": "bigint", "topic": "varchar"}
    pool = {"name": "pool", "format": "parquet", "path": str(folder / "*.parquet"), "adopt": adopt}
    main = {"tokens": "adopted.n", "group_by": "adopted.topic"} | mixture | ({"weights": "w"} if weights else {})
    w = {"method": "temperature", "temperature": 2.0, "tokens": "adopted.n", "group_by": "adopted.topic"}
    tables: dict[str, Any] = {"weights": {"w": w}} if weights else {}
    tables |= {"name": "bench", "sources": [pool], "ingest": {"shard_bytes": SHARD_BYTES}, "mixtures": {"main": main}}
    return Recipe.of(tables)


def seconds(lake: Lake, made: Recipe) -> tuple[float, int]:
    """Of one mixture that is made anew, its weights apart; and the tokens taken."""
    run = Run(lake, Graph(made), Serial())
    for step in steps(run.graph, ("weigh",)):
        perform(run, step)
    start = time.perf_counter()
    counts = mix(run, "main")
    spent = time.perf_counter() - start
    if counts.get("reused") or run.failed:
        raise SystemExit("the mixture was not made")
    gc.collect()
    return spent, counts["taken_tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    budget = options.documents * 665 // 4  # a quarter of the tokens: exp(6.5) each in the mean
    kinds = ["draw", "best", "sorted", "draw, 1,000 groups", "best, 1,000 groups"]
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, lake = Path(name), Lake.create(Path(name) / "lake")
        write_pool(folder, options.documents)
        run = Run(lake, Graph(recipe(folder, False)), Serial())
        for step in steps(run.graph, ("ingest",)):
            perform(run, step)
        print(f"{options.documents} documents, budget {budget} tokens")
        for turn in range(options.rounds):
            for place, kind in enumerate(kinds):
                order = {} if kind.startswith("draw") else {"order_by": "adopted.score DESC"}
                # Another budget makes another mixture, lest the last one be reused.
                number = budget + turn * len(kinds) + place
                few = best_first.SORTED
                best_first.SORTED = 10**18 if kind == "sorted" else few
                spent, taken = seconds(lake, recipe(folder, "groups" in kind, budget_tokens=number, **order))
                best_first.SORTED = few
                best[kind] = min(best.get(kind, spent), spent)
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
                print(f"  {turn} {kind:20}{spent:8.1f} s, {taken} tokens taken, {peak:.2f} GiB at the peak so far")
        lake.close()
    for kind, spent in best.items():
        plain = best["draw, 1,000 groups" if "groups" in kind else "draw"]
        print(f"{kind:20}{options.documents / spent:12.0f} documents/s{spent / plain:8.2f} times the draw")


if __name__ == "__main__":
    main()
