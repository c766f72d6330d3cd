"""Perplexity correlations beside the authors' package, and their published top tens.

    python -m venv /tmp/authors && /tmp/authors/bin/pip install perplexity-correlations
    CORPUSMILL_BENCH_DATA=FOLDER python tests/benchmarks/correlation.py [--package /tmp/authors/bin/python]

Speed: 90 models x 100,000 domains, process seconds, one thread, best of 3, the package in an environment of its own,
in turns with ours. Without --package the loops of its code, written out below.
Golden: FOLDER/tables/perplexity_correlations is the authors' repository from `examples` on. Per benchmark how many of
their ten best texts are among our ten best (averaged ranks; theirs are ordinal, so 9 may do), and R^2 of held-out
ranks beside that of the mean loss.
"""

import argparse
import csv
import os
import re
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from scorers.correlation import Array, Estimator, estimate, held_out
from scorers.preselect import PreSelect

ESTIMATORS: dict[Estimator, str] = {
    "product": "product",
    "sign": "sign",
    "sign_cdf": "sign_cdf",
    "sign_sign": "sign_sign",
    "spearman": "spearmanr",
}
MODELS, DOMAINS = 90, 100_000
THEIRS = f"""
import time, numpy as np
from perplexity_correlations import estimation
rng = np.random.default_rng(0)
x, y = rng.random(({MODELS}, {DOMAINS})), rng.random({MODELS})
began = time.process_time()
found = estimation.NAME(x, y)
print(time.process_time() - began, *found[:50])
"""
TOP_TENS = {
    "arc_easy": ["arc_easy"],
    "sciq": ["sciq"],
    "piqa": ["piqa"],
    "lambada": ["lambada_openai", "lambada_standard"],
    **{f"lambada_{language}": [f"lambada_openai_mt_{language}"] for language in ("fr", "de", "it", "es")},
}


def ours(estimator: Estimator, x: Array, y: Array) -> tuple[float, Array]:
    began = time.process_time()
    found = estimate(x, y, estimator)
    return time.process_time() - began, found[:50]


def theirs(package: str, name: str) -> tuple[float, Array]:
    program = [package, "-c", THEIRS.replace("NAME", name)]
    seconds, *found = subprocess.run(program, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), np.array(found, float)


def by_pairs(estimator: Estimator, x: Array, y: Array) -> tuple[float, Array]:
    """The authors' estimators as their code has them: a loop over models, pairs with all later ones."""
    began = time.process_time()
    ranks = x.argsort(axis=0).argsort(axis=0) + 1 if estimator in ("sign_cdf", "spearman") else x
    n = len(y)
    if estimator == "product":
        found = np.mean(y * x.T, axis=1)
    elif estimator == "spearman":
        order = y.argsort().argsort() + 1
        found = 1 - 6 * ((order[:, None] - ranks) ** 2).sum(axis=0) / (n * (n**2 - 1))
    else:
        values = ranks / n if estimator == "sign_cdf" else x
        total = np.zeros(x.shape[1])
        for i in range(n):
            apart = values[i:] - values[i]
            apart = np.sign(apart) if estimator == "sign_sign" else apart
            total += (np.sign(y[i:] - y[i])[:, None] * apart).sum(axis=0)
        found = 2 * total / (n * (n - 1))
    return time.process_time() - began, found[:50]


def speed(package: str | None) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.random((MODELS, DOMAINS)), rng.random(MODELS)
    other = "package" if package else "its loops"
    print(f"{MODELS} models x {DOMAINS} domains\n{'':12}{other + ' s':>12}{'ours s':>10}{'ratio':>8}")
    totals = np.zeros(2)
    for estimator, name in ESTIMATORS.items():
        runs = [
            (theirs(package, name) if package else by_pairs(estimator, x, y), ours(estimator, x, y)) for _ in range(3)
        ]
        assert np.allclose(runs[0][0][1], runs[0][1][1], atol=1e-12)
        best = [min(run[side][0] for run in runs) for side in (0, 1)]
        totals += best
        print(f"{estimator:12}{best[0]:12.3f}{best[1]:10.3f}{best[0] / best[1]:8.1f}")
    print(f"{'all five':12}{totals[0]:12.3f}{totals[1]:10.3f}{totals[0] / totals[1]:8.1f}")


def strength() -> None:
    ability = dict(zip("abcdef", (75.38, 76.30, 77.27, 79.46, 80.47, 81.19), strict=True))
    score = PreSelect(inputs={model: f"{model}.nats" for model in ability}, ability=ability).build()
    rng = np.random.default_rng(0)
    losses = {model: pa.array(1000 * rng.random(900_000)) for model in ability}
    batches = pa.table(losses).to_batches(65_536)
    began = time.process_time()
    rows = sum(score(batch).num_rows for batch in batches)
    print(f"predictive strength of {rows} documents, 6 models: {time.process_time() - began:.2f} s")


def table(file: Path) -> tuple[list[str], list[str], Array]:
    """Names of the rows, those of the columns, values."""
    (_, *columns), *rows = csv.reader(file.open())
    return [row[0] for row in rows], columns, np.array([row[1:] for row in rows], float)


def published(file: Path) -> set[int]:
    """Row numbers of the ten best texts, out of a file of the authors'."""
    part = file.read_text().split("top_ten_from_estimate:")[1].split("top_ten_from_projected")[0]
    return {int(number) for number in re.findall(r"^ +(\d+):", part, re.MULTILINE)}


def golden(folder: Path) -> None:
    sources = folder / "get_error_and_bpb"
    texts, models, losses = table(sources / "bpb_csvs/chunked_synthetic_sample_bpb_id.csv")
    benchmarks, columns, errors = table(sources / "error_csvs/error.csv")
    names = sorted(models)  # the folds go by this order
    losses = losses[:, [models.index(name) for name in names]].T
    errors = errors[:, [columns.index(name) for name in names]]
    print(f"{len(names)} models x {len(texts)} texts\n{'':14}{'top ten':>8}{'R2':>9}{'mean loss':>11}")
    for name, parts in TOP_TENS.items():
        y = errors[[benchmarks.index(part) for part in parts]].mean(axis=0)
        found = estimate(losses, y)
        said = published(folder / f"get_fasttext_filter/fasttext_info/{name}_synthetic.yml")
        same = len(said & set(np.argsort(-found, kind="stable")[:10].tolist()))
        ranks = held_out(losses, y, estimate)
        print(f"{name:14}{f'{same} / {len(said)}':>8}{ranks.r2:9.4f}{ranks.baseline_r2:11.4f}")
        assert same >= 9, (name, said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", help="python of an environment that has perplexity-correlations")
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # the package's processes
    speed(options.package)
    strength()
    data = Path(os.environ.get("CORPUSMILL_BENCH_DATA", ""), "tables/perplexity_correlations")
    if data.is_dir():
        golden(data)
    else:
        print("golden numbers skipped: CORPUSMILL_BENCH_DATA has no tables/perplexity_correlations")


if __name__ == "__main__":
    main()
