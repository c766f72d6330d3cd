"""SQL of the user: parsed and allowlisted before it runs, then run on a locked connection.

    check_query        what `query` takes: one SELECT over named relations
    check_expression   what `where`, `group_by`, `copies` take: one scalar expression over a document and its scores
    check_order        what `prefer` takes: an expression and, perhaps, ASC or DESC
    lock               the connection on which a checked query runs

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
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

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

_ONE_DOCUMENT = "an expression sees one document at a time"
_NOT_SCALAR = {
    "SUBQUERY": f"no subqueries: {_ONE_DOCUMENT}; make the subquery a score or a rule set of its own",
    "WINDOW": f"no window functions: {_ONE_DOCUMENT}",
    "STAR": "no stars: name the columns",
    "POSITIONAL_REFERENCE": "no positions (#1): name the column",
}
_PARAMETER = "no parameters ($1, ?): write the value itself"

# A value comes out of these although one that went in is NULL. (AND and OR too, as SQL's three-valued logic has it.)
_HIDES_NULL = {"OPERATOR_IS_NULL", "OPERATOR_IS_NOT_NULL", "OPERATOR_COALESCE", "CASE_EXPR"}
_HIDES_NULL |= {"COMPARE_DISTINCT_FROM", "COMPARE_NOT_DISTINCT_FROM"}
_HIDES_NULL_FUNCTIONS = {"concat", "concat_ws", "greatest", "least", "hash", "typeof", "row", "struct_pack", "map"}
_HIDES_NULL_FUNCTIONS |= {f"{kind}_{name}" for kind in ("list", "array") for name in ("value", "concat", "cat", "zip")}
_HIDES_NULL_FUNCTIONS |= {"list_pack", "json_array", "json_object"}
_LAMBDA_FUNCTIONS = {f"{prefix}{name}" for prefix in ("list_", "array_", "") for name in ("apply", "filter", "reduce")}
_LAMBDA_FUNCTIONS |= {"list_transform", "array_transform"}

# They read the clock, and duckdb_functions() calls them consistent or does not say.
_CLOCK = {"ago", "current_localtime", "current_localtimestamp", "pg_conf_load_time", "pg_postmaster_start_time"}


@dataclass(frozen=True)
class Scope:
    """What an expression may name: columns of the documents, and per entry its columns (with `computed`)."""

    documents: Collection[str]
    entries: Mapping[str, Collection[str]]


@dataclass(frozen=True)
class Expression:
    """A checked expression.

    sql: the text in parentheses, so that it can stand anywhere.
    references: (entry, column) in the spelling of the scope, sorted, unique; entry None for a document's column.
    null_tests: entries whose NULL the expression hides (IS NULL, coalesce, CASE, IS DISTINCT FROM, concat, ...) without
        asking `entry.computed`; a score that was never computed would pass there for one that is NULL.
    """

    sql: str
    references: tuple[tuple[str | None, str], ...]
    null_tests: tuple[str, ...]


def nearest(name: str, names: Collection[str]) -> str:
    """ "; did you mean 'x'?" for the name closest to `name`, or "" when none is close."""
    close = difflib.get_close_matches(name.lower(), {n.lower(): n for n in names}, n=1, cutoff=0.6)
    return f"; did you mean {_find(close[0], names)!r}?" if close else ""


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
    todo: list[tuple[Any, frozenset[str]]] = [(_parse(sql).node, frozenset())]
    while todo:
        item, ctes = todo.pop()
        if isinstance(item, list):
            todo += [(child, ctes) for child in item]
            continue
        if not isinstance(item, dict):
            continue
        kind = _known_kind(item)
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
            _check_function(item["function_name"])
        todo += [(value, ctes) for key, value in item.items() if key != "cte_map"]


def check_expression(sql: str, scope: Scope) -> Expression:
    """The checked expression; QueryError unless `sql` is one scalar expression over the names of `scope`.

    No subqueries, aggregates, window functions, stars, and nothing that changes from run to run (random, the clock):
    the same recipe must choose the same documents.
    """
    text = sql.strip()
    if not text:
        raise QueryError("the expression is empty; write one over the columns, such as language.code = 'en'")
    # The text must mean the same alone and in parentheses. `1) , (2` and `1 FROM x --` fail one or the other.
    alone, empty = _parse(f"SELECT\n{text}\n", skip=len("SELECT\n")), _parse("SELECT 1")
    if len(alone.node.get("select_list", ())) != 1 or _without_columns(alone.node) != _without_columns(empty.node):
        raise QueryError(f"one expression is wanted, without alias, FROM, WHERE or ORDER BY: {text!r}")
    if alone.text != _parse(f"SELECT (\n{text}\n)", skip=len("SELECT (\n")).text:
        raise QueryError(f"one expression is wanted, without alias: {text!r}")
    found = list(_references(alone.node["select_list"][0], scope))
    asked = {entry for entry, column, _ in found if column == "computed"}
    references = sorted({(entry, column) for entry, column, _ in found}, key=lambda pair: (pair[0] or "", pair[1]))
    null_tests = sorted({entry for entry, _, hidden in found if hidden and entry and entry not in asked})
    return Expression(f"({text}\n)" if "--" in text else f"({text})", tuple(references), tuple(null_tests))


def check_order(sql: str, scope: Scope) -> tuple[Expression, bool | None]:
    """The expression that is ordered by, and whether DESC (True), ASC (False) or neither (None) follows it."""
    text = sql.strip()
    empty = _parse("SELECT 1 ORDER BY 1").node
    node = _parse(f"SELECT 1 ORDER BY\n{text}\n", skip=len("SELECT 1 ORDER BY\n")).node
    keys = [key for modifier in node["modifiers"] for key in modifier.get("orders", ())]
    if len(keys) != 1 or {**node, "modifiers": None} != {**empty, "modifiers": None} or len(node["modifiers"]) != 1:
        raise QueryError(f"one expression is wanted, then ASC or DESC or nothing; ties go by id: {text!r}")
    if keys[0]["null_order"] != "ORDER_DEFAULT":
        raise QueryError(f"NULL always comes last; drop NULLS FIRST or NULLS LAST: {text!r}")
    descending = {"ORDER_DEFAULT": None, "ASCENDING": False, "DESCENDING": True}[keys[0]["type"]]
    if descending is not None:
        text = re.sub(r"(?i)\s*\b(asc|desc)\Z", "", text)
    return check_expression(text, scope), descending


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
class _Parsed:
    node: dict[str, Any]
    text: str  # the tree as JSON, without places


def _parse(sql: str, skip: int = 0) -> _Parsed:
    """The tree of the one SELECT in `sql`; `skip`: characters of ours before the user's."""
    if "\0" in sql or (not sql.isascii() and any("\ud800" <= char <= "\udfff" for char in sql)):
        raise QueryError("the SQL holds a character that is no text (NUL or a lone surrogate); remove it")
    row = _connection().execute("SELECT json_serialize_sql(?::VARCHAR)", [sql]).fetchone()
    assert row is not None
    text = re.sub(r'"query_location":\d+', '"query_location":0', row[0])
    try:
        tree = json.loads(text)
    except RecursionError:
        raise QueryError("the SQL is nested too deeply; split it up with WITH, or IN (...) for many ORs") from None
    if tree["error"] and tree["error_type"] != "parser":
        raise QueryError(_not_select(sql))
    if tree["error"]:
        raise QueryError(f"{tree['error_message']}{_place(sql, tree.get('position'), skip)}")
    if len(tree["statements"]) != 1:
        raise QueryError(f"one SELECT is wanted, not {len(tree['statements']) or 'an empty text'}; run them one by one")
    if tree["statements"][0].get("named_param_map"):
        raise QueryError(_PARAMETER)
    return _Parsed(tree["statements"][0]["node"], text)


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


