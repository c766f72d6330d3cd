"""Perplexity correlations from end to end: do benchmarks find the domains that teach them, and the pages?

    CORPUSMILL_BENCH_DATA=FOLDER python tests/benchmarks/correlations_end_to_end.py [--tokens 100000] [--size 1m]
        [--items 100] [--lake DIR]

FOLDER/text holds a file <domain>.jsonl.gz (`id`, `text`) of each of DOMAINS, FOLDER/benchmarks what EXPECTED names.
Documents are cut into passages of about 1,000 characters, and each document, by the hash of its id, gives passages to
one of three parts alone: what models learn, what is known of domains (a fifth of it is read by all models, all of it
is labelled for the classifiers), and the pool. One recipe

    trains twelve small models that differ in what they learned (MODELS), and reads the known passages with each;
    takes what they lose on the right answers of benchmarks, which this file measures, as their errors;
    estimates which domains go with which benchmark, trains a page classifier on the domains that it chose, and
    takes a fifth of the pool's tokens, once by the classifier and once by the weights.

Every benchmark is of a kind (EXPECTED), so one can see whether the estimates find it. Small models choose between
answers by chance; how likely the right answer is to them says more, so that is what is ranked. It is a check of the
whole way, not of what the paper claims: nothing is trained on what was selected, and twelve models of one trainer are
few, and differ more than public ones do.

What it showed: of the domains, code is first for HumanEval (estimate 0.97, interval 0.81 to 1.00), the two medical ones
for MMLU's medicine (0.94 and 0.92). LAMBADA, contemporary fiction, has speeches, novels, web and messages first, all
near 0.55, with intervals from below 0 to 1. ARC-easy and MMLU's law prefer running English prose to textbooks (rank 9)
and contracts (7): what these models can do for a short answer is probably plain language, and no more. Held-out R2
says nothing for so few models: where a fold has two, it is 1 or -3. The page classifiers tell pages of the chosen
domains from others in documents that they never saw (AUROC 0.96 to 0.98), so the mixture by pages is close to the one
by domains. Accuracies are at chance, 19 to 34 %.

With --lake the lake is kept, and a run that was stopped goes on. About 13 minutes of one free core.
"""

import argparse
import csv
import gzip
import hashlib
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from heapq import nsmallest
from pathlib import Path
from typing import Any, NamedTuple

from flows.curate import work
from pipelines.execute import Serial
from pipelines.graph import Graph
from pipelines.recipe import Recipe
from scorers.lm.forward import CausalLM
from storage.lake import Lake

NAME = "correlated"
DOMAINS = {  # as sources are called here, and the files
    "code": "code_python",
    "contracts": "legal_contracts_edgar",
    "encyclopedia": "encyclopedia_wikipedia",
    "gnome": "docs_gnome_multi",
    "manuals": "docs_software_en",
    "mathematics": "math_latex_stacks",
    "medical_qa": "medical_qa_medquad",
    "novels": "novels_en_eltec",
    "pubmed": "medical_pubmed_abstracts",
    "rfc": "specs_rfc",
    "rights": "udhr_multi",
    "sms": "spam_sms_labelled",
    "speeches": "speeches_sotu",
    "textbooks": "textbooks_openstax_d2l",
    "web": "web_cc_human_quality",
}
MODELS: Mapping[str, tuple[str, ...]] = {  # what each learns from; "4m" in the name is its size
    "everything": tuple(DOMAINS),
    "everything_short": tuple(DOMAINS),
    "everything_4m": tuple(DOMAINS),
    "fiction": ("novels", "speeches"),
    "medicine": ("medical_qa", "pubmed"),
    "school": ("textbooks", "encyclopedia"),
    "software": ("code", "manuals"),
    "protocols": ("rfc", "gnome"),
    "law": ("contracts", "speeches"),
    "science": ("mathematics", "pubmed", "textbooks"),
    "informal": ("web", "sms", "novels"),
    "languages": ("rights", "gnome", "encyclopedia"),
}
EXPECTED = {  # the domains that are of the benchmark's kind
    "lambada": ("novels",),
    "arc_easy": ("textbooks", "encyclopedia"),
    "mmlu_medicine": ("medical_qa", "pubmed"),
    "mmlu_law": ("contracts",),
    "human_eval": ("code",),
}
MMLU = {
    "mmlu_medicine": ("anatomy", "clinical_knowledge", "college_medicine", "medical_genetics", "professional_medicine"),
    "mmlu_law": ("international_law", "jurisprudence"),
}
PARTS = {"learn": 300, "known": 150, "pool": 150}
"""Passages of a domain in each part."""
READ = 5
"""One in so many of the known passages is read by the models."""
CHARACTERS = 1000
KEPT = 0.2
"""The share of the tokens that weights and mixtures are to hold."""


