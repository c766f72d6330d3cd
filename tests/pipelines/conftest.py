"""The main job on small inputs with its real parts: a lake in a temporary folder, JSONL files, the serial executor."""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipelines.execute import Executor, Serial
from pipelines.graph import Graph
from pipelines.recipe import Recipe
from pipelines.run import STAGES, Run, perform, recorded, steps
from storage.lake import Lake


@dataclass
class Done:
    """A run that ended, and what each of its steps counted."""

    run: Run
    counts: Mapping[str, Any]


@dataclass
class Job:
    """A folder with sources and a lake. Recipes are mappings as TOML would give; paths count from the folder."""

    folder: Path
    name: str = "lake"
    executor: Executor = field(default_factory=Serial)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lake = Lake.create(self.folder / self.name)
        self.lake.rows("SET threads = 1")  # hundreds of queries of a few rows each: a second thread only costs

    def elsewhere(self, name: str) -> "Job":
        """The same sources with another lake."""
        return Job(self.folder, name, self.executor)

    def write(self, path: str, records: Iterable[Mapping[str, Any] | str]) -> None:
        """A JSONL file; a text stands for the record {"text": it}."""
        rows = [{"text": record} if isinstance(record, str) else record for record in records]
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(gzip.compress(data) if path.endswith(".gz") else data)

    def recipe(self, **tables: Any) -> dict[str, Any]:
        """A recipe named "test" over the source "pool", pool/*.jsonl; `tables` add to it or replace."""
        pool = {"name": "pool", "format": "jsonl", "path": "pool/*.jsonl"}
        return {"name": "test", "seed": 7, "sources": [pool]} | tables

    def graph(self, recipe: Mapping[str, Any]) -> Graph:
        return Graph(Recipe.of(recipe, base=str(self.folder)))

    def run(self, recipe: Mapping[str, Any], stages: Sequence[str] = STAGES) -> Done:
        """Do those stages of the recipe, as `corpusmill run` does."""
        run = Run(self.lake, self.graph(recipe), self.executor)
        with recorded(run) as record:
            for step in steps(run.graph, stages):
                record.note(step.name, *perform(run, step))
        return Done(run, record.counts)

    def check(self) -> None:
        """Law of every lake: what SQL sees of a table are the rows of its shards, each id once."""
        shards = 'SELECT "table", sum(rows) FROM lake.main.shards GROUP BY 1 ORDER BY 1'
        for table, rows in self.lake.rows(shards):
            counted = self.lake.rows(f'SELECT count(*), count(DISTINCT doc_id) FROM lake.main."{table}"')
            assert counted == [(rows, rows)], table

    def ask(self, query: str, recipe: str = "test") -> list[tuple[Any, ...]]:
        """Rows of SQL over a recipe's names, on the lake's own connection: a query's own takes 0.1 s to attach."""
        self.lake.rows(f"USE lake.{recipe}")
        try:
            return self.lake.rows(query)
        finally:
            self.lake.rows("USE memory.main")


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    job.check()
    job.lake.close()