def _known_kind(item: dict[str, Any]) -> str:
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


def _check_function(name: str) -> None:
    name = name.lower()
    if name in DENIED or name.startswith(DENIED_PREFIX):
        raise QueryError(f"{name}() is not allowed: it reads or changes more than the tables; drop it")
    if name not in (known := _functions().known):
        raise QueryError(f"no function {name}(){nearest(name, known)}")


def _is_text(item: dict[str, Any]) -> bool:
    return item.get("class") == "CONSTANT" and item["value"]["type"]["id"] == "VARCHAR"


def _without_columns(node: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in node.items() if key != "select_list"}


def _references(tree: Any, scope: Scope) -> Iterator[tuple[str | None, str, bool]]:
    """(entry, column, whether its NULL is hidden) for each name in the expression."""
    todo: list[tuple[Any, frozenset[str], bool]] = [(tree, frozenset(), False)]
    while todo:
        item, parameters, hidden = todo.pop()
        if isinstance(item, list):
            todo += [(child, parameters, hidden) for child in item]
            continue
        if not isinstance(item, dict):
            continue
        kind = _known_kind(item)
        if kind in _NOT_SCALAR:
            raise QueryError(_NOT_SCALAR[kind])
        if kind == "CONSTANT":
            continue
        if kind == "COLUMN_REF":
            if item["column_names"][0].lower() not in parameters:
                yield *_resolve(item["column_names"], scope), hidden
            continue
        if kind == "FUNCTION":
            name, children = item["function_name"].lower(), item["children"]
            _check_scalar(name, len(children))
            hidden |= name in _HIDES_NULL_FUNCTIONS or name in _LAMBDA_FUNCTIONS
            # `metadata->'key'` is a LAMBDA to the parser too; a real one is the second argument of these.
            if name in _LAMBDA_FUNCTIONS and len(children) > 1 and children[1]["class"] == "LAMBDA":
                left, body = children[1]["lhs"], children[1]["expr"]
                names = left["children"] if left["class"] == "FUNCTION" else [left]
                given = {part["column_names"][0].lower() for part in names if part["class"] == "COLUMN_REF"}
                todo.append((body, parameters | given, hidden))
                item = {**item, "children": [children[0], *children[2:]]}
        elif kind == "OPERATOR" and item["type"] == "GROUPING_FUNCTION":
            raise QueryError(f"no GROUPING(): {_ONE_DOCUMENT}")
        hidden |= item.get("type") in _HIDES_NULL
        todo += [(value, parameters, hidden) for value in item.values()]


