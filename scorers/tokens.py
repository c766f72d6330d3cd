"""Tokens: how long a document is in the tokens that budgets are counted in."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import pyarrow as pa

from scorers.base import MapSpec, ModelPath, Score
from storage.errors import RecipeError
from storage.schema import Column

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Tokens(MapSpec):
    """Counts a document's tokens, special tokens (begin, end, separators) not among them.

    tokenizer: a tokenizer.json, a GGUF file, or the folder of a model that holds one of them or any other tokenizer
    that transformers reads. A file is better than a folder where the folder holds weights too: all of it is digested
    for the fingerprint. Truncation and padding that the file asks for are ignored. An empty text has 0 tokens.
    """

    scorer: Literal["tokens"] = "tokens"
    tokenizer: ModelPath

    libraries: ClassVar[tuple[str, ...]] = ("tokenizers", "transformers")
    batch_rows: ClassVar[int] = 128
    """The library keeps some hundred bytes per token of a batch."""

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column("n", pa.int64(), "tokens without special tokens", "tokens"),)

    def build(self, device: str = "cpu") -> Score:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a worker has one core
        tokenizer = load(self.tokenizer)
        schema = pa.schema([("n", pa.int64())])

        def score(documents: pa.RecordBatch) -> pa.RecordBatch:
            encodings = tokenizer.encode_batch_fast(documents["text"].to_pylist(), add_special_tokens=False)
            return pa.record_batch([pa.array(map(len, encodings), pa.int64())], schema=schema)

        return score


def load(path: str) -> "Tokenizer":
    """The Rust tokenizer of a file or folder, without truncation and padding. RecipeError where there is none."""
    from tokenizers import Tokenizer

    given = Path(path)
    file = given / "tokenizer.json" if given.is_dir() else given
    if file.suffix == ".json" and file.exists():
        text = file.read_text(encoding="utf-8")
        try:
            described = json.loads(text)
        except ValueError as error:
            raise RecipeError(f"tokenizer: {str(file)!r} is no JSON ({error}); name a tokenizer.json") from error
        if not isinstance(described, dict) or "model" not in described:
            raise RecipeError(f"tokenizer: {str(file)!r} describes no tokenizer; name a tokenizer.json")
        tokenizer = Tokenizer.from_str(text)
    else:
        tokenizer = _by_transformers(given)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _by_transformers(given: Path) -> "Tokenizer":
    from transformers import AutoTokenizer

    ggufs = sorted(given.glob("*.gguf")) if given.is_dir() else [given]
    folder, options = given, {}
    if not given.is_dir() or len(ggufs) == 1:
        folder, options = ggufs[0].parent, {"gguf_file": ggufs[0].name}
    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, **options)
        tokenizer: Tokenizer = loaded.backend_tokenizer
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise RecipeError(f"tokenizer: none found in {str(given)!r} ({reason}); name a tokenizer.json") from error
    return tokenizer
