"""Weights by perplexity correlations: the matrix is exact, the book and the record say what they rest on."""

import json
import math

import numpy as np
import pytest

from scorers.correlation import estimate, held_out
from storage.errors import RecipeError

MODELS = ("m0", "m1", "m2", "m3", "m4", "m5")
ACCURACY = (0.30, 0.42, 0.38, 0.55, 0.61, 0.50)
# nats of one document's byte, per group and model: `ranks` goes with the accuracies, `against` goes the other way
NATS = {
    "ranks": (0.90, 0.78, 0.82, 0.65, 0.59, 0.70),
    "against": (0.50, 0.62, 0.58, 0.75, 0.81, 0.70),
    "mixed": (0.70, 0.60, 0.72, 0.66, 0.58, 0.74),
    "flat": (0.66, 0.66, 0.66, 0.66, 0.66, 0.66),
}


@pytest.fixture
def pages(job):
    """Per group a short and a long document whose losses differ, so that means of documents would be another number."""
    rows = []
    for group, nats in NATS.items():
        for n_bytes, factor in ((40, 0.5), (110, 1.25)):
            losses = {model: loss * factor * n_bytes for model, loss in zip(MODELS, nats, strict=True)}
            rows.append({"text": (group + " ").ljust(n_bytes, "x"), "url": f"http://{group}.org/{n_bytes}", **losses})
    job.write("pool/a.jsonl", rows)
    errors(job, ACCURACY)
    # groups and models in another order, one that no document has, and a model that nobody asked about
    groups, values = ["gone", *reversed(NATS)], matrix(["ranks", *reversed(NATS)])[::-1]
    lines = [
        f"{group}.org,1.5,{','.join(map(repr, bits))}" for group, bits in zip(groups, values.T.tolist(), strict=True)
    ]
    (job.folder / "bpb.csv").write_text("\n".join([",".join(["group", "other", *MODELS[::-1]]), *lines]))
    return job


def errors(job, accuracy) -> None:
    header = ",".join(["benchmark", *MODELS[::-1], "another"])
    lines = [",".join(["arc", *map(str, accuracy[::-1]), "0.9"]), ",".join(["unused", *["7"] * 7])]
    (job.folder / "errors.csv").write_text("\n".join([header, *lines]) + "\n")


def recipe(job, **w) -> dict:
    """Weights "w" from the losses in bpb.csv; what is None is left out."""
    learned = {"method": "perplexity_correlation", "tokens": "n_bytes", "matrix": "bpb.csv"}
    learned |= {"errors": "errors.csv", "benchmarks": {"arc": "accuracy"}, "budget_tokens": 300}
    return job.recipe(weights={"w": {k: v for k, v in (learned | w).items() if v is not None}})


def scored(job, models=MODELS, **w) -> dict:
    """The same from the scores of the recipe."""
    tables = recipe(job, matrix=None, losses={model: model for model in models}, **w)
    return tables | {"scores": {model: {"scorer": "planted:Losses", "field": model} for model in models}}


def book(job, name: str = "w") -> dict[str, tuple]:
    columns = '"group", weight, estimate, rank, low, high, tokens'
    query = f'SELECT {columns} FROM lake.main.weights WHERE mixture = ? ORDER BY "group"'
    return {group.removesuffix(".org"): rest for group, *rest in job.lake.rows(query, [name])}


def record(job) -> dict:
    return json.loads(job.lake.rows("SELECT record FROM lake.main.mixtures WHERE name = 'w'")[0][0])


STAGES = ("ingest", "score", "weigh")


def matrix(groups=NATS) -> np.ndarray:
    """[models, groups] of bits per byte: sums over sums."""
    return np.array([NATS[g] for g in groups]).T * (40 * 0.5 + 110 * 1.25) / (150 * math.log(2))


def test_groups_on_which_better_models_have_lower_losses_are_taken_first(pages):
    pages.run(recipe(pages), ("ingest", "weigh"))
    found = book(pages)
    expected = dict(zip(NATS, estimate(matrix(), 1 - np.array(ACCURACY)), strict=True))
    assert found["ranks"][1] == pytest.approx(1.0)
    assert found["against"][1] == pytest.approx(-1.0)
    assert found["mixed"][1] == pytest.approx(expected["mixed"])
    assert found["flat"] == [0.0, None, None, None, None, 150]
    assert [found[g][2] for g in ("ranks", "mixed", "against")] == [1, 2, 3]
    assert found["mixed"][3] <= found["mixed"][1] <= found["mixed"][4]
    assert found["ranks"][3:5] == [1.0, 1.0]
    assert {g: row[0] for g, row in found.items()} == {"ranks": 0.5, "mixed": 0.5, "against": 0.0, "flat": 0.0}
    kept = record(pages)
    assert kept["held_out"] | {"folds": 2} == kept["held_out"]
    assert {k: kept[k] for k in ("models", "models_dropped", "groups", "groups_without_estimate", "missing")} == {
        "models": 6,
        "models_dropped": 0,
        "groups": 4,
        "groups_without_estimate": 1,
        "missing": 0,
    }
    by_hand = held_out(matrix(sorted(NATS)), 1 - np.array(ACCURACY), estimate, folds=2)
    assert (kept["held_out"]["r2"], kept["held_out"]["mean_loss_r2"]) == pytest.approx(
        (by_hand.r2, by_hand.baseline_r2)
    )


