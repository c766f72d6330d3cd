"""SQL of the user: parsed and allowlisted before it runs, then run on a locked connection.

    check_query   what `query` takes: one SELECT over named relations
    lock          the connection on which a checked query runs
    parse, ...    the parts of which storage.expressions is made too

DuckDB itself parses (`json_serialize_sql`), so what is checked is what will run. The walk knows every kind of node that
it lets through: a kind it has never heard of is refused. A read-only attach and `lock` are not enough by themselves:
`COPY` still overwrites Parquet inside the lake, `sqlite_scan` reads any SQLite file, `ATTACH` opens one for writing.

Functions: of those that `duckdb_functions()` of a bare DuckDB lists (core, icu, json, parquet; so none of the attached
extensions), every scalar, aggregate and macro is allowed but DENIED. All 818 names of 1.5.5 were gone through by hand,
with the bodies of the macros; tests/storage/functions.txt holds the names that were seen, and a test fails on others.
"""

import difflib
import json
import re
import secrets
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from storage.errors import QueryError

if TYPE_CHECKING:
    import duckdb

_SESSION = {"getenv", "current_setting", "getvariable", "in_search_path", "current_query", "current_query_id"}
_SESSION |= {"current_connection_id", "current_transaction_id", "txid_current"}
_CATALOG = {"pg_get_viewdef", "pg_get_constraintdef", "format_type", "get_block_size"}
_EFFECTS = {"nextval", "currval", "write_log", "setseed", "sleep_ms", "pg_sleep"}
_RUNS_TEXT = {"json_serialize_plan"}  # binds the SQL that it is given, and so opens the files named there
_TRUSTS_BYTES = {"combine", "finalize", "variant_bytes_to_variant"}  # engine internals on states made by hand
DENIED = frozenset(_SESSION | _CATALOG | _EFFECTS | _RUNS_TEXT | _TRUSTS_BYTES)
DENIED_PREFIX = "__internal_"

TABLE_FUNCTIONS = frozenset({"range", "generate_series", "unnest", "json_each", "json_tree"})
"""They compute rows from their arguments and read nothing else."""

_TABLES = {"BASE_TABLE", "SUBQUERY", "JOIN", "TABLE_FUNCTION", "EXPRESSION_LIST", "EMPTY", "PIVOT", "SHOW_REF"}
_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE"}
_MODIFIERS = {"ORDER_MODIFIER", "LIMIT_MODIFIER", "LIMIT_PERCENT_MODIFIER", "DISTINCT_MODIFIER"}
_ORDERS = {"ORDER_DEFAULT", "ASCENDING", "DESCENDING"}
_TYPES = {f"{kind}_TYPE_INFO" for kind in ("UNBOUND", "DECIMAL", "STRING", "LIST", "STRUCT", "ARRAY", "ENUM")}
_KINDS = _TABLES | _NODES | _MODIFIERS | _ORDERS | _TYPES
_SCALARS = {"COLUMN_REF", "CONSTANT", "FUNCTION", "OPERATOR", "COMPARISON", "CONJUNCTION", "CAST", "CASE", "BETWEEN"}
_SCALARS |= {"LAMBDA", "COLLATE"}
_CLASSES = _SCALARS | {"STAR", "SUBQUERY", "WINDOW", "POSITIONAL_REFERENCE"}

MAX_DEPTH = 200
_TOO_DEEP = "the SQL is nested too deeply; split it up with WITH, or IN (...) for many ORs"
_PARAMETER = "no parameters ($1, ?): write the value itself"

# They read the clock, and duckdb_functions() calls them consistent or does not say.
_CLOCK = {"ago", "current_localtime", "current_localtimestamp", "pg_conf_load_time", "pg_postmaster_start_time"}


def nearest(name: str, names: Collection[str]) -> str:
    """ "; did you mean 'x'?" for the name closest to `name`, or "" when none is close."""
    close = difflib.get_close_matches(name.lower(), {n.lower(): n for n in names}, n=1, cutoff=0.6)
    return f"; did you mean {find(close[0], names)!r}?" if close else ""


