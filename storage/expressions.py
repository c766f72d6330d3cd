"""SQL expressions of the recipe (`where`, `group_by`, `prefer`, `copies`): one scalar over a document and its scores.

    check_expression   one expression over the names of a Scope
    check_order        an expression and, perhaps, ASC or DESC

Parsed and allowlisted as queries are (storage.sql), and besides: one document at a time, and the same on every run.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from storage.errors import QueryError
from storage.sql import check_function, find, functions, known_kind, nearest, parse

_ONE_DOCUMENT = "an expression sees one document at a time"
_NOT_SCALAR = {
    "SUBQUERY": f"no subqueries: {_ONE_DOCUMENT}; make the subquery a score or a rule set of its own",
    "WINDOW": f"no window functions: {_ONE_DOCUMENT}",
    "STAR": "no stars: name the columns",
    "POSITIONAL_REFERENCE": "no positions (#1): name the column",
}
# A value comes out of these although one that went in is NULL. (AND and OR too, as SQL's three-valued logic has it.)
_HIDES_NULL = {"OPERATOR_IS_NULL", "OPERATOR_IS_NOT_NULL", "OPERATOR_COALESCE", "CASE_EXPR"}
_HIDES_NULL |= {"COMPARE_DISTINCT_FROM", "COMPARE_NOT_DISTINCT_FROM"}
_HIDES_NULL_FUNCTIONS = {"concat", "concat_ws", "greatest", "least", "hash", "typeof", "row", "struct_pack", "map"}
_HIDES_NULL_FUNCTIONS |= {f"{kind}_{name}" for kind in ("list", "array") for name in ("value", "concat", "cat", "zip")}
_HIDES_NULL_FUNCTIONS |= {"list_pack", "json_array", "json_object"}
_LAMBDA_FUNCTIONS = {f"{prefix}{name}" for prefix in ("list_", "array_", "") for name in ("apply", "filter", "reduce")}
_LAMBDA_FUNCTIONS |= {"list_transform", "array_transform"}


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


def check_expression(sql: str, scope: Scope) -> Expression:
    """The checked expression; QueryError unless `sql` is one scalar expression over the names of `scope`.

    No subqueries, aggregates, window functions, stars, and nothing that changes from run to run (random, the clock):
    the same recipe must choose the same documents.
    """
    text = sql.strip()
    if not text:
        raise QueryError("the expression is empty; write one over the columns, such as language.code = 'en'")
    # The text must mean the same alone and in parentheses. `1) , (2` and `1 FROM x --` fail one or the other.
    alone, empty = parse(f"SELECT\n{text}\n", skip=len("SELECT\n")), parse("SELECT 1")
    if len(alone.node.get("select_list", ())) != 1 or _without_columns(alone.node) != _without_columns(empty.node):
        raise QueryError(f"one expression is wanted, without alias, FROM, WHERE or ORDER BY: {text!r}")
    if alone.text != parse(f"SELECT (\n{text}\n)", skip=len("SELECT (\n")).text:
        raise QueryError(f"one expression is wanted, without alias: {text!r}")
    found = list(_references(alone.node["select_list"][0], scope))
    asked = {entry for entry, column, _ in found if column == "computed"}
    references = sorted({(entry, column) for entry, column, _ in found}, key=lambda pair: (pair[0] or "", pair[1]))
    null_tests = sorted({entry for entry, _, hidden in found if hidden and entry and entry not in asked})
    return Expression(f"({text}\n)" if "--" in text else f"({text})", tuple(references), tuple(null_tests))


def check_order(sql: str, scope: Scope) -> tuple[Expression, bool | None]:
    """The expression that is ordered by, and whether DESC (True), ASC (False) or neither (None) follows it."""
    text = sql.strip()
    empty = parse("SELECT 1 ORDER BY 1").node
    node = parse(f"SELECT 1 ORDER BY\n{text}\n", skip=len("SELECT 1 ORDER BY\n")).node
    keys = [key for modifier in node["modifiers"] for key in modifier.get("orders", ())]
    if len(keys) != 1 or {**node, "modifiers": None} != {**empty, "modifiers": None} or len(node["modifiers"]) != 1:
        raise QueryError(f"one expression is wanted, then ASC or DESC or nothing; ties go by id: {text!r}")
    if keys[0]["null_order"] != "ORDER_DEFAULT":
        raise QueryError(f"NULL always comes last; drop NULLS FIRST or NULLS LAST: {text!r}")
    descending = {"ORDER_DEFAULT": None, "ASCENDING": False, "DESCENDING": True}[keys[0]["type"]]
    if descending is not None:
        text = re.sub(r"(?i)\s*\b(asc|desc)\Z", "", text)
    return check_expression(text, scope), descending


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
        kind = known_kind(item)
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
    check_function(name)
    if name in functions().aggregates:
        raise QueryError(f"{name}() is an aggregate: {_ONE_DOCUMENT}; drop it")
    if name == "unnest":
        raise QueryError(f"unnest() makes several rows: {_ONE_DOCUMENT}; use list functions")
    if name in functions().unstable or (name == "age" and arguments == 1):
        raise QueryError(
            f"{name}() changes from run to run, and the same recipe must choose the same documents; "
            "write the value itself, such as DATE '2025-01-01'"
        )


def _resolve(parts: list[str], scope: Scope) -> tuple[str | None, str]:
    name, entry = ".".join(parts), find(parts[0], scope.entries)
    if entry and len(parts) > 1:
        columns = scope.entries[entry]
        if column := find(parts[1], columns):
            return entry, column
        near = nearest(parts[1], columns)
        raise QueryError(f"{entry!r} has no column {parts[1]!r}{near}; it has {', '.join(columns)}")
    if column := find(parts[0], scope.documents):
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
