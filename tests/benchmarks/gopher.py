"""Gopher signals, documents a second and core, by kind of text: repetition costs, since only repeats are followed.

    CORPUSMILL_BENCH_DATA=FOLDER python tests/benchmarks/gopher.py [--documents 400]

The goal is 800 documents of 567 words a second and core (datatrove with spaCy: about 80; dolma: about 215).
"""

import argparse

from cpu_scorers import count_words, files, read, scoring

from scorers.quality.gopher import Gopher

GOAL = 800


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=400)
    options = parser.parse_args()
    spec = Gopher()
    score = spec.build()
    found, slowest = files(), float("inf")
    print(f"{'':40}{'words':>8}{'documents/s':>14}{'of 567 words/s':>16}")
    for file in found:
        texts = read(file, options.documents)
        total, spent = count_words(texts), scoring(spec, score, texts)
        rate = total / 567 / spent
        slowest = min(slowest, rate)
        print(f"{file.name:40}{total / len(texts):8.0f}{len(texts) / spent:14.0f}{rate:16.0f}")
    print(f"slowest: {slowest / GOAL:.1f} times the goal")


if __name__ == "__main__":
    main()
