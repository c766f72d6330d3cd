"""A run that is stopped at any commit, just before or just after it, is finished by the next one: the same lake."""

from pathlib import Path
from typing import Any

import pytest
from conftest import Job

from storage.lake import Lake

TEXTS = ["the first page", "the second page", "the first page", "a third one", "THE FIRST PAGE", "and the last"]


def recipe(job: Job) -> dict[str, Any]:
    n = {"scorer": "planted:Planted", "field": "n", "good": "high"}
    scores = {"n": n, "dear": n | {"where": "n.value > 1"}, "same": {"scorer": "duplicates"}}
    weights = {"flat": {"method": "temperature", "temperature": 2, "tokens": "n_bytes", "group_by": "source"}}
    main = {"tokens": "n_bytes", "group_by": "source", "where": "n.value >= 0", "one_per": "same.cluster"}
    main |= {"prefer": "dear.value", "weights": "flat", "budget_tokens": 100, "max_epochs": 3}
    exports = {"train": {"mixture": "main"}}
    return job.recipe(scores=scores, weights=weights, mixtures={"main": main}, exports=exports)


def prepare(folder: Path) -> Job:
    job = Job(folder)
    for number, text in enumerate(TEXTS):
        job.write(f"pool/{number % 3}.jsonl", [{"text": text, "n": number}, {"text": ""}, {"text": text * 2, "n": -1}])
    return job


def contents(job: Job) -> dict[str, Any]:
    """Everything that a reader can see, but for times and random names."""
    tables = {"corpus": "SELECT * FROM corpus ORDER BY doc_id", "rejects": "SELECT * FROM rejects ORDER BY doc_id"}
    tables |= {
        "explain": "SELECT * FROM explain('main') ORDER BY doc_id",
        "weights": "SELECT * FROM weights ORDER BY ALL",
    }
    tables |= {"files": "SELECT number, source, size, first, active FROM files ORDER BY 1"}
    tables |= {"ledger": "SELECT * FROM ledger ORDER BY ALL", "seen": "SELECT * FROM seen ORDER BY ALL"}
    tables |= {"shards": 'SELECT "table", shard, rows, sha256, input FROM shards ORDER BY ALL'}
    found: dict[str, Any] = {name: job.ask(query) for name, query in tables.items()}
    [(mixture,)] = job.lake.rows('SELECT "table" FROM lake.main.mixtures WHERE "table" <> \'\'')
    found["mixture"] = job.lake.rows(f"SELECT * FROM lake.main.{mixture} ORDER BY doc_id")
    export = job.folder / "lake/exports/test/train"
    found["export"] = {file.name: file.read_bytes() for file in export.iterdir() if file.name != "manifest.json"}
    found["beside"] = sorted(entry.name for entry in export.parent.iterdir())
    found["scratch"] = sorted(entry.name for entry in (job.lake.folder / "scratch").iterdir())
    return found


class Stopped(BaseException):
    """As a signal would."""


@pytest.fixture(autouse=True)
def _a_shard_for_each_file(monkeypatch):
    monkeypatch.setattr("pipelines.ingest.GROUP_BYTES", 1)
    monkeypatch.setattr("pipelines.run.COMMIT_SECONDS", 0.0)  # each shard by itself


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run leaves, and the number of its commits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.ingest.GROUP_BYTES", 1)
        patch.setattr("pipelines.run.COMMIT_SECONDS", 0.0)
        commits = []
        commit = Lake.commit
        job = prepare(tmp_path_factory.mktemp("whole"))
        patch.setattr(Lake, "commit", lambda lake, change: (commits.append(0), commit(lake, change))[1])
        job.run(recipe(job))
        yield contents(job), len(commits)
        job.lake.close()


@pytest.mark.parametrize(("when", "part"), [("after", 0.3), ("before", 0.8)])
def test_a_run_that_was_stopped_is_finished_by_the_next(tmp_path, monkeypatch, whole, when, part):
    expected, commits = whole
    job = prepare(tmp_path)
    left = [round(part * commits)]
    commit = Lake.commit

    def stopping(lake, change):
        left[0] -= 1
        if left[0] == 0 and when == "before":
            raise Stopped
        result = commit(lake, change)
        if left[0] == 0:
            raise Stopped
        return result

    monkeypatch.setattr(Lake, "commit", stopping)
    with pytest.raises(Stopped):
        job.run(recipe(job))
    monkeypatch.setattr(Lake, "commit", commit)
    job.lake.close()
    job.run(recipe(job))
    found = contents(job)
    for name in expected:
        assert found[name] == expected[name], name
    job.lake.close()
