"""Do fastText classifiers tell the web documents that people called good, and better than their length does?

    CORPUSMILL_BENCH_DATA=FOLDER python tests/benchmarks/quality_classifier.py

FOLDER/tables/dclm holds DCLM's human labels (arXiv 2406.11794): majority_data.jsonl.gz, 499 web documents with label 1
or 0, and agreement_data.jsonl.gz, of these the 281 on which the raters agreed, with the same labels (checked here). So
there are three rows of numbers: `agreed` (281), `contested` (the other 218) and `all`.

Training texts are others of FOLDER (`text/`, `benchmarks/`, `html/`, `warc/`): never `web_cc_human_quality`, which is
of the same source, and no passage that shares 13 words in a row with a labelled document. A document gives at most 4
passages of 2,000 characters, a source at most 1,000; of the smaller class passages come again until both are as many.
Positives and negatives are the sets below, in all pairs, with DCLM's profile.

The pair and then the settings with the best AUROC on `agreed` are the choice, to be judged on `contested`. `all` is
comparable with published numbers; there a pair is chosen anew for each fifth of the documents on the other four, so
that no document takes part in the choice of the classifier that scores it. Scores of different classifiers enter as
ranks. What this does not undo: the sets of texts were put together by someone who had seen labelled documents.

`with length` is the mean of the ranks of the classifier's score and of the number of characters: fastText averages over
words, so it cannot see length. Brackets are 95 % intervals of a bootstrap over documents, good and bad apart: of AUROC,
and of how far it is above zlib's, with length above that of few line breaks with length. It takes three minutes of one
core.
"""

import gzip
import json
import os
import random
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from resiliparse.extract.html2text import extract_plain_text

from scorers.classifiers.fasttext import FastText
from scorers.classifiers.fasttext_training import FastTextTraining, auroc, train
from storage.sources.extract import Page, html_extractor
from storage.sources.records import Document
from storage.sources.streams import Input
from storage.sources.warc import read_warc

Scores = NDArray[np.float64]
Mask = NDArray[np.bool_]

PASSAGE, PER_DOCUMENT, PER_SOURCE = 2_000, 4, 1_000
SHARED_WORDS = 13
FOLDS, RESAMPLES, SEED = 5, 2_000, 7
BASE = FastTextTraining(profile="dclm", dim=16, buckets=500_000)
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "word bigrams, 5 epochs, 16 numbers a word": {},
    "words alone": {"word_ngrams": 1},
    "1 epoch": {"epochs": 1},
    "2 epochs": {"epochs": 2},
    "20 epochs": {"epochs": 20},
    "100 numbers a word": {"dim": 100},
    "words that occur 3 times": {"min_count": 3},
}
HUMAN = BASE.model_copy(update={"epochs": 50, "learning_rate": 0.5})
"""For a few hundred documents with human labels: the best of seven by cross-validation inside `agreed`."""
BOOKS = ["novels_en_eltec", "speeches_sotu", "textbooks_openstax_d2l"]
ARTICLES = ["articles by hand", "pages, main text"]
QUESTIONS = ["arc_challenge", "arc_easy", "gsm8k", "openbook_qa", "piqa"]
FURNITURE = ["pages, the rest", "articles, the rest", "crawls, the rest"]
POSITIVES: Mapping[str, list[str]] = {
    "books": BOOKS,
    "articles": ARTICLES,
    "books and articles": [*BOOKS, *ARTICLES, "boolq", "encyclopedia_wikipedia"],
    "reference": [
        "textbooks_openstax_d2l",
        "encyclopedia_wikipedia",
        "medical_pubmed_abstracts",
        "docs_software_en",
    ],
    "questions, answered": [*QUESTIONS, "boolq", "medical_qa_medquad"],
}
NEGATIVES: Mapping[str, list[str]] = {
    "crawls": ["crawls, main text"],
    "what pages leave out": FURNITURE,
    "both": ["crawls, main text", *FURNITURE],
    "both, SMS, contracts": ["crawls, main text", *FURNITURE, "spam_sms_labelled", "legal_contracts_edgar"],
}


