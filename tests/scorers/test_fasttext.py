"""fastText classifiers with a real, tiny model: probabilities, the one line that a text becomes, and bad files."""

from pathlib import Path

import fasttext
import pyarrow as pa
import pytest
from pydantic import ValidationError
from scorer_examples import fasttext_file

from scorers.classifiers.fasttext import PROFILES, FastText, Profile
from storage.errors import RecipeError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fasttext_file(tmp_path_factory.mktemp("fasttext"))


def scores(model: str, *texts: str, label: str = "__label__good", profile: Profile = "plain") -> list[float | None]:
    spec = FastText(model=model, label=label, profile=profile)
    found: list[float | None] = spec.build()(pa.record_batch({"text": pa.array(texts, pa.large_string())}))[
        "score"
    ].to_pylist()
    return found


def test_fruit_is_good_and_metal_is_not(model: str) -> None:
    fruit, metal = scores(model, "apple banana\ncherry grape", "iron\n\nsteel copper")
    assert fruit is not None
    assert metal is not None
    assert fruit > 0.8 > 0.2 > metal


def test_labels_share_one(model: str) -> None:
    texts = ("apple iron", "fig", "gold of tin")
    good, bad = scores(model, *texts), scores(model, *texts, label="__label__bad")
    assert [g + b for g, b in zip(good, bad, strict=True) if g is not None and b is not None] == pytest.approx(
        [1] * 3, abs=3e-5
    )


def test_scores_stay_within_their_bounds(model: str) -> None:
    """The library's own probability of a sure thing is 1.00001."""
    sure = "apple banana cherry date elder fig grape " * 50
    assert max(fasttext.load_model(model).predict(sure.strip())[1]) > 0.9
    assert all(0 <= value <= 1 for value in scores(model, sure, "iron " * 200) if value is not None)


def test_white_space_has_no_score(model: str) -> None:
    assert scores(model, "", " \n ", "\u00a0") == [None] * 3


def test_a_label_in_the_text_changes_nothing(model: str) -> None:
    assert scores(model, "apple iron __label__good") == scores(model, "apple iron")


@pytest.mark.parametrize(
    ("profile", "line"),
    [
        ("dclm", "a  b c d e"),
        ("preselect", " a  b\x0bc\u2028d  e "),
        ("plain", "a b c d e"),
    ],
)
def test_profiles(profile: Profile, line: str) -> None:
    assert PROFILES[profile](" a  b\x0bc\u2028d\ne\n" if profile != "preselect" else " a  b\x0bc\u2028d\n\ne\n") == line


def test_a_wrong_label_names_the_nearest(model: str) -> None:
    with pytest.raises(RecipeError, match="did you mean '__label__good'"):
        FastText(model=model, label="__label__goods").build()


def test_what_is_no_classifier_is_the_recipes_error(model: str, tmp_path: Path) -> None:
    assert "none.bin" in FastText(model=str(tmp_path / "none.bin"), label="x").problems()[0]
    broken = tmp_path / "broken.bin"
    broken.write_bytes(b"no model at all")
    with pytest.raises(RecipeError, match="no whole fastText model"):
        FastText(model=str(broken), label="__label__good").build()
    (tmp_path / "lines.txt").write_text("apple banana cherry\n" * 30)
    vectors = fasttext.train_unsupervised(str(tmp_path / "lines.txt"), dim=2, bucket=10, thread=1, verbose=0, epoch=1)
    vectors.save_model(str(broken))
    with pytest.raises(RecipeError, match="supervised"):
        FastText(model=str(broken), label="__label__good").build()
    with pytest.raises(ValidationError, match="profile"):
        FastText(model=model, label="x", profile="other")  # type: ignore[arg-type]
