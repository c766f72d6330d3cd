"""CoLoR-Filter on domains that are known: does the best by score come from the domain of the target texts?

    CORPUSMILL_BENCH_DATA=FOLDER python tests/benchmarks/color_filter.py [--pool 256] [--prior 450] [--targets 1000]
        [--size 1m] [--lake DIR]

FOLDER/text holds a file <domain>.jsonl.gz (`id`, `text`) of each of DOMAINS. Documents are cut into passages of about
800 characters, and each document, by the hash of its id, gives passages to one of three parts alone: what the prior
learns (--prior of each domain), target texts (--targets of a domain), and the pool that is scored (--pool of each). One
recipe trains the prior and a conditional model per target domain, scores the pool, and takes the best 1/4, 1/16, 1/64
of its tokens. What is told of a selection is the share of its tokens that come from the target domain; once more of
the best 1/64 where only an eighth of that domain is in the running, since it is then about all that could be right.

It is a check of the whole way from text to mixture, not of what the paper claims: nothing is trained on what was
selected. With --lake the lake is kept, and a run that was stopped goes on. About 15 minutes of one free core.
"""

import argparse
import gzip
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from heapq import nsmallest
from pathlib import Path
from typing import Any

from flows.curate import work
from pipelines.execute import Serial
from pipelines.graph import Graph
from pipelines.recipe import Recipe
from storage.lake import Lake

DOMAINS = {  # as sources are called here, and the files
    "contracts": "legal_contracts_edgar",
    "encyclopedia": "encyclopedia_wikipedia",
    "mathematics": "math_latex_stacks",
    "manuals": "docs_software_en",
    "medical_qa": "medical_qa_medquad",
    "novels": "novels_en_eltec",
    "pubmed": "medical_pubmed_abstracts",
    "rfc": "specs_rfc",
    "speeches": "speeches_sotu",
    "textbooks": "textbooks_openstax_d2l",
}
TARGETS = ("mathematics", "medical_qa", "contracts", "textbooks")
PARTS = ("prior", "targets", "pool")
FRACTIONS = (4, 16, 64)
CHARACTERS = 800
POOL = "adopted.part = 'pool'"
RARE = 8
"""One in so many passages of the target domain is in the running where it is rare."""


