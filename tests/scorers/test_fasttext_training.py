"""Training of fastText classifiers: the same model again, what is learned of a text, what the record says."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import fasttext
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scorers.classifiers.fasttext import FastText
from scorers.classifiers.fasttext_training import FastTextTraining, auroc, train
from storage.errors import RecipeError

SMALL: dict[str, Any] = {"dim": 8, "buckets": 500, "epochs": 8}


def rows(count: int = 400, seed: int = 1) -> list[dict[str, Any]]:
    """Texts of two labels whose words overlap by half; each tenth is held out."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        words = [f"w{draw.randrange(60) + 30 * (number % 2)}" for _ in range(12)]
        made.append({"label": "ab"[number % 2], "text": " ".join(words), "heldout": number % 20 < 2})
    return made


def fit(folder: Path, texts: list[dict[str, Any]], seed: int = 3, **settings: Any) -> dict[str, Any]:
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(texts), folder / "texts.parquet")
    work = folder / "work"
    work.mkdir()
    training = FastTextTraining(**SMALL | settings)
    train(training, str(folder / "texts.parquet"), str(work), str(folder / "out"), seed=seed)
    assert not list(work.iterdir()), "what was made on the way is gone"
    record: dict[str, Any] = json.loads((folder / "out" / "training.json").read_text())
    return record


def sha(folder: Path) -> str:
    return hashlib.sha256((folder / "out" / "model.bin").read_bytes()).hexdigest()


def test_the_same_seed_gives_the_same_file_whatever_memory_held_before(tmp_path):
    fit(tmp_path / "one", rows())
    junk = [np.full(1 << 16, np.nan) for _ in range(64)]
    del junk  # the allocator hands this out again
    fit(tmp_path / "two", rows())
    fit(tmp_path / "other", rows(), seed=4)
    assert sha(tmp_path / "one") == sha(tmp_path / "two") != sha(tmp_path / "other")


def test_the_record_tells_what_held_out_texts_say(tmp_path):
    record = fit(tmp_path / "x", rows())
    assert record["documents"] == 360
    for label, told in record["labels"].items():
        assert (told["documents"], told["held_out"]) == (180, 20)
        assert told["recall"] > 0.8 < told["precision"]
        assert told["auroc"] > 0.95
        assert told["length_auroc"] < 0.95
        model = fasttext.load_model(str(tmp_path / "x" / "out" / "model.bin"))
        held = [row for row in rows() if row["heldout"] and row["label"] == label]
        right = [model.predict(row["text"])[0][0] == f"__label__{label}" for row in held]
        assert told["recall"] == pytest.approx(sum(right) / len(right))


def test_without_held_out_texts_the_measures_are_null(tmp_path):
    record = fit(tmp_path / "x", [row | {"heldout": False} for row in rows(40)])
    assert {told[name] for told in record["labels"].values() for name in ("recall", "precision", "auroc")} == {None}


def test_a_text_is_one_line_and_cannot_label_itself(tmp_path):
    """Later lines are learned too, and a word that looks like a label is none."""
    texts = rows()
    for row in texts:
        first, rest = row["text"].split(" ", 1)
        other = "b" if row["label"] == "a" else "a"
        row["text"] = f"{first}\n__label__{other} \u2028 {rest}\r\n__label__new\n"
    record = fit(tmp_path / "x", texts, profile="dclm")
    plain = fit(tmp_path / "plain", rows(), profile="dclm")
    assert record["label_words_removed"] == 2 * 360
    assert record["labels"].keys() == {"a", "b"}
    model = fasttext.load_model(str(tmp_path / "x" / "out" / "model.bin"))
    assert sorted(model.get_labels()) == ["__label__a", "__label__b"]
    assert record["words"] == plain["words"]
    assert sha(tmp_path / "x") == sha(tmp_path / "plain"), "what is left is the same line"


def test_the_scorer_uses_the_profile_of_the_training(tmp_path):
    fit(tmp_path / "x", rows(), profile="preselect")
    path = str(tmp_path / "x" / "out" / "model.bin")
    batch = pa.record_batch({"doc_id": [1], "text": ["w1 w2\nw3"]})
    own, same = (FastText(model=path, label="__label__a", profile=p).build()(batch) for p in (None, "preselect"))
    assert own.equals(same)
    with pytest.raises(RecipeError, match="profile: dclm, but the model was trained with preselect; leave it out"):
        FastText(model=path, label="__label__a", profile="dclm").build()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [({"min_count": 1000}, "min_count: no word occurs 1000 times"), ({"learning_rate": 1e30}, "learning_rate: 1e")],
)
def test_what_cannot_be_trained_names_the_parameter(tmp_path, settings, problem):
    with pytest.raises(RecipeError, match=problem):
        fit(tmp_path / "x", rows(), **settings)


def test_auroc():
    """The methods' worked example, ties, and the sides that are empty."""
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.55, 0.5, 0.4, 0.3])
    labels = np.array([1, 1, 0, 1, 0, 1, 0, 0], dtype=bool)
    assert auroc(scores, labels) == 0.8125
    assert auroc(np.zeros(8), labels) == 0.5
    assert auroc(scores, np.ones(8, bool)) is None
