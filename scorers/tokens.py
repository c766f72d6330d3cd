"""Tokens: how long a document is in the tokens that budgets are counted in."""

import os
from typing import ClassVar, Literal

import pyarrow as pa

from scorers.base import MapSpec, ModelPath, Score
from storage.schema import Column


class Tokens(MapSpec):
    """Counts a document's tokens, special tokens (begin, end, separators) not among them.

    tokenizer: a tokenizer.json, a GGUF file, or a model's folder (scorers.lm.tokenizer). A file is better than a folder
    with weights: all of it is digested for the fingerprint. Truncation and padding that the file asks for are ignored.
    An empty text has 0 tokens.
    """

    scorer: Literal["tokens"] = "tokens"
    tokenizer: ModelPath

    libraries: ClassVar[tuple[str, ...]] = ("tokenizers", "transformers")  # the latter reads GGUF and older folders
    batch_rows: ClassVar[int] = 128  # the library keeps about a hundred bytes per token of a batch

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column("n", pa.int64(), "tokens without special tokens", "tokens"),)

    def build(self, device: str = "cpu") -> Score:
        from scorers.lm.tokenizer import load_tokenizer

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a worker has one core
        tokenizer = load_tokenizer(self.tokenizer)
        schema = pa.schema([("n", pa.int64())])

        def score(documents: pa.RecordBatch) -> pa.RecordBatch:
            encodings = tokenizer.encode_batch_fast(documents["text"].to_pylist(), add_special_tokens=False)
            return pa.record_batch([pa.array(map(len, encodings), pa.int64())], schema=schema)

        return score
