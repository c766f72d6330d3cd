"""The rule set gopher: each rule drops what breaks it, by name, in order; NULL breaks none."""

import re
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

import pipelines
from scorers.quality.gopher import Gopher

SQL = Path(pipelines.__path__[0], "rules", "gopher.sql").read_text(encoding="utf-8")
DEFAULTS = {name: float(value) for name, value in re.findall(r"^-- \$(\w+) = (\S+) -- \S", SQL, re.MULTILINE)}
COLUMNS = Gopher().columns
GOOD = {column.name: 0 for column in COLUMNS} | {
    "n_words": 500,
    "mean_word_length": 4.5,
    "letter_words": 0.9,
    "stop_words": 6,
}
BROKEN = {
    "too_few_words": {"n_words": 49},
    "too_many_words": {"n_words": 100_001},
    "words_too_short": {"mean_word_length": 2.9},
    "words_too_long": {"mean_word_length": 10.1},
    "too_many_hashes": {"hash_ratio": 0.11},
    "too_many_ellipses": {"ellipsis_ratio": 0.11},
    "too_many_bullet_lines": {"bullet_lines": 0.91},
    "too_many_ellipsis_lines": {"ellipsis_lines": 0.31},
    "too_few_letter_words": {"letter_words": 0.79},
    "too_few_stop_words": {"stop_words": 1},
    "duplicate_lines": {"duplicate_lines": 0.31},
    "duplicate_paragraphs": {"duplicate_paragraphs": 0.31},
    "duplicate_line_chars": {"duplicate_line_chars": 0.21},
    "duplicate_paragraph_chars": {"duplicate_paragraph_chars": 0.21},
    "top_2_gram": {"top_2_gram": 0.21},
    "top_3_gram": {"top_3_gram": 0.19},
    "top_4_gram": {"top_4_gram": 0.17},
    "duplicate_5_grams": {"duplicate_5_grams": 0.16},
    "duplicate_6_grams": {"duplicate_6_grams": 0.15},
    "duplicate_7_grams": {"duplicate_7_grams": 0.14},
    "duplicate_8_grams": {"duplicate_8_grams": 0.13},
    "duplicate_9_grams": {"duplicate_9_grams": 0.12},
    "duplicate_10_grams": {"duplicate_10_grams": 0.11},
}


def reasons(*rows: dict[str, Any], **thresholds: float) -> list[str | None]:
    signals = pa.Table.from_pylist(list(rows), pa.schema([(column.name, column.type) for column in COLUMNS]))
    with duckdb.connect() as connection:
        connection.register("signals", signals)
        return [row[0] for row in connection.execute(f"{SQL} FROM signals AS s", DEFAULTS | thresholds).fetchall()]


def test_the_header_declares_what_the_body_uses() -> None:
    body = SQL[SQL.index("SELECT") :]
    assert set(re.findall(r"\$(\w+)", body)) == DEFAULTS.keys()
    assert set(re.findall(r"\bs\.(\w+)", body)) == {column.name for column in COLUMNS}
    assert re.findall(r"THEN '(\w+)'", body) == list(BROKEN)
    assert re.search(r"^-- signals: gopher$", SQL, re.MULTILINE)


def test_each_rule_names_itself() -> None:
    assert reasons(GOOD, *(GOOD | broken for broken in BROKEN.values())) == [None, *BROKEN]


def test_the_first_rule_that_is_broken_is_the_reason() -> None:
    """Break one more rule from the last to the first: each takes over."""
    row, rows = GOOD, []
    for broken in reversed(BROKEN.values()):
        rows.append(row := row | broken)
    names = [name for name in BROKEN if name not in ("too_few_words", "words_too_short")]  # hidden by their rivals
    found = reasons(*rows)
    assert [name for name in reversed(found) if name in names] == names


def test_the_bounds_themselves_are_kept() -> None:
    bounds = {
        "mean_word_length": 3,
        "n_words": 50,
        "letter_words": 0.8,
        "stop_words": 2,
        "duplicate_lines": 0.3,
        "top_3_gram": 0.18,
        "duplicate_10_grams": 0.1,
        "hash_ratio": 0.1,
    }
    assert reasons(GOOD | bounds, GOOD | {"n_words": 100_000, "mean_word_length": 10}) == [None, None]


def test_null_breaks_no_rule_but_no_words_do() -> None:
    nothing = dict.fromkeys(GOOD) | {"n_words": 0, "stop_words": 0}
    assert reasons(dict.fromkeys(GOOD) | {"n_words": 60, "stop_words": 2}) == [None]
    assert reasons(nothing, min_words=0, min_stop_words=0) == ["too_few_words"]


def test_thresholds_are_parameters() -> None:
    assert reasons(GOOD, min_words=501) == ["too_few_words"]
    assert reasons(GOOD | {"top_2_gram": 0.5}, max_top_2_gram=0.5) == [None]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Too short to keep.", "too_few_words"),
        ("", "too_few_words"),
        ("of the " * 40, "words_too_short"),
        ("incomprehensibilities " * 60, "words_too_long"),
        ("# comment " * 60, "too_many_hashes"),
        ("... comment " * 60, "too_many_ellipses"),
        ("these 1000 with, 2000; 3400: 5678 (9876) " * 30, "too_few_letter_words"),
        ("nothing here says anything " * 30, "too_few_stop_words"),
        ("to have a line of words\n" * 30, "duplicate_lines"),
        ("to have a line of the same words " * 30, "top_2_gram"),
    ],
)
def test_from_text_to_reason(text: str, reason: str) -> None:
    scores = Gopher().build()(pa.record_batch({"text": pa.array([text], pa.large_string())}))
    assert reasons(*scores.to_pylist()) == [reason]
