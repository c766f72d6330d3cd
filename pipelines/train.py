"""Train: the language models of a recipe, from what its lake or a file of target texts holds.

    texts     once: the query's rows in a seeded order, some held out, as one Parquet file of the working folder
    train     on the executor's gang (every GPU, else this machine's CPUs): scorers.lm.train, from its last checkpoint
    keep      the folder and its record in the book `models`

A model is trained once and then stays, also when the lake grows: a prior that changed with every crawl would change
every score that was read off it. `corpusmill train` is how to ask for a new one.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pyarrow.parquet as pq

from pipelines.execute import Resources
from pipelines.frames import paths_of
from pipelines.graph import Learner
from pipelines.mix import current, made_from
from pipelines.recipe import Model
from pipelines.run import Counts, Run, wanted
from pipelines.views import macros, views
from scorers.base import digest
from storage.catalog import quote
from storage.errors import QueryError, RecipeError
from storage.lake import LakeSpace, to_json

# A row of equal content is a copy: copies are spread over the whole, and held out together.
TEXTS = """
SELECT
    prompt,
    text,
    (md5_number_upper(content || ':holdout:' || {seed}) >> 11) / 9007199254740992.0 < {holdout} AS heldout
FROM (
    SELECT *, md5(coalesce(prompt, '') || chr(31) || text) AS content, row_number() OVER (PARTITION BY content) AS copy
    FROM (SELECT {prompt} AS prompt, CAST(text AS VARCHAR) AS text FROM asked)
    WHERE text <> ''
)
ORDER BY md5(content || ':' || copy || ':' || {seed}), content
"""
TARGETS = """
SELECT coalesce(prompt, question) AS prompt,
    coalesce(text, completion, CASE WHEN question SIMILAR TO '(?s).*\\s' THEN answer ELSE ' ' || answer END) AS text
FROM read_json({path}, format = 'newline_delimited', columns = {{
    text: 'VARCHAR', prompt: 'VARCHAR', completion: 'VARCHAR', question: 'VARCHAR', answer: 'VARCHAR'}})
