"""Ingest: every record once, the same ids whatever happens around them, and nothing stays of what has left."""

import os
from collections.abc import Iterator

import pytest

from pipelines.execute import Resources
from pipelines.frames import INGESTED
from pipelines.ingest import keep, make_intake, missing, register
from storage.errors import RecipeError, ShardError
from storage.sources import list_files

PAGES = [{"text": f"page number {n}", "url": f"http://site{n % 3}.org/{n}", "q": n} for n in range(6)]
QUALITY = {"q": {"scorer": "planted:Planted", "field": "q"}}


class Shuffled:
    """An executor whose results come in another order, as from several workers."""

    def __init__(self, order: int) -> None:
        self.order = order

    def map(self, make, items, *, gpu=False) -> Iterator:
        work = make(Resources("cpu", 1))
        done = [(item, work(item)) for item in items]
        yield from done[:: self.order]


@pytest.fixture
def three(job):
    """a, b and c of two pages each; b's file also holds a record that is no document, and a broken line."""
    job.write("pool/a.jsonl", PAGES[:2])
    job.write("pool/b.jsonl", [*PAGES[2:4], {"text": " "}, {"title": "no text"}])
    job.write("pool/c.jsonl", PAGES[4:])
    return job


def documents(job) -> dict[int, str]:
    return dict(job.ask("SELECT doc_id, text FROM documents"))


def files(job) -> dict[str, int]:
    """Number by name, of the files that the lake now stands on."""
    rows = job.lake.rows("SELECT path, number FROM lake.main.files WHERE active")
    return {path.rpartition("/")[2]: number for path, number in rows}


def ids(number: int, *records: int) -> set[int]:
    return {number << 32 | record for record in records}


def test_the_books_balance_by_source_and_reason(three):
    three.write("more.jsonl.gz", ["a", "b", ""])
    other = {"name": "more", "format": "jsonl", "path": "more.jsonl.gz"}
    recipe = three.recipe(sources=[three.recipe()["sources"][0], other])
    counts = three.run(recipe).counts["ingest"]
    assert counts == {
        "more": {"records": 3, "documents": 2, "rejects": 1, "reasons": {"empty": 1}},
        "pool": {"records": 8, "documents": 6, "rejects": 2, "reasons": {"empty": 1, "no_text_field": 1}},
    }
    ledger = three.ask("SELECT sum(records), sum(documents), sum(rejects) FROM ledger")
    assert ledger == [(11, 8, 3)]
    b = files(three)["b.jsonl"]
    assert dict(three.ask("SELECT doc_id, reason FROM rejects WHERE source = 'pool'")) == {
        b << 32 | 2: "empty",
        b << 32 | 3: "no_text_field",
    }
    assert documents(three).keys() >= ids(b, 0, 1)


def test_a_second_run_reads_nothing(three, monkeypatch):
    first = three.run(three.recipe()).counts
    before = three.lake.shards(three.graph(three.recipe()).documents)
    monkeypatch.setattr("pipelines.ingest.take_in", None)
    monkeypatch.setattr("pipelines.ingest.file_digest", None)
    assert three.run(three.recipe()).counts == first
    assert three.lake.shards(three.graph(three.recipe()).documents) == before


def test_a_touched_file_is_looked_at_once_and_not_read_again(three, monkeypatch):
    three.run(three.recipe())
    os.utime(three.folder / "pool" / "a.jsonl", ns=(1, 1))
    monkeypatch.setattr("pipelines.ingest.take_in", None)
    three.run(three.recipe())
    monkeypatch.setattr("pipelines.ingest.file_digest", None)
    three.run(three.recipe())
    assert set(documents(three).values()) == {page["text"] for page in PAGES}


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl"])
def test_a_changed_file_gets_a_new_number_and_the_rest_of_its_group_stays(three, name):
    """Whichever of a group it is: a group goes by its first file."""
    recipe = three.recipe(scores=QUALITY)
    three.run(recipe)
    old, before = files(three), documents(three)
    three.write(f"pool/{name}", [{"text": "changed", "q": 9}])
    done = three.run(recipe)
    new, after = files(three), documents(three)
    assert {n for n in new if new[n] != old[n]} == {name}
    assert new[name] == max(old.values()) + 1
    assert after == {i: text for i, text in before.items() if i >> 32 != old[name]} | {new[name] << 32: "changed"}
    assert dict(three.ask("SELECT doc_id, q.value FROM corpus")).keys() == after.keys()
    assert dict(three.ask("SELECT doc_id, value FROM q"))[new[name] << 32] == 9.0
    assert three.ask("SELECT count(*) FROM q") == [(len(after),)]
    assert done.counts["ingest"]["pool"]["documents"] == len(after)
    assert three.run(recipe).counts["q"]["computed"] == 0