def passages(text: str) -> Iterator[str]:
    """Pieces of about 800 characters that begin and end between words; what is left at the end is dropped."""
    start = 0
    while start + CHARACTERS <= len(text):
        end = max(text.rfind(space, start + CHARACTERS // 2, start + CHARACTERS) for space in (" ", "\n"))
        end = start + CHARACTERS if end < 0 else end
        yield text[start:end].strip()
        start = end


def running(rare: str | None = None) -> str:
    """The passages in the running: the pool, or the pool with few of one domain."""
    return f"{POOL} AND (source <> '{rare}' OR doc_id % {RARE} = 0)" if rare else POOL


def digest(*parts: object) -> str:
    return hashlib.md5("\x1f".join(map(str, parts)).encode()).hexdigest()


def parts(file: Path, sizes: dict[str, int]) -> dict[str, list[str]]:
    """Of each part so many passages of the file, in an order by hash; no passage is there twice."""
    found: dict[str, dict[str, str]] = {part: {} for part in PARTS}
    seen = set[str]()
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            part = PARTS[int(digest("part", record["id"]), 16) % len(PARTS)]
            for passage in passages(record["text"]):
                if passage and passage not in seen:
                    seen.add(passage)
                    found[part][digest("order", passage)] = passage
    short = [f"{len(found[part])} of {size} for {part}" for part, size in sizes.items() if len(found[part]) < size]
    if short:
        raise SystemExit(f"{file} has too few passages: {', '.join(short)}")
    return {part: [found[part][key] for key in nsmallest(size, found[part])] for part, size in sizes.items()}


def write(texts: Path, folder: Path, sizes: dict[str, int]) -> None:
    """FOLDER/<domain>.jsonl of `text` and `part`, and FOLDER/<domain>.targets.jsonl of those that are targets."""
    for domain, file in DOMAINS.items():
        lines = parts(texts / f"{file}.jsonl.gz", sizes)
        target = lines.pop("targets")
        pool = [{"text": text, "part": part} for part, some in lines.items() for text in some]
        written = {domain: pool} | (
            {f"{domain}.targets": [{"text": text} for text in target]} if domain in TARGETS else {}
        )
        for name, records in written.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def recipe(folder: Path, options: argparse.Namespace, tokens: dict[str | None, int]) -> Recipe:
    """The recipe; with mixtures where `tokens` says how many are in the running, which no recipe knows beforehand."""
    losses = {"scorer": "language_model", "measures": ["nats_per_token", "nats"], "where": POOL}
    data: dict[str, Any] = {
        "name": "color",
        "seed": 7,
        "sources": [
            {"name": domain, "format": "jsonl", "path": f"{domain}.jsonl", "adopt": {"part": "varchar"}}
            for domain in DOMAINS
        ],
        "models": {
            "prior": {
                "size": options.size,
                "vocabulary": options.vocabulary,
                "context": 256,
                "query": "SELECT text FROM corpus WHERE adopted.part = 'prior'",
            }
        },
        "scores": {
            "tokens": {"scorer": "tokens", "tokenizer": "models.prior", "where": POOL},
            "marginal": losses | {"model": "models.prior"},
        },
        "mixtures": {},
    }
    orders: dict[str, tuple[str | None, str | None]] = {"random": (None, None)}  # by, target
    for target in TARGETS:
        data["models"][f"after_{target}"] = {
            "base": "models.prior",
            "targets": f"{target}.targets.jsonl",
            "holdout": 0.05,
        }
        data["scores"][target] = losses | {"model": f"models.after_{target}"}
        for way, per, column, roles in (
            ("color", "token", "nats_per_token", ("prior", "conditional")),
            ("conditional_only", "token", "nats_per_token", ("conditional",)),
            ("color_sum", "sequence", "nats", ("prior", "conditional")),
        ):
            inputs = {role: f"{'marginal' if role == 'prior' else target}.{column}" for role in roles}
            name = f"{way}_{target}"
            data["scores"][name] = {"scorer": "color_filter", "per": per, "inputs": inputs, "where": POOL}
            orders[name] = f"{name}.score", target
    for name, (order, target) in orders.items() if tokens else ():
        cases = [(f"{name}_{n}", None, n) for n in FRACTIONS]
        cases += [(f"{name}_rare", target, FRACTIONS[-1])] if target else []
        for mixture, rare, n in cases:
            data["mixtures"][mixture] = {
                "tokens": "tokens.n",
                "where": running(rare),
                "group_by": "source",
                "budget_tokens": tokens[rare] // n,
            } | ({"order_by": order} if order else {})
    return Recipe.of(data, base=str(folder))


def row(*cells: object) -> None:
    print("|" + "|".join(f" {cell} " for cell in cells) + "|", flush=True)


def table(*names: str) -> None:
    print()
    row(*names)
    row(*["---"] * len(names))


def machine() -> str:
    told = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in told if line.startswith("model name")), "unknown CPU")
    return f"one thread of {name}, load {os.getloadavg()[0]:.1f} at the end"


