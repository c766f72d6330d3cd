"""The DuckLake catalog: the one place that attaches it, commits to it and locks its tables.

    LAKE/lake.toml        format version, catalog URL
    LAKE/catalog.sqlite   names, schemas, snapshots (or PostgreSQL, by URL)
    LAKE/data/main/...    Parquet: our shards and DuckLake's own small files
    LAKE/locks/           one file per table that a run writes, held by flock (on PostgreSQL: advisory locks)

Why each option of `attach`: without WAL an open reader makes a writer's commit fail; with inlining, quotes inside
STRUCT strings were lost. DuckLake's own merge, rewrite, clean-up and inlining calls are never used: they break the
alignment of shards, or delete files that are live.
"""

import fcntl
import hashlib
import json
import os
import random
import socket
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import duckdb

from storage.errors import LockedError, RecipeError, ShardError

FORMAT = 1
COMMIT_ATTEMPTS = 40

T = TypeVar("T")


def create(folder: Path, catalog: str = "") -> None:
    """Make the folder of a new lake; an existing lake is left as it is.

    Args:
        catalog: "" for SQLite beside the data, or a PostgreSQL URL for a team.
    """
    if not (folder / "lake.toml").exists():
        try:
            (folder / "data" / "main").mkdir(parents=True, exist_ok=True)
            (folder / "locks").mkdir(exist_ok=True)
        except OSError as error:
            raise RecipeError(f"no lake can be made at {folder}: {error.strerror}; choose another folder") from None
        aside = folder / f".lake.toml.{os.getpid()}"
        aside.write_text(f"format = {FORMAT}\ncatalog = {json.dumps(catalog)}\n")
        os.rename(aside, folder / "lake.toml")


