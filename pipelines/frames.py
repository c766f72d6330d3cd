"""A shard's columns side by side: by position, without a join, whatever the number of tables.

Used by workers. `evaluate` gives SQL expressions over documents and entries for every row of a shard, in its order.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.graph import Entry, Graph
from pipelines.layers import Reference, closure, layered
from pipelines.run import Run, wanted
from storage.errors import QueryError, RecipeError
from storage.lake import check_aligned, run_sql
from storage.shards import read_shard

Paths = Mapping[str, str]
INGESTED = "ingest"
"""The `input` of shards that ingest writes."""


def paths_of(run: Run, references: Iterable[Reference]) -> dict[str, dict[str, str]]:
    """Per entry that the references lead to: its file for every document shard.

    Raises RecipeError, with the command that helps, for each entry that is not up to date: what was computed for
    another `where`, or beside other documents, must not pass for what the recipe says now.
    """
    documents = run.documents()
    tables: dict[str, dict[str, str]] = {}
    problems = []
    for name in closure(run.graph, references):
        entry = run.graph.entries.get(name)
        if entry is None or entry.kind == "rules":
            continue
        shards = run.lake.shards(entry.table)
        if entry.kind == "reduce":
            whole = shards.get("all")
            left = 0 if whole is not None and whole.input == run.states[name] else len(documents)
            tables[name] = dict.fromkeys(documents, whole.path if whole else "")
        else:
            key = run.key(name)
            inputs = {s: INGESTED if entry.kind == "adopted" else wanted(d.sha256, key) for s, d in documents.items()}
            left = sum(shard not in shards or shards[shard].input != made for shard, made in inputs.items())
            tables[name] = {shard: shards[shard].path for shard in documents if shard in shards}
        if left:
            verb = "ingest" if entry.kind == "adopted" else "score"
            problems.append(
                f"scores.{name}: {left} of {len(documents)} shards are not up to date; "
                f"run: corpusmill {verb} RECIPE --lake {run.lake.folder}"
            )
    if problems:
        raise RecipeError(*problems)
    return tables


def frame(graph: Graph, data: str, paths: Paths, needed: Mapping[str, set[str]]) -> pa.Table:
    """One table of a shard: its document columns, and every needed score column under the name "entry.column"."""
    columns = ["doc_id", *sorted(needed[""] - {"doc_id"})]
    table = read_shard(data, paths[""], columns).select(columns)
    ids = table.column("doc_id")
    for name in needed:
        entry = graph.entries.get(name)
        if entry is None or entry.kind == "rules":
            continue
        wanted = sorted(needed[name])
        if entry.kind == "reduce":
            found = _sparse(data, paths[name], ids, wanted, entry)
        else:
            found = read_shard(data, paths[name], ["doc_id", *wanted])
            check_aligned(ids, found.column("doc_id"), entry.table)
        for column in wanted:
            table = table.append_column(f"{name}.{column}", found.column(column))
    return table


def evaluate(
    graph: Graph, data: str, paths: Paths, references: Iterable[Reference], expressions: Mapping[str, str]
) -> pa.Table:
    """The expressions' values for every row of a shard, in its order."""
    needed = closure(graph, references)
    selected = ", ".join(f"{sql} AS c{i}" for i, sql in enumerate(expressions.values()))
    query = f"SELECT {selected} FROM ({layered(graph, needed, 'shard')})"
    table = run_sql(query, shard=frame(graph, data, paths, needed))
    return table.rename_columns(list(expressions))


def covered(graph: Graph, entry: Entry, data: str, paths: Paths, rows: int) -> np.ndarray:
    """For every row of a shard whether the entry's `where` is true there, [rows] of bool."""
    if entry.where is None:
        return np.ones(rows, dtype=bool)
    expressions = {"wanted": f"coalesce({entry.where.sql}, false)"}
    with by_field(f"scores.{entry.name}.where"):
        found: np.ndarray = evaluate(graph, data, paths, entry.where.references, expressions).column(0).to_numpy()
    return found


@contextmanager
def by_field(place: str) -> Iterator[None]:
    """Where an expression meets a value that it cannot take (a cast, an overflow), the error names its field."""
    try:
        yield
    except QueryError as error:
        raise RecipeError(f"{place}: {str(error).splitlines()[0]}; TRY_CAST gives NULL where a cast fails") from None


def _sparse(data: str, path: str, ids: pa.ChunkedArray, columns: list[str], entry: Entry) -> pa.Table:
    """Rows of a sparse table beside `ids`; NULL where it has none."""
    schema = pa.schema([field for field in entry.schema if field.name in columns])
    if len(ids) == 0:
        return schema.empty_table()
    columns = schema.names
    within = [("doc_id", ">=", ids[0].as_py()), ("doc_id", "<=", ids[-1].as_py())]
    found = pq.read_table(f"{data}/{path}", columns=["doc_id", *columns], filters=within, partitioning=None)
    index = pc.index_in(ids, value_set=found.column("doc_id"))
    return found.select(columns).take(index).cast(schema)
