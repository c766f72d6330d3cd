"""fastText as a scorer and as a whole run beside the bare library: documents a second and core, scaling, memory.

    CORPUSMILL_BENCH_DATA=FOLDER python tests/benchmarks/fasttext_scorer.py [--documents 40000] [--words 3800000]

FOLDER/text holds *.jsonl or *.jsonl.gz with a field `text`; documents are taken evenly from the files and cut at 20,000
characters. The model has the shape of DCLM's: bigrams, 100 numbers each, two million buckets, and a dictionary that is
filled up with made-up words until the file has 2.4 GB. It takes four minutes, 8 GB of memory and 4 GB under TMPDIR.

    library   the loop that a user writes: model.predict of each text in memory, made one line. One core.
    scorer    the built scorer on batches in memory. One core.
    run       the step `score` of a recipe: Parquet shards are read, scored, written and committed to the lake; in this
              process, then on Ray with one worker and with two.
    memory    proportional set size (a page is shared among those who map it) of the two workers at their largest,
              beside two processes that each loaded the model by the library and scored with it.

Rates count processor time, which other work on the machine disturbs little. Those of the workers are of what comes
after their first shards, which leaves out that they start and load; beside them is the rate by the clock.
"""

import argparse
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from cpu_scorers import files, read, scoring, seconds

from flows.ray_executor import RayExecutor
from pipelines.execute import Executor, Serial
from pipelines.graph import Graph
from pipelines.recipe import Recipe
from pipelines.run import Quiet, Run, perform, steps
from scorers.classifiers.fasttext import PROFILES, FastText
from scorers.device import compute_with
from storage.lake import Lake

LABELS = ("__label__a", "__label__b", "__label__c")  # each run scores another one, so that nothing is reused
SHARD_BYTES = 8_000_000
line = PROFILES["dclm"]


def train(texts: list[str], words: int, folder: Path) -> str:
    import fasttext

    corpus = folder / "lines.txt"
    with corpus.open("w") as out:
        for place, text in enumerate(texts):
            out.write(f"{LABELS[place % 3]} {line(text)}\n")
        known = len({word for text in texts for word in text.split()})
        for first in range(known, words, 1000):
            out.write(f"{LABELS[0]} {' '.join(f'made{word}up' for word in range(first, first + 1000))}\n")
    model = fasttext.train_supervised(
        str(corpus), wordNgrams=2, dim=100, bucket=2_000_000, epoch=1, thread=os.cpu_count(), verbose=0
    )
    model.save_model(str(folder / "model.bin"))
    corpus.unlink()
    return str(folder / "model.bin")


def by_library(path: str, texts: list[str]) -> tuple[float, float]:
    """Seconds of processor time to load and to score."""
    import fasttext

    began = time.process_time()
    model = fasttext.load_model(path)
    loaded = time.process_time() - began
    return loaded, seconds(lambda: [model.predict(line(text)) for text in texts])


@dataclass
class Look:
    """At some processes, at one moment: processor seconds of each, by its number, and bytes of PSS of all."""

    at: float
    cpu: dict[int, float]
    pss: int

    @classmethod
    def of(cls, processes: Iterable[psutil.Process]) -> "Look":
        look = cls(time.perf_counter(), {}, 0)
        for process in processes:
            with suppress(psutil.Error):  # it ended meanwhile
                times = process.cpu_times()
                look.pss += process.memory_full_info().pss
                look.cpu[process.pid] = times.user + times.system
        return look


@dataclass
class Watched(Quiet):
    """When shards were done and how many documents they held, and what was seen of Ray's workers meanwhile."""

    done: list[tuple[float, int]] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)

    def advance(self, amount: int) -> None:
        self.done.append((time.perf_counter(), amount))

    @contextmanager
    def watching(self) -> Iterator[None]:
        over = Event()

        def watch() -> None:
            while not over.wait(0.2):
                found = psutil.Process().children(recursive=True)
                self.looks.append(Look.of(process for process in found if "_Process" in command(process)))

        thread = Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def rates(self, workers: int) -> tuple[float, float]:
        """Documents a second of processor time, and of the clock, after each worker's first shard."""
        (first, _), (last, _) = self.done[workers - 1], self.done[-1]
        documents = sum(amount for _, amount in self.done[workers:])
        spent = 0.0
        for process in {process for look in self.looks for process in look.cpu}:
            seen = [look for look in self.looks if process in look.cpu]
            times, cpu = [look.at for look in seen], [look.cpu[process] for look in seen]
            spent += float(np.diff(np.interp([first, last], times, cpu))[0])
        return documents / spent, documents / (last - first)


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def copy(path: str, texts: list[str], ready: Any, over: Any) -> None:
    import fasttext

    model = fasttext.load_model(path)
    for text in texts:
        model.predict(line(text))
    ready.release()
    over.wait()


