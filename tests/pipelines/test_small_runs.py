"""Weights by RegMix: files in, weights, the spread of the regressors and the record out."""

import json

import numpy as np
import pytest

from storage.errors import RecipeError

GROUPS = ("code.org", "news.org", "web.org")
TOKENS = (100, 300, 600)


def losses(x: np.ndarray) -> np.ndarray:
    """Two targets [runs, 2]; of their mean news is the best, and the first of it counts most."""
    return np.stack([3 - 0.6 * np.sqrt(x[:, 1]) - 0.3 * x[:, 2], 3.5 - 0.5 * x[:, 0] - 0.2 * np.sqrt(x[:, 1])], axis=1)


def write(job, mixtures: np.ndarray, results: np.ndarray, groups=GROUPS) -> None:
    """Both files; runs and groups of the second and of the lake in another order."""
    lines = [f"n{run}," + ",".join(map(repr, row)) for run, row in enumerate(mixtures.tolist())]
    (job.folder / "mixtures.csv").write_text("\n".join([",".join(["run", *groups]), *lines]))
    lines = [f"n{run}," + ",".join(map(repr, row)) for run, row in enumerate(results.tolist())]
    (job.folder / "losses.csv").write_text("\n".join(["run,chat,exam", *lines[::-1]]))


@pytest.fixture
def lake(job):
    pages = [
        {"text": f"{group}{n}".ljust(10), "url": f"http://{group}/{n}"}
        for group, tokens in zip(GROUPS, TOKENS, strict=True)
        for n in range(tokens // 10)
    ]
    job.write("pool/a.jsonl", pages)
    mixtures = np.random.default_rng(1).dirichlet([1, 1, 1], 40).round(3)
    write(job, mixtures[:, ::-1], losses(mixtures), GROUPS[::-1])
    return job


def recipe(job, **w) -> dict:
    """What is None is left out."""
    learned = {"method": "regmix", "tokens": "n_bytes", "mixtures": "mixtures.csv", "results": "losses.csv"}
    learned |= {"targets": ["chat", "exam"], "budget_tokens": 1000, "max_epochs": 2}
    return job.recipe(weights={"w": {k: v for k, v in (learned | w).items() if v is not None}})


def book(job) -> dict[str, tuple]:
    query = """SELECT "group", weight, low, high, estimate, rank FROM lake.main.weights WHERE mixture = 'w'"""
    return {group: tuple(row) for group, *row in job.lake.rows(query)}


def record(job) -> dict:
    return json.loads(job.lake.rows("SELECT record FROM lake.main.mixtures WHERE name = 'w'")[0][0])


STAGES = ("ingest", "weigh")


def test_the_better_regressors_optimum_are_the_weights_and_both_are_told(lake):
    lake.run(recipe(lake), STAGES)
    found, kept = book(lake), record(lake)
    assert sum(weight for weight, *_ in found.values()) == pytest.approx(1)
    assert {group: row[0] for group, row in found.items()} == pytest.approx(
        kept["regressors"][kept["regressor"]]["weights"]
    )
    for group, (weight, low, high, estimate, rank) in found.items():
        optima = [kept["regressors"][regressor]["weights"][group] for regressor in ("log_linear", "quadratic")]
        assert (low, high) == (min(optima), max(optima))
        assert low <= weight <= high
        assert (estimate, rank) == (None, None)
    assert kept["regressor"] == "quadratic"  # the losses have roots in them
    assert kept["regressors"]["quadratic"]["held_out_spearman"] > 0.99
    assert (kept["runs"], kept["runs_without_losses"]) == (40, 0)
    assert kept["spread"] == pytest.approx(sum(high - low for _, low, high, *_ in found.values()) / 2)
    assert (kept["sums"]["least"], kept["sums"]["greatest"]) == pytest.approx((0.999, 1.001))
    assert 0 < kept["sums"]["not_1"] < 40
    assert kept["regressors"]["quadratic"]["loss"] < kept["regressors"]["quadratic"]["loss_of_natural"]
    assert kept["regressors"]["quadratic"]["loss"] == pytest.approx(kept["best_run"]["loss"], abs=0.1)


def test_no_weight_is_beyond_its_epochs_or_beyond_what_any_run_had(lake):
    lake.run(recipe(lake, kl=0, max_epochs=1.5), STAGES)
    assert book(lake)["news.org"][0] == pytest.approx(0.45)
    mixtures = np.random.default_rng(2).dirichlet([4, 4, 4], 40)
    write(lake, mixtures, losses(mixtures))
    lake.run(recipe(lake, kl=0, max_epochs=100), ("weigh",))
    assert book(lake)["news.org"][0] <= mixtures[:, 1].max() + 1e-9
    lake.run(recipe(lake, kl=1e6, max_epochs=100), ("weigh",))
    assert [row[0] for row in book(lake).values()] == pytest.approx([0.1, 0.3, 0.6], abs=1e-4)


def test_other_targets_and_other_files_make_the_weights_anew(lake):
    lake.run(recipe(lake, targets=["chat"]), STAGES)
    chat = book(lake)
    assert lake.run(recipe(lake, targets=["chat"]), ("weigh",)).counts["w"]["reused"] is True
    lake.run(recipe(lake, targets=["exam"]), ("weigh",))
    assert book(lake)["code.org"][0] > chat["code.org"][0]
    (lake.folder / "losses.csv").write_text((lake.folder / "losses.csv").read_text().replace("n0,", "n0,9"))
    assert lake.run(recipe(lake, targets=["exam"]), ("weigh",)).counts["w"]["reused"] is False


def test_runs_that_are_not_done_are_left_out_and_counted(lake):
    lines = (lake.folder / "losses.csv").read_text().splitlines()
    lines = [lines[0], "n39,,2.5", *lines[3:]]  # one failed, one is not there yet
    (lake.folder / "losses.csv").write_text("\n".join(lines))
    lake.run(recipe(lake), STAGES)
    assert (record(lake)["runs"], record(lake)["runs_without_losses"]) == (38, 2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mixtures": "gone.csv"}, r"weights\.w\.mixtures: no file"),
        ({"mixtures": None}, r"weights\.w\.mixtures: name the file of mixtures"),
        ({"results": None}, r"weights\.w\.results: name the file of losses"),
        ({"targets": None}, r"weights\.w\.targets: say which columns"),
        ({"budget_tokens": None}, r"weights\.w\.budget_tokens: say for how many"),
        ({"method": "natural"}, r"weights\.w\.mixtures: goes with method = \"regmix\""),
        ({"targets": ["chess"]}, r"weights\.w: targets: .* has no column 'chess'; it has chat, exam"),
        ({"budget_tokens": 10_000}, r"weights\.w: the caps sum to 0\.2, .* more epochs"),
        ({"mixtures": "off.csv"}, r"weights\.w: run 'a': its shares sum to 0\.8, not 1"),
        (
            {"mixtures": "other.csv"},
            r"weights\.w: mixtures: .* has the column 'new\.org', of which there is no",
        ),
        ({"mixtures": "fewer.csv"}, r"weights\.w: mixtures: .* has no column 'web\.org'"),
        ({"mixtures": "few.csv"}, r"weights\.w: results: the run 'n0' has no line in .*few\.csv"),
        ({"mixtures": "few.csv", "results": "few_losses.csv"}, r"weights\.w: results: 1 runs .* 3 groups need 5"),
        ({"mixtures": "few.csv", "results": "infinite.csv"}, r"weights\.w: results: the exam of run 'a' is infinite"),
    ],
)
def test_bad_input_is_named(lake, change, told):
    files = {
        "off": "run,code.org,news.org,web.org\na,0.3,0.3,0.2",
        "other": "run,code.org,new.org,web.org\na,0.3,0.3,0.4",
        "fewer": "run,code.org,news.org\na,0.5,0.5",
        "few": "run,code.org,news.org,web.org\na,0.3,0.3,0.4",
        "few_losses": "run,chat,exam\na,2,3",
        "infinite": "run,chat,exam\na,2,inf",
    }
    for name, text in files.items():
        (lake.folder / f"{name}.csv").write_text(text)
    if change.get("mixtures") == "off.csv":
        change = change | {"results": "few_losses.csv"}
    with pytest.raises(RecipeError, match=told):
        lake.run(recipe(lake, **change), STAGES)
