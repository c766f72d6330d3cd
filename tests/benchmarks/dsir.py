"""DSIR beside the authors' package: documents a second and core, and the numbers of their toy files.

    CORPUSMILL_BENCH_DATA=FOLDER python tests/benchmarks/dsir.py [--documents 3000] [--package SITE_PACKAGES]

FOLDER/text holds *.jsonl or *.jsonl.gz with a field `text`; documents are taken evenly from the files and cut at 20,000
characters. Both sides fit to all documents and weigh each of them, from texts in memory, in one thread; process time is
counted. The authors read every text twice, to fit and to weigh; here its n-grams are kept, and only the sums are done
again. SITE_PACKAGES is where `pip install --target` put data-selection 1.0.3 with its dependencies; without it their
loop stands in as it is written below, with Python's own regular expression for NLTK's tokenizer and a plain join.

FOLDER/tables/dsir/toy_*.jsonl, the data of the authors' tests, gives the golden numbers where it is there.
"""

import argparse
import hashlib
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from cpu_scorers import files, read

from scorers.classifiers.dsir import DSIR
from scorers.classifiers.hashed_ngrams import HashedNgrams, Hasher
from storage.lake import LakeSpace

BUCKETS = 10_000
AUTHORS_SHARE = 16
"""The authors' side is timed on one document of so many."""

Counts = Callable[[str], np.ndarray]


def plain(text: str) -> np.ndarray:
    """get_ngram_counts of data-selection 1.0.3, n-gram by n-gram."""
    words = re.findall(r"\w+|[^\w\s]+", text.lower())
    counts = np.zeros(BUCKETS, dtype=int)
    for word in words:
        counts[int(hashlib.sha256(word.encode("utf-8")).hexdigest(), 16) % BUCKETS] += 1
    for pair in pairwise(words):
        counts[int(hashlib.sha256(" ".join(pair).encode("utf-8")).hexdigest(), 16) % BUCKETS] += 1
    return counts


def authors_counts(package: str | None) -> tuple[str, Counts]:
    if package is None:
        return "their loop", plain
    sys.path.append(package)
    from data_selection.hashed_ngram_dsir import get_ngram_counts

    return "data-selection", get_ngram_counts


def authors(counts: Counts, texts: list[str], target: np.ndarray) -> np.ndarray:
    """What HashedNgramDSIR does: fit_importance_estimator, compute_importance_weights with its metadata."""
    raw = np.zeros(BUCKETS, dtype=int)
    for text in texts:
        raw += counts(text)
        raw.sum()  # its budget of n-grams is asked after every document
    log_diff = np.log(target / target.sum() + 1e-8) - np.log(raw / raw.sum() + 1e-8)
    weights, lengths = [], []
    for text in texts:
        features = counts(text)
        weights.append(np.dot(log_diff, features))
        lengths.append((features.sum() + 1) // 2)
    return np.array(weights)


def ours(spec: DSIR, texts: list[str]) -> tuple[pa.Table, float]:
    """The scores, and the seconds that the features took."""
    score, features = spec.maps()["features"].build(), []
    hashes = pa.array([place.to_bytes(16, "little") for place in range(len(texts))], pa.uuid())
    began = time.process_time()
    for first in range(0, len(texts), HashedNgrams.batch_rows):
        part = texts[first : first + HashedNgrams.batch_rows]
        texts_and_hashes = {"text": pa.array(part, pa.large_string()), "text_hash": hashes[first : first + len(part)]}
        features.append(score(pa.record_batch(texts_and_hashes)))
    took = time.process_time() - began
    table = pa.Table.from_batches(features).append_column("doc_id", pa.array(range(len(texts)), pa.int64()))
    with duckdb.connect(config={"threads": 1}) as con:
        con.register("features", table)
        return spec.reduce(LakeSpace(con), extend=False).read_all(), took


def seconds(run: Callable[[], Any]) -> tuple[Any, float]:
    """What it gave, and the shorter of two times: other work on the machine only adds."""
    times = []
    for _ in range(2):
        began = time.process_time()
        found = run()
        times.append(time.process_time() - began)
    return found, min(times)


def speed(texts: list[str], folder: Path, package: str | None) -> None:
    target = folder / "target.jsonl"
    chosen = texts[:50]
    target.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
    Hasher()(["warm"])  # the classes of characters, once per process
    took_features = []

    def scored() -> pa.Table:
        scores, features = ours(DSIR(targets=str(target)), texts)
        took_features.append(features)
        return scores

    scores, whole = seconds(scored)
    who, counts = authors_counts(package)
    some = texts[::AUTHORS_SHARE]
    wanted = np.sum([counts(text) for text in chosen], axis=0)
    _, took = seconds(lambda: authors(counts, some, wanted))
    _, once = seconds(lambda: [counts(text) for text in some])
    tokens = np.array(scores.column("n_tokens").to_pylist())
    print(f"{len(texts)} documents of {tokens.mean():.0f} tokens, {who} on {len(some)} of them; microseconds per token")
    for what, mine, theirs in (("fit and weigh", whole, took), ("features of every text", min(took_features), once)):
        mine, theirs = 1e6 * mine / tokens.sum(), 1e6 * theirs / tokens[::AUTHORS_SHARE].sum()
        print(f"{what:>24} {mine:6.2f}   {who} {theirs:.2f}   ratio {theirs / mine:.1f}")
    expected = authors(OurCounts(), texts, wanted)
    found = np.array(scores.column("log_weight").to_pylist(), float)
    print(f"  largest difference of a weight: {np.abs(found - expected).max():.1e} nats")


class OurCounts:
    """Dense counts out of our features, for the authors' own arithmetic over all documents."""

    def __init__(self) -> None:
        self.hasher = Hasher()

    def __call__(self, text: str) -> np.ndarray:
        return np.bincount(self.hasher([text])[1], minlength=BUCKETS)


def golden(data: Path, folder: Path) -> None:
    def contents(name: str) -> list[str]:
        return [json.loads(line)["contents"] for line in (data / name).read_text().splitlines()]

    target = folder / "toy.jsonl"
    target.write_text("".join(json.dumps({"text": t}) + "\n" for t in contents("toy_target_data.jsonl")))
    texts = contents("toy_pile_data.jsonl")
    scores, _ = ours(DSIR(targets=str(target)), texts)
    weights, tokens = (np.array(scores.column(name).to_pylist()) for name in ("log_weight", "n_tokens"))
    print(f"toy Pile: {len(texts)} documents, {(tokens >= 100).sum()} of them of 100 tokens or more")
    print("  first weights", ", ".join(f"{weight:.6f}" for weight in weights[:3]))
    best = sorted(np.flatnonzero(tokens >= 100), key=lambda doc: -weights[doc])[:5]
    print("  best of those", ", ".join(f"{doc} ({weights[doc]:.3f})" for doc in best))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, default=3000)
    parser.add_argument("--package", metavar="SITE_PACKAGES")
    asked = parser.parse_args()
    found = files()
    texts = [text for file in found for text in read(file, max(1, asked.documents // len(found)))]
    random.Random(0).shuffle(texts)
    with tempfile.TemporaryDirectory() as folder:
        speed(texts, Path(folder), asked.package)
        toys = Path(os.environ["CORPUSMILL_BENCH_DATA"], "tables", "dsir")
        if toys.exists():
            golden(toys, Path(folder))


if __name__ == "__main__":
    main()
