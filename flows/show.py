"""How an answer is printed: a table for eyes, CSV or JSON lines for programs."""

import sys
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN_ROWS = 1000
SHOWN_WIDTH = 80


def show(answer: "pa.RecordBatchReader", format: str) -> None:
    """Print the answer; CSV and JSON (an object per line) stream, a table stops after 1,000 rows and says so."""
    if format == "csv":
        import csv

        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(answer.schema.names)
        for batch in answer:
            writer.writerows([_cell(value) for value in row.values()] for row in batch.to_pylist())
    elif format == "json":
        for batch in answer:
            for row in batch.to_pylist():
                sys.stdout.buffer.write(_json(row) + b"\n")
        sys.stdout.buffer.flush()
    else:
        _table(answer)


def _table(answer: "pa.RecordBatchReader") -> None:
    import pyarrow as pa
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for field in answer.schema:
        number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type) or pa.types.is_decimal(field.type)
        table.add_column(field.name, justify="right" if number else "left", overflow="fold", no_wrap=False)
    rows = 0
    more = False
    for batch in answer:
        for row in batch.to_pylist():
            if rows == SHOWN_ROWS:
                more = True
                break
            table.add_row(*(escape(_text(value)) for value in row.values()))
            rows += 1
        if more:
            break
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(table)
    console.print(f"{rows} rows" + (", and more: use --format csv or json, or LIMIT" if more else ""))


def _json(value: Any) -> bytes:
    import orjson

    return orjson.dumps(value, default=_plain, option=orjson.OPT_NON_STR_KEYS)


def _plain(value: Any) -> Any:
    """What JSON has no word for: bytes as hex, decimals as numbers, intervals by their parts."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Decimal):  # sums of integers too: DuckDB's 128-bit integers come as decimals
        return int(value) if value == value.to_integral_value() else float(value)
    if hasattr(value, "months"):
        parts = (value.months, "months"), (value.days, "days"), (value.nanoseconds / 1e9, "seconds")
        return " ".join(f"{amount:g} {unit}" for amount, unit in parts if amount) or "0 seconds"
    return str(value)


def _cell(value: Any) -> Any:
    """A CSV field: NULL is empty, nested values are JSON."""
    nested = isinstance(value, (dict, list, bytes, tuple))
    return _json(value).decode().strip('"') if nested else value


def _text(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, Decimal):
        value = _plain(value)
    if isinstance(value, float):
        text = f"{value:,.4f}".rstrip("0").rstrip(".")
    else:
        text = _json(value).decode() if isinstance(value, (dict, list)) else str(_plain(value))
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= SHOWN_WIDTH else text[: SHOWN_WIDTH - 1] + "…"