def check_query(sql: str, relations: Collection[str], table_functions: Collection[str] = ()) -> None:
    """Raise QueryError unless `sql` is one SELECT that reads nothing but `relations` and its own CTEs.

    Args:
        relations: the names that FROM may use, unqualified; letter case does not matter.
        table_functions: table macros that FROM may call with text constants, such as mixture('main').
    """
    known = {name.lower() for name in relations}
    ours = {name.lower() for name in table_functions}
    listed = f"FROM can name {', '.join(sorted(relations))}" if relations else "there are no tables yet"
    # (what is still to be visited, the CTEs that are seen from there)
    todo: list[tuple[Any, frozenset[str]]] = [(parse(sql).node, frozenset())]
    while todo:
        item, ctes = todo.pop()
        if isinstance(item, list):
            todo += [(child, ctes) for child in item]
            continue
        if not isinstance(item, dict):
            continue
        kind = known_kind(item)
        if kind == "CONSTANT":
            continue  # data: whatever it holds, it is not run
        if "cte_map" in item:
            # A CTE sees those before it, not itself and not those after it: there the name means a table.
            for cte in item["cte_map"]["map"]:
                todo.append((cte["value"], ctes))
                ctes |= {cte["key"].lower()}
        if kind == "RECURSIVE_CTE_NODE":
            todo.append((item["right"], ctes | {item["cte_name"].lower()}))
            item = {**item, "right": None}
        elif kind == "BASE_TABLE":
            if item.get("at_clause"):
                raise QueryError("AT (...) is not taken in a query; drop it: a query sees the newest snapshot")
            if (name := item["table_name"]).lower() not in known | ctes:
                raise QueryError(f"no table {name!r}{nearest(name, relations)}; {listed}")
        elif kind == "SHOW_REF" and (item["show_type"] not in ("DESCRIBE", "SUMMARY") or not item["query"]):
            raise QueryError(f"SHOW reads the catalog; write DESCRIBE <table>: {listed}")
        elif kind == "TABLE_FUNCTION":
            function = item["function"]
            if function.get("class") != "FUNCTION":
                raise QueryError("a table function is called as name(arguments)")
            _refuse_qualified(function)
            name, arguments = function["function_name"].lower(), function["children"]
            if name not in TABLE_FUNCTIONS | ours:
                near = nearest(name, TABLE_FUNCTIONS | ours)
                functions = ", ".join(f"{function}(...)" for function in sorted(TABLE_FUNCTIONS | ours))
                raise QueryError(f"{name}() cannot be called in FROM{near}; {listed}, or call {functions}")
            if name in ours and not all(_is_text(argument) for argument in arguments):
                raise QueryError(f"{name}() takes text constants: write {name}('main')")
            item = {**item, "function": arguments}
        elif kind in ("FUNCTION", "WINDOW"):
            check_function(item["function_name"])
        todo += [(value, ctes) for key, value in item.items() if key != "cte_map"]


class Named(NamedTuple):
    """What a query names, in lower case as SQL reads it.

    Attributes:
        tables: in FROM, its own CTEs too.
        columns: each part of each name of a column, `relation` of `relation.*` too.
        calls: (function, argument) of table functions called with text, as mixture('main'); the argument as written.
    """

    tables: set[str]
    columns: set[str]
    calls: set[tuple[str, str]]


def named(sql: str) -> Named:
    """What a query names; QueryError where it is none."""
    found = Named(set(), set(), set())
    todo: list[Any] = [parse(sql).node]
    while todo:
        item = todo.pop()
        if isinstance(item, list):
            todo += item
        elif isinstance(item, dict) and not _is_text(item):
            if item.get("type") == "BASE_TABLE":
                found.tables.add(item["table_name"].lower())
            elif item.get("type") == "TABLE_FUNCTION":
                call = item["function"]
                texts = [argument["value"]["value"] for argument in call["children"] if _is_text(argument)]
                found.calls.update((call["function_name"].lower(), text) for text in texts)
            found.columns.update(part.lower() for part in item.get("column_names", ()))
            found.columns.add(item.get("relation_name", "").lower())
            todo += item.values()
    return found


def lock(con: "duckdb.DuckDBPyConnection", data_dir: str) -> None:
    """Let `con` reach no file outside `data_dir`, load nothing, and change no setting any more.

    Call it last: after the read-only ATTACH, USE, and the temporary views. Queries that `check_query` passed keep
    working, spill to a folder of this connection (removed when it closes), and see what other processes commit.
    """
    spill = f"{tempfile.gettempdir()}/corpusmill-{secrets.token_hex(8)}"
    for setting, value in {
        "python_enable_replacements": "false",  # FROM df would read a variable of the program
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "allow_community_extensions": "false",
        "temp_directory": _quoted(spill),  # DuckDB allows it by itself
        "allowed_directories": f"[{_quoted(data_dir)}]",
        "enable_external_access": "false",
        "lock_configuration": "true",
    }.items():
        con.execute(f"SET {setting} = {value}")


@dataclass(frozen=True)
class Parsed:
    """A SELECT as DuckDB parsed it."""

    node: dict[str, Any]
    text: str  # the tree as JSON, without places


def parse(sql: str, skip: int = 0) -> Parsed:
    """The tree of the one SELECT in `sql`; `skip`: characters of ours before the user's."""
    if "\0" in sql or (not sql.isascii() and any("\ud800" <= char <= "\udfff" for char in sql)):
        raise QueryError("the SQL holds a character that is no text (NUL or a lone surrogate); remove it")
    # A fixed depth, since how deep json.loads goes hangs on the version of Python.
    if max(accumulate((char in "([{") - (char in ")]}") for char in sql), default=0) > MAX_DEPTH:
        raise QueryError(_TOO_DEEP)
    row = _connection().execute("SELECT json_serialize_sql(?::VARCHAR)", [sql]).fetchone()
    assert row is not None
    text = re.sub(r'"query_location":\d+', '"query_location":0', row[0])
    try:
        tree = json.loads(text)
    except RecursionError:
        raise QueryError(_TOO_DEEP) from None
    if tree["error"] and tree["error_type"] != "parser":
        raise QueryError(_not_select(sql))
    if tree["error"]:
        raise QueryError(f"{tree['error_message']}{_place(sql, tree.get('position'), skip)}")
    if len(tree["statements"]) != 1:
        raise QueryError(f"one SELECT is wanted, not {len(tree['statements']) or 'an empty text'}; run them one by one")
    if tree["statements"][0].get("named_param_map"):
        raise QueryError(_PARAMETER)
    return Parsed(tree["statements"][0]["node"], text)