def test_a_removed_files_documents_and_scores_leave_and_an_added_file_only_adds(three):
    recipe = three.recipe(scores=QUALITY)
    three.run(recipe)
    before, gone = documents(three), files(three)["a.jsonl"]
    snapshot = three.lake.snapshot()
    (three.folder / "pool" / "a.jsonl").unlink()
    three.run(recipe)
    assert documents(three) == {i: text for i, text in before.items() if i >> 32 != gone}
    assert three.ask("SELECT count(*) FROM q") == [(4,)]
    table = three.graph(recipe).documents
    assert three.lake.rows(f"SELECT count(*) FROM lake.main.{table} AT (VERSION => {snapshot})") == [(6,)]

    three.write("pool/0.jsonl", [{"text": "added", "q": 1}])
    done = three.run(recipe)
    assert done.counts["q"]["computed"] == 1
    assert documents(three) == {i: text for i, text in before.items() if i >> 32 != gone} | {3 << 32: "added"}


def test_a_file_that_comes_back_is_a_new_file(three):
    three.run(three.recipe())
    data = (three.folder / "pool" / "a.jsonl").read_bytes()
    (three.folder / "pool" / "a.jsonl").unlink()
    three.run(three.recipe())
    (three.folder / "pool" / "a.jsonl").write_bytes(data)
    three.run(three.recipe())
    assert files(three) == {"a.jsonl": 3, "b.jsonl": 1, "c.jsonl": 2}
    assert set(documents(three).values()) == {page["text"] for page in PAGES}


def test_a_changed_mapping_reads_again(three):
    recipe = three.recipe()
    three.run(recipe)
    recipe["sources"][0]["columns"] = {"text": "url"}
    counts = three.run(recipe).counts["ingest"]["pool"]
    assert set(documents(three).values()) == {page["url"] for page in PAGES}
    assert counts["records"] == 8
    assert min(files(three).values()) == 3


def test_a_source_without_files_is_told_before_any_work(three):
    recipe = three.recipe(sources=[{"name": "pool", "format": "jsonl", "path": "nothing/*"}])
    with pytest.raises(RecipeError, match=r"sources\.pool\.path: nothing matches"):
        three.run(recipe)
    assert three.lake.rows("SELECT count(*) FROM lake.main.files") == [(0,)]


@pytest.mark.parametrize("change", [{"extractor": "trafilatura"}, {"max_record_bytes": 14}])
def test_other_ingest_settings_are_another_table_of_the_same_files(three, change):
    three.run(three.recipe(name="one"))
    before = files(three)
    three.run(three.recipe(name="two", ingest=change))
    assert files(three) == before
    one, two = (three.graph(three.recipe(ingest=ingest)).documents for ingest in ({}, change))
    assert one != two
    assert three.ask("SELECT count(*) FROM documents", "one") == [(6,)]
    assert three.ask("SELECT count(*) FROM documents", "two") == [(0 if "max_record_bytes" in change else 6,)]
    (three.folder / "pool" / "a.jsonl").unlink()
    three.run(three.recipe(name="one"))
    assert three.ask("SELECT count(*) FROM documents", "one") == [(4,)]


def test_ids_and_shards_do_not_hang_on_the_order_in_which_workers_finish(three, monkeypatch):
    monkeypatch.setattr("pipelines.ingest.GROUP_BYTES", 1)  # a group for each file
    found = []
    for name, order in (("one", 1), ("other", -1)):
        job = three.elsewhere(name)
        job.executor = Shuffled(order)
        job.run(job.recipe(scores=QUALITY))
        shards = job.lake.shards(job.graph(job.recipe()).documents)
        found.append((documents(job), {shard: (s.rows, s.sha256) for shard, s in shards.items()}))
        job.lake.close()
    assert found[0] == found[1]
    assert len(found[0][1]) == 3


