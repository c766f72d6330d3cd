"""Weights: the worked examples of the papers, and the book that a run keeps of them."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipelines.run import Run
from scorers.domains import weights
from storage.errors import RecipeError

# Characters by language of the README of PyPI's unimax-sampling, and its numbers for a budget of 250e9 and 4 epochs.
LANGUAGES = {"swe": 179955884499, "fas": 184595788282, "ekk": 42541080893, "isl": 10027573389, "fao": 549707867}


def shares(epochs, tokens, budget):
    return epochs * tokens / budget


@pytest.mark.parametrize(
    ("said", "tokens", "epochs", "filled"),
    [
        # one round, two rounds, no room (methods: water-filling of epoch caps)
        ([0.5, 0.3, 0.2], [20, 200, 400], [4, 2.76, 0.92], [0.08, 0.552, 0.368]),
        ([0.6, 0.3, 0.1], [50, 87.5, 225], [4, 4, 2], [0.2, 0.35, 0.45]),
        ([0.5, 0.5], [50, 75], [4, 4], [0.2, 0.3]),
        # a group without weight gets none of what is over, a group without tokens can take nothing
        ([0.5, 0.5, 0.0], [50, 400, 400], [4, 2, 0], [0.2, 0.8, 0]),
        ([0.5, 0.5], [0, 400], [0, 2.5], [0, 1.0]),
    ],
)
def test_epochs_under_a_cap_are_water_filled(said, tokens, epochs, filled):
    tokens = np.array(tokens, float)
    found = weights.epochs(np.array(said), tokens, 1000, 4.0)
    assert found == pytest.approx(epochs)
    assert shares(found, tokens, 1000) == pytest.approx(filled)


@pytest.mark.parametrize(
    ("budget", "expected", "epochs", "unspent"),
    [(1000, [0.4, 0.4, 0.2], [0.5, 400 / 150, 4], 0), (5000, [0.8, 0.15, 0.05], [4, 4, 4], 1000)],
)
def test_unimax_is_as_even_as_the_epochs_allow(budget, expected, epochs, unspent):
    tokens = np.array([800.0, 150.0, 50.0])
    found, left = weights.unimax(tokens, budget, 4.0)
    assert found == pytest.approx(expected)
    assert left == pytest.approx(unspent, abs=1e-9)
    assert weights.epochs(found, tokens, budget, 4.0) == pytest.approx(epochs)
    more, left = weights.unimax(np.append(tokens, 0.0), budget, 4.0)
    assert (more[-1], left) == (0.0, pytest.approx(unspent, abs=1e-9))


def test_unimax_by_the_numbers_of_the_package():
    budget, tokens = 250_000_000_000, np.array(list(LANGUAGES.values()), float)
    found, unspent = weights.unimax(tokens, budget, 4.0)
    drawn = dict(zip(LANGUAGES, found * budget, strict=True))
    assert unspent == pytest.approx(0, abs=1)
    assert drawn == pytest.approx(
        {"swe": 69230291658.67, "fas": 69230291658.67, "ekk": 69230291658.67, "isl": 40110293556, "fao": 2198831468}
    )
    assert sorted(set(found.round(7))) == pytest.approx([0.0087953, 0.1604412, 0.2769212])
    epochs = {name: drawn[name] / LANGUAGES[name] for name in LANGUAGES}
    assert epochs == pytest.approx({"fao": 4, "isl": 4, "ekk": 1.627375, "swe": 0.384707, "fas": 0.375037}, rel=1e-5)


@pytest.mark.parametrize(
    ("temperature", "expected", "epochs"),
    [
        (1, [0.8, 0.15, 0.05], [1, 1, 1]),
        (2, [0.59417258, 0.25728427, 0.14854315], [0.743, 1.716, 2.971]),
        (1 / 0.3, [0.49008141, 0.29659827, 0.21332032], [0.613, 1.977, 4.266]),
        (1e9, [1 / 3, 1 / 3, 1 / 3], [1000 / 2400, 1000 / 450, 1000 / 150]),
    ],
)
def test_temperature_flattens(temperature, expected, epochs):
    tokens = np.array([800.0, 150.0, 50.0])
    found = weights.temperature(tokens, temperature)
    assert found == pytest.approx(expected)
    assert weights.epochs(found, tokens, 1000, 100.0) == pytest.approx(epochs, rel=1e-3)
    assert weights.temperature(np.array([800.0, 0.0]), temperature) == pytest.approx([1.0, 0.0])


positive = arrays.arrays(float, 4, elements=st.floats(0.01, 1e6))


@given(positive, positive, st.integers(1, 10**9), st.floats(0.1, 10))
def test_water_filling_spends_the_budget_or_fills_every_cap(said, tokens, budget, cap):
    said = said / said.sum()
    epochs = weights.epochs(said, tokens, budget, cap)
    assert (epochs <= cap * (1 + 1e-9)).all()
    assert (epochs * tokens).sum() == pytest.approx(min(budget, cap * tokens.sum()))
    free = epochs < cap * (1 - 1e-9)
    ratio = (epochs * tokens / said)[free]
    assert ratio == pytest.approx(np.full(len(ratio), ratio[:1]))  # who is under the cap keeps the proportions ...
    assert (
        (epochs * tokens / said)[~free] <= ratio.min(initial=np.inf) * (1 + 1e-9)
    ).all()  # ... who is at it wanted more


# -- the stage -----------------------------------------------------------------------------------------------------


@pytest.fixture
def sites(job):
    """80, 15 and 5 documents of ten bytes on three sites, and one without a url."""
    counts = {"big.org": 80, "mid.org": 15, "small.org": 5}
    pages = [{"text": f"{n:010d}", "url": f"http://{site}/{n}"} for site, count in counts.items() for n in range(count)]
    job.write("pool/a.jsonl", pages)
    return job


def book(job, name: str = "w") -> dict[str, float]:
    rows = job.lake.rows('SELECT "group", weight FROM lake.main.weights WHERE mixture = ?', [name])
    return {group: round(weight, 6) for group, weight in rows}


def record(job, name: str = "w") -> dict:
    return json.loads(job.lake.rows("SELECT record FROM lake.main.mixtures WHERE name = ?", [name])[0][0])


def recipe(job, **w) -> dict:
    return job.recipe(
        weights={"w": w},
        mixtures={"main": {"tokens": "n_bytes", "weights": "w", "budget_tokens": 500, "max_epochs": 4}},
    )


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"method": "natural"}, [0.8, 0.15, 0.05]),
        ({"method": "temperature", "temperature": 2}, [0.594173, 0.257284, 0.148543]),
        ({"method": "unimax", "budget_tokens": 400, "max_epochs": 4}, [1 / 3, 1 / 3, 1 / 3]),
        ({"method": "unimax", "budget_tokens": 1000, "max_epochs": 4}, [0.4, 0.4, 0.2]),
        ({"method": "natural", "factor": {"mid.org": 2, "small.org": 0}}, [0.727273, 0.272727, 0.0]),
        ({"method": "temperature", "temperature": 2, "where": "url NOT LIKE '%9'"}, [0.596078, 0.254170, 0.149752]),
    ],
)
def test_the_share_of_tokens_that_each_group_shall_have(sites, method, expected):
    sites.run(recipe(sites, tokens="n_bytes", **method), ("ingest", "weigh"))
    found = book(sites)
    assert list(found) == ["big.org", "mid.org", "small.org"]
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-5)
    assert list(found.values()) == pytest.approx(expected, abs=0.01)


def test_given_shares_are_made_to_sum_to_one_and_what_was_said_is_on_record(sites):
    sites.run(recipe(sites, method="given", share={"big.org": 1, "mid.org": 2, "small.org": 1}))
    assert book(sites) == {"big.org": 0.25, "mid.org": 0.5, "small.org": 0.25}
    assert record(sites)["sum_as_given"] == 4.0
    assert book(sites, "main") == book(sites)
    assert record(sites, "main")["weights"] == "w"


def test_what_unimax_cannot_spend_is_on_record(sites):
    sites.run(recipe(sites, method="unimax", tokens="n_bytes", budget_tokens=5000, max_epochs=4), ("ingest", "weigh"))
    assert record(sites)["unspent_tokens"] == 1000


@pytest.mark.parametrize(
    ("factor", "told"),
    [
        ({"smal.org": 2}, r"weights\.w\.factor: no group 'smal\.org' among the candidates.*small\.org"),
        (dict.fromkeys(("big.org", "mid.org", "small.org"), 0), r"weights\.w\.factor: leaves no group a weight"),
    ],
)
def test_a_factor_that_helps_nobody_is_told(sites, factor, told):
    with pytest.raises(RecipeError, match=told):
        sites.run(recipe(sites, method="natural", tokens="n_bytes", factor=factor), ("ingest", "weigh"))


def test_the_book_tells_what_repeated_tokens_are_worth(sites):
    """50 tokens four times, 800 not even once: the law's 3.72567 epochs, and 200 new tokens."""
    tables = recipe(sites, method="given", share={"small.org": 1, "big.org": 1})
    tables["mixtures"]["main"]["budget_tokens"] = 400
    tables["mixtures"]["curve"] = {"tokens": "n_bytes", "copies": "2"}
    sites.run(tables)
    query = 'SELECT "group", effective_tokens, marginal_value FROM lake.main.weights WHERE mixture = ?'
    found = {group: row for group, *row in sites.lake.rows(query, ["main"])}
    assert found["small.org"] == pytest.approx([50 * 3.72567, 0.82287], rel=1e-5)
    assert found["big.org"] == [200.0, 1.0]
    assert found["mid.org"] == [0.0, 1.0]
    assert record(sites, "main")["totals"]["effective_tokens"] == 386
    assert {tuple(row) for _, *row in sites.lake.rows(query, ["curve"])} == {(None, None)}
    assert {tuple(row) for _, *row in sites.lake.rows(query, ["w"])} == {(None, None)}
    assert record(sites, "curve")["totals"]["effective_tokens"] is None


