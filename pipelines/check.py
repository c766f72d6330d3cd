"""What a run would do, what has been done, and what a sample says about the whole."""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pipelines.execute import Executor, Serial
from pipelines.graph import SCORED, Graph
from pipelines.ingest import missing
from pipelines.recipe import Recipe
from pipelines.run import STAGES, Run, perform, recorded, steps
from pipelines.score import todo
from storage.errors import RecipeError
from storage.lake import Lake
from storage.sources import FoundFile, list_files


def check_sources(graph: Graph) -> dict[str, list[FoundFile]]:
    """The files of each source. Raises RecipeError with every pattern that names none."""
    found: dict[str, list[FoundFile]] = {}
    problems: list[str] = []
    for source in graph.recipe.sources:
        try:
            found[source.name] = list_files(source)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(*problems)
    return found


def plan(graph: Graph, folder: Path | None) -> Iterator[str]:
    """One line per step, in order. Raises RecipeError where a source has no files."""
    sources = check_sources(graph)
    run = None
    if folder is not None and (folder / "lake.toml").exists():
        run = Run(Lake(folder), graph, Serial())
    try:
        yield f"recipe {graph.recipe.name}: " + ("no lake yet, all is to do" if run is None else f"lake {folder}")
        for name, files in sources.items():
            yield f"  source   {name:<20} {len(files):>8,} files  {sum(f.size for f in files) / 1e6:>12,.1f} MB"
        if run is not None:
            run.refresh()
            yield f"  ingest   {graph.documents:<30} {_ingested(run)}"
        for name in graph.order:
            yield from _planned(run, graph, name)
        for name, export in graph.recipe.exports.items():
            yield f"  export   {name:<30} {export.mixture} as {export.format}"
    finally:
        if run is not None:
            run.lake.close()


def _planned(run: Run | None, graph: Graph, name: str) -> Iterator[str]:
    if name in graph.learners:
        yield f"  model    {graph.learners[name].model:<30} {_trained(run, name)}"
    elif name in graph.recipe.weights:
        yield f"  weights  {name}"
    elif name in graph.recipe.mixtures:
        yield f"  mixture  {graph.mixture_table(name)}"
    elif (entry := graph.entries[name]).kind == "rules":
        yield f"  rules    {name:<30} a view over {entry.signals}"
    elif entry.kind in SCORED:
        yield f"  {entry.kind:<8} {entry.table:<30} {_scored(run, name)}" + _because(graph, name)


def _trained(run: Run | None, name: str) -> str:
    model = run.graph.learners[name].model if run else ""
    rows = run.lake.rows("SELECT made_at, record FROM lake.main.models WHERE model = ?", [model]) if run else []
    if not rows:
        return "to train"
    record = json.loads(rows[0][1])
    amount = f"{record['tokens']:,} tokens" if "tokens" in record else f"{record['documents']:,} texts"
    return f"trained {rows[0][0]:%Y-%m-%d %H:%M} on {amount}"


def _ingested(run: Run) -> str:
    documents, groups = run.documents(), missing(run.lake, run.graph)
    rows = sum(shard.rows for shard in documents.values())
    return f"{rows:,} documents in {len(documents)} shards there; {len(groups)} groups of known files to read"


def _scored(run: Run | None, name: str) -> str:
    if run is None:
        return "to compute"
    entry, documents = run.graph.entries[name], run.documents()
    if entry.kind == "reduce":
        old = run.lake.shards(entry.table).get("all")
        return "reused" if old is not None and old.input == run.states[name] else "to compute"
    try:
        left = todo(run, entry)
    except RecipeError:  # a table that it reads is not up to date yet
        return "to compute, when what it reads is there"
    rows = sum(item.rows for item in left)
    return f"{len(documents) - len(left)} shards reused, {len(left)} to do ({rows:,} documents)"


def _because(graph: Graph, name: str) -> str:
    where = graph.entries[name].where
    return f"  where {' '.join(where.sql.split())}" if where else ""


