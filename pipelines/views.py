"""What a query sees: the recipe's tables by their plain names, `corpus`, `mixture('name')`, `explain('name')`."""

from collections.abc import Iterable

from pipelines.graph import Entry, Graph, closure, layered
from pipelines.run import Run
from storage.catalog import name as q
from storage.catalog import quote
from storage.lake import BOOKS
from storage.schema import DOCUMENTS

Reference = tuple[str | None, str]


def joined(run: Run, references: Iterable[Reference]) -> str:
    """SQL over the lake that gives documents with one struct column per entry that the references lead to."""
    graph = run.graph
    needed = closure(graph, references)
    columns = [f"d.{q(column)}" for column in sorted(needed[""])]
    sql = f"FROM ({_documents(graph)}) d"
    for entry_name in needed:
        entry = graph.entries.get(entry_name)
        if entry is None or entry.kind == "rules":
            continue
        columns += [f'{q(entry_name)}.{q(column)} AS "{entry_name}.{column}"' for column in sorted(needed[entry_name])]
        sql += f" LEFT JOIN lake.main.{q(entry.table)} AS {q(entry_name)} ON d.doc_id = {q(entry_name)}.doc_id"
    return layered(graph, needed, f"(SELECT {', '.join(columns)} {sql})")


def _documents(graph: Graph) -> str:
    names = ", ".join(map(quote, graph.sources))
    return f"SELECT * FROM lake.main.{q(graph.documents)} WHERE source IN ({names})"


def views(run: Run) -> dict[str, str]:
    """Per name that exists by now, its SELECT."""
    graph, lake = run.graph, run.lake
    tables = {row[0] for row in lake.rows("SELECT table_name FROM duckdb_tables() WHERE database_name = 'lake'")}
    made = {row[0] for row in lake.rows('SELECT DISTINCT "table" FROM lake.main.shards')}
    made |= {row[0] for row in lake.rows('SELECT DISTINCT "table" FROM lake.main.ledger')}
    found = {book: f"SELECT * FROM lake.main.{book}" for book in BOOKS}
    if graph.documents not in made:
        return found
    names = ", ".join(map(quote, graph.sources))
    found["documents"] = _documents(graph)
    found["rejects"] = f"SELECT * FROM lake.main.{q(graph.rejects)} WHERE source IN ({names})"
    there: list[Entry] = []
    for entry in graph.entries.values():
        if entry.kind == "rules":
            ready = all(read in {e.name for e in there} for read in entry.reads)
        else:
            ready = entry.table in tables and (entry.table in made)
            ready = ready and all(read in {e.name for e in there} for read in entry.reads)
        if ready:
            there.append(entry)
            found[entry.name] = _view(run, entry)
    references: set[Reference] = {(e.name, c) for e in there for c in ("computed", *(c.name for c in e.columns))}
    documents: set[Reference] = {(None, column) for column in DOCUMENTS.names}
    flat = joined(run, references | documents)
    columns = ", ".join([q(c) for c in DOCUMENTS.names] + [q(e.name) for e in there])
    found["corpus"] = f"SELECT {columns} FROM ({flat})"
    return found


def _view(run: Run, entry: Entry) -> str:
    """An entry's rows as its `where` now stands; a sparse table as it is."""
    if entry.kind == "reduce" or (entry.kind != "rules" and entry.where is None):
        kept = f"SELECT * FROM lake.main.{q(entry.table)}"
        return f"{kept} WHERE doc_id IN (SELECT doc_id FROM ({_documents(run.graph)}))" if _shared(run) else kept
    columns = ["computed", *(column.name for column in entry.columns)]
    fields = ", ".join(f"{q(entry.name)}.{q(column)} AS {q(column)}" for column in columns)
    return f"SELECT doc_id, {fields} FROM ({joined(run, {(entry.name, column) for column in columns})})"


def _shared(run: Run) -> bool:
    """Whether the documents table also holds sources of other recipes."""
    return len(run.documents()) < len(run.lake.shards(run.graph.documents))


def macros(run: Run) -> dict[str, str]:
    """mixture(name): the documents taken, with copies. explain(name): every document, and what became of it."""
    made = {
        row[0]: row[1]
        for row in run.lake.rows(
            'SELECT name, "table" FROM lake.main.mixtures WHERE recipe = ?', [run.graph.recipe.name]
        )
        if row[0] in run.graph.recipe.mixtures
    }
    if not made:
        return {}
    documents = _documents(run.graph)
    mixtures, explained = [], []
    for mixture, table in made.items():
        rows = f"lake.main.{q(table)}"
        mixtures.append(
            f'SELECT {quote(mixture)} AS mixture, m.copies, m."group", m.tokens, d.* '
            f"FROM {rows} m JOIN ({documents}) d USING (doc_id) WHERE m.copies > 0"
        )
        explained.append(_explained(run, mixture, table))
    by_name = " UNION ALL BY NAME "
    return {
        "mixture": f"SELECT * EXCLUDE (mixture) FROM ({by_name.join(mixtures)}) WHERE mixture = name",
        "explain": f"SELECT * EXCLUDE (mixture) FROM ({by_name.join(explained)}) WHERE mixture = name",
    }


def _explained(run: Run, mixture: str, table: str) -> str:
    selected = run.graph.selections[mixture]
    where = selected.where.sql if selected.where else "true"
    rules = sorted({e for e, _ in selected.references if e and run.graph.entries[e].kind == "rules"})
    reasons = "".join(f" || coalesce('; {rule}: ' || {q(rule)}.reason, '')" for rule in rules)
    detail = f"""CASE m.dropped
        WHEN 'where' THEN {quote(f"not true: {where}")}{reasons}
        WHEN 'null' THEN {quote(f"NULL: {where}")}
        WHEN 'unscored' THEN {quote(f"not computed yet: {where}")}
        WHEN 'best' THEN 'beyond the cut of best'
        WHEN 'duplicate' THEN 'document ' || m.instead || ' of the same cluster was preferred'
        WHEN 'holdout' THEN 'held out of every mixture of this seed'
        WHEN 'no_weight' THEN 'group ' || m."group" || ' has no weight'
        WHEN 'draw' THEN 'expected copies ' || round(m.expected, 4) || ', and its draw was not below the fraction'
    END"""
    references: set[Reference] = {(rule, "reason") for rule in rules} | {(None, "source"), (None, "url")}
    return (
        f'SELECT {quote(mixture)} AS mixture, m.doc_id, c.source, c.url, m."group", m.tokens, m.expected, m.copies, '
        f"m.dropped, {detail} AS detail FROM lake.main.{q(table)} m JOIN ({joined(run, references)}) c USING (doc_id)"
    )


def publish(run: Run, *, under_way: bool = False) -> None:
    """Point the recipe's names at what there is now, all in one transaction.

    Args:
        under_way: in the middle of a run. A recipe's first run shows its tables as they come; later ones change nothing
            before their end, so that what a reader sees is always of one run.
    """
    recipe = run.graph.recipe.name
    if under_way and run.lake.rows(
        "SELECT 1 FROM lake.main.runs WHERE recipe = ? AND state = 'done' LIMIT 1", [recipe]
    ):
        return
    run.lake.publish(recipe, views(run), macros(run))
