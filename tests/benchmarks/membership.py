"""Membership: can a loss tell the texts that a model was trained on from texts like them that it never saw?

    CORPUSMILL_BENCH_DATA=FOLDER python tests/benchmarks/membership.py [--size 1m] [--bytes 500 700]
        [--domain medical_pubmed_abstracts] [--other medical_qa_medquad] [--lake DIR] [--threads 1]

FOLDER/text holds DOMAIN.jsonl.gz. One recipe does all of the work in a lake in a temporary folder:

    documents   of --bytes bytes, so that they are of like length and nearly all fit into one window; of each cluster
                of duplicates one, so that no half holds a copy of the other; put into four quarters by their hash
    models      from random weights on quarters 0 and 1, for 1, 4 and 16 epochs; their tokenizer is fitted to other
                documents of the domain, because a vocabulary fitted to the members would know them by itself
    scores      of every chosen document, under each model

and queries give the halves to compare:

    members     quarters 0 and 1 against 2 and 3 after 1, 4 and 16 epochs
    fresh       quarter 2 against 3 under the model of 16 epochs: nobody was trained on either, so chance
    other       quarters 0 and 1 against 2 and 3 of the other domain under the same model: chance

It takes a quarter of an hour of one core, most of it the 16 epochs.

AUROC is the probability that a member scores above a non-member, equals counting half (average ranks). TPR is the share
of the members found at the last threshold at which at most 5 % of the non-members are taken for members. Every measure
is turned so that high says member: losses, entropy and EL2N by their negative (SEEN). `tokens` is a control that
reads no loss: a member's advantage in it would be the tokenizer's. The brackets are 95 % intervals of a bootstrap over
documents, members and non-members apart; where chance is the truth, one interval in twenty leaves 0.5 out, and those of
one column do so together, since all measures are of the same losses.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from flows.curate import work
from pipelines.execute import Serial
from pipelines.graph import Graph
from pipelines.recipe import Recipe
from pipelines.run import STAGES
from storage.lake import Lake

EPOCHS = (1, 4, 16)
K = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
FAMILIES = ("loss", "zlib", "lowercase", "min_k", "min_k_plus_plus")
QUARTER = "md5_number_upper(CAST(text_hash AS VARCHAR)) % 4"
ASKED = f"SELECT source, {QUARTER} AS quarter, {{0}}.* FROM corpus WHERE {{0}}.computed ORDER BY doc_id"
MOST_FALSE = 0.05
RESAMPLES = 500

SEEN: Mapping[str, tuple[str, int]] = {
    "loss": ("nats_per_token", -1),
    "bits per byte": ("bits_per_byte", -1),
    "zlib": ("zlib_ratio", 1),
    "lowercase": ("lowercase_ratio", 1),
    **{f"min_k {k}": (f"min_k_{round(100 * k)}", 1) for k in K},
    **{f"min_k_plus_plus {k}": (f"min_k_plus_plus_{round(100 * k)}", 1) for k in K},
    "el2n": ("el2n", -1),
    "entropy": ("token_entropy", -1),
    "tokens": ("n_tokens", -1),
}
"""Per measure its column, and the sign that makes high say member."""


class Found(NamedTuple):
    auroc: float
    tpr: float


class Judged(NamedTuple):
    """A measure on one pair of halves, with the ends of its 95 % intervals."""

    found: Found
    low: Found
    high: Found

    @property
    def chance(self) -> bool:
        return self.low.auroc <= 0.5 <= self.high.auroc


def tell(members: NDArray[np.float64], others: NDArray[np.float64]) -> Found:
    """AUROC and TPR at 5 % FPR of scores of which high says member."""
    scores = np.concatenate([members, others])
    order = np.argsort(-scores, kind="stable")
    positive = order < len(members)
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # equal scores are taken together
    tpr = np.append(0, np.cumsum(positive)[last]) / len(members)
    fpr = np.append(0, np.cumsum(~positive)[last]) / len(others)
    area = float(np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2))
    return Found(area, float(tpr[np.searchsorted(fpr, MOST_FALSE, side="right") - 1]))


def judge(members: NDArray[np.float64], others: NDArray[np.float64]) -> Judged:
    rng = np.random.default_rng(0)
    drawn = [tell(rng.choice(members, len(members)), rng.choice(others, len(others))) for _ in range(RESAMPLES)]
    low, high = np.quantile(np.array(drawn), [0.025, 0.975], axis=0)
    return Judged(tell(members, others), Found(*low.tolist()), Found(*high.tolist()))


def recipe(options: argparse.Namespace, data: Path) -> dict[str, Any]:
    least, most = options.bytes
    chosen = f"n_bytes BETWEEN {least} AND {most} AND duplicates.cluster = doc_id"
    of_domain = f"source = '{options.domain}'"
    members = f"SELECT text FROM corpus WHERE {of_domain} AND {chosen} AND {QUARTER} < 2"
    scores: dict[str, Any] = {"duplicates": {"scorer": "duplicates"}}
    models: dict[str, Any] = {
        "reader": {
            "size": "1m",
            "vocabulary": options.vocabulary,
            "context": options.context,
            "tokens": options.context,
            "query": f"SELECT text FROM corpus WHERE {of_domain} AND n_bytes > {most} AND {QUARTER} = 0",
        }
    }
    for epochs in EPOCHS:
        models[f"epochs_{epochs}"] = {
            "size": options.size,
            "tokenizer": "models.reader",
            "context": options.context,
            "batch_tokens": 4 * options.context,
            "epochs": epochs,
            "query": members,
            "holdout": 0,
        }
        scores[f"after_{epochs}"] = {
            "scorer": "language_model",
            "model": f"models.epochs_{epochs}",
            "measures": [
                *("nats_per_token", "bits_per_byte", "n_tokens", "zlib_ratio", "lowercase_ratio"),
                *("min_k", "min_k_plus_plus", "el2n", "token_entropy"),
            ],
            "k": K,
            "where": chosen if epochs == EPOCHS[-1] else f"{of_domain} AND {chosen}",
        }
    sources = [
        {"name": name, "format": "jsonl", "path": str(data / "text" / f"{name}.jsonl.gz")}
        for name in (options.domain, options.other)
    ]
    return {"name": "membership", "seed": 1, "sources": sources, "models": models, "scores": scores}


def halves(rows: pa.Table, source: str, quarters: tuple[int, ...]) -> pa.Table:
    wanted = np.isin(rows["quarter"].to_numpy(), quarters) & (rows["source"].to_numpy() == source)
    return rows.filter(pa.array(wanted))


def values(rows: pa.Table, measure: str) -> NDArray[np.float64]:
    column, sign = SEEN[measure]
    assert rows[column].null_count == 0, f"{column} is NULL for {rows[column].null_count} documents"
    return sign * rows[column].to_numpy().astype(np.float64)


def cell(judged: Judged) -> str:
    auroc, tpr = ([part[i] for part in (judged.found, judged.low, judged.high)] for i in (0, 1))
    area = "{:.3f} [{:.3f}, {:.3f}]".format(*auroc)
    return f"{area} {'{:.0%} [{:.0%}, {:.0%}]'.format(*tpr)}".replace("%", " %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", default="medical_pubmed_abstracts")
    parser.add_argument("--other", default="medical_qa_medquad")
    parser.add_argument("--size", default="1m")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--bytes", type=int, nargs=2, default=(500, 700))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lake", help="a folder to keep; what is done there already is not done again")
    options = parser.parse_args()
    data = Path(os.environ.get("CORPUSMILL_BENCH_DATA", ""))
    if not (data / "text" / f"{options.domain}.jsonl.gz").exists():
        print(f"skipped: CORPUSMILL_BENCH_DATA names no folder with text/{options.domain}.jsonl.gz")
        raise SystemExit(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.lake or temporary)
        wall, cpu = time.perf_counter(), time.process_time()
        graph = Graph(Recipe.of(recipe(options, data)))
        work(graph, folder, Serial(threads=options.threads), stages=STAGES)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        lake = Lake(folder)
        report(options, lake, wall, cpu)
        lake.close()


def report(options: argparse.Namespace, lake: Lake, wall: float, cpu: float) -> None:
    """Prints what was trained, the table, and what it says."""
    scored = {epochs: lake.query(ASKED.format(f"after_{epochs}")) for epochs in EPOCHS}
    last = scored[EPOCHS[-1]]
    trained, unseen = ({e: halves(rows, options.domain, q) for e, rows in scored.items()} for q in ((0, 1), (2, 3)))
    pairs = {f"members, epochs {epochs}": (trained[epochs], unseen[epochs]) for epochs in EPOCHS}
    pairs["fresh"] = halves(last, options.domain, (2,)), halves(last, options.domain, (3,))
    pairs["other"] = halves(last, options.other, (0, 1)), halves(last, options.other, (2, 3))

    for epochs in EPOCHS:
        asked = f"SELECT record FROM models WHERE name = 'epochs_{epochs}'"
        record = json.loads(lake.query(asked)["record"][0].as_py())
        loss = " and ".join(f"{-values(half[epochs], 'loss').mean():.3f}" for half in (trained, unseen))
        print(
            f"epochs_{epochs}: {record['parameters']:,} parameters, {record['documents']} documents, "
            f"{record['tokens']:,} tokens in {record['settings']['steps']} steps, {record['seconds']:.0f} s; "
            f"loss of members and non-members {loss} nats/token"
        )
    long = int((last["n_tokens"].to_numpy() >= options.context).sum())
    print(
        f"documents of {options.bytes[0]} to {options.bytes[1]} bytes, {long} of {last.num_rows} longer than the "
        f"context of {options.context}; vocabulary {options.vocabulary}; {platform.machine()}, "
        f"threads {options.threads}; the run took {wall:.0f} s, {cpu:.0f} s of a core, under a load of "
        f"{os.getloadavg()[1]:.1f}\n"
    )

    judged = {
        name: {measure: judge(values(one, measure), values(two, measure)) for measure in SEEN}
        for name, (one, two) in pairs.items()
    }
    heads = [f"{name} ({one.num_rows} : {two.num_rows})" for name, (one, two) in pairs.items()]
    print(f"| AUROC [95 %], TPR at 5 % FPR [95 %] | {' | '.join(heads)} |")
    print("|---|" + "---|" * len(pairs))
    for measure in SEEN:
        print(f"| {measure} | {' | '.join(cell(of[measure]) for of in judged.values())} |")
    print()
    for name, of in judged.items():
        off = sum(not found.chance for found in of.values())
        print(f"{name}: {off} of {len(of)} intervals of AUROC leave 0.5 out; the best of each family:")
        for i, what in enumerate(("AUROC", "TPR")):
            best = {family: max(of[m].found[i] for m in of if m.partition(" ")[0] == family) for family in FAMILIES}
            print(f"  {what:5} " + ", ".join(f"{family} {value:.3f}" for family, value in best.items()))
    print(
        "A hint at contamination, never a verdict on a document: on halves of one distribution these scores find what "
        "a small model has repeated, and published ones of large models with one epoch stay near chance (Duan et al., "
        "COLM 2024, arXiv 2402.07841)."
    )


if __name__ == "__main__":
    main()
