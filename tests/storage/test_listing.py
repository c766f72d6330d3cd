"""Laws of sources as a recipe names them: which files they are, what identifies them, what is wrong with them."""

import json
import os

import fsspec
import pyarrow as pa
import pytest
from pydantic import ValidationError

from storage.errors import RecipeError
from storage.sources import REASONS, Intake, Source, file_digest, list_files


def source(path, format="jsonl", **settings):
    return Source(name="pool", format=format, path=path, **settings)


def test_globs_find_each_file_once_and_sorted(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "deep/er/c.jsonl", "deep/d.txt", "odd[1].jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = list_files(source((f"{tmp_path}/**/*.jsonl", f"{tmp_path}/a.jsonl", f"{tmp_path}/odd[1].jsonl")))
    assert [file.path for file in found] == sorted(
        str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "deep/er/c.jsonl", "odd[1].jsonl")
    )
    assert all(file.size == os.path.getsize(file.path) for file in found)


def test_relative_paths_count_from_the_recipe(tmp_path):
    (tmp_path / "x.jsonl").write_text("{}")
    given = {"name": "a", "format": "jsonl", "path": ["*.jsonl", "memory://b/*"]}
    read = Source.model_validate(given, context={"base": str(tmp_path)})
    assert read.paths == (f"{tmp_path}/*.jsonl", "memory://b/*")
    assert Source.model_validate_json(read.model_dump_json()) == read


def test_a_url_is_listed_and_identified_by_what_the_store_says():
    fs = fsspec.filesystem("memory")
    fs.pipe({"/pool/b.jsonl": b"22", "/pool/a.jsonl": b"1", "/pool/c.txt": b""})
    files = list_files(source("memory://pool/*.jsonl"))
    assert [(file.path, file.size) for file in files] == [("memory:///pool/a.jsonl", 1), ("memory:///pool/b.jsonl", 2)]
    before = [file_digest(file) for file in files]
    fs.pipe("/pool/a.jsonl", b"2")
    after = [file_digest(file) for file in list_files(source("memory://pool/*.jsonl"))]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True]
    fs.rm("/pool", recursive=True)


def test_a_digest_follows_the_content_not_the_name(tmp_path):
    for name, text in (("a", "same"), ("b", "same"), ("c", "other")):
        (tmp_path / name).write_text(text)
    a, b, c = (file_digest(file) for file in list_files(source(f"{tmp_path}/*")))
    assert a == b != c
    assert len(a) == 32


def test_every_pattern_without_a_file_is_named(tmp_path):
    with pytest.raises(RecipeError) as error:
        list_files(source((f"{tmp_path}/no*", str(tmp_path), "memory://nothing/*", "gopher://x", "s3://bucket/*")))
    problems = error.value.problems
    assert len(problems) == 5
    assert all(problem.startswith("sources.pool.path: ") for problem in problems)
    assert "is a folder" in problems[1]
    assert "s3fs" in problems[4]


def test_a_saved_data_set_is_the_files_that_it_names(tmp_path):
    for split in ("train", "test"):
        folder = tmp_path / "set" / split
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
        for name in ("data-00000-of-00001.arrow", "cache-123.arrow"):
            with pa.ipc.new_stream(str(folder / name), pa.schema({"text": pa.string()})):
                pass
    found = list_files(source(f"{tmp_path}/set", "huggingface"))
    assert [file.path[len(str(tmp_path)) :] for file in found] == [
        f"/set/{split}/data-00000-of-00001.arrow" for split in ("test", "train")
    ]


def test_a_hub_folder_is_its_data_files(tmp_path):
    for name in ("README.md", "data/a.parquet", "en/c4.00000.json.gz", "x.jsonl.zst", ".cache/y.parquet", "info.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = list_files(source(str(tmp_path), "huggingface"))
    assert [file.path[len(str(tmp_path)) + 1 :] for file in found] == [
        "data/a.parquet", "en/c4.00000.json.gz", "x.jsonl.zst"
    ]  # fmt: skip
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="no folder with Parquet"):
        list_files(source(f"{tmp_path}/empty", "huggingface"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "Upper"},
        {"path": ()},
        {"format": "csv"},
        {"columns": {"body": "text"}},
        {"columns": {"text": ""}},
        {"format": "warc", "adopt": ["score"]},
        {"adopt": ["a.score", "b.Score"]},
        {"adopt": ["doc_id"]},
        {"adopt": {"score": "float"}},
        {"unknown": 1},
    ],
)
def test_a_wrong_setting_is_refused(wrong):
    with pytest.raises(ValidationError):
        Source.model_validate({"name": "a", "format": "jsonl", "path": "x", **wrong})


def test_the_digest_of_a_source_covers_what_can_change_a_document():
    base = source("a", columns={"text": "body"}, adopt=["score"])
    assert base.adopt == {"score": "double"}
    assert base.settings_digest() == source("b", columns={"text": "body"}, adopt={"score": "double"}).settings_digest()
    others = [source("a"), source("a", columns={"text": "body"}), source("a", "parquet", adopt=["score"])]
    assert len({s.settings_digest() for s in (base, *others)}) == 4


def test_the_fingerprint_of_the_intake_covers_what_can_change_the_table():
    variants = [Intake(), Intake(extractor="trafilatura"), Intake(max_record_bytes=1000), Intake(shard_bytes=1000)]
    assert len({intake.fingerprint() for intake in variants}) == 4
    assert Intake().fingerprint() == Intake().fingerprint()
    assert not Intake(extractor="trafilatura").problems()
    assert all(REASONS.values())
