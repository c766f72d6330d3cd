"""Models by name: a real cache of the hub in a temporary folder, and no network."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pyarrow as pa
import pytest
from scorer_examples import language_model

from scorers.base import digest
from scorers.hub import files, local
from scorers.lm.measures import LanguageModel
from scorers.tokens import Tokens
from storage.errors import RecipeError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TUNED = "fedcba9876543210fedcba9876543210fedcba98"


def cached(home: Path, name: str, commit: str, ref: str, model: Path, **more: str) -> Path:
    """The files of a model as the hub's client lays them down: blobs by content, snapshots of links, refs by name."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    contents = {file.name: file.read_bytes() for file in model.iterdir()} | {n: t.encode() for n, t in more.items()}
    for path, content in contents.items():
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(content)
        (snapshot / path).symlink_to(blob)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(language_model(tmp_path_factory.mktemp("hub"))["model"])


@pytest.fixture
def home(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cached(tmp_path, "miller/tiny", COMMIT, "main", model, **{"pytorch_model.bin": "a pickle", "README.md": "read me"})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_name_is_its_snapshot(home: Path, model: Path) -> None:
    for name in ("hf://miller/tiny", "hf://miller/tiny@main", f"hf://miller/tiny@{COMMIT}"):
        assert Path(local(name)).resolve() == (home / "hub/models--miller--tiny/snapshots" / COMMIT).resolve()
        assert [file.name for file in files(name)] == sorted(file.name for file in model.iterdir())
    assert local(str(model)) == str(model)


def test_a_model_by_name_scores_as_its_folder(home: Path, model: Path) -> None:
    named, folder = LanguageModel(model="hf://miller/tiny"), LanguageModel(model=str(model))
    assert named.problems() == []
    batch = pa.record_batch({"text": ["the stones grind barley", ""]})
    assert named.build()(batch) == folder.build()(batch)
    batch = pa.record_batch({"text": pa.array(["the stones grind barley"], pa.large_string())})
    assert Tokens(tokenizer="hf://miller/tiny").build()(batch) == Tokens(tokenizer=str(model)).build()(batch)


def test_the_fingerprint_is_of_the_files_that_are_read(home: Path, model: Path) -> None:
    before = LanguageModel(model="hf://miller/tiny").fingerprint()
    assert digest("hf://miller/tiny") == digest(str(model))
    (home / "hub/models--miller--tiny/snapshots" / COMMIT / "another.bin").write_text("of another program")
    assert LanguageModel(model="hf://miller/tiny").fingerprint() == before
    cached(home, "miller/tiny", TUNED, "tuned", model, **{"generation_config.json": "{}", "chat_template.jinja": ""})
    assert LanguageModel(model="hf://miller/tiny@tuned").fingerprint() != before
    assert LanguageModel(model=f"hf://miller/tiny@{COMMIT}").fingerprint() == before


@pytest.mark.parametrize(
    "name", ["hf://miller/absent", "hf://miller/tiny@next", "hf://miller/tiny/config.json", "hf://"]
)
def test_what_is_not_there_is_told_with_the_remedy(home: Path, name: str) -> None:
    spec = LanguageModel(model=name)
    [problem] = spec.problems()
    assert problem.startswith(f"model: {name!r}")
    assert "hf download miller/" in problem or "correct the name" in problem
    for ask in (spec.fingerprint, spec.build):
        with pytest.raises(RecipeError):
            ask()


def test_weights_that_were_not_fetched(home: Path, model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((model / name).read_bytes())
    cached(home, "miller/bare", COMMIT, "main", bare, **{"pytorch_model.bin": "a pickle"})
    assert "has no *.safetensors" in LanguageModel(model="hf://miller/bare").problems()[0]


def test_hf_home_moves_the_cache(home: Path) -> None:
    code = "from scorers.base import digest; print(digest('hf://miller/tiny'))"
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.stdout.strip() == digest("hf://miller/tiny"), done.stderr
