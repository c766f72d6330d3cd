"""Models of a recipe: what they wait for, what they learn from, when they are trained, and what reads them."""

import copy
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.check import trial
from pipelines.execute import Serial
from pipelines.graph import Graph
from pipelines.recipe import Recipe
from pipelines.run import Run, perform, recorded, steps
from pipelines.texts import write_texts
from storage.errors import RecipeError

WORDS = [f"{a}{b}{c}" for a in ("b", "d", "k") for b in ("a", "e", "o") for c in ("l", "n", "r", "s")]
PRIOR: dict[str, Any] = {"size": "1m", "vocabulary": 300, "context": 32, "tokens": 2048, "holdout": 0.2}


def text(start: int, step: int) -> str:
    return " ".join(WORDS[(start + step * i) % len(WORDS)] for i in range(40))


def recipe(job, **more: Any) -> dict[str, Any]:
    """CoLoR-Filter whole: a prior on the lake, a conditional on target texts, two losses, their difference."""
    loss = {"scorer": "language_model", "measures": ["nats_per_token", "n_tokens"]}
    tables: dict[str, Any] = {
        "models": {
            "prior": {**PRIOR, "query": "SELECT text FROM corpus WHERE n.value >= 0"},
            "conditional": {"base": "models.prior", "targets": "targets.jsonl", "answers_only": True, "holdout": 0},
        },
        "scores": {
            "n": {"scorer": "planted:Planted", "field": "n"},
            "marginal": {**loss, "model": "models.prior"},
            "targeted": {**loss, "model": "models.conditional"},
            "tokens": {"scorer": "tokens", "tokenizer": "models.prior"},
            "color": {
                "scorer": "color_filter",
                "inputs": {"prior": "marginal.nats_per_token", "conditional": "targeted.nats_per_token"},
            },
        },
        "mixtures": {"best": {"tokens": "tokens.n", "where": "color.score > -100"}},
    }
    return job.recipe(**tables | more)


def targets(job) -> None:
    job.write("targets.jsonl", [{"question": text(i, 2)[:40], "answer": text(i, 2)[40:80]} for i in range(12)])


@pytest.fixture
def full(job):
    rows = [{"text": text(i, 1 + i % 3), "n": float(i), "url": f"https://{'ab'[i % 2]}.org/{i}"} for i in range(24)]
    job.write("pool/a.jsonl", rows)
    targets(job)
    job.executor = Serial(threads=1)  # matrices this small only wait for a second thread
    return job


def graph(job, **changes: Any) -> Graph:
    data = copy.deepcopy(recipe(job))
    for path, value in changes.items():
        *folders, last = path.split("__")
        place = data
        for folder in folders:
            place = place[folder]
        place[last] = value
    return job.graph(data)


def names(job, **changes: Any) -> dict[str, str]:
    found = graph(job, **changes)
    return {name: learner.model for name, learner in found.learners.items()} | {
        name: entry.table for name, entry in found.entries.items()
    }


def test_all_comes_after_what_it_reads(full):
    order = list(graph(full).order)
    for one, other in [
        ("n", "prior"), ("prior", "conditional"), ("conditional", "targeted"), ("targeted", "color"),
        ("prior", "marginal"), ("prior", "tokens"), ("color", "best"),
    ]:  # fmt: skip
        assert order.index(one) < order.index(other)


def test_a_model_may_learn_from_a_mixture_that_another_follows(full):
    changed = graph(
        full,
        models__prior={**PRIOR, "mixture": "first"},
        mixtures={"first": {"tokens": "n_bytes"}, "best": {"tokens": "tokens.n", "where": "color.score > 0"}},
    )
    order = list(changed.order)
    assert order.index("first") < order.index("prior") < order.index("color") < order.index("best")


