"""Token counts: what the tokenizer gives, without what it adds, and whatever its file says of length."""

from pathlib import Path

import pyarrow as pa
import pytest
from scorer_examples import PROSE, tokenizer_file
from tokenizers import Tokenizer, processors

from scorers.tokens import Tokens
from storage.errors import RecipeError

TEXTS = [PROSE, "", "naïve 漢字 🎉", PROSE * 20]


def count(path: str, texts: list[str] = TEXTS) -> list[int]:
    scores = Tokens(tokenizer=path).build()(pa.record_batch({"text": pa.array(texts, pa.large_string())}))
    found: list[int] = scores["n"].to_pylist()
    return found


def test_counts_are_the_tokenizers_own(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path)
    tokenizer = Tokenizer.from_file(path)
    assert count(path) == [len(tokenizer.encode(text, add_special_tokens=False).ids) for text in TEXTS]
    assert count(path)[1] == 0
    assert count(path)[2] == len("naïve 漢字 🎉".encode())  # nothing but bytes was merged here


def test_a_folder_is_its_tokenizer_json(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path)
    assert count(str(tmp_path)) == count(path)


def test_special_tokens_truncation_and_padding_do_not_count(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path)
    plain = count(path)
    tokenizer = Tokenizer.from_file(path)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A </s>", special_tokens=[("</s>", 0)])
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=64)
    tokenizer.save(path)
    assert len(tokenizer.encode(PROSE).ids) == 64
    assert count(path) == plain


def test_the_content_of_the_file_is_in_the_fingerprint_not_its_name(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path)
    copy = tmp_path / "copy.json"
    copy.write_bytes(Path(path).read_bytes())
    assert Tokens(tokenizer=str(copy)).fingerprint() == Tokens(tokenizer=path).fingerprint()
    copy.write_bytes(copy.read_bytes() + b"\n")
    assert Tokens(tokenizer=str(copy)).fingerprint() != Tokens(tokenizer=path).fingerprint()


def test_a_missing_or_wrong_file_is_the_recipes_error(tmp_path: Path) -> None:
    [problem] = Tokens(tokenizer=str(tmp_path / "none.json")).problems()
    assert "none.json" in problem
    wrong = tmp_path / "tokenizer.json"
    wrong.write_text('{"a": 1}')
    with pytest.raises(RecipeError, match="tokenizer"):
        Tokens(tokenizer=str(wrong)).build()
