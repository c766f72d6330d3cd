"""The graph: the order of entries, and what changes their fingerprints (another table) and keys (other rows of it)."""

import copy
import json
import pickle
from typing import Any

import pytest

from pipelines.graph import Graph
from pipelines.recipe import Recipe

SHA = "0" * 64

RECIPE: dict[str, Any] = {
    "name": "test",
    "sources": [{"name": "pool", "format": "jsonl", "path": "/nowhere/*.jsonl"}],
    "scores": {
        "twice": {"scorer": "planted:Twice", "inputs": {"x": "cheap"}},
        "dear": {"scorer": "planted:Planted", "field": "d", "where": "clean.keep AND duplicates.cluster_size < 9"},
        "duplicates": {"scorer": "duplicates", "where": "cheap.value > 0"},
        "gopher": {"scorer": "gopher"},
        "cheap": {"scorer": "planted:Planted", "field": "c", "good": "high"},
    },
    "rules": {"clean": {"rules": "gopher", "min_words": 3}},
    "mixtures": {"main": {"tokens": "n_bytes", "where": "dear.value > 0"}},
}


def graph(**changes: Any) -> Graph:
    """RECIPE with changes: a path with __ for dots, and the new value (None removes)."""
    data = copy.deepcopy(RECIPE)
    for path, value in changes.items():
        *folders, last = path.split("__")
        place = data
        for folder in folders:
            place = place.setdefault(folder, {})
        place.pop(last, None) if value is None else place.__setitem__(last, value)
    return Graph(Recipe.of(data))


def tables(graph: Graph) -> dict[str, str]:
    return {name: entry.table for name, entry in graph.entries.items() if entry.kind != "rules"}


def keys(graph: Graph) -> dict[str, str]:
    return {name: graph.key(name, {"duplicates": "state"}) for name in graph.entries}


def differing(one: dict[str, str], two: dict[str, str]) -> set[str]:
    return {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)}


def test_entries_run_after_what_they_read():
    order = list(graph().entries)
    for name, entry in graph().entries.items():
        assert all(order.index(read) < order.index(name) for read in entry.reads), (name, order)
    assert set(order) == {"cheap", "twice", "duplicates_signatures", "duplicates", "gopher", "clean", "dear"}
    assert graph().upstream(["dear"]) == set(order) - {"twice"}


@pytest.mark.parametrize("order", [sorted(RECIPE["scores"]), sorted(RECIPE["scores"], reverse=True)])
def test_the_order_in_the_file_changes_nothing(order):
    shuffled = graph(scores={name: RECIPE["scores"][name] for name in order})
    assert tables(shuffled) == tables(graph())
    assert keys(shuffled) == keys(graph())


SIGNATURES = {"duplicates_signatures", "duplicates"}
CHANGES: list[tuple[dict[str, Any], set[str], set[str]]] = [
    # a change of the recipe, the entries that get another table, the entries that (also) get another key
    ({"seed": 9}, set(), set()),
    ({"name": "other"}, set(), set()),
    ({"scores__cheap__field": "e"}, {"cheap", "twice", "duplicates"}, {"duplicates_signatures", "dear"}),
    ({"scores__dear__where": "clean.keep"}, set(), {"dear"}),
    ({"scores__dear__where": None}, set(), {"dear"}),
    ({"scores__cheap__where": "n_bytes > 3"}, {"duplicates"}, {"cheap", "twice", "duplicates_signatures", "dear"}),
    ({"rules__clean__min_words": 4}, set(), {"clean", "dear"}),
    ({"scores__duplicates__bands": 2}, SIGNATURES, {"dear"}),
    ({"scores__duplicates__where": None}, {"duplicates"}, {"duplicates_signatures", "dear"}),
    ({"scores__cheap__good": "low"}, {"cheap", "twice", "duplicates"}, {"duplicates_signatures", "dear"}),
    ({"ingest__extractor": "trafilatura"}, {*tables(graph())}, {"clean"}),
    ({"ingest__shard_bytes": 1000}, {*tables(graph())}, {"clean"}),
    ({"mixtures__main__tokens": "length(text)"}, set(), set()),
]


@pytest.mark.parametrize(("change", "other_table", "other_key"), CHANGES, ids=lambda value: str(value)[:60])
def test_values_are_in_the_table_name_and_coverage_in_the_key(change, other_table, other_key):
    before, after = graph(), graph(**change)
    assert differing(tables(before), tables(after)) == other_table
    assert differing(keys(before), keys(after)) == other_table | other_key
    assert (before.documents != after.documents) == ("ingest" in next(iter(change)))


def test_a_reduce_belongs_to_its_sources_and_what_follows_from_it_to_what_it_saw():
    more = [*RECIPE["sources"], {"name": "b", "format": "jsonl", "path": "/b"}]
    assert differing(tables(graph()), tables(graph(sources=more))) == {"duplicates"}
    one, other = (graph().key("dear", {"duplicates": state}) for state in ("a", "b"))
    assert one != other


def test_the_content_of_a_rule_file_counts_not_its_name(tmp_path):
    text = "-- signals: gopher\n-- $n = 3 -- words\nSELECT CASE WHEN s.n_words < $n THEN 'short' END AS reason\n"
    for name, content in {
        "a": text,
        "b": "-- the same\n" + text,
        "c": text.replace("n_words", "n_lines + s.n_words"),
    }.items():
        (tmp_path / f"{name}.sql").write_text(content.replace("n_lines", "stop_words"))
    found = [keys(graph(rules__clean={"rules": str(tmp_path / f"{name}.sql")})) for name in "abc"]
    assert found[0] == found[1]
    assert differing(found[0], found[2]) == {"clean", "dear"}
    assert differing(found[0], keys(graph(rules__clean={"rules": str(tmp_path / "a.sql"), "n": 4}))) == {
        "clean",
        "dear",
    }


def test_a_mixture_is_another_table_for_another_definition_seed_or_name():
    changes = [{}, {"seed": 9}, {"name": "b"}, {"mixtures__main__where": "true"}, {"mixtures__main__seed": 9}]
    names = [graph(**change).mixture_table("main") for change in changes]
    assert len(set(names)) == len(names)


def test_a_graph_pickles_for_the_workers():
    one = graph()
    other = pickle.loads(pickle.dumps(one))
    assert other.entries == one.entries
    assert json.dumps(keys(other)) == json.dumps(keys(one))