def test_weight_on_a_group_that_is_not_there_names_it(sites):
    with pytest.raises(RecipeError, match=r"mixtures\.main: weights\.w gives weight to .* candidates: gone\.org; take"):
        sites.run(recipe(sites, method="given", share={"big.org": 1, "gone.org": 1, "never.org": 0}))


def test_groups_that_only_the_weights_saw_are_left_out_unless_it_is_all_of_them(sites):
    tables = recipe(sites, method="temperature", temperature=2, tokens="n_bytes")
    tables["mixtures"]["main"]["where"] = "domain <> 'small.org'"
    sites.run(tables)
    assert record(sites, "main")["groups_without_candidates"] == 1
    assert sum(book(sites, "main").values()) == pytest.approx(1.0, abs=1e-5)
    tables["weights"]["w"]["where"] = "domain = 'small.org'"
    with pytest.raises(RecipeError, match=r"weights\.w gives weight to groups without a document .*: small\.org"):
        sites.run(tables)


def test_no_tokens_no_weights(sites):
    with pytest.raises(RecipeError, match=r"weights\.w: no tokens among the candidates; look at its where"):
        sites.run(recipe(sites, method="natural", tokens="n_bytes", where="false"))


def test_weights_choose_as_a_mixture_does(sites):
    """One per cluster, cuts and holdout leave the same tokens that the mixture will find."""
    choice = {"tokens": "n_bytes", "one_per": "text", "best": {"doc_id ASC": 0.9}, "holdout": 0.1}
    tables = recipe(sites, method="natural", **choice)
    tables["mixtures"]["main"] |= choice
    run: Run = sites.run(tables).run
    rows = run.lake.rows('SELECT mixture, "group", documents, tokens, weight FROM lake.main.weights ORDER BY ALL')
    found = {name: [row[1:] for row in rows if row[0] == name] for name in ("w", "main")}
    assert found["w"] == found["main"]
    assert sum(tokens for _, _, tokens, _ in found["w"]) < 10 * 80