def test_a_file_gives_the_same_weights(pages):
    pages.run(scored(pages), STAGES)
    found, ranks = book(pages), record(pages)["held_out"]
    pages.run(recipe(pages), ("weigh",))
    assert record(pages)["held_out"] == pytest.approx(ranks)
    assert record(pages)["models_without_errors"] == 1
    assert book(pages).keys() == found.keys()
    for group, row in found.items():
        assert book(pages)[group] == pytest.approx(row)


def test_a_mixture_takes_them_and_new_errors_make_them_anew(pages):
    tables = recipe(pages)
    tables["mixtures"] = {"main": {"tokens": "n_bytes", "weights": "w", "budget_tokens": 300}}
    assert pages.run(tables).counts["w"]["reused"] is False
    taken = dict(pages.lake.rows("""SELECT "group", taken_tokens FROM lake.main.weights WHERE mixture = 'main'"""))
    assert taken == {"ranks.org": 150, "mixed.org": 150, "against.org": 0, "flat.org": 0}
    assert pages.run(tables, ("weigh",)).counts["w"]["reused"] is True
    errors(pages, ACCURACY[::-1])
    assert pages.run(tables, ("weigh",)).counts["w"]["reused"] is False
    assert book(pages)["ranks"][1] == pytest.approx(estimate(matrix(), 1 - np.array(ACCURACY[::-1]))[0])


def test_models_are_compared_on_the_documents_that_all_of_them_have(pages):
    """A model without the long document of a group, and one without the group."""
    rows = [json.loads(line) for line in (pages.folder / "pool/a.jsonl").read_text().splitlines()]
    for row in rows:
        if row["url"] == "http://mixed.org/110":
            del row["m1"]
        if row["url"].startswith("http://against.org"):
            del row["m3"]
    pages.write("pool/a.jsonl", rows)
    models = MODELS[:4]
    with pytest.raises(RecipeError, match=r"weights\.w: model 'm3', text 'against\.org': no loss \(1 missing in all\)"):
        pages.run(scored(pages, models), STAGES)
    pages.run(scored(pages, models, missing="pairwise", estimator="product"), ("weigh",))
    wrong, short = 1 - np.array(ACCURACY[:4]), np.array(NATS["mixed"][:4]) * 0.5 / math.log(2)
    found = book(pages)
    assert found["mixed"][1] == pytest.approx(wrong @ short / 4)
    assert found["ranks"][1] == pytest.approx(wrong @ matrix(["ranks"])[:4, 0] / 4)
    assert found["against"][1] == pytest.approx(wrong[:3] @ matrix(["against"])[:3, 0] / 3)
    assert (record(pages)["missing"], record(pages)["documents_compared"]) == (1, 7)
    assert record(pages)["held_out"] is None


def test_what_is_missing_is_counted(pages):
    lines = (pages.folder / "bpb.csv").read_text().replace("against.org,1.5,", "against.org,1.5,,,").splitlines()
    lines = [",".join(line.split(",")[:8]) for line in lines]  # m5 and m4 lack a group
    (pages.folder / "bpb.csv").write_text("\n".join(lines))
    pages.run(recipe(pages, missing="drop_text"), ("ingest", "weigh"))
    assert book(pages)["against"][:2] == [0.0, None]
    assert {k: record(pages)[k] for k in ("models", "groups", "groups_dropped", "missing")} == {
        "models": 6,
        "groups": 3,
        "groups_dropped": 1,
        "missing": 2,
    }
    pages.run(recipe(pages, missing="drop_model"), ("weigh",))
    assert (record(pages)["models"], record(pages)["models_dropped"]) == (4, 2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"errors": "gone.csv"}, r"weights\.w\.errors: no file"),
        ({"losses": {"m0": "plain"}}, r"weights\.w\.losses: name the models, .* one of the two"),
        ({"benchmarks": None}, r"weights\.w\.benchmarks: say what to predict"),
        ({"budget_tokens": None}, r"weights\.w\.budget_tokens: say for how many"),
        ({"method": "natural"}, r"weights\.w\.matrix: goes with method"),
        ({"matrix": None, "losses": {"m0": "m9"}}, r"weights\.w\.losses\.m0: the entry 'm9' is not there"),
        (
            {"matrix": None, "losses": {"m0": "plain"}},
            r"weights\.w\.losses\.m0: the entry 'plain' has no column 'bits_per_byte'",
        ),
        ({"benchmarks": {"acr": "accuracy"}}, r"weights\.w: benchmarks: .* has no line 'acr'; it has arc, unused"),
        ({"benchmarks": {"unused": "accuracy"}}, r"benchmark 'unused', model 'm5': 7 is no accuracy"),
        ({"matrix": None, "losses": {"m7": "whole"}}, r"weights\.w: losses: .* has no column 'm7'"),
        ({"matrix": None, "losses": {"m0": "whole", "m1": "whole"}}, r"weights\.w: 2 models with losses and errors"),
        ({"budget_tokens": 500}, r"weights\.w: the caps of the 3 texts .* sum to 0\.9"),
        ({"matrix": "notes.csv"}, r"notes\.csv is no table of numbers"),
        ({"matrix": "twice.csv"}, r"two lines are named 'a'"),
    ],
)
def test_bad_input_is_named(pages, change, told):
    (pages.folder / "notes.csv").write_text("group,m0\na,high\n")
    (pages.folder / "twice.csv").write_text("group,m0\na,1\na,2\n")
    tables = recipe(pages, **change)
    tables["scores"] = {"plain": {"scorer": "planted:Planted", "field": "m0"}}
    tables["scores"]["whole"] = {"scorer": "planted:Losses", "field": "m0"}
    with pytest.raises(RecipeError, match=told):
        pages.run(tables, STAGES)