class Item(NamedTuple):
    """A question, or a text that breaks off; its possible answers, each with the space before it; the right one."""

    query: str
    choices: tuple[str, ...]
    gold: int


def benchmarks(folder: Path, count: int) -> dict[str, list[Item]]:
    """At most `count` items of each benchmark."""

    def lines(name: str) -> Iterator[dict[str, Any]]:
        with gzip.open(folder / name, "rt", encoding="utf-8") as file:
            yield from map(json.loads, file)

    found = {
        "lambada": [
            Item(line["context"].rstrip(), (" " + line["continuation"],), 0)
            for line in lines("llm_foundry/lambada_openai.jsonl.gz")
        ],
        "arc_easy": [
            Item(line["query"].rstrip() + "\nAnswer:", tuple(f" {choice}" for choice in line["choices"]), line["gold"])
            for line in lines("llm_foundry/arc_easy.jsonl.gz")
        ],
        "human_eval": [
            Item(line["prompt"].rstrip(), ("\n" + line["canonical_solution"].rstrip(),), 0)
            for line in lines("HumanEval.jsonl.gz")
        ],
    }
    with gzip.open(folder / "mmlu_test.csv.gz", "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    for name, subjects in MMLU.items():
        of = {f"{subject}_test" for subject in subjects}
        found[name] = [
            Item(
                f"Question: {row[1].strip()}\nAnswer:", tuple(f" {choice.strip()}" for choice in row[2:6]), int(row[6])
            )
            for row in rows
            if row[0] in of and row[1] != "question"  # each subject has the head of the table again
        ]
    return {name: random.Random(7).sample(found[name], min(count, len(found[name]))) for name in EXPECTED}


class Result(NamedTuple):
    """How a model does on a benchmark.

    accuracy: share of the items whose right answer has the most log-probability per byte; None without a choice.
    perplexity: of a byte of the right answers, 2 to the bits per byte, summed over all items; low is good.
    """

    accuracy: float | None
    perplexity: float


def results(model: CausalLM, items: Sequence[Item]) -> Result:
    """Score the answers by their log-likelihood after the query."""
    pairs = [(item.query, choice) for item in items for choice in item.choices]
    whole = model([query + choice for query, choice in pairs])
    # The answer begins with white space after none, where a byte-level BPE never joins: its tokens are the last ones.
    nats = []
    for predicted, tokens in zip(whole, model.tokenize([choice for _, choice in pairs]), strict=True):
        assert predicted is not None
        assert tokens is not None
        nats.append(-float(predicted.log_probs[-tokens.ids.size :].sum(dtype="float64")))
    right, right_nats, right_bytes, at = 0, 0.0, 0, 0
    for item in items:
        losses = nats[at : (at := at + len(item.choices))]
        sizes = [len(choice.encode()) for choice in item.choices]
        rates = [loss / size for loss, size in zip(losses, sizes, strict=True)]
        right += rates.index(min(rates)) == item.gold
        right_nats += losses[item.gold]
        right_bytes += sizes[item.gold]
    choice = len(items[0].choices) > 1
    return Result(right / len(items) if choice else None, math.exp(right_nats / right_bytes))


def answered(folder: Path, models: Mapping[str, str], items: Mapping[str, list[Item]]) -> dict[str, dict[str, Result]]:
    """Per benchmark and model the result; FOLDER/answers.json keeps them, by the models' folders and the items."""
    file, asked = folder / "answers.json", digest(items)
    told: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    keys = {model: f"{Path(path).name} {asked}" for model, path in models.items()}
    for model, key in keys.items():
        if key not in told:
            causal = CausalLM(models[model])
            told[key] = {name: results(causal, some) for name, some in items.items()}
            file.write_text(json.dumps(told))
            print(f"answered by {model}", flush=True)
    return {name: {model: Result(*told[key][name]) for model, key in keys.items()} for name in items}


def passages(text: str) -> list[str]:
    """Pieces of about 1,000 characters that begin and end between words; a short text is one, a short end is none."""
    found, start = [], 0
    while len(text) - start >= (CHARACTERS if start else 40):
        end = max(text.rfind(space, start + CHARACTERS // 2, start + CHARACTERS) for space in (" ", "\n"))
        end = min(len(text), start + CHARACTERS) if end < 0 or len(text) - start < CHARACTERS else end
        found.append(text[start:end].strip())
        start = end
    return [passage for passage in found if passage]


def digest(*parts: object) -> str:
    return hashlib.md5("\x1f".join(map(str, parts)).encode()).hexdigest()


def parts(file: Path) -> dict[str, list[str]]:
    """Of each part so many passages of the file, in an order by hash; no passage is there twice."""
    found: dict[str, dict[str, str]] = {part: {} for part in PARTS}
    seen = set[str]()
    of = [part for part, size in PARTS.items() for _ in range(size)]
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            part = of[int(digest("part", record["id"]), 16) % len(of)]
            for passage in passages(record["text"]):
                if passage not in seen:
                    seen.add(passage)
                    found[part][digest("order", passage)] = passage
    short = [f"{len(found[part])} of {size} for {part}" for part, size in PARTS.items() if len(found[part]) < size]
    if short:
        raise SystemExit(f"{file} has too few passages: {', '.join(short)}")
    return {part: [found[part][key] for key in nsmallest(size, found[part])] for part, size in PARTS.items()}


def recipe(folder: Path, options: argparse.Namespace, tokens: int | None = None) -> Recipe:
    """The recipe; with what comes after the benchmarks where `tokens` says how many the known passages have."""
    data: dict[str, Any] = {
        "name": NAME,
        "seed": 7,
        "sources": [
            {"name": domain, "format": "jsonl", "path": f"{domain}.jsonl", "adopt": {"part": "varchar"}}
            for domain in DOMAINS
        ],
        "models": {},
        "scores": {
            "tokens": {"scorer": "tokens", "tokenizer": "models.everything", "where": "adopted.part <> 'learn'"}
        },
        "weights": {},
        "mixtures": {},
    }
    for model, domains in MODELS.items():
        data["models"][model] = {
            "size": "4m" if "4m" in model else options.size,
            "context": 256,
            "tokens": options.tokens // 3 if "short" in model else options.tokens,
            "query": f"SELECT text FROM corpus WHERE adopted.part = 'learn' AND source IN ({quoted(domains)})",
        } | ({"vocabulary": 4096} if model == "everything" else {"tokenizer": "models.everything"})
        data["scores"][f"by_{model}"] = {
            "scorer": "language_model",
            "model": f"models.{model}",
            "measures": ["nats", "bits_per_byte"],
            "where": f"adopted.part = 'known' AND doc_id % {READ} = 0",
        }
    for benchmark in EXPECTED if tokens else ():
        pool = {"tokens": "tokens.n", "group_by": "source", "where": "adopted.part = 'pool'", "budget_fraction": KEPT}
        data["weights"][f"weights_{benchmark}"] = {
            "method": "perplexity_correlation",
            "tokens": "tokens.n",
            "group_by": "source",
            "where": "adopted.part = 'known'",
            "losses": {model: f"by_{model}" for model in MODELS},
            "errors": "results.csv",
            "benchmarks": {benchmark: "perplexity"},
            "budget_tokens": int(KEPT * tokens),
        }
        data["models"][f"page_{benchmark}"] = {
            "trainer": "fasttext",
            "weights": f"weights_{benchmark}",
            "buckets": 200_000,  # two thousand pages are few: with the defaults, meant for millions, they teach nothing
            "learning_rate": 0.5,
            "epochs": 10,
        }
        data["scores"][f"include_{benchmark}"] = {
            "scorer": "fasttext",
            "model": f"models.page_{benchmark}",
            "label": "__label__include",
            "where": "adopted.part = 'pool'",
        }
        data["mixtures"][f"pages_{benchmark}"] = pool | {"order_by": f"include_{benchmark}.score"}
        data["mixtures"][f"domains_{benchmark}"] = pool | {"weights": f"weights_{benchmark}"}
    return Recipe.of(data, base=str(folder))


def quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def write(data: Path, folder: Path) -> None:
    """FOLDER/<domain>.jsonl of `text` and `part`."""
    for domain, file in DOMAINS.items():
        lines = [
            {"text": text, "part": part} for part, some in parts(data / f"{file}.jsonl.gz").items() for text in some
        ]
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


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


def tell_models(lake: Lake, found: Mapping[str, Mapping[str, Result]]) -> None:
    """What each model learned, how it answers, and what it loses on each domain."""
    records = {
        line["name"]: json.loads(line["record"]) for line in lake.query("SELECT name, record FROM models").to_pylist()
    }
    table("model", "parameters", "tokens", "learned from", *found)
    for model, domains in MODELS.items():
        told = [results[model] for results in found.values()]
        row(
            model,
            f"{records[model]['parameters']:,}",
            f"{records[model]['tokens']:,}",
            "everything" if len(domains) == len(DOMAINS) else ", ".join(domains),
            *(f"{r.perplexity:.2f}" + (f" ({r.accuracy:.0%})" if r.accuracy is not None else "") for r in told),
        )
    print("perplexity of a byte of the right answers, and accuracy")

    sums = ", ".join(f"sum(by_{model}.nats) / sum(by_{model}.nats / by_{model}.bits_per_byte)" for model in MODELS)
    losses = lake.query(f"SELECT source, {sums} FROM corpus WHERE by_everything.computed GROUP BY 1 ORDER BY 1", NAME)
    table("bits/byte", *MODELS)
    for line in zip(*(column.to_pylist() for column in losses.columns), strict=True):
        least = min(line[1:])
        row(line[0], *(f"**{value:.2f}**" if value == least else f"{value:.2f}" for value in line[1:]))


def tell_domains(lake: Lake) -> None:
    """What the estimates say of the domains, and what each mixture is made of."""
    records = {
        line["name"]: json.loads(line["record"]) for line in lake.query("SELECT name, record FROM mixtures").to_pylist()
    }
    books: dict[str, dict[str, dict[str, Any]]] = {}
    for line in lake.query("SELECT * FROM weights").to_pylist():
        books.setdefault(line["mixture"], {})[line["group"]] = line

    table("benchmark", "rank", "domain", "estimate", "95 % interval", "weight", "of its kind")
    for benchmark, kind in EXPECTED.items():
        ranked = sorted(books[f"weights_{benchmark}"].values(), key=lambda line: line["rank"])
        for line in ranked:
            if line["rank"] <= 5 or line["group"] in kind or line is ranked[-1]:
                span = f"{line['low']:+.2f} to {line['high']:+.2f}"
                of_kind = "yes" if line["group"] in kind else ""
                row(
                    benchmark,
                    line["rank"],
                    line["group"],
                    f"{line['estimate']:+.2f}",
                    span,
                    f"{line['weight']:.2f}",
                    of_kind,
                )

    table("benchmark", "R2 of held-out ranks by the estimates", "by the mean loss")
    for benchmark in EXPECTED:
        held = records[f"weights_{benchmark}"]["held_out"]
        row(benchmark, f"{held['r2']:.2f}", f"{held['mean_loss_r2']:.2f}")

    table(
        "page classifier", "includes", "learned", "held out", "recall", "AUROC", "of mere length", "AUROC on the pool"
    )
    models = {
        line["name"]: json.loads(line["record"]) for line in lake.query("SELECT name, record FROM models").to_pylist()
    }
    for benchmark in EXPECTED:
        labels = models[f"page_{benchmark}"]["labels"]
        include, book = labels["include"], books[f"weights_{benchmark}"].values()
        chosen = [line["group"] for line in book if line["weight"] > 0]
        row(
            benchmark,
            ", ".join(chosen),
            " + ".join(str(label["documents"]) for label in labels.values()),
            " + ".join(str(label["held_out"]) for label in labels.values()),
            " and ".join(f"{label['recall']:.2f}" for label in labels.values()),
            f"{include['auroc']:.3f}",
            f"{include['length_auroc']:.3f}",
            f"{auroc(lake, benchmark, chosen):.3f}",
        )

    table("benchmark", "mixture", "tokens", "documents", "of its kind", "natural", "largest domains")
    for benchmark, kind in EXPECTED.items():
        for way in ("pages", "domains"):
            book, totals = books[f"{way}_{benchmark}"], records[f"{way}_{benchmark}"]["totals"]
            taken = {group: line["taken_tokens"] / totals["taken_tokens"] for group, line in book.items()}
            largest = sorted(taken, key=taken.__getitem__, reverse=True)[:4]
            row(
                benchmark,
                way,
                f"{totals['taken_tokens']:,} of {totals['budget_tokens']:,}",
                totals["taken_documents"],
                f"{sum(taken.get(group, 0) for group in kind):.0%}",
                f"{sum(book[group]['share'] for group in kind):.0%}",
                ", ".join(f"{group} {taken[group]:.0%}" for group in largest),
            )


def auroc(lake: Lake, benchmark: str, chosen: Sequence[str]) -> float:
    """That a passage of the pool scores higher if it is of a chosen domain than if it is not; ties count half."""
    ranked = (
        f"SELECT source IN ({quoted(chosen)}) AS same, rank() OVER (ORDER BY score) "
        "+ (count(*) OVER (PARTITION BY score) - 1) / 2 AS r "
        f"FROM (SELECT source, include_{benchmark}.score AS score FROM corpus WHERE adopted.part = 'pool')"
    )
    sums = "SELECT sum(r) FILTER (same) AS ranks, count(*) FILTER (same) AS n, count(*) AS total"
    [line] = lake.query(f"{sums} FROM ({ranked})", NAME).to_pylist()
    n = line["n"]
    return float((line["ranks"] - n * (n + 1) / 2) / (n * (line["total"] - n)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="that each model learns")
    parser.add_argument("--size", default="1m", help="of the models but one")
    parser.add_argument("--items", type=int, default=100, help="of each benchmark")
    parser.add_argument("--lake", type=Path, help="a folder to keep, and to go on in")
    options = parser.parse_args()
    data = Path(os.environ.get("CORPUSMILL_BENCH_DATA", "/nowhere"))
    missing = [file for file in DOMAINS.values() if not (data / "text" / f"{file}.jsonl.gz").exists()]
    if missing:
        print(f"skipped: CORPUSMILL_BENCH_DATA names no folder with text/{missing[0]}.jsonl.gz")
        raise SystemExit(0)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.lake or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "lake").exists():
            write(data / "text", folder)
        here, executor = folder / "lake", Serial(threads=1)
        work(Graph(recipe(folder, options)), here, executor, stages=("ingest", "train", "score"))

        lake = Lake(here)
        models = {
            line["name"]: str(here / line["path"]) for line in lake.query("SELECT name, path FROM models").to_pylist()
        }
        found = answered(
            folder, {model: models[model] for model in MODELS}, benchmarks(data / "benchmarks", options.items)
        )
        with (folder / "results.csv").open("w", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(["benchmark", *MODELS])
            for benchmark, results in found.items():
                lines.writerow([benchmark, *(results[model].perplexity for model in MODELS)])

        query = "SELECT sum(tokens.n)::BIGINT FROM corpus WHERE adopted.part = 'known'"
        tokens = lake.query(query, NAME)[0][0].as_py()
        work(Graph(recipe(folder, options, tokens)), here, executor, stages=("train", "score", "weigh", "mix"))
        lake = Lake(here)
        print(f"\n{machine()}, {(time.monotonic() - began) / 60:.0f} minutes")
        tell_models(lake, found)
        tell_domains(lake)


if __name__ == "__main__":
    main()
