"""The main job through its front door: one command, killed, resumed, with any number of workers, gives one lake."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest

from flows.curate import work
from flows.ray_executor import RayExecutor
from pipelines.execute import Serial
from pipelines.graph import Graph
from pipelines.recipe import Recipe
from storage.lake import Lake

RECIPE = """
name = "small"
seed = 5

[ingest]
shard_bytes = 60_000

[[sources]]
name = "notes"
format = "jsonl"
path = "notes-*.jsonl"

[[sources]]
name = "pages"
format = "warc"
path = "pages.warc.gz"

[scores.gopher]
scorer = "gopher"

[rules.quality]
rules = "gopher"
min_words = 20
min_stop_words = 1

[scores.duplicates]
scorer = "duplicates"
where = "n_bytes < 100000"

[weights.flat]
method = "temperature"
temperature = 2.0
tokens = "gopher.n_words"

[mixtures.main]
tokens = "gopher.n_words"
budget_tokens = 20_000
weights = "flat"
max_epochs = 2
where = "quality.keep"
one_per = "duplicates.cluster"
holdout = 0.05

[exports.train]
mixture = "main"
"""
WORDS = [
    "the",
    "river",
    "and",
    "the",
    "mill",
    "of",
    "that",
    "town",
    "have",
    "to",
    "be",
    "with",
    "us",
    "when",
    "rain",
    "falls",
    "on",
    "stone",
    "walls",
    "near",
    "green",
    "fields",
]


# warcio leaves its temporary files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    from warcio.warcwriter import WARCWriter

    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(10, 200))) + "." for _ in range(600)]
    texts[300:340] = texts[:40]  # exact copies
    for part in range(3):
        lines = [
            orjson.dumps({"text": text, "url": f"https://site{number % 7}.example.org/{number}"})
            for number, text in enumerate(texts[part * 200 : part * 200 + 200])
        ]
        (folder / f"notes-{part}.jsonl").write_bytes(b"\n".join([*lines, b"{broken"]) + b"\n")
    with open(folder / "pages.warc.gz", "wb") as file:
        writer = WARCWriter(file, gzip=True)
        for number in range(20):
            body = f"<html><body><main><p>{' '.join(rng.choices(WORDS, k=150))}.</p></main></body></html>".encode()
            writer.write_record(_response(writer, number, body))
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


def _response(writer, number: int, body: bytes):
    from io import BytesIO

    from warcio.statusandheaders import StatusAndHeaders

    headers = StatusAndHeaders("200 OK", [("Content-Type", "text/html; charset=utf-8")], protocol="HTTP/1.1")
    return writer.create_warc_record(
        f"https://pages.example.com/{number}", "response", payload=BytesIO(body), http_headers=headers
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> dict[str, str]:
    """An empty home: nothing of this machine's Prefect, caches or settings."""
    folder = tmp_path_factory.mktemp("home")
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    return kept | {"HOME": str(folder), "PREFECT_HOME": str(folder / "prefect")}


