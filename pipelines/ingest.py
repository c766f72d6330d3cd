"""Ingest: the files of the sources become documents and rejects, each record exactly once.

Files get append-only numbers in the sorted order of the listing, in one transaction before any work. A file is known by
path, content and the settings of its source: where one of these changes it is a new file with a new number, and the
old one's documents leave the live lake (snapshots keep them), with every score of their shards. So they do where a file
is no longer listed. Small files are packed into groups; a group becomes whole shards, and a group is there or not.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from pipelines.execute import Resources
from pipelines.frames import INGESTED
from pipelines.graph import Graph
from pipelines.recipe import Recipe
from pipelines.run import Counts, Run, group_of
from storage.errors import RecipeError, SchemaError, ShardError
from storage.intake import InputFile, Taken, take_in
from storage.lake import Lake
from storage.schema import DOCUMENTS, REJECTS
from storage.sources import FoundFile, Source, file_digest, list_files

GROUP_BYTES = 64_000_000
"""Input files are packed until they are this large together, so that small ones do not become small shards."""


@dataclass(frozen=True)
class Group:
    """Files of one source that are read together, in number order."""

    source: str
    files: tuple[InputFile, ...]
    size: int

    @property
    def first(self) -> int:
        return self.files[0].number

    def __str__(self) -> str:
        return f"{self.source}: {self.files[0].path}" + (f" and {len(self.files) - 1} more" * (len(self.files) > 1))


def ingest(run: Run) -> Counts:
    """Bring the documents table up to date with the sources. Returns counts per source, and by reason."""
    lake, graph = run.lake, run.graph
    with lake.locked("files", run.who, wait=True):
        _refuse_names_of_others(lake, graph.recipe)
        for source in graph.recipe.sources:
            found = list_files(source)
            register(lake, source, found if run.sample == 1.0 else sampled(found, run.sample))
    with lake.locked(graph.documents, run.who):
        lake.make_table(graph.documents, DOCUMENTS)
        lake.make_table(graph.rejects, REJECTS)
        adopted = graph.entries.get("adopted")
        if adopted:
            lake.make_table(adopted.table, adopted.schema, adopted.columns)
        groups = missing(lake, graph, stop=run.sample < 1.0)
        run.progress.begin("ingest", sum(group.size for group in groups), "bytes")
        run.map("ingest", partial(make_intake, graph, lake.data), groups, partial(keep, run), lambda g: g.size)
    return books(run)


def _refuse_names_of_others(lake: Lake, recipe: Recipe) -> None:
    """RecipeError where another recipe of this lake calls other files by a source's name: they would retire."""
    last = "SELECT recipe, arg_max(resolved, started) FROM lake.main.runs WHERE recipe <> ? GROUP BY 1 ORDER BY 1"
    mine = {source["name"]: source for source in recipe.model_dump(mode="json")["sources"]}
    problems = [
        f"sources.{source['name']}: recipe {other!r} gives this name to other files, and a source's name "
        "belongs to the lake; choose another name, or another lake"
        for other, resolved in lake.rows(last, [recipe.name])
        for source in json.loads(resolved)["sources"]
        if source != mine.get(source["name"], source)
    ]
    if problems:
        raise RecipeError(*problems)


def make_intake(graph: Graph, data: str, resources: Resources) -> Callable[[Group], Taken]:
    """The function that reads one group of files into shards."""
    adopted = graph.entries.get("adopted")
    tables: dict[Literal["documents", "rejects", "adopted"], str] = {
        "documents": graph.documents,
        "rejects": graph.rejects,
        "adopted": adopted.table if adopted else "",
    }
    sources = {source.name: source for source in graph.recipe.sources}

    def intake(group: Group) -> Taken:
        columns = adopted.columns if adopted else ()
        return take_in(group.files, sources[group.source], graph.recipe.ingest, data, tables, columns)

    return intake


def keep(run: Run, finished: list[tuple[Group, Taken]]) -> None:
    """Commit groups: their shards and their lines in the ledger, together."""
    lake, graph = run.lake, run.graph
    written = [(file, INGESTED) for _, taken in finished for file in (*taken.documents, *taken.rejects, *taken.adopted)]
    lines = [
        (graph.documents, count.number, count.records, count.documents, count.rejects)
        for _, taken in finished
        for count in taken.counts
    ]
    numbers = [line[1] for line in lines]

    def balance() -> None:
        if len(lake.rows("SELECT 1 FROM lake.main.files WHERE active AND list_contains(?, number)", [numbers])) < len(
            numbers
        ):
            raise ShardError("another run took files out of the lake that this one was reading; run again")
        lake.change(
            'DELETE FROM lake.main.ledger WHERE "table" = ? AND list_contains(?, file)', [graph.documents, numbers]
        )
        lake.insert("ledger", lines)

    lake.register(written, also=balance)