def attach(folder: Path, *, read_only: bool = False) -> duckdb.DuckDBPyConnection:
    """A connection of its own on which the lake's catalog is attached as `lake`.

    Raises RecipeError where there is no lake, or one of a newer format.
    """
    folder = folder.resolve()
    url = _settings(folder)["catalog"]
    con = duckdb.connect(config={"allow_unsigned_extensions": "false", "autoinstall_known_extensions": "false"})
    backend, store = ("postgres", url) if url else ("sqlite", str(folder / "catalog.sqlite"))
    load_extensions(con, "ducklake", "postgres_scanner" if url else "sqlite_scanner")
    # The paths in the catalog are relative: a lake may be moved or copied as a folder.
    options = ["OVERRIDE_DATA_PATH true", f"DATA_PATH {quote(str(folder / 'data') + '/')}", "DATA_INLINING_ROW_LIMIT 0"]
    if not url:
        options += ["META_JOURNAL_MODE 'WAL'", "META_BUSY_TIMEOUT 10000"]
    if read_only:
        options.append("READ_ONLY")
    con.execute(f"ATTACH {quote(f'ducklake:{backend}:{store}')} AS lake ({', '.join(options)})")
    con.execute("SET arrow_large_buffer_size = true; SET TimeZone = 'UTC'; SET enable_progress_bar = false")
    return con


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = tomllib.loads((folder / "lake.toml").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError(f"no lake at {folder}; make one with: corpusmill run RECIPE --lake {folder}") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{folder / 'lake.toml'} is damaged: {error}; restore format and catalog") from None
    if settings["format"] > FORMAT:
        raise RecipeError(f"{folder} is a lake of format {settings['format']}; upgrade corpusmill (it reads {FORMAT})")
    return settings


def load_extensions(con: duckdb.DuckDBPyConnection, *names: str) -> None:
    """Load the signed extensions out of their wheels: nothing is downloaded, nothing written to the home folder."""
    for name in names:
        folder = files(f"duckdb_extension_{name}") / "extensions" / f"v{duckdb.__version__}"
        con.execute(f"LOAD {quote(str(folder / f'{name}.duckdb_extension'))}")


def commit(
    connection: Callable[[], duckdb.DuckDBPyConnection],
    reconnect: Callable[[], None],
    folder: Path,
    change: Callable[[], T],
) -> T:
    """Run `change` in one transaction; when another writer got in between, run it whole again.

    Writers of one folder take turns by a lock of their own: two of them inside DuckLake at once did not only conflict,
    they crashed `ducklake_add_data_files` (a segmentation fault in 2 of 10 runs). Writers on other machines, with a
    PostgreSQL catalog, can still conflict: for them there is the replay, on a fresh connection.

    Args:
        change: reads what it needs inside itself, since it may run several times.
    """
    for attempt in range(COMMIT_ATTEMPTS):
        with _turn(folder):
            con = connection()
            try:
                con.execute("BEGIN")
                result = change()
                con.execute("COMMIT")
                return result
            except duckdb.Error as error:
                _rollback(con)
                if not _may_pass(error):
                    raise
                last = error
                reconnect()
            except BaseException:
                _rollback(con)
                raise
        # Jitter, so that two writers do not meet again.
        time.sleep(random.uniform(0.2, 1.0) * min(0.05 * 2**attempt, 2.0))
    raise ShardError(f"the catalog stayed busy through {COMMIT_ATTEMPTS} attempts: {last}")


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    with open(folder / "locks" / "commit", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _rollback(con: duckdb.DuckDBPyConnection) -> None:
    with suppress(duckdb.TransactionException):  # a failed COMMIT has ended the transaction already
        con.execute("ROLLBACK")


def _may_pass(error: duckdb.Error) -> bool:
    text = str(error).lower()
    return any(word in text for word in ("conflict", "locked", "busy", "could not serialize", "deadlock"))


@contextmanager
def locked(folder: Path, table: str, who: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a table for as long as the context lasts; it is freed when the process dies, however it dies.

    On SQLite it is a file lock in the lake's folder; on PostgreSQL an advisory lock, which other machines see too.
    Raises LockedError, naming the holder, when another process has it (unless told to `wait`).
    """
    who = f"{who} (pid {os.getpid()} on {socket.gethostname()}, since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC)"
    url = _settings(folder)["catalog"]
    with _advisory_lock(url, table, who, wait) if url else _file_lock(folder, table, who, wait):
        yield


@contextmanager
def _file_lock(folder: Path, table: str, who: str, wait: bool) -> Iterator[None]:
    with open(folder / "locks" / f"{table}.lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            raise LockedError(f"table {table} is being written by {file.read().strip() or 'another run'}") from None
        file.truncate(0)
        file.write(who)
        file.flush()
        yield


@contextmanager
def _advisory_lock(url: str, table: str, who: str, wait: bool) -> Iterator[None]:
    """A transaction on a connection of its own holds the lock; the session's name says who."""
    key = int.from_bytes(hashlib.sha256(table.encode()).digest()[:8], "big", signed=True)
    with duckdb.connect() as con:
        load_extensions(con, "postgres_scanner")
        con.execute(f"ATTACH {quote(url)} AS pg (TYPE postgres, READ_ONLY)")

        def ask(select: str) -> Any:
            return con.execute(f"FROM postgres_query('pg', {quote(select)})").fetchone()

        con.execute("BEGIN")
        ask(f"SELECT set_config('application_name', {quote(who[:63])}, true)")
        if wait:
            ask(f"SELECT pg_advisory_xact_lock({key})::text")
        elif ask(f"SELECT pg_try_advisory_xact_lock({key})") != (True,):
            holder = ask(
                "SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory' "
                f"AND granted AND (classid::bigint << 32 | objid::bigint) = {key}"
            )
            raise LockedError(f"table {table} is being written by {holder[0] if holder else 'another run'}")
        yield


def quote(text: str) -> str:
    """A SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def name(identifier: str) -> str:
    """A quoted SQL identifier."""
    return '"' + identifier.replace('"', '""') + '"'
