"""The Prefect flow of a recipe: one task per entry of its graph, Ray inside each, never a task per shard."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

# Both would report home; and Prefect's own log lines would stand between ours: they go to its API alone.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")
# Torch's threads would spin while they wait for one another: on a machine that is shared that made training on two
# threads 3 to 16 times slower than it is when they sleep. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.watch import watcher
from pipelines.check import check_sources
from pipelines.execute import Executor, Serial
from pipelines.graph import Graph
from pipelines.ingest import missing
from pipelines.recipe import Recipe
from pipelines.run import STAGES, Record, Run, Step, perform, recorded, steps
from storage.errors import RecipeError, ShardError
from storage.lake import Lake
from storage.sql import nearest


@flow(name="corpusmill", flow_run_name="{recipe.name}", validate_parameters=False)
def curate(recipe: Recipe, lake: str, workers: int, catalog: str = "") -> dict[str, Any]:
    """Ingest, score, train, weigh, mix and export as the recipe says. Returns the counts of every step.

    Args:
        lake: the lake's folder; made where there is none.
        workers: Ray workers; 0 runs everything in this process.
        catalog: PostgreSQL URL for the catalog of a new lake; SQLite when empty.
    """
    if not isinstance(recipe, Recipe):  # from a deployment it comes as JSON
        recipe = Recipe.of(recipe)

    def as_task(run: Run, step: Step, record: Record) -> None:
        @task(
            name=step.name,
            tags=[step.kind],
            retries=2,
            retry_delay_seconds=5,
            retry_condition_fn=_may_pass,
            cache_policy=NO_CACHE,
        )
        def entry() -> dict[str, Any]:
            counts, seconds = perform(run, step)
            record.note(step.name, counts, seconds)
            return dict(counts)

        entry()

    with executor(workers) as workers_at_hand:
        return _all(Graph(recipe), Path(lake), workers_at_hand, as_task, catalog=catalog)


def work(
    graph: Graph,
    lake: Path,
    executor: Executor,
    *,
    stages: Sequence[str],
    entries: Sequence[str] = (),
    catalog: str = "",
) -> dict[str, Any]:
    """Some stages of a recipe, without Prefect. `entries` limits them to these and what they read."""

    def plainly(run: Run, step: Step, record: Record) -> None:
        record.note(step.name, *perform(run, step))

    return _all(graph, lake, executor, plainly, stages, entries, catalog)


def executor(workers: int) -> AbstractContextManager[Executor]:
    """Ray with that many workers; without any, this process, on its GPU where there is one."""
    if workers == 0:
        from scorers.device import best_device

        return nullcontext(Serial(best_device()))
    from flows.ray_executor import RayExecutor

    return RayExecutor(workers)


def _all(
    graph: Graph,
    folder: Path,
    executor: Executor,
    do: Any,
    stages: Sequence[str] = STAGES,
    entries: Sequence[str] = (),
    catalog: str = "",
) -> dict[str, Any]:
    plan = steps(graph, stages)
    unknown = set(entries) - {step.name for step in plan}
    if unknown:
        names = [step.name for step in plan]
        raise RecipeError(*(f"no entry {name!r}{nearest(name, names)}; there are {names}" for name in sorted(unknown)))
    if entries:
        needed = graph.upstream(entries)
        plan = [step for step in plan if step.name in needed]
    if "ingest" in stages:
        check_sources(graph)
    lake = Lake.create(folder, catalog) if "ingest" in stages else Lake(folder)
    if "ingest" not in stages and (left := missing(lake, graph)):
        raise RecipeError(
            f"{len(left)} groups of files are not ingested yet; run: corpusmill ingest RECIPE --lake {folder}"
        )
    watch = watcher()
    run = Run(lake, graph, executor, watch, anew=tuple(stages) == ("train",))
    try:
        with recorded(run) as record:
            for step in plan:
                do(run, step, record)
        return record.counts
    finally:
        watch.stop()
        lake.close()


def _may_pass(task: Any, task_run: Any, state: Any) -> bool:
    """Prefect's question whether to retry: only what may pass."""
    return isinstance(state.result(raise_on_failure=False), (ShardError, OSError))