def register(lake: Lake, source: Source, found: Sequence[FoundFile]) -> None:
    """Give new files their numbers, and retire those that changed or are no longer listed. One transaction."""
    settings = source.settings_digest()
    known = "SELECT path, size, stamp, digest FROM lake.main.files WHERE active AND source = ?"
    before = {row[0]: row[1:] for row in lake.rows(known, [source.name])}
    digests = {}
    for file in found:
        size, stamp, digest = before.get(file.path, (None, None, None))
        unchanged = (size, stamp) == (file.size, file.stamp)
        digests[file.path] = digest if unchanged and digest else file_digest(file)

    def change() -> None:
        active = lake.rows(
            "SELECT number, path, digest, settings, first, stamp FROM lake.main.files WHERE active AND source = ?",
            [source.name],
        )
        stays = {
            path: stamp
            for _, path, digest, used, _, stamp in active
            if digests.get(path) == digest and used == settings
        }
        gone = [(number, first) for number, path, _, _, first, _ in active if path not in stays]
        if gone:
            _retire(lake, gone)
        fresh = []
        for file in found:
            if file.path not in stays:
                fresh.append(file)
            elif stays[file.path] != file.stamp:  # touched, its content is the same: not to be read again and again
                touched = "UPDATE lake.main.files SET stamp = ? WHERE active AND source = ? AND path = ?"
                lake.change(touched, [file.stamp, source.name, file.path])
        if not fresh:
            return
        (start,) = lake.rows("SELECT coalesce(max(number) + 1, 0) FROM lake.main.files")[0]
        rows: list[tuple[Any, ...]] = []
        first, packed = start, 0
        for number, file in enumerate(fresh, start):
            if packed and packed + file.size > GROUP_BYTES:
                first, packed = number, 0
            packed += file.size
            rows.append(
                (number, source.name, file.path, file.size, file.stamp, digests[file.path], settings, first, True)
            )
        lake.insert("files", rows)

    lake.commit(change)


def sampled(found: Sequence[FoundFile], fraction: float) -> list[FoundFile]:
    """The first files, in an order that hangs on their names, up to `fraction` of all bytes; the last one cut short.

    A smaller sample is part of a larger one. Each source has one record at least.
    """
    left = fraction * sum(file.size for file in found)
    chosen = []
    for file in sorted(found, key=lambda file: hashlib.sha256(file.path.encode()).digest()):
        if left <= 0:
            break
        chosen.append(replace(file, size=min(file.size, max(1, round(left)))))
        left -= file.size
    return sorted(chosen)


def _retire(lake: Lake, gone: Iterable[tuple[int, int]]) -> None:
    """Take files out of the lake. The shards of their groups go; what else was in them is read again."""
    numbers = [number for number, _ in gone]
    firsts = {first for _, first in gone}
    lake.change("UPDATE lake.main.files SET active = false WHERE list_contains(?, number)", [numbers])
    # A mixture is a record of what was chosen: it stays until it is made again.
    aligned = lake.rows(
        'SELECT "table", shard FROM lake.main.shards '
        'WHERE "table" NOT IN (SELECT "table" FROM lake.main.mixtures) AND regexp_matches(shard, \'^[0-9]{8}-\')'
    )
    lake.drop_shards((table, shard) for table, shard in aligned if group_of(shard) in firsts)
    lake.change(
        "DELETE FROM lake.main.ledger WHERE file IN (SELECT number FROM lake.main.files WHERE list_contains(?, first))",
        [sorted(firsts)],
    )
    # A group goes by the number of its first file, and so do its shards.
    left = "SELECT first, min(number) FROM lake.main.files WHERE active AND list_contains(?, first) GROUP BY first"
    for old, new in lake.rows(left, [sorted(firsts)]):
        lake.change("UPDATE lake.main.files SET first = ? WHERE active AND first = ?", [new, old])


def missing(lake: Lake, graph: Graph, *, stop: bool = False) -> list[Group]:
    """Groups of active files that are not in the documents table, or whose adopted columns are not in theirs.

    Args:
        stop: end reading each file at its noted size, for a trial.
    """
    groups: dict[int, list[tuple[InputFile, str, int]]] = defaultdict(list)
    query = (
        "SELECT first, number, path, source, size FROM lake.main.files "
        "WHERE active AND list_contains(?, source) ORDER BY number"
    )
    for first, number, path, source, size in lake.rows(query, [list(graph.sources)]):
        groups[first].append((InputFile(number, path, size if stop else None), source, size))
    read = {row[0] for row in lake.rows('SELECT file FROM lake.main.ledger WHERE "table" = ?', [graph.documents])}
    adopted = graph.entries.get("adopted")
    unadopted: set[int] = set()
    if adopted:
        there = lake.shards(adopted.table)
        unadopted = {group_of(shard) for shard in lake.shards(graph.documents) if shard not in there}
    return [
        Group(files[0][1], tuple(file for file, _, _ in files), sum(size for _, _, size in files))
        for first, files in groups.items()
        if first in unadopted or any(file.number not in read for file, _, _ in files)
    ]


def books(run: Run) -> Counts:
    """Per source: records, documents, rejects; and the rejects by reason. The books balance, or this raises."""
    lake, graph = run.lake, run.graph
    names = list(graph.sources)
    query = """
        SELECT f.source, sum(l.records), sum(l.documents), sum(l.rejects)
        FROM lake.main.ledger l JOIN lake.main.files f ON l.file = f.number
        WHERE l."table" = ? AND f.active AND list_contains(?, f.source) GROUP BY 1 ORDER BY 1
    """
    per_source: dict[str, dict[str, Any]] = {
        source: {"records": int(records), "documents": int(documents), "rejects": int(rejects), "reasons": {}}
        for source, records, documents, rejects in lake.rows(query, [graph.documents, names])
    }
    reasons = lake.rows(
        f'SELECT source, reason, count(*) FROM lake.main."{graph.rejects}" WHERE list_contains(?, source) '
        "GROUP BY ALL ORDER BY 1, 3 DESC, 2",
        [names],
    )
    for source, reason, count in reasons:
        per_source[source]["reasons"][reason] = int(count)
    for source, line in per_source.items():
        counted = sum(line["reasons"].values())
        if line["records"] != line["documents"] + line["rejects"] or counted != line["rejects"]:
            raise SchemaError(f"the books of {source} do not balance: {line}")
    there = sum(shard.rows for shard in run.documents().values())
    if there != sum(line["documents"] for line in per_source.values()):
        raise SchemaError(f"{there} documents are in the lake, and in the books {per_source}")
    return per_source