def lines(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file) as rows:
        return [json.loads(row) for row in rows]


def labelled(folder: Path) -> tuple[list[str], Mask, Mask]:
    """Texts, which are good, and on which the raters agreed."""
    majority = {row["text"]: bool(row["label"]) for row in lines(folder / "majority_data.jsonl.gz")}
    agreed = {row["text"]: bool(row["label"]) for row in lines(folder / "agreement_data.jsonl.gz")}
    assert agreed.items() <= majority.items(), "agreement_data is no longer a part of majority_data"
    return list(majority), np.array(list(majority.values())), np.array([text in agreed for text in majority])


def simple(texts: list[str]) -> dict[str, Scores]:
    """What needs no classifier, turned so that high says good."""
    measures: dict[str, Callable[[str], float]] = {
        "length": len,
        "zlib ratio, low": lambda text: -len(zlib.compress(text.encode())) / len(text.encode()),
        "line breaks, few": lambda text: -text.count("\n") / len(text),
        "length of words": lambda text: float(np.mean([len(word) for word in text.split()])),
        "words per line": lambda text: len(text.split()) / (text.count("\n") + 1),
    }
    return {name: np.array([measure(text) for text in texts], float) for name, measure in measures.items()}


def crawl(files: Iterable[Path]) -> tuple[list[str], list[str]]:
    """Of each page the main text as `ingest` takes it, and the lines of the page that are in no main text."""

    def read(extract: Callable[[str], Page]) -> list[str]:
        found = []
        for path in files:
            with Input(str(path)) as file:
                records = read_warc(file, 20_000_000, extract, "benchmark")
                found += [record.text.decode() for record in records if isinstance(record, Document)]
        return found

    files = list(files)
    main = read(html_extractor("resiliparse"))
    shown = {line.strip() for text in main for line in text.splitlines()}
    whole = read(lambda html: Page(extract_plain_text(html, main_content=False, alt_texts=False)))
    return main, ["\n".join(line for line in text.splitlines() if line.strip() not in shown) for text in whole]


def answered(row: dict[str, Any]) -> str:
    if "choices" in row:
        return f"{row['query']} {row['choices'][int(row['gold'])]}"
    return f"{row['context']} {row['chain_of_thought']} {row['answer']}"