def tell(lake: Lake) -> None:
    def ask(query: str) -> list[dict[str, Any]]:
        return lake.query(query, "color").to_pylist()

    records = {
        line["model"].split("__")[0]: json.loads(line["record"])
        for line in ask("SELECT model, record FROM models ORDER BY made_at")
    }
    table("model", "parameters", "tokens", "learning rate", "steps", "bits/byte before", "after", "seconds")
    for name, record in records.items():
        settings, ends = record["settings"], (record["held_out_before"], record["held_out"])
        row(
            name,
            f"{record['parameters']:,}",
            f"{record['tokens']:,}",
            f"{settings['learning_rate']:.2g}",
            settings["steps"],
            *(f"{end['bits_per_byte']:.3f}" if end else "" for end in ends),
            f"{record['seconds']:.0f}",
        )

    shares: dict[str, dict[str, float]] = {}  # of a mixture's tokens, by domain
    natural: dict[str, dict[str, float]] = {}  # of those in the running
    for line in ask("SELECT *, taken_tokens / sum(taken_tokens) OVER (PARTITION BY mixture) AS taken FROM weights"):
        shares.setdefault(line["mixture"], {})[line["group"]] = line["taken"]
        natural.setdefault(line["mixture"], {})[line["group"]] = line["share"]
    taus = {
        line["name"]: json.loads(line["record"])["totals"].get("tau")
        for line in ask("SELECT name, record FROM mixtures")
    }
    heads = [f"1/{n}" for n in FRACTIONS]
    table("target", "by", *heads, f"{heads[-1]}, rare", "AUROC", "tau", f"second domain of {heads[-1]}, rare")
    for target in TARGETS:
        there = [natural["random_4"][target]] * len(FRACTIONS) + [natural[f"color_{target}_rare"][target]]
        most = [min(1.0, share * n) for share, n in zip(there, [*FRACTIONS, FRACTIONS[-1]], strict=True)]
        row(target, "natural share", *(f"{share:.1%}" for share in there), "0.5", "", "")
        row(target, "at most, about", *(f"{share:.1%}" for share in most), "1", "", "")
        row(target, "random", *(f"{shares[f'random_{n}'][target]:.1%}" for n in FRACTIONS), "", "", "", "")
        for way in ("color", "conditional_only", "color_sum"):
            name = f"{way}_{target}"
            names = [*(f"{name}_{n}" for n in FRACTIONS), f"{name}_rare"]
            others = {domain: share for domain, share in shares[names[-1]].items() if domain != target}
            second = max(others, key=others.__getitem__)
            row(
                target,
                way,
                *(f"{shares[mixture].get(target, 0):.1%}" for mixture in names),
                f"{auroc(ask, target, name):.4f}",
                ", ".join(f"{taus[mixture]:.2f}" for mixture in names),
                f"{second} {others[second]:.1%}" if others[second] else "",
            )

    table(
        "CoLoR over the pool, nats/token",
        "mean",
        "deviation",
        "skewness",
        "excess kurtosis",
        "least",
        "most",
        "above 0",
        "mean of the target",
        "of the rest",
    )
    for target in TARGETS:
        [line] = ask(
            "SELECT avg(x) AS mean, stddev_samp(x) AS deviation, skewness(x) AS skew, kurtosis(x) AS kurtosis, "
            "min(x) AS least, max(x) AS most, avg((x > 0)::INT) AS above, avg(x) FILTER (same) AS inside, "
            "avg(x) FILTER (NOT same) AS outside FROM "
            f"(SELECT color_{target}.score::DOUBLE AS x, source = '{target}' AS same FROM corpus WHERE {POOL})"
        )
        above = f"{line.pop('above'):.1%}"
        values = [f"{value:+.3f}" for value in line.values()]
        row(target, *values[:6], above, *values[6:])

    table("target", "end", "CoLoR", "of", "passage")
    for target in TARGETS:
        for end, word in (("DESC", "best"), ("ASC", "worst")):
            for line in ask(
                f"SELECT source, color_{target}.score AS score, text FROM corpus WHERE {POOL} "
                f"ORDER BY score {end}, text LIMIT 2"
            ):
                passage = " ".join(line["text"].split())[:70].replace("|", "/")
                row(target, word, f"{line['score']:+.3f}", line["source"], passage)


def auroc(ask: Any, target: str, name: str) -> float:
    """That a passage of the target domain has a better score than another: by the sum of ranks, ties by half."""
    [line] = ask(
        "SELECT (sum(r) FILTER (same) - n * (n + 1) / 2) / (n * (count(*) - n)) AS auroc FROM ("
        "SELECT same, count(*) FILTER (same) OVER () AS n, "
        "rank() OVER (ORDER BY x) + (count(*) OVER (PARTITION BY x) - 1) / 2 AS r FROM "
        f"(SELECT {name}.score AS x, source = '{target}' AS same FROM corpus WHERE {POOL})) GROUP BY n"
    )
    return float(line["auroc"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=int, default=256, help="passages of a domain that are scored")
    parser.add_argument("--prior", type=int, default=450, help="passages of a domain that the prior learns")
    parser.add_argument("--targets", type=int, default=1000, help="passages that are target texts")
    parser.add_argument("--size", default="1m", help="of the models")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--lake", type=Path, help="a folder to keep, and to go on in")
    options = parser.parse_args()
    data = os.environ.get("CORPUSMILL_BENCH_DATA")
    missing = [file for file in DOMAINS.values() if not Path(data or "", "text", f"{file}.jsonl.gz").exists()]
    if not data or missing:
        print(f"skipped: CORPUSMILL_BENCH_DATA names no folder with text/{missing[0]}.jsonl.gz")
        raise SystemExit(0)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.lake or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        sizes = {part: getattr(options, part) for part in PARTS}
        if not (folder / "lake").exists():
            write(Path(data, "text"), folder, sizes)
        here = folder / "lake"
        work(Graph(recipe(folder, options, {})), here, Serial(threads=1), stages=("ingest", "train", "score"))
        lake = Lake(here)
        tokens = {
            rare: lake.query(f"SELECT sum(tokens.n)::BIGINT FROM corpus WHERE {running(rare)}", "color")[0][0].as_py()
            for rare in (None, *TARGETS)
        }
        work(Graph(recipe(folder, options, tokens)), here, Serial(threads=1), stages=("mix",))
        counts = f"{len(DOMAINS)} x {options.pool} passages of about {CHARACTERS} characters, {tokens[None]:,} tokens"
        print(f"\n{machine()}, {(time.monotonic() - began) / 60:.0f} minutes; pool: {counts}")
        tell(lake)


if __name__ == "__main__":
    main()