"""


def train(run: Run, name: str) -> Counts:
    """Train one [models.x] entry, unless it is there."""
    lake, learner = run.lake, run.graph.learners[name]
    with lake.locked(learner.model, run.who):
        rows = lake.rows("SELECT input, record FROM lake.main.models WHERE model = ?", [learner.model])
        made = _made_from(run, learner)
        if rows and (rows[0][0] == made or not run.anew):
            return {**_told(json.loads(rows[0][1])), "reused": True} | ({} if rows[0][0] == made else {"older": True})
        model = run.located(learner.definition)
        out = lake.folder / "models" / f"{learner.model}-{made[:8]}"
        work = out.with_name(f".{out.name}")
        for old in out.parent.glob(f".{learner.model}-*"):
            if old != work:
                shutil.rmtree(old)
        if not out.exists():
            work.mkdir(parents=True, exist_ok=True)
            seed = run.graph.recipe.seed if model.seed is None else model.seed
            texts = work / "texts.parquet"
            if not texts.exists():
                _write_texts(run, learner, seed, texts)
            # By itself, since the members of a gang that wait for tokens would give up after minutes.
            run.executor.gang(partial(tokenize, model, str(texts), str(work)), gpu=False)
            with _watched(run, name, work / "log.jsonl"):
                run.executor.gang(partial(fit, model, str(texts), str(work), str(out), seed))
        record = json.loads((out / "training.json").read_text())
        weights = [digest(str(file)) for file in [*sorted(out.glob("*.safetensors")), out / "tokenizer.json"]]
        state = hashlib.sha256("\n".join(weights).encode()).hexdigest()[:32]
        path = str(out.relative_to(lake.folder))

        def books() -> None:
            lake.change("DELETE FROM lake.main.models WHERE model = ?", [learner.model])
            line = (name, learner.model, path, made, state, datetime.now(UTC), to_json(record))
            lake.insert("models", [line])

        lake.commit(books)
        shutil.rmtree(work, ignore_errors=True)
    return _told(record)


def tokenize(model: Model, texts: str, work: str, resources: Resources) -> None:
    """Lays the tokens of the texts beside them."""
    from scorers.lm.corpus import prepare

    prepare(model, texts, work)


def fit(model: Model, texts: str, work: str, out: str, seed: int, resources: Resources) -> None:
    """What every member of the gang does."""
    from scorers.lm.train import train

    train(
        model,
        texts,
        work,
        out,
        seed=seed,
        device=resources.device,
        threads=resources.threads,
        rank=resources.rank,
        world=resources.world,
    )


def _made_from(run: Run, learner: Learner) -> str:
    """What the model would learn from now: documents, entries, mixtures, and the models that it begins with."""
    graph = run.graph
    parts = [learner.fingerprint, *(run.states.get(name, "") for name in learner.reads if name in graph.learners)]
    if learner.definition.targets is None:
        parts += [wanted(shard.sha256, shard.shard) for shard in run.documents().values()]
        parts += [run.key(name) for name in learner.reads if name in graph.entries]
        parts += [made_from(run, name) for name in learner.reads if name in graph.recipe.mixtures]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _write_texts(run: Run, learner: Learner, seed: int, path: Path) -> None:
    place = f"models.{learner.name}"
    with _asked(run, learner) as space:
        columns = space.read("FROM asked LIMIT 0").schema.names
        prompt = "CAST(prompt AS VARCHAR)" if "prompt" in columns else "NULL::VARCHAR"
        (lost,) = space.read("SELECT count(*) FROM asked WHERE text IS NULL").read_all().column(0).to_pylist()
        if lost and learner.definition.targets is not None:
            raise RecipeError(f"{place}.targets: {lost} lines have none of text, completion and answer; mend the file")
        aside = path.with_name("texts.part")
        reader = space.read(TEXTS.format(prompt=prompt, seed=seed, holdout=learner.definition.holdout))
        rows = 0
        with pq.ParquetWriter(aside, reader.schema, compression="zstd") as writer:
            for batch in reader:
                rows += batch.num_rows
                writer.write_batch(batch)
        if not rows:
            raise RecipeError(f"{place}: there is nothing to learn, no row has a text; look at its query or file")
        aside.rename(path)


@contextmanager
def _asked(run: Run, learner: Learner) -> Iterator[LakeSpace]:
    """The texts to learn, as the relation `asked`."""
    definition, entries = learner.definition, run.graph.entries
    if definition.targets is not None:
        relation = TARGETS.format(path=quote(definition.targets))
        try:
            with run.lake.space({"asked": relation}, attached=False) as space:
                yield space
        except QueryError as error:
            raise RecipeError(f"models.{learner.name}.targets: {error}") from None
        return
    for mixture in (name for name in learner.reads if name in run.graph.recipe.mixtures):
        if not current(run, mixture):
            raise RecipeError(
                f"models.{learner.name}: mixture {mixture} is not up to date; "
                f"run: corpusmill mix RECIPE {mixture} --lake {run.lake.folder}"
            )
    paths_of(run, {(name, "computed") for name in learner.reads if name in entries})
    query = definition.query or f"SELECT text FROM mixture({quote(str(definition.mixture))}), range(copies)"
    there = views(run)
    names = {name: there[name] for name in ("documents", "corpus", *entries) if name in there}
    try:
        with run.lake.asked(query, names, {k: v for k, v in macros(run).items() if k == "mixture"}) as space:
            yield space
    except QueryError as error:
        raise RecipeError(f"models.{learner.name}.query: {error}") from None


@contextmanager
def _watched(run: Run, name: str, log: Path) -> Iterator[None]:
    """Shows the progress that the trainer's log tells."""
    log.unlink(missing_ok=True)  # of a run that was killed, perhaps in the middle of a line
    over = Event()

    def follow() -> None:
        seen, begin = 0, 0
        while not over.wait(1.0):
            if not log.exists():
                continue
            with log.open("rb") as file:
                file.seek(begin)
                lines = file.read().splitlines(keepends=True)
            for line in lines:
                if not line.endswith(b"\n"):
                    break  # half a line, which is read when it is whole
                said: Mapping[str, Any] = json.loads(line)
                if not begin:
                    run.progress.begin(name, said["tokens"] * said["steps"] // said["step"], "tokens")
                begin += len(line)
                run.progress.advance(said["tokens"] - seen)
                seen = said["tokens"]

    follower = Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        over.set()
        follower.join()


def _told(record: Mapping[str, Any]) -> dict[str, Any]:
    held_out = record["held_out"] or {}
    told = {name: record[name] for name in ("parameters", "tokens", "documents")}
    return told | ({"bits_per_byte": round(held_out["bits_per_byte"], 4)} if held_out else {})
