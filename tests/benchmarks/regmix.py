"""RegMix's regressors on the authors' runs, and what each of them recommends.

    CORPUSMILL_BENCH_DATA=FOLDER python tests/benchmarks/regmix.py

FOLDER/tables/regmix has data/*.csv of sail-sg/regmix (MIT): mixtures of 17 domains of the Pile and losses on 13 of them
of 512 runs of 1M parameters to fit to, and of 256 of 1M, the same 256 of 60M and 64 of 1B to test on. Prints Spearman's
rank correlation x 100 for every target; of Pile-CC, which is theirs, the better must reach 98 on the 1M and 60M runs
(LightGBM, stopped by the test set: 98.92 on 1M). Then what is recommended for Pile-CC: by caps and KL, and by the
authors' rule, the mean of the best 128 of 100,000 draws of Dirichlet(token shares).
"""

import csv
import os
import time
from pathlib import Path

import numpy as np

from scorers.correlation import Array
from scorers.domains.regmix import REGRESSORS, Fitted, fit, normalised, optimum, rank_correlation, sample, spearman

PILE = {
    "arxiv": 0.113285273,
    "freelaw": 0.079608651,
    "nih_exporter": 0.003913491,
    "pubmed_central": 0.185375901,
    "wikipedia_en": 0.051081359,
    "dm_mathematics": 0.015962925,
    "github": 0.101750772,
    "philpapers": 0.003707518,
    "stackexchange": 0.066529351,
    "enron_emails": 0.001750772,
    "gutenberg_pg_19": 0.027085479,
    "pile_cc": 0.236869207,
    "ubuntu_irc": 0.01184346,
    "europarl": 0.007929969,
    "hackernews": 0.008032956,
    "pubmed_abstracts": 0.038825953,
    "uspto_backgrounds": 0.046446962,
}
"""Shares of tokens of the authors' sampler."""
TESTS = ("test_{}_1m", "test_{}_60m", "test_{}_1B")


def table(file: Path) -> tuple[list[str], list[str], Array]:
    """Names of the rows, those of the columns, values."""
    (_, *columns), *rows = csv.reader(file.open())
    return [row[0] for row in rows], columns, np.array([row[1:] for row in rows], float)


def runs(folder: Path, name: str) -> tuple[Array, Array, Array, list[str]]:
    """Mixtures [runs, groups] made to sum to 1, the sums that they had, losses [runs, targets], the targets' names."""
    names, columns, mixtures = table(folder / f"{name.format('mixture')}.csv")
    assert [column.removeprefix("train_the_pile_") for column in columns] == list(PILE)
    again, targets, losses = table(folder / f"{name.format('pile_loss')}.csv")
    assert names == again
    shares, sums = normalised(mixtures, names)
    return shares, sums, losses, [t.removeprefix("metric/the_pile_").removesuffix("_val_loss") for t in targets]


def ranks(folder: Path, x: Array, y: Array, targets: list[str]) -> None:
    tests = [runs(folder, name) for name in TESTS]
    head = "".join(f"{regressor:>28}" for regressor in REGRESSORS)
    print(f"{'':20}{head}\n{'':20}" + f"{'1M':>10}{'60M':>9}{'1B':>9}" * 2)
    for column, target in enumerate(targets):
        row = []
        for regressor in REGRESSORS:
            fitted = fit(regressor, x, y[:, [column]])
            row.append([100 * spearman(fitted.losses(mixtures), z[:, column]) for mixtures, _, z, _ in tests])
        print(f"{target:20}" + "".join(f"{a:10.2f}{b:9.2f}{c:9.2f}" for a, b, c in row))
        if target == "pile_cc":
            assert max(min(found[:2]) for found in row) >= 98, row


def drawn(fitted: Fitted, prior: Array) -> Array:
    draws = np.random.default_rng(42).dirichlet(prior, 100_000)
    return np.asarray(draws[np.argsort(fitted.losses(draws))[:128]].mean(axis=0))


def recommended(folder: Path, x: Array, y: Array) -> None:
    """y: [runs, 1], of Pile-CC."""
    prior = np.array(list(PILE.values()))
    prior /= prior.sum()
    web, best = list(PILE).index("pile_cc"), x[np.argsort(y[:, 0])[:8]]
    print(f"\nshare of Pile-CC{'':28}" + "".join(f"{regressor:>14}" for regressor in REGRESSORS) + f"{'spread':>10}")
    fitted = [fit(regressor, x, y) for regressor in REGRESSORS]
    rows = {"best 128 of 100,000 draws": [drawn(one, prior) for one in fitted]}
    seen = x.max(axis=0)
    for said, caps, kl in (
        ("as much as some run had", seen, 0.0),
        ("the same, KL 0.05", seen, 0.05),
        ("the same, KL 0.1", seen, 0.1),
        ("4 epochs of a budget of the Pile", np.minimum(seen, 4 * prior), 0.0),
        ("the same, KL 0.05", np.minimum(seen, 4 * prior), 0.05),
    ):
        rows[said + " " * len(rows)] = [optimum(one, prior, caps, kl, best) for one in fitted]
    for said, (one, other) in rows.items():
        print(f"{said.strip():44}{one[web]:14.3f}{other[web]:14.3f}{np.abs(one - other).sum() / 2:10.3f}")
    mixtures, _, losses, targets = runs(folder, TESTS[2])
    place = int(losses[:, targets.index("pile_cc")].argmin())
    print(f"{'the best of the 64 runs of 1B':44}{mixtures[place, web]:14.3f}")


def main() -> None:
    folder = Path(os.environ.get("CORPUSMILL_BENCH_DATA", ""), "tables/regmix")
    if not folder.is_dir():
        print("skipped: CORPUSMILL_BENCH_DATA has no tables/regmix")
        return
    x, sums, y, targets = runs(folder, "train_{}_1m")
    print(f"{len(x)} runs; sums {sums.min():.3f} to {sums.max():.3f}, {(np.abs(sums - 1) > 1e-9).sum()} are not 1")
    web = y[:, [targets.index("pile_cc")]]
    for regressor in REGRESSORS:
        began = time.process_time()
        fit(regressor, x, web)
        seconds = time.process_time() - began
        held_out = 100 * rank_correlation(regressor, x, web)
        print(f"{regressor}: fitted in {seconds:.2f} s, Spearman x 100 of left-out runs {held_out:.2f}")
    ranks(folder, x, y, targets)
    recommended(folder, x, web)
    theirs, ours = np.median(x.max(axis=1)), np.median(sample(np.array(list(PILE.values())), 512).max(axis=1))
    print(f"\nmedian of the largest share of a mixture: theirs {theirs:.3f}, sampled here by their rules {ours:.3f}")


if __name__ == "__main__":
    main()
