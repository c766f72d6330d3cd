"""The lake keeps what DuckLake alone does not: each trap that was met once is a law here."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from storage import catalog
from storage.errors import LockedError, QueryError, RecipeError
from storage.lake import Lake
from storage.schema import Column, score_schema
from storage.shards import ShardFile, write_shard

COLUMNS = (Column("v", pa.float64(), "a value", unit="bits", higher_is_better=False),)
SCHEMA = score_schema(COLUMNS)


@pytest.fixture
def lake(tmp_path: Path):
    lake = Lake.create(tmp_path / "it's a lake")
    lake.make_table("t__1", SCHEMA, COLUMNS)
    yield lake
    lake.close()


def shard(lake: Lake, number: int, value: float, rows: int = 10) -> ShardFile:
    ids = pa.array(range(number * 100, number * 100 + rows), pa.int64())
    columns = [ids, pa.array([True] * rows), pa.array([value] * rows)]
    batch = pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
    return write_shard(lake.data, "t__1", f"{number:08d}-000", [batch], SCHEMA)


def total(lake: Lake) -> tuple[int, float]:
    return lake.rows("SELECT count(*), sum(v) FROM lake.main.t__1")[0]


def test_a_shard_is_in_the_table_and_in_the_books_or_in_neither(lake):
    lake.register([(shard(lake, 0, 1.0), "a"), (shard(lake, 1, 2.0), "a")])
    assert total(lake) == (20, 30.0)
    with pytest.raises(RuntimeError):
        lake.register([(shard(lake, 2, 4.0), "a")], also=_fail)
    assert total(lake) == (20, 30.0)
    assert list(lake.shards("t__1")) == ["00000000-000", "00000001-000"]


def _fail() -> None:
    raise RuntimeError


def test_the_same_file_is_never_added_twice(lake):
    file = shard(lake, 0, 1.0)
    lake.register([(file, "a")])
    lake.register([(file, "b")])
    assert total(lake) == (10, 10.0)
    assert lake.shards("t__1")["00000000-000"].input == "b"


def test_replacing_a_shard_is_atomic_for_a_reader_that_is_open(lake):
    lake.register([(shard(lake, 0, 1.0), "a"), (shard(lake, 1, 2.0), "a")])
    reader = catalog.attach(lake.folder, read_only=True)
    reader.execute("BEGIN")
    before = reader.execute("SELECT count(*), sum(v) FROM lake.main.t__1").fetchall()
    lake.register([(shard(lake, 0, 5.0), "b")])  # an open reader does not make the commit fail
    assert reader.execute("SELECT count(*), sum(v) FROM lake.main.t__1").fetchall() == before
    reader.execute("COMMIT")
    assert reader.execute("SELECT count(*), sum(v) FROM lake.main.t__1").fetchall() == [(20, 70.0)]
    reader.close()


def test_a_snapshot_keeps_what_was_replaced(lake):
    lake.register([(shard(lake, 0, 1.0), "a")])
    before = lake.snapshot()
    lake.register([(shard(lake, 0, 5.0), "b")])
    assert lake.rows(f"SELECT sum(v) FROM lake.main.t__1 AT (VERSION => {before})") == [(10.0,)]


def test_an_empty_shard_exists_without_rows(lake):
    lake.register([(shard(lake, 0, 1.0, rows=0), "a")])
    assert lake.shards("t__1")["00000000-000"].rows == 0
    lake.register([(shard(lake, 0, 1.0, rows=3), "a")])
    assert total(lake) == (3, 3.0)


def _write_many(folder: Path, first: int, count: int) -> None:
    lake = Lake(folder)
    for number in range(first, first + count):
        lake.register([(shard(lake, number, 1.0), "a")])
    lake.close()


def test_two_writers_lose_nothing(lake):
    lake.close()
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(lake.folder, start, 8)) for start in (0, 50)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert total(lake) == (160, 160.0)
    assert len(lake.shards("t__1")) == 16


def test_kill_9_in_the_middle_of_commits_leaves_only_orphans(lake):
    lake.close()
    context = multiprocessing.get_context("spawn")
    for round_ in range(3):
        writer = context.Process(target=_write_many, args=(lake.folder, round_ * 1000, 1000))
        writer.start()
        time.sleep(1.2 + 0.13 * round_)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        rows, _ = total(lake)
        shards = lake.shards("t__1")
        assert rows == sum(one.rows for one in shards.values())
        assert all(Path(lake.data, one.path).exists() for one in shards.values())
        lake.close()


def test_orphans_are_swept_by_our_own_rule(lake):
    live, orphan = shard(lake, 0, 1.0), shard(lake, 1, 1.0)
    lake.register([(live, "a")])
    lake.register([(shard(lake, 0, 2.0), "b")])  # `live` is replaced; a snapshot still reads it
    assert lake.sweep() == []
    assert [Path(path).name for path in lake.sweep(older_than=-1)] == [Path(orphan.path).name]
    assert Path(lake.data, live.path).exists()


def test_what_breaks_alignment_or_deletes_live_files_is_never_called():
    root = Path(__file__).parents[2]
    forbidden = r"merge_adjacent|rewrite_data_files|cleanup_old|delete_orphaned|flush_inlined|\bCHECKPOINT\b"
    sources = [path for room in ("storage", "scorers", "pipelines", "flows") for path in (root / room).rglob("*.py")]
    assert sources
    assert [path for path in sources if re.search(forbidden, path.read_text())] == []


def test_quotes_inside_structs_survive(lake):
    lake.commit(lambda: lake.insert("mixtures", [("r", "a \"b\" 'c'", "t", None, '{"x": "it\'s"}')]))
    assert lake.rows("SELECT name, record ->> 'x' FROM lake.main.mixtures") == [("a \"b\" 'c'", "it's")]


def test_columns_say_their_unit_and_direction(lake):
    comments = lake.rows("SELECT comment FROM duckdb_columns() WHERE table_name = 't__1' AND column_name = 'v'")
    assert comments == [("a value; bits; lower is better",)]


def test_the_lock_names_its_holder_and_dies_with_it(lake):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from storage.catalog import locked; from pathlib import Path\n"
            "with locked(Path(sys.argv[1]), 't__1', 'run 7'): print('held', flush=True); time.sleep(60)",
            str(lake.folder),
        ],
        stdout=subprocess.PIPE,
    )
    with holder, holder.stdout as out:
        assert out.readline() == b"held\n"
        with pytest.raises(LockedError, match=rf"table t__1 is being written by run 7 \(pid {holder.pid}"):
            lake.locked("t__1", "me").__enter__()
        holder.kill()
        holder.wait()
    with lake.locked("t__1", "me"), lake.locked("u__1", "me"):
        pass


def test_a_query_sees_published_names_only(lake):
    lake.register([(shard(lake, 0, 1.5), "a")])
    row = ["1", "demo", "2026-01-01", None, "done", "", 1, "{}", "{}", "{}"]
    lake.commit(lambda: lake.insert("runs", [row]))
    views = {"t": "SELECT * FROM lake.main.t__1", "runs": "SELECT * FROM lake.main.runs"}
    lake.publish("demo", views, {"mixture": "SELECT * FROM lake.main.t__1 WHERE v = 1.5 AND name = 'x'"})
    answer = lake.query("SELECT sum(v) AS total FROM t")
    assert answer.to_pydict() == {"total": [15.0]}
    assert lake.query("SELECT count(*) AS n FROM mixture('x')").to_pydict() == {"n": [10]}
    assert pa.types.is_large_string(lake.query("SELECT recipe FROM runs").schema.field(0).type)  # room above 2 GB
    for attack in (
        "SELECT * FROM lake.main.shards",
        "SELECT * FROM read_parquet('/etc/passwd')",
        "COPY (SELECT 1) TO '/tmp/x'",
        "DELETE FROM t",
        "SELECT * FROM t__1",
    ):
        with pytest.raises(QueryError):
            lake.query(attack)
    with pytest.raises(QueryError, match="did you mean 'demo'"):
        lake.query("SELECT 1", recipe="dmo")


def test_a_folder_without_a_lake_is_the_users_error(tmp_path):
    with pytest.raises(RecipeError, match="no lake at"):
        Lake(tmp_path)
    (tmp_path / "lake.toml").write_text('format = 99\ncatalog = ""\n')
    with pytest.raises(RecipeError, match="format 99; upgrade"):
        catalog.attach(tmp_path)