def standing(folder: Path, graph: Graph | None = None) -> Iterator[str]:
    """A recipe's tables with shards done and to do (the last one's where none is given), and the last runs."""
    lake = Lake(folder)
    try:
        if graph is None:
            last = lake.rows("SELECT resolved FROM lake.main.runs ORDER BY started DESC LIMIT 1")
            try:
                graph = Graph(Recipe.of(json.loads(last[0][0]))) if last else None
            except RecipeError as error:
                yield f"the last recipe cannot be read here ({error}); name it: status RECIPE --lake {folder}"
        if graph is not None:
            yield from _tables(Run(lake, graph, Serial()))
        query = (
            "SELECT run, recipe, state, started, ended - started, snapshot FROM lake.main.runs "
            "ORDER BY started DESC LIMIT 10"
        )
        runs = lake.rows(query)
        yield "runs" if runs else "nothing has run on this lake yet"
        for name, recipe, state, started, took, snapshot in runs:
            told = "killed, or still running" if state == "running" else f"{state}, snapshot {snapshot}, {took}"
            yield f"  {name}  {recipe:<16} {started:%Y-%m-%d %H:%M}  {told}"
    finally:
        lake.close()


def _tables(run: Run) -> Iterator[str]:
    graph, lake = run.graph, run.lake
    run.refresh()
    yield f"recipe {graph.recipe.name}"
    yield f"  {'documents':<24} {_ingested(run)}"
    for entry in graph.scored:
        yield f"  {entry.name:<24} {_scored(run, entry.name)}"
    for name in graph.learners:
        yield f"  {name:<24} {_trained(run, name)}"
    for name in graph.recipe.rules:
        yield f"  {name:<24} rules, a view over {graph.entries[name].signals}"
    query = "SELECT name, made_at FROM lake.main.mixtures WHERE recipe = ?"
    made = dict(lake.rows(query, [graph.recipe.name]))
    for name in (*graph.recipe.weights, *graph.recipe.mixtures):
        yield f"  {name:<24} " + (f"made {made[name]:%Y-%m-%d %H:%M}" if name in made else "to make")
    yield f"a query can name: {', '.join(lake.tables(graph.recipe.name))}; mixture('NAME'), explain('NAME')"


def trial(graph: Graph, fraction: float, executor: Executor) -> Iterator[str]:
    """Run the stages on a sample in a lake of its own; print rates, an estimate, and what rules would drop.

    A smaller sample is part of a larger one (pipelines.ingest.sampled). Models are not trained, since what they cost
    does not follow the sample; so they and what reads them are left out, and named.
    """
    with tempfile.TemporaryDirectory(prefix="corpusmill-") as folder:
        lake = Lake.create(folder)
        run = Run(lake, graph, executor, sample=fraction)
        total = sum(file.size for files in check_sources(graph).values() for file in files)
        spent: dict[str, float] = {}
        plan = [step for step in steps(graph, STAGES[:-1]) if not _needs_models(graph, step.name)]
        try:
            with recorded(run):
                for step in plan:
                    begun = time.monotonic()
                    perform(run, step)
                    spent[step.name] = time.monotonic() - begun
            (read,) = lake.rows("SELECT sum(size) FROM lake.main.files WHERE active")[0]
            documents = sum(shard.rows for shard in run.documents().values())
            factor = total / read
            yield f"sample: {documents:,} documents, 1/{factor:,.1f} of the input, so {documents * factor:,.0f} in all"
            for name, seconds in spent.items():
                whole = seconds * factor
                yield f"  {name:<28} {documents / seconds:>10,.0f} documents/s   {whole / 60:>10,.1f} min for all"
            yield f"  {'together':<28} {'':>22}   {sum(spent.values()) * factor / 60:>10,.1f} min, start-up included"
            if left := [name for name in graph.order if _needs_models(graph, name)]:
                yield f"not tried, for they need models that the recipe trains: {', '.join(left)}"
            for name in graph.recipe.rules:
                if name in left:
                    continue
                yield f"rules {name} would drop"
                dropped = lake.query(_DROPPED.format(rules=name), graph.recipe.name)
                for reason, count, share in zip(*dropped.to_pydict().values(), strict=True):
                    yield f"  {reason or '(kept)':<28} {count:>10,} documents   {share:>10.1%}"
        finally:
            lake.close()


def _needs_models(graph: Graph, name: str) -> bool:
    return not graph.learners.keys().isdisjoint(graph.upstream([name]))


_DROPPED = """
SELECT {rules}.reason AS reason, count(*) AS documents, count(*) / sum(count(*)) OVER () AS share
FROM corpus WHERE {rules}.computed GROUP BY 1 ORDER BY 2 DESC
"""