def sources(folder: Path, wanted: set[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    found["pages, main text"], found["pages, the rest"] = crawl([folder / "html/pages.warc.gz"])
    _, found["articles, the rest"] = crawl([folder / "html/article_extraction_benchmark.warc.gz"])
    gold = lines(folder / "html/article_extraction_benchmark.gold.jsonl.gz")
    found["articles by hand"] = [row["text"] for row in gold]
    crawls = (path for path in sorted((folder / "warc").rglob("*")) if path.is_file())
    found["crawls, main text"], found["crawls, the rest"] = crawl(crawls)
    for file in folder.glob("text/*.jsonl.gz"):
        if file.name.removesuffix(".jsonl.gz") in wanted:
            found[file.name.removesuffix(".jsonl.gz")] = [row["text"] for row in lines(file)]
    for file in folder.glob("benchmarks/llm_foundry/*.jsonl.gz"):
        if file.name.removesuffix(".jsonl.gz") in wanted:
            found[file.name.removesuffix(".jsonl.gz")] = [answered(row) for row in lines(file)]
    return {name: texts for name, texts in found.items() if name in wanted}


def runs(text: str) -> set[int]:
    words = text.split()
    return {hash(tuple(words[n : n + SHARED_WORDS])) for n in range(len(words) - SHARED_WORDS + 1)}


def passages(name: str, texts: list[str], tested: set[int]) -> tuple[list[str], int]:
    """Some of each document, none that shares a run of words with a labelled one; and how many did."""
    draw, found = random.Random(name), []
    for text in texts:
        parts = [text[first : first + PASSAGE] for first in range(0, len(text), PASSAGE)]
        found += draw.sample(parts, min(PER_DOCUMENT, len(parts)))
    draw.shuffle(found)
    some = [part for part in found if part.strip()][:PER_SOURCE]
    clean = [part for part in some if not runs(part) & tested]
    return clean, len(some) - len(clean)


def classify(good: list[str], bad: list[str], tested: list[str], training: FastTextTraining) -> Scores:
    """P(good) of `tested`, by a classifier trained on the others and applied as the scorer `fasttext`."""
    most = max(len(good), len(bad))
    rows = [(label, texts[n % len(texts)]) for label, texts in (("hq", good), ("cc", bad)) for n in range(most)]
    random.Random(SEED).shuffle(rows)
    labels, texts = zip(*rows, strict=True)
    with tempfile.TemporaryDirectory() as folder:
        table = pa.table({"label": labels, "text": texts, "heldout": [False] * len(rows)})
        pq.write_table(table, f"{folder}/texts.parquet")
        train(training, f"{folder}/texts.parquet", folder, f"{folder}/model", seed=SEED)
        score = FastText(model=f"{folder}/model/model.bin", label="__label__hq").build()
        found = score(pa.record_batch({"text": pa.array(tested, pa.large_string())}))["score"]
        return np.array(found.fill_null(0.0), float)


def ranks(scores: Scores) -> Scores:
    """From 0 to 1, equals alike."""
    _, which, count = np.unique(scores, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(count) - (count + 1) / 2)[which] / max(1, len(scores) - 1))


def area(scores: Scores, good: Mask) -> float:
    found = auroc(scores, good)
    assert found is not None, "documents of one label only"
    return found


def resampled(good: Mask, *scores: Scores) -> list[Scores]:
    """The AUROC of each on the same draws of documents with replacement."""
    draw, sides = np.random.default_rng(SEED), [np.flatnonzero(good), np.flatnonzero(~good)]
    drawn = [np.concatenate([draw.choice(side, len(side)) for side in sides]) for _ in range(RESAMPLES)]
    return [np.array([area(each[documents], good[documents]) for documents in drawn]) for each in scores]


def interval(values: Scores) -> str:
    low, high = np.quantile(values, [0.025, 0.975])
    return f"[{low:.3f}, {high:.3f}]"


class Labelled:
    """The documents to be told apart, and the rows of the tables about them."""

    def __init__(self, folder: Path) -> None:
        self.texts, self.good, self.agreed = labelled(folder)
        self.simple = simple(self.texts)
        self.parts = {"agreed": self.agreed, "contested": ~self.agreed, "all": np.ones(len(self.texts), bool)}
        draw = np.random.default_rng(SEED)
        self.folds = np.empty(len(self.texts), np.intp)
        for side in (self.good, ~self.good):
            self.folds[side] = draw.permutation(side.sum()) % FOLDS

    def on(self, scores: Scores, part: str) -> float:
        return area(scores[self.parts[part]], self.good[self.parts[part]])

    def with_length(self, scores: Scores) -> Scores:
        return (ranks(scores) + ranks(self.simple["length"])) / 2

    def header(self, title: str) -> None:
        print(f"\n{title:52}{'agreed':>8}{'contested':>11}{'all':>7}   with length: agreed  contested    all")

    def row(self, name: str, scores: Scores) -> None:
        first, second = ([self.on(s, part) for part in self.parts] for s in (scores, self.with_length(scores)))
        print(
            f"{name:52}{first[0]:8.3f}{first[1]:11.3f}{first[2]:7.3f}"
            f"{second[0]:22.3f}{second[1]:11.3f}{second[2]:7.3f}",
            flush=True,
        )

    def verdict(self, name: str, scores: Scores, part: str) -> None:
        """AUROC with its interval, and how far it is above the best that needs no classifier, alone and with length."""
        chosen = self.parts[part]
        good = self.good[chosen]
        few_breaks = self.with_length(self.simple["line breaks, few"])
        alone = scores[chosen], self.simple["zlib ratio, low"][chosen]
        both = self.with_length(scores)[chosen], few_breaks[chosen]
        for kind, (ours, simple) in {f"{name} ({part})": alone, f"{name} ({part}), with length": both}.items():
            of_ours, of_simple = resampled(good, ours, simple)
            more = area(ours, good) - area(simple, good)
            spread, above = interval(of_ours), interval(of_ours - of_simple)
            print(f"{kind:64}{area(ours, good):8.3f} {spread}{more:+10.3f} {above}", flush=True)

    def chosen_elsewhere(self, candidates: Mapping[str, Scores]) -> Scores:
        """Each fifth as scored by the candidate that is best on the other four, as ranks over all documents."""
        scores = np.empty(len(self.texts))
        for fold in range(FOLDS):
            others = self.folds != fold
            best = max(candidates, key=lambda name: area(candidates[name][others], self.good[others]))
            scores[~others] = ranks(candidates[best])[~others]
        return scores


def main() -> None:
    folder = Path(os.environ.get("CORPUSMILL_BENCH_DATA", ""))
    if not (folder / "tables/dclm/majority_data.jsonl.gz").is_file():
        print("skipped: CORPUSMILL_BENCH_DATA names no folder with tables/dclm/majority_data.jsonl.gz")
        return
    began = time.process_time()
    people = Labelled(folder / "tables/dclm")
    print(f"{len(people.texts)} documents, {people.good.sum()} of them good; agreed on: {people.agreed.sum()}")
    people.header("AUROC without a classifier")
    for name, scores in people.simple.items():
        people.row(name, scores)

    tested = set().union(*map(runs, people.texts))
    wanted = {name for sets in (POSITIVES, NEGATIVES) for names in sets.values() for name in names}
    found = {name: passages(name, texts, tested) for name, texts in sources(folder, wanted).items()}
    assert wanted == found.keys(), wanted - found.keys()
    print(f"\npassages to train on: {'; '.join(f'{name} {len(parts)}' for name, (parts, _) in sorted(found.items()))}")
    print(f"left out because they share {SHARED_WORDS} words: {sum(shared for _, shared in found.values())}")

    def texts(names: list[str]) -> list[str]:
        return [part for name in names for part in found[name][0]]

    people.header("good / bad that it was trained on")
    candidates: dict[str, Scores] = {}
    for good, positives in POSITIVES.items():
        for bad, negatives in NEGATIVES.items():
            name = f"{good} / {bad}"
            candidates[name] = classify(texts(positives), texts(negatives), people.texts, BASE)
            people.row(name, candidates[name])
    pair = max(candidates, key=lambda name: people.on(candidates[name], "agreed"))
    positives, negatives = (
        texts(sets[name]) for sets, name in zip((POSITIVES, NEGATIVES), pair.split(" / "), strict=True)
    )
    people.header(f"settings, for {pair}")
    settings: dict[str, Scores] = {}
    for name, changed in SETTINGS.items():
        training = BASE.model_copy(update=dict(changed))
        settings[name] = classify(positives, negatives, people.texts, training) if changed else candidates[pair]
        people.row(name, settings[name])
    best = max(settings, key=lambda name: people.on(settings[name], "agreed"))

    print(f"\nchosen on `agreed`: {pair}; {best}\n{'':67}AUROC{'':22}above zlib, or length with line breaks")
    people.verdict("chosen on `agreed`", settings[best], "contested")
    people.verdict("chosen on four fifths", people.chosen_elsewhere(candidates), "all")

    def learned(on: Mask, to: Mask) -> Scores:
        good, bad = ([people.texts[n] for n in np.flatnonzero(on & side)] for side in (people.good, ~people.good))
        return classify(good, bad, [people.texts[n] for n in np.flatnonzero(to)], HUMAN)

    by_people = np.zeros(len(people.texts))
    by_people[~people.agreed] = learned(people.agreed, ~people.agreed)
    people.verdict("trained on the labels of `agreed`", by_people, "contested")
    for fold in range(FOLDS):
        by_people[people.folds == fold] = ranks(learned(people.folds != fold, people.folds == fold))
    people.verdict("trained on the labels of four fifths", by_people, "all")
    print(f"\n{time.process_time() - began:.0f} s of one core")


if __name__ == "__main__":
    main()