def _place(sql: str, position: str | None, skip: int) -> str:
    if position is None:
        return ""
    lines = sql[skip : max(min(int(position), len(sql.rstrip())), skip)].split("\n")
    return f" (line {len(lines)}, column {len(lines[-1]) + 1})"


def _not_select(sql: str) -> str:
    bare = re.sub(r"(?s)--[^\n]*|/\*.*?\*/", " ", sql)
    word = match[0].upper() if (match := re.search(r"\w+", bare)) else ""
    if word == "PIVOT":
        return "PIVOT needs its values: write PIVOT ... ON column IN ('a', 'b') USING ..."
    if word in ("SELECT", "WITH", "FROM", "VALUES", "TABLE"):
        return (
            "only one SELECT at a time: several statements, or one that is no SELECT, stand here; PIVOT needs IN (...)"
        )
    remedy = {
        "COPY": "to write files, use an export or `corpusmill query --format`",
        "EXPORT": "to write files, use an export or `corpusmill query --format`",
        "EXPLAIN": "run the SELECT itself",
        "CALL": "the table functions that are allowed stand in FROM",
    }.get(word, "the lake is changed by `corpusmill run` only")
    return f"{word} is not a query; write one SELECT: {remedy}"


def known_kind(item: dict[str, Any]) -> str:
    """The node's kind, "" for a plain container; QueryError for a kind that is not allowed, or a qualified name."""
    if "class" in item:
        kind = str(item["class"])
        if kind == "PARAMETER":
            raise QueryError(_PARAMETER)
        if kind not in _CLASSES:
            raise QueryError(f"{kind.lower()} is not allowed in a query; write it another way")
    elif isinstance(item.get("type"), str):
        kind = item["type"]
        if kind not in _KINDS:
            raise QueryError(f"{kind.lower()} is not allowed in a query; write it another way")
    else:
        return ""
    _refuse_qualified(item)
    return kind


def _refuse_qualified(item: dict[str, Any]) -> None:
    name = item.get("table_name") or item.get("function_name") or item.get("name") or "name"
    path = [item.get("catalog_name") or item.get("catalog"), item.get("schema_name") or item.get("schema")]
    # The parser itself writes main.list_value for [1, 2].
    if path[0] or (path[1] and not (item.get("class") == "FUNCTION" and path[1] == "main")):
        kept = f"write {name}(...)" if "function_name" in item else f"write {name}"
        raise QueryError(f"{'.'.join(part for part in (*path, name) if part)}: no dots before a name here; {kept}")


def check_function(name: str) -> None:
    name = name.lower()
    if name in DENIED or name.startswith(DENIED_PREFIX):
        raise QueryError(f"{name}() is not allowed: it reads or changes more than the tables; drop it")
    if name not in (known := functions().known):
        raise QueryError(f"no function {name}(){nearest(name, known)}")


def _is_text(item: dict[str, Any]) -> bool:
    return item.get("class") == "CONSTANT" and item["value"]["type"]["id"] == "VARCHAR"


def find(name: str, names: Collection[str]) -> str | None:
    """The spelling in `names` of `name`; SQL's identifiers do not heed letter case."""
    return name if name in names else next((known for known in names if known.lower() == name.lower()), None)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@dataclass(frozen=True)
class Functions:
    """Names of the functions of a bare DuckDB, in lower case."""

    known: frozenset[str]
    aggregates: frozenset[str]
    unstable: frozenset[str]


@lru_cache(maxsize=1)
def functions() -> Functions:
    result = _connection().execute(
        "SELECT lower(function_name), function_type, stability FROM duckdb_functions() "
        "WHERE function_type IN ('scalar', 'aggregate', 'macro')"
    )
    rows = result.fetchall()
    scalars = {name for name, kind, _ in rows if kind != "aggregate"}
    return Functions(
        known=frozenset({name for name, _, _ in rows} | {"unnest"}),
        aggregates=frozenset({name for name, kind, _ in rows if kind == "aggregate"} - scalars),
        unstable=frozenset({name for name, kind, how in rows if kind == "scalar" and how != "CONSISTENT"} | _CLOCK),
    )


def _connection() -> "duckdb.DuckDBPyConnection":
    """A cursor of the process's parser: a DuckDB with no data; cursors may be used from any thread."""
    return _parser().cursor()


@lru_cache(maxsize=1)
def _parser() -> "duckdb.DuckDBPyConnection":
    import duckdb

    con = duckdb.connect(config={"threads": 1})
    con.execute("SET autoinstall_known_extensions = false")
    con.execute("SET autoload_known_extensions = false")
    con.execute("SET enable_external_access = false")
    con.execute("SET lock_configuration = true")
    return con
