"""What a crawl's text costs: quality and speed of both extractors, and of the whole way from WARC to documents.

    CORPUSMILL_BENCH_DATA=FOLDER python tests/benchmarks/extraction.py

FOLDER/html holds NAME.warc.gz beside NAME.gold.jsonl.gz: pages, and for each of them {"url", "text"} with
the main text as people marked it. Pages without gold are timed only. One process; the best of three rounds in turn.

F1 is token-level: words (\\w+, lower case) as a bag, then runs of four words, to which order matters. A page's F1 is
the harmonic mean of precision and recall; the score is the mean over pages.
"""

import gzip
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import trafilatura
from fastwarc.warc import ArchiveIterator
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding

from storage.intake import InputFile, take_in
from storage.sources import Intake, Source
from storage.sources.extract import html_extractor

ROUNDS = 3
BARE = {"preserve_formatting": True, "main_content": True}
OURS = {**BARE, "alt_texts": False, "comments": False, "post_meta": False, "skip_elements": ["header"]}


def pages(crawl: Path) -> Iterator[tuple[str, str]]:
    """(url, HTML), read as directly as the libraries allow."""
    with open(crawl, "rb") as file:
        for record in ArchiveIterator(file, auto_decode="all"):
            content = record.reader.read()
            html = bytes_to_str(content, detect_encoding(content, from_html_meta=True))
            yield record.headers.get("WARC-Target-URI"), html


def runs(text: str, length: int) -> Counter[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return Counter(zip(*(words[n:] for n in range(length)), strict=False))


def agreement(texts: list[str], gold: list[str], length: int) -> tuple[float, float, float]:
    """F1, precision and recall, each the mean over pages."""
    sums = [0.0, 0.0, 0.0]
    for text, true in zip(texts, gold, strict=True):
        found, wanted = runs(text, length), runs(true, length)
        common = (found & wanted).total()
        precision = common / found.total() if found else float(not wanted)
        recall = common / wanted.total() if wanted else 1.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        sums = [a + b for a, b in zip(sums, (f1, precision, recall), strict=True)]
    return sums[0] / len(gold), sums[1] / len(gold), sums[2] / len(gold)


def quality(crawl: Path, gold_file: Path) -> None:
    with gzip.open(gold_file) as lines:
        gold = {record["url"]: record["text"] for record in map(orjson.loads, lines)}
    known = [(html, gold[url]) for url, html in pages(crawl) if url in gold]
    extractors: dict[str, Callable[[str], str]] = {
        "resiliparse, all text": lambda html: extract_plain_text(html),
        "resiliparse, its defaults": lambda html: extract_plain_text(html, **BARE),
        "resiliparse, as used here": lambda html: extract_plain_text(html, **OURS),
        "  with title, rights, guards": lambda html: html_extractor("resiliparse")(html).text,
        "trafilatura, its defaults": lambda html: trafilatura.extract(html) or "",
        "trafilatura, no comments": lambda html: trafilatura.extract(html, include_comments=False) or "",
        "trafilatura, precision": lambda html: (
            trafilatura.extract(html, include_comments=False, favor_precision=True) or ""
        ),
        "trafilatura, as used here": lambda html: trafilatura.extract(html, fast=True, include_comments=False) or "",
    }
    print(f"\n{crawl.name}: {len(known)} pages with gold text")
    print(f"{'':30}{'pages/s':>9}   {'words: F1':>9} {'prec.':>7} {'recall':>7}   {'4 words: F1':>11}")
    for name, extract in extractors.items():
        began = time.process_time()
        texts = [extract(html) for html, _ in known]
        took = time.process_time() - began
        words, fours = (agreement(texts, [true for _, true in known], length) for length in (1, 4))
        print(
            f"{name:30}{len(known) / took:9.0f}   {words[0]:9.4f} {words[1]:7.4f} {words[2]:7.4f}   {fours[0]:11.4f}",
            flush=True,
        )


def bare(crawl: Path) -> int:
    """The least that a loop over fastwarc and resiliparse can do."""
    return sum(1 for _, html in pages(crawl) if extract_plain_text(html, **OURS))


def ours(crawl: Path) -> int:
    """The same pages as documents in shards: with domains, rights, metadata, hashes and books."""
    source = Source(name="bench", format="warc", path=str(crawl))
    tables = {"documents": "documents", "rejects": "rejects", "adopted": "adopted"}
    with tempfile.TemporaryDirectory() as folder:
        taken = take_in([InputFile(0, str(crawl))], source, Intake(), folder, tables)
    return taken.counts[0].documents


def whole_way(crawl: Path) -> None:
    best = dict.fromkeys((bare, ours), float("inf"))
    counts = {}
    for _ in range(ROUNDS):
        for way in best:
            began = time.perf_counter()
            counts[way] = way(crawl)
            best[way] = min(best[way], time.perf_counter() - began)
    print(f"\n{crawl.name}: from WARC to text")
    print(f"  fastwarc and resiliparse in a loop   {counts[bare] / best[bare]:7.0f} pages/s")
    print(f"  documents and rejects in shards      {counts[ours] / best[ours]:7.0f} pages/s")
    print(f"  ratio {best[ours] / best[bare]:.2f}")


def main() -> None:
    folder = os.environ.get("CORPUSMILL_BENCH_DATA")
    crawls = sorted(Path(folder, "html").glob("*.warc.gz")) if folder else []
    if not crawls:
        print("skipped: CORPUSMILL_BENCH_DATA names no folder with html/*.warc.gz")
        return
    for crawl in crawls:
        gold = crawl.with_name(crawl.name.removesuffix(".warc.gz") + ".gold.jsonl.gz")
        if gold.exists():
            quality(crawl, gold)
        whole_way(crawl)


if __name__ == "__main__":
    main()