def copies(path: str, texts: list[str]) -> int:
    """PSS of two processes that each have the library's model."""
    spawn = multiprocessing.get_context("spawn")
    ready, over = spawn.Semaphore(0), spawn.Event()
    processes = [spawn.Process(target=copy, args=(path, texts, ready, over)) for _ in range(2)]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire()
    look = Look.of(psutil.Process(process.pid) for process in processes)
    over.set()
    for process in processes:
        process.join()
    return look.pss


def run(lake: Lake, graph: Graph, name: str, executor: Executor) -> tuple[Watched, float]:
    """Performs the score step of that name; processor seconds of this process."""
    watched = Watched()
    made = Run(lake, graph, executor, watched)
    [step] = [step for step in steps(graph, ("score",)) if step.name == name]
    with watched.watching():
        return watched, seconds(lambda: perform(made, step))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=40_000)
    parser.add_argument("--words", type=int, default=3_800_000)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded
    found = files()
    texts = [text for file in found for text in read(file, options.documents // len(found))]
    random.Random(7).shuffle(texts)
    words = sum(len(text.split()) for text in texts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = train(texts[: len(texts) // 4], options.words, folder)
        size = Path(path).stat().st_size
        print(f"{len(texts)} documents of {words / len(texts):.0f} words; the model has {size / 1e9:.2f} GB")

        some = texts[: len(texts) // 4]
        loading, spent = by_library(path, some)
        bare = len(some) / spent
        print(f"{'library':24}{bare:8.0f} documents/s and core; loaded in {loading:.1f} s")

        spec = FastText(model=path, label=LABELS[0], profile="dclm")
        began = time.process_time()
        score = spec.build()
        loading = time.process_time() - began
        compute_with(1)
        rate = len(some) / scoring(spec, score, some)
        print(f"{'scorer':24}{rate:8.0f} {rate / bare:20.2f} of the library; loaded in {loading:.1f} s")
        del score

        for first in range(0, len(texts), 4000):
            pq.write_table(pa.table({"text": texts[first : first + 4000]}), folder / f"{first:08d}.parquet")
        recipe = {
            "name": "bench",
            "sources": [{"name": "pool", "format": "parquet", "path": str(folder / "*.parquet")}],
            "ingest": {"shard_bytes": SHARD_BYTES},
            "scores": {
                name: {"scorer": "fasttext", "model": path, "label": label, "profile": "dclm"}
                for name, label in zip(("serial", "ray_1", "ray_2"), LABELS, strict=True)
            },
        }
        graph = Graph(Recipe.of(recipe))
        with closing(Lake.create(folder / "lake")) as lake:
            [ingest] = steps(graph, ("ingest",))
            perform(Run(lake, graph, Serial()), ingest)
            _, spent = run(lake, graph, "serial", Serial(threads=1))
            rate = len(texts) / spent
            print(f"{'run, this process':24}{rate:8.0f} {rate / bare:20.2f} of the library, with its loading")
            rates, clocks = [], []
            for workers in (1, 2):
                with RayExecutor(workers) as executor:
                    watched, _ = run(lake, graph, f"ray_{workers}", executor)
                rate, clock = watched.rates(workers)
                rates.append(rate)
                clocks.append(clock)
                name = f"run, Ray, {workers} worker{'s' * (workers > 1)}"
                print(f"{name:24}{rate:8.0f} {rate / bare:20.2f} of the library; by the clock {clock:.0f} in all")
        print(f"two workers do {2 * rates[1] / rates[0]:.2f} times one's by processor time,", end=" ")
        print(f"{clocks[1] / clocks[0]:.2f} times by the clock; load of the machine {os.getloadavg()[0]:.1f}")
        shared, apart = max(look.pss for look in watched.looks), copies(path, some[:2000])
        print(f"memory of two workers {shared / 1e9:.2f} GB, of two copies {apart / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