AFTER_PRIOR = {"prior", "conditional", "marginal", "targeted", "tokens", "color"}
CHANGES: list[tuple[dict[str, Any], set[str]]] = [
    ({"models__prior__context": 16}, AFTER_PRIOR),
    ({"models__prior__query": "SELECT text FROM documents"}, AFTER_PRIOR),
    ({"models__conditional__epochs": 2}, {"conditional", "targeted", "color"}),
    ({"scores__n__field": "m"}, {"n"} | AFTER_PRIOR),
    ({"scores__n__where": "n_bytes > 9"}, AFTER_PRIOR),
    ({"seed": 8}, AFTER_PRIOR),
    ({"name": "other"}, set()),
    ({"mixtures__best__where": "color.score > 1"}, set()),
]


@pytest.mark.parametrize(("changes", "other"), CHANGES)
def test_what_gives_another_model(full, changes, other):
    before, after = names(full), names(full, **changes)
    assert {name for name in before if before[name] != after[name]} == other


def test_another_text_of_the_targets_gives_another_conditional(full):
    before = names(full)
    full.write("targets.jsonl", [{"text": "another"}])
    after = names(full)
    assert {name for name in before if before[name] != after[name]} == {"conditional", "targeted", "color"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"scores__marginal__model": "models.priro"},
            "scores.marginal.model: no entry [models.priro]; did you mean 'prior'?",
        ),
        ({"models__conditional__base": "models.x"}, "models.conditional.base: no entry [models.x]"),
        ({"models__prior__query": None}, "models.prior: name one of query, mixture and targets, not 0 of them"),
        ({"models__prior__mixture": "best"}, "models.prior: name one of query, mixture and targets, not 2 of them"),
        ({"models__prior__query": "SELECT text FROM weights"}, "models.prior.query: no table 'weights'"),
        ({"models__prior__query": "COPY documents TO 'x'"}, "models.prior.query: COPY is not a query"),
        (
            {"models__prior__query": "SELECT text FROM corpus WHERE color.score > 0"},
            "models: these wait for each other",
        ),
        (
            {"models__prior__query": "SELECT text FROM corpus WHERE COLOR.Score > 0"},
            "models: these wait for each other",
        ),
        ({"models__prior__query": "SELECT txt FROM corpus"}, 'Referenced column "txt"'),
        ({"models__prior__query": "SELECT text, color.* FROM corpus"}, "models: these wait for each other"),
        (
            {"models__prior__query": "SELECT text FROM mixture('bset')"},
            "models.prior.query: no mixture 'bset'; did you mean 'best'?",
        ),
        ({"models__prior__query": "SELECT text FROM corpus WHERE n.vale > 0"}, "models.prior.query: Binder Error"),
        ({"models__prior__query": "SELECT text FROM corpus WHERE n.value > [1]"}, "models.prior.query: Binder Error"),
        ({"models__prior__query": "SELECT url FROM n JOIN documents USING (doc_id);"}, "gives no column text"),
        ({"models__conditional__targets": "none.jsonl"}, "models.conditional.targets: no file"),
        ({"models__prior__size": "3m"}, "models.prior.size"),
        ({"models__prior__rate": 1}, "models.prior.rate: no such key"),
    ],
)
def test_problems_are_told_before_any_work(full, changes, problem):
    with pytest.raises(RecipeError) as error:
        graph(full, **changes)
    assert any(problem in line for line in error.value.problems), error.value.problems


@pytest.mark.parametrize(
    "query",
    [
        "SELECT text FROM documents WHERE text_hash IS NOT NULL -- all of them",
        "WITH high AS (SELECT doc_id FROM N WHERE value > 3) SELECT text FROM Corpus JOIN high USING (doc_id);",
        "SELECT url AS prompt, text FROM mixture('first'), range(copies) WHERE \"group\" = 'a' ORDER BY doc_id LIMIT 9",
        "SELECT first(corpus.text) AS text FROM corpus GROUP BY n.value",
        # `tokens` and `color` are entries that read the model; here they are a column of mixtures, and a text.
        "SELECT text FROM mixture('first') WHERE tokens > 1",
        "SELECT text FROM corpus WHERE source <> 'color'",
    ],
)
def test_queries_that_give_texts_are_good_before_there_is_a_lake(full, query):
    mixtures = {"first": {"tokens": "n_bytes"}, "best": {"tokens": "tokens.n", "where": "color.score > 0"}}
    graph(full, models__prior__query=query, mixtures=mixtures)


