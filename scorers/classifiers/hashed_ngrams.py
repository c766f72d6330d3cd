"""Hashed n-grams: the features of DSIR (Xie et al., NeurIPS 2023, arXiv 2302.03169), equal to the authors' bit by bit.

    "Don't pay"  ->  don  '  t  pay                          in lower case, the runs of \\w, and of neither \\w nor \\s
                 ->  don  '  t  pay  don '  ' t  t pay       all runs of one to `ngram` tokens, joined by a space
                 ->  SHA-256 of the UTF-8, read as one integer, modulo `buckets`

SHA-256 of every n-gram is what the features cost. Most n-grams of a text have been met before, so their buckets are
kept in a table with a fixed number of slots, found by a 64-bit hash of the n-gram that numpy computes; two n-grams
would have to agree in 64 bits, once in 10^19 pairs, to take one's bucket for the other's.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from scorers import words
from scorers.base import MapSpec, Score
from storage.schema import Column

Order = Annotated[int, Field(ge=1, le=4)]
Buckets = Annotated[int, Field(ge=2, le=1 << 16)]

SPACE, WORD, PUNCTUATION = 0, 1, 2
SLOT_BITS = 21
"""2^21 slots take 20 MB, and hold the n-grams that come often; a worker has one table."""


class HashedNgrams(MapSpec):
    """The bucket of every n-gram of a document, in ascending order: about 0.7 bytes a token on disk.

    A text without a token has an empty list. `text_key` is 64 bits of text_hash, for draws that hang on the content.
    """

    scorer: Literal["hashed_ngrams"] = "hashed_ngrams"
    ngram: Order = 2
    buckets: Buckets = 10_000

    reads = ("text", "text_hash")

    @property
    def columns(self) -> tuple[Column, ...]:
        return (
            Column("ngrams", pa.list_(pa.uint16()), "bucket of each n-gram, ascending"),
            Column("text_key", pa.int64(), "the first 64 bits of text_hash"),
        )

    def build(self, device: str = "cpu") -> Score:
        hasher = Hasher(self.ngram, self.buckets)
        schema = pa.schema([(column.name, column.type) for column in self.columns])

        def score(documents: pa.RecordBatch) -> pa.RecordBatch:
            counts, found = hasher(documents["text"].to_pylist())
            hashes = b"".join(documents["text_hash"].storage.to_pylist())
            offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
            return pa.record_batch(
                [pa.ListArray.from_arrays(offsets, found), pa.array(np.frombuffer(hashes, "<i8")[::2])], schema=schema
            )

        return score


class Hasher:
    """Texts to the buckets of their n-grams; it gets faster with what it has seen."""

    def __init__(self, ngram: int = 2, buckets: int = 10_000) -> None:
        self.ngram = ngram
        self.buckets = buckets
        self._keys = np.zeros(1 << SLOT_BITS, np.uint64)  # what stands in a slot; the last one to come stays
        self._values = np.zeros(1 << SLOT_BITS, np.uint16)

    def __call__(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16]]:
        """n-grams per text, [texts]; their buckets text after text, ascending in each."""
        parts = [self._some([text.lower() for text in texts[part]]) for part in words.groups(texts)]
        if not parts:
            return np.empty(0, np.int64), np.empty(0, np.uint16)
        counts, found = zip(*parts, strict=True)
        return np.concatenate(counts), np.concatenate(found)

    def _some(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16]]:
        codes = np.frombuffer("\n".join([*texts, ""]).encode("utf-32-le"), np.uint32)  # no token crosses a line break
        kind = _classes()[codes]
        within = kind != SPACE
        change = kind[1:] != kind[:-1]
        first = np.flatnonzero(within & np.concatenate([[True], change]))
        last = np.flatnonzero(within & np.concatenate([change, [True]]))
        if not len(first):
            return np.zeros(len(texts), np.int64), np.empty(0, np.uint16)
        text = np.searchsorted(np.cumsum([len(text) + 1 for text in texts]), first, side="right")

        # Each token followed by one space: there an n-gram is a run of characters, its tokens joined as they must be.
        ends = np.cumsum(last - first + 2)
        begins = np.concatenate([[0], ends[:-1]])
        spelled = np.full(ends[-1], ord(" "), np.uint32)
        letters = np.ones(len(spelled), bool)
        letters[ends - 1] = False
        spelled[letters] = codes[within]
        powers, inverses = words.powers_of_base(1 << (len(spelled) - 1).bit_length())
        tokens = np.add.reduceat(spelled * powers[: len(spelled)], begins) * inverses[begins]

        # [n-grams] of all orders, one order after the other: hash, index of the first token, tokens.
        keys, start, order = [], [], []
        key = np.zeros(len(tokens), np.uint64)
        for n in range(1, min(self.ngram, len(tokens)) + 1):
            at = np.arange(len(tokens) - n + 1)
            key = words.mix(key[: len(at)] + tokens[n - 1 :])
            whole = text[at] == text[n - 1 :]  # all of one text
            keys.append(key[whole])
            start.append(at[whole])
            order.append(np.full(len(start[-1]), n))
        begin = np.concatenate(start)
        found = self._looked_up(np.concatenate(keys), begin, begin + np.concatenate(order), spelled, begins)

        sorted_by_text = np.sort((text[begin].astype(np.uint32) << np.uint32(16)) | found)
        return np.bincount(text[begin], minlength=len(texts)), sorted_by_text.astype(np.uint16)

    def _looked_up(
        self,
        keys: npt.NDArray[np.uint64],
        begin: npt.NDArray[np.int64],
        end: npt.NDArray[np.int64],
        spelled: npt.NDArray[np.uint32],
        begins: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.uint16]:
        """Buckets of n-grams from the table; those that are not there are hashed and take their slots."""
        slots = (keys >> np.uint64(64 - SLOT_BITS)).astype(np.int64)
        found = self._values[slots]
        missing = np.flatnonzero(self._keys[slots] != keys)
        _, one, place = np.unique(keys[missing], return_index=True, return_inverse=True)
        each = missing[one]
        utf8 = spelled.tobytes().decode("utf-32-le").encode()
        if len(utf8) == len(spelled):
            offsets = np.append(begins, len(utf8))
        else:
            widths = 1 + (spelled >= 0x80) + (spelled >= 0x800) + (spelled >= 0x10000)
            offsets = np.append((np.cumsum(widths) - widths)[begins], len(utf8))
        runs = zip(offsets[begin[each]].tolist(), (offsets[end[each]] - 1).tolist(), strict=True)
        fresh = _remainders([hashlib.sha256(utf8[a:b]).digest() for a, b in runs], self.buckets)
        found[missing] = fresh[place]
        self._keys[slots[each]] = keys[each]
        self._values[slots[each]] = fresh
        return found


def _remainders(digests: Sequence[bytes], modulus: int) -> npt.NDArray[np.uint16]:
    """Digests of 32 bytes, each read as one big-endian integer, modulo at most 2^16."""
    parts = np.frombuffer(b"".join(digests), ">u4").reshape(-1, 8).astype(np.int64) % modulus
    powers = np.array([pow(1 << 32, 7 - part, modulus) for part in range(8)])
    remainders: npt.NDArray[np.uint16] = ((parts * powers).sum(axis=1) % modulus).astype(np.uint16)
    return remainders


@lru_cache(maxsize=1)
def _classes() -> npt.NDArray[np.uint8]:
    """Per code point what the authors' regular expression (NLTK's WordPunctTokenizer) takes it for."""
    everything = "".join(map(chr, range(0x110000)))
    table = np.full(len(everything), PUNCTUATION, np.uint8)
    for kind, pattern in ((WORD, r"\w+"), (SPACE, r"\s+")):
        for run in re.finditer(pattern, everything):
            table[run.start() : run.end()] = kind
    return table
