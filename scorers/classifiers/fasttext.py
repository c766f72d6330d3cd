"""fastText classifiers (Joulin et al. 2016): any supervised model file as a score.

What the library does, and what is done about it here: it takes one line and raises on a line break (a profile says
how lines become one); it adds 1e-5 to every probability (clipped to 1); it returns nothing where no token of a text
is in its dictionary (NULL); it takes a word such as __label__x in a text for a label and skips it.
"""

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa

from scorers.base import MapSpec, ModelPath, Score
from storage.errors import RecipeError
from storage.schema import Column

Profile = Literal["dclm", "preselect", "plain"]
LABEL = "__label__"
"""What a label begins with, in the library's files and here."""

PROFILES: dict[Profile, Callable[[str], str]] = {
    "dclm": lambda text: " ".join(text.strip().splitlines()),
    "preselect": lambda text: text.replace("\n", " "),
    "plain": lambda text: " ".join(text.split()),
}


class FastText(MapSpec):
    """P(label) by a supervised fastText model.

    model: the file (.bin or .ftz), or "models.x", a classifier that the recipe trains. It is held in memory once per
        worker: 2.4 GB for DCLM's.
    label: with its prefix, as in the model ("__label__hq").
    profile: how a text becomes the one line that fastText wants. It must be the one that the model was trained with,
        as it is where the recipe trains it; else left out it is plain:
        dclm       stripped, lines (of any line break of Unicode) joined by one space      mlfoundations/dclm
        preselect  each line break a space                                                 hkust-nlp/PreSelect
        plain      every run of white space one space, none at the ends
    score is in [0, 1], NULL for a text of white space alone and where the model knows no token of it.
    """

    scorer: Literal["fasttext"] = "fasttext"
    model: ModelPath
    label: str
    profile: Profile | None = None

    libraries: ClassVar[tuple[str, ...]] = ("fasttext-numpy2-wheel",)
    trainer_read: ClassVar[str] = "fasttext"

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column("score", pa.float32(), f"P({self.label})", "probability", higher_is_better=True),)

    def _profile(self) -> Profile:
        trained = trained_profile(self.model)
        if trained is not None and self.profile not in (None, trained):
            raise RecipeError(f"profile: {self.profile}, but the model was trained with {trained}; leave it out")
        return trained or self.profile or "plain"

    def build(self, device: str = "cpu") -> Score:
        model = load(self.model)
        labels = model.get_labels()
        if self.label not in labels:
            near = difflib.get_close_matches(self.label, labels, 1, 0.0)
            raise RecipeError(f"label: {self.model!r} has no label {self.label!r}; did you mean {near[0]!r}?")
        normalise = PROFILES[self._profile()]

        def probability(text: str) -> float | None:
            if not text or text.isspace():
                return None
            found, probabilities = model.predict(normalise(text), k=len(labels))
            if self.label not in found:
                return None if not found else 0.0
            return min(float(probabilities[found.index(self.label)]), 1.0)

        schema = pa.schema([("score", pa.float32())])

        def score(documents: pa.RecordBatch) -> pa.RecordBatch:
            scores = [probability(text) for text in documents["text"].to_pylist()]
            return pa.record_batch([pa.array(scores, pa.float32())], schema=schema)

        return score


def trained_profile(model: str) -> Profile | None:
    """The profile with which a recipe trained the model; None for any other model."""
    record = Path(model).with_name("training.json")
    if not record.is_file():
        return None
    profile: Profile | None = json.loads(record.read_text()).get("training", {}).get("profile")
    return profile


def load(path: str) -> Any:
    """A fastText model. RecipeError where the file is none, or is not supervised."""
    import fasttext

    try:
        model = fasttext.load_model(path)
    except (ValueError, MemoryError) as error:  # the latter from a file that was cut short
        raise RecipeError(f"model: {path!r} is no whole fastText model ({error}); name a .bin or .ftz file") from error
    if model.f.getArgs().model.name != "supervised":
        raise RecipeError(f"model: {path!r} was not trained with labels; name a supervised fastText model")
    return model