def test_a_run_trains_scores_and_chooses_and_the_next_reuses_all(full):
    counts = full.run(recipe(full)).counts
    assert counts["prior"]["tokens"] == 2048
    assert counts["prior"]["documents"] < 24, "some are held out"
    rows = full.ask("SELECT name, model, path FROM models ORDER BY name")
    assert [(name, model.partition("__")[0]) for name, model, _ in rows] == [("conditional",) * 2, ("prior",) * 2]
    for _, _, path in rows:
        files = {file.name for file in (full.lake.folder / path).iterdir()}
        assert files >= {"config.json", "model.safetensors", "tokenizer.json", "training.json"}
    assert not list((full.lake.folder / "models").glob(".*")), "working folders are gone"
    query = (
        "SELECT count(*), max(abs(color.score - (marginal.nats_per_token - targeted.nats_per_token))), "
        "count(DISTINCT marginal.nats_per_token), min(tokens.n - marginal.n_tokens), max(tokens.n - marginal.n_tokens) "
        "FROM corpus"
    )
    count, difference, distinct, fewest, most = full.ask(query)[0]
    assert (count, fewest, most) == (24, 0, 0), "with its BOS the model predicts every token that is counted"
    assert difference < 1e-5
    assert distinct > 12
    again = full.run(recipe(full)).counts
    assert again["prior"]["reused"]
    assert again["conditional"]["reused"]
    assert again["marginal"]["computed"] == again["targeted"]["computed"] == 0


def test_the_same_recipe_elsewhere_gives_the_same_model(full):
    full.run(recipe(full), ("ingest", "score", "train"))
    other = full.elsewhere("other")
    other.run(recipe(full), ("ingest", "score", "train"))
    digests = "SELECT model, input, digest FROM models ORDER BY model"
    assert full.ask(digests) == other.ask(digests)
    other.lake.close()


def test_a_trained_model_stays_until_it_is_asked_for_anew(full):
    full.run(recipe(full))
    full.write("pool/b.jsonl", [{"text": text(50 + i, 2), "n": 1.0} for i in range(8)])
    grown = full.run(recipe(full))
    assert grown.counts["prior"] == {**grown.counts["prior"], "reused": True, "older": True}
    assert grown.counts["marginal"]["computed"] == 8
    run = Run(full.lake, full.graph(recipe(full)), full.executor, anew=True)
    with recorded(run) as record:
        for step in steps(run.graph, ("train",)):
            record.note(step.name, *perform(run, step))
    assert "reused" not in record.counts["prior"]
    assert "reused" not in record.counts["conditional"]
    assert full.run(recipe(full)).counts["marginal"]["computed"] == 32