def test_adopted_columns_stand_beside_their_documents_and_are_not_computed_where_a_source_has_none(job):
    job.write("a.jsonl", [{"text": "a", "meta": {"stars": 3}}, {"text": ""}, {"text": "b", "meta": {"stars": "many"}}])
    job.write("b.jsonl", ["c"])
    sources = [
        {"name": "a", "format": "jsonl", "path": "a.jsonl", "adopt": {"meta.stars": "bigint"}},
        {"name": "b", "format": "jsonl", "path": "b.jsonl"},
    ]
    job.run(job.recipe(sources=sources))
    assert job.ask("SELECT text, adopted.computed, adopted.stars FROM corpus ORDER BY text") == [
        ("a", True, 3),
        ("b", True, None),
        ("c", False, None),
    ]
    graph = job.graph(job.recipe(sources=sources))
    shards = job.lake.shards(graph.entries["adopted"].table)
    assert {shard: s.rows for shard, s in shards.items()} == {
        shard: s.rows for shard, s in job.lake.shards(graph.documents).items()
    }
    assert {shard.input for shard in shards.values()} == {INGESTED}


def test_a_recipe_that_begins_to_adopt_leaves_the_other_sources_scores_alone(job):
    job.write("a.jsonl", [{"text": "a", "stars": 3, "q": 1}])
    job.write("b.jsonl", [{"text": "b", "q": 2}])
    a, b = ({"name": name, "format": "jsonl", "path": f"{name}.jsonl"} for name in "ab")
    job.run(job.recipe(sources=[a, b], scores=QUALITY))
    done = job.run(job.recipe(sources=[a | {"adopt": ["stars"]}, b], scores=QUALITY))
    assert done.counts["q"]["computed"] == 1
    assert job.ask("SELECT text, adopted.stars, q.value FROM corpus ORDER BY 1") == [("a", 3.0, 1.0), ("b", None, 2.0)]


def test_two_recipes_see_only_their_own_sources(job):
    job.write("a.jsonl", [{"text": "a", "q": 1}, {"text": ""}])
    job.write("b.jsonl", [{"text": "b", "q": 2}, {"text": "b", "q": 3}])
    a, b = ({"name": name, "format": "jsonl", "path": f"{name}.jsonl"} for name in "ab")
    scores = QUALITY | {"same": {"scorer": "duplicates"}}
    one = job.recipe(name="one", sources=[a], scores=scores)
    two = job.recipe(name="two", sources=[b], scores=scores)
    for recipe, computed in ((one, 1), (two, 2), (one, 0)):
        assert job.run(recipe).counts["q"]["computed"] == computed
    for name, texts, values in (("one", ["a"], [1.0]), ("two", ["b", "b"], [2.0, 3.0])):
        assert [text for (text,) in job.ask("SELECT text FROM documents ORDER BY 1", name)] == texts
        assert [value for (value,) in job.ask("SELECT value FROM q ORDER BY 1", name)] == values
        assert [value for (value,) in job.ask("SELECT q.value FROM corpus ORDER BY 1", name)] == values
    assert job.ask("SELECT count(*) FROM rejects", "two") == [(0,)]
    assert job.ask("SELECT cluster_size FROM same", "one") == []
    assert job.ask("SELECT cluster_size FROM same", "two") == [(2,), (2,)]
    assert job.ask("SELECT same.cluster_size FROM corpus", "one") == [(1,)]


def test_a_group_whose_files_changed_while_it_was_read_is_not_kept(three):
    """Another run, of a recipe with the same source, looks at the files in between."""
    run = three.run(three.recipe()).run
    graph, source = run.graph, run.graph.recipe.sources[0]
    three.write("pool/b.jsonl", ["changed"])
    register(three.lake, source, list_files(source))
    group, _ = missing(three.lake, graph)
    taken = make_intake(graph, three.lake.data, Resources("cpu", 1))(group)
    (three.folder / "pool" / "a.jsonl").unlink()
    register(three.lake, source, list_files(source))
    with pytest.raises(ShardError, match="run again"):
        keep(run, [(group, taken)])
    three.run(three.recipe())
    assert set(documents(three).values()) == {"changed", *(page["text"] for page in PAGES[4:])}


def test_a_sources_name_belongs_to_the_lake(job):
    """Else two recipes would retire each other's documents at every run."""
    job.write("pool/a.jsonl", ["one text", "another text"])
    job.write("other/a.jsonl", ["a third text"])
    job.run(job.recipe(name="first"))
    same_name = {"name": "pool", "format": "jsonl", "path": "other/*.jsonl"}
    with pytest.raises(RecipeError, match=r"sources.pool: recipe 'first' gives this name to other files"):
        job.run(job.recipe(name="second", sources=[same_name]))
    assert job.lake.query("SELECT count(*) AS n FROM documents", "first").to_pydict() == {"n": [2]}
    job.run(job.recipe(name="first", sources=[same_name]))  # its own name, a recipe may move