def corpusmill(home: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", *map(str, words)]
    return subprocess.run(command, env=home, capture_output=True, text=True, timeout=240)


def contents(folder: Path) -> dict[str, object]:
    """All that a lake says, but for times and file names."""
    lake = Lake(folder)
    queries = {
        "documents": "FROM documents",
        "rejects": "FROM rejects",
        "gopher": "FROM gopher",
        "signatures": "FROM duplicates_signatures",
        "clusters": "FROM duplicates",
        "explain": "FROM explain('main')",
        "weights": "FROM weights",
        "shards": 'SELECT "table", shard, rows, sha256, input FROM shards',
        "ledger": "FROM ledger",
    }
    rows = {name: sorted(map(str, lake.query(query).to_pylist())) for name, query in queries.items()}
    manifest = json.loads((folder / "exports" / "small" / "train" / "manifest.json").read_text())
    assert all(rows.values())
    return rows | {"export": [file["sha256"] for file in manifest["files"]], "totals": manifest["totals"]}


@pytest.fixture(scope="module")
def whole(corpus, home, tmp_path_factory) -> Path:
    """The lake of an uninterrupted run, through Prefect and Ray."""
    lake = tmp_path_factory.mktemp("whole") / "lake"
    done = corpusmill(home, "run", corpus / "recipe.toml", "--lake", lake, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return lake


def test_the_books_balance_after_a_run(whole):
    answer = Lake(whole).query(
        "SELECT sum(records) = sum(documents + rejects) AS balanced, sum(records) AS n FROM ledger"
    )
    assert answer.to_pylist() == [{"balanced": True, "n": 623}]
    assert Lake(whole).query("SELECT reason, count(*) AS n FROM rejects GROUP BY 1").to_pylist() == [
        {"reason": "not_json", "n": 3}
    ]


def test_a_second_run_computes_nothing_and_changes_nothing(corpus, home, whole):
    before = contents(whole)
    done = corpusmill(home, "run", corpus / "recipe.toml", "--lake", whole, "--workers", 0)
    assert done.returncode == 0, done.stderr
    assert contents(whole) == before
    counts = json.loads(Lake(whole).query("SELECT counts FROM runs ORDER BY started DESC LIMIT 1").column(0)[0].as_py())
    assert counts["gopher"]["computed"] == 0
    assert counts["main"]["reused"]
    assert counts["train"]["reused"]


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_any_number_of_workers_gives_the_same_lake(corpus, whole, tmp_path, workers):
    graph = Graph(Recipe.load(corpus / "recipe.toml"))
    stages = ("ingest", "score", "weigh", "mix", "export")
    if workers:
        with RayExecutor(workers) as executor:
            work(graph, tmp_path / "lake", executor, stages=stages)
    else:
        work(graph, tmp_path / "lake", Serial(), stages=stages)
    assert contents(tmp_path / "lake") == contents(whole)


def test_a_killed_run_goes_on_where_it_was(corpus, home, whole, tmp_path):
    command = [sys.executable, "-m", "flows.cli", "run", corpus / "recipe.toml", "--lake", tmp_path / "lake"]
    rng = random.Random(2)
    for _ in range(4):
        process = subprocess.Popen([*map(str, command), "--workers", "0"], env=home, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(5.0, 13.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = corpusmill(home, *command[3:], "--workers", 0)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "lake") == contents(whole)


def test_the_verbs_one_by_one_give_the_same_lake(corpus, home, whole, tmp_path):
    for verb in ("ingest", "score", "weigh", "mix", "export"):
        done = corpusmill(home, verb, corpus / "recipe.toml", "--lake", tmp_path / "lake", "--workers", 0)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "lake") == contents(whole)


def test_query_prints_tables_csv_and_json(home, whole):
    ask = ("query", "SELECT source, count(*) AS n FROM documents GROUP BY 1 ORDER BY 1", "--lake", whole, "--format")
    assert corpusmill(home, *ask, "csv").stdout == "source,n\nnotes,600\npages,20\n"
    lines = corpusmill(home, *ask, "json").stdout.splitlines()
    assert [json.loads(line) for line in lines] == [{"source": "notes", "n": 600}, {"source": "pages", "n": 20}]
    assert "notes" in corpusmill(home, *ask, "table").stdout


def test_status_and_check_tell_what_is_done(corpus, home, whole):
    assert "0 to do" in corpusmill(home, "status", "--lake", whole).stdout
    plan = corpusmill(home, "check", corpus / "recipe.toml", "--lake", whole).stdout
    assert "0 to do" in plan
    fresh = corpusmill(home, "check", corpus / "recipe.toml").stdout
    assert "no lake yet" in fresh


def test_a_sample_tells_rates_and_drops(corpus, home):
    trial = corpusmill(home, "check", corpus / "recipe.toml", "--sample", "0.2")
    assert trial.returncode == 0, trial.stderr
    assert "documents/s" in trial.stdout
    assert "rules quality would drop" in trial.stdout


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("max_epochs", "max_epoch"), "mixtures.main.max_epoch: no such key; did you mean 'max_epochs'?"),
        (("gopher.n_words", "gopher.words"), "'gopher' has no column 'words'; did you mean 'n_words'?"),
        (("notes-*.jsonl", "absent-*.jsonl"), "absent-*.jsonl"),
        (("min_words", "min_word"), "no such threshold; did you mean 'min_words'?"),
        (('scorer = "gopher"', 'scorer = "gofer"'), "no scorer 'gofer'; did you mean 'gopher'?"),
    ],
)
def test_a_wrong_recipe_is_told_before_any_work(corpus, home, tmp_path, change, told):
    recipe = corpus / f"{abs(hash(told))}.toml"
    recipe.write_text(RECIPE.replace(*change))
    done = corpusmill(home, "run", recipe, "--lake", tmp_path / "lake", "--workers", 0)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "lake").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("query", "SELECT 1", "--lake", "/nowhere"),
        ("status", "--lake", "/nowhere"),
        ("check", "/nowhere.toml"),
        ("mix", "/nowhere.toml", "--lake", "/nowhere"),
        ("query", "SELECT 1"),
        ("run", "a", "b", "c"),
    ],
)
def test_user_errors_exit_2_without_a_traceback(home, words):
    done = corpusmill(home, *words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_table_that_another_run_writes_is_left_alone(corpus, home, whole):
    lake = Lake(whole)
    graph = Graph(Recipe.load(corpus / "recipe.toml"))
    with lake.locked(graph.entries["gopher"].table, "run 7 of recipe 'other'"):
        done = corpusmill(home, "score", corpus / "recipe.toml", "gopher", "--lake", whole, "--workers", 0)
    assert done.returncode == 2
    assert "is being written by run 7 of recipe 'other' (pid" in done.stderr


def test_the_recipe_that_a_run_keeps_repeats_it(corpus, home, whole, tmp_path):
    kept = Lake(whole).query("SELECT resolved FROM runs WHERE state = 'done' ORDER BY started LIMIT 1").column(0)[0]
    (tmp_path / "kept.json").write_text(kept.as_py())
    plan = corpusmill(home, "check", tmp_path / "kept.json", "--lake", whole)
    assert plan.returncode == 0, plan.stderr
    assert " to compute" not in plan.stdout
    assert "0 to do" in plan.stdout