def test_a_run_that_was_killed_before_its_commit_finds_the_model(full, monkeypatch):
    full.run(recipe(full), ("ingest",))
    run = Run(full.lake, full.graph(recipe(full)), full.executor)
    [prior] = [step for step in steps(run.graph, ("train",)) if step.name == "prior"]
    [n] = [step for step in steps(run.graph, ("score",)) if step.name == "n"]
    perform(run, n)

    def killed(change):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(full.lake, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            perform(run, prior)
    [out] = [path for path in (full.lake.folder / "models").iterdir() if not path.name.startswith(".")]
    before = (out / "training.json").read_text()
    perform(run, prior)
    assert (out / "training.json").read_text() == before


def test_texts_hang_on_their_content_alone(full, tmp_path):
    rows = [{"text": text(i % 9, 1), "n": 0.0} for i in range(30)]
    orders = []
    for name, parts in (("one", [rows]), ("two", [rows[20:], rows[:20]])):
        shutil.rmtree(full.folder / "pool")
        for number, part in enumerate(parts):
            full.write(f"pool/{number}.jsonl", part)
        job = full.elsewhere(name)
        run = job.run(recipe(full), ("ingest",)).run
        perform(run, next(step for step in steps(run.graph, ("score",)) if step.name == "n"))
        path = tmp_path / f"{name}.parquet"
        run.refresh()
        write_texts(run, run.graph.learners["prior"], path)
        orders.append(pq.read_table(path).to_pylist())
        job.lake.close()
    assert orders[0] == orders[1]
    texts = [row["text"] for row in orders[0]]
    assert sorted(texts) == sorted(row["text"] for row in rows)
    assert len({(row["text"], row["heldout"]) for row in orders[0]}) == 9, "copies are held out together"
    assert any(one != other for one, other in pairwise(texts)), "and are spread"


def test_a_mixture_is_learned_as_often_as_it_takes(full, tmp_path):
    changed = recipe(
        full,
        models={"prior": {**PRIOR, "mixture": "main"}},
        scores={"n": {"scorer": "planted:Planted", "field": "n"}},
        mixtures={"main": {"tokens": "n_bytes", "copies": "floor(n.value / 10)"}},
    )
    run = full.run(changed, ("ingest", "score", "mix")).run
    write_texts(run, run.graph.learners["prior"], tmp_path / "texts.parquet")
    assert pq.read_table(tmp_path / "texts.parquet").num_rows == 10 * 1 + 4 * 2


@pytest.mark.parametrize(
    ("models", "problem"),
    [
        ({"prior": {**PRIOR, "query": "SELECT text FROM documents WHERE source = ''"}}, "there is nothing to learn"),
        ({"prior": {**PRIOR, "targets": "bad.jsonl"}}, "models.prior.targets: "),
        ({"prior": {**PRIOR, "targets": "other.jsonl"}}, "1 lines have none of text, completion and answer"),
    ],
)
def test_what_cannot_be_learned_is_told(full, models, problem):
    full.write("bad.jsonl", ["a", "b"])
    (full.folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    full.write("other.jsonl", [{"text": "a"}, {"body": "b"}])
    with pytest.raises(RecipeError, match=problem):
        full.run(full.recipe(models=models), ("ingest", "train"))


def test_a_score_of_a_model_that_is_not_there_names_the_command(full):
    with pytest.raises(RecipeError, match=r"models\.prior is not trained yet; run: corpusmill train RECIPE prior"):
        full.run(recipe(full), ("ingest", "score"))


def test_questions_and_their_answers_are_joined_by_one_space(full, tmp_path):
    full.write(
        "targets.jsonl", [{"question": "Who?", "answer": "I"}, {"prompt": "Q: ", "completion": "A"}, {"text": "T"}]
    )
    run = full.run(recipe(full), ("ingest",)).run
    write_texts(run, run.graph.learners["conditional"], tmp_path / "texts.parquet")
    rows = pq.read_table(tmp_path / "texts.parquet").to_pylist()
    assert sorted((row["prompt"] or "", row["text"]) for row in rows) == [("", "T"), ("Q: ", "A"), ("Who?", " I")]


def test_a_model_in_json_is_what_it_was_in_toml(full):
    graph_ = graph(full)
    again = Graph(Recipe.of(json.loads(graph_.recipe.model_dump_json())))
    assert {n: x.model for n, x in again.learners.items()} == {n: x.model for n, x in graph_.learners.items()}
    assert Path(again.learners["conditional"].definition.targets or "").is_absolute()


def test_a_sample_leaves_out_models_and_what_reads_them(full):
    lines = list(trial(graph(full), 1.0, full.executor))
    [left] = [line for line in lines if line.startswith("not tried")]
    assert set(left.partition(": ")[2].split(", ")) == AFTER_PRIOR | {"best"}
    assert any(line.split()[0] == "n" for line in lines)