def _check_scalar(name: str, arguments: int) -> None:
    _check_function(name)
    if name in _functions().aggregates:
        raise QueryError(f"{name}() is an aggregate: {_ONE_DOCUMENT}; drop it")
    if name == "unnest":
        raise QueryError(f"unnest() makes several rows: {_ONE_DOCUMENT}; use list functions")
    if name in _functions().unstable or (name == "age" and arguments == 1):
        raise QueryError(
            f"{name}() changes from run to run, and the same recipe must choose the same documents; "
            "write the value itself, such as DATE '2025-01-01'"
        )


def _resolve(parts: list[str], scope: Scope) -> tuple[str | None, str]:
    name, entry = ".".join(parts), _find(parts[0], scope.entries)
    if entry and len(parts) > 1:
        columns = scope.entries[entry]
        if column := _find(parts[1], columns):
            return entry, column
        near = nearest(parts[1], columns)
        raise QueryError(f"{entry!r} has no column {parts[1]!r}{near}; it has {', '.join(columns)}")
    if column := _find(parts[0], scope.documents):
        return None, column
    if entry:
        raise QueryError(f"{name!r} is an entry; name one of its columns: {_dotted(entry, scope)}")
    every = [f"{entry}.{column}" for entry, columns in scope.entries.items() for column in columns]
    owners = [full for full in every if full.split(".")[1].lower() == name.lower()]
    near = f"; did you mean {' or '.join(owners)}?" if owners else nearest(name, [*scope.documents, *every])
    entries = f", and of entries as entry.column: {', '.join(scope.entries)}" if scope.entries else ""
    raise QueryError(f"no column {name!r}{near or '; there are ' + ', '.join(scope.documents) + entries}")


def _dotted(entry: str, scope: Scope) -> str:
    return ", ".join(f"{entry}.{column}" for column in scope.entries[entry])


def _find(name: str, names: Collection[str]) -> str | None:
    """The spelling in `names` of `name`; SQL's identifiers do not heed letter case."""
    return name if name in names else next((known for known in names if known.lower() == name.lower()), None)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@dataclass(frozen=True)
class _Functions:
    known: frozenset[str]
    aggregates: frozenset[str]
    unstable: frozenset[str]


@lru_cache(maxsize=1)
def _functions() -> _Functions:
    result = _connection().execute(
        "SELECT lower(function_name), function_type, stability FROM duckdb_functions() "
        "WHERE function_type IN ('scalar', 'aggregate', 'macro')"
    )
    rows = result.fetchall()
    scalars = {name for name, kind, _ in rows if kind != "aggregate"}
    return _Functions(
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
