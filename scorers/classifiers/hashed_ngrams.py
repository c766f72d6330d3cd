"""Hashed n-grams: the features of DSIR (Xie et al., NeurIPS 2023, arXiv 2302.03169), equal to the authors' bit by bit.

    "Don't pay"  ->  don  '  t  pay                          in lower case, the runs of \\w, and of neither \\w nor \\s
                 ->  don  '  t  pay  don '  ' t  t pay       all runs of one to `ngram` tokens, joined by a space
                 ->  SHA-256 of the UTF-8, read as one integer, modulo `buckets`

\\w and \\s are those of Python's `re`, as in NLTK's WordPunctTokenizer until 3.9; NLTK 3.10 has another engine, which
counts the vowel signs of Indic scripts among the letters.

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
Buckets = Annotated[int, Field(ge=2, lt=1 << 16)]

SPACE, WORD, PUNCTUATION = 0, 1, 2
SLOT_BITS = 21
"""2^21 slots take 24 MB, and hold the n-grams that come often; a worker has one table."""
BUCKET_BITS, LARGEST = np.uint64(16), np.uint64((1 << 16) - 1)


class HashedNgrams(MapSpec):
    """The bucket of every n-gram of a document, in ascending order: 0.7 bytes a token on disk, 1.6 in short texts.

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
        # A slot: the low 48 bits of a hash, then 16 of the bucket. The hash's high bits are the slot's number.
        self._slots = np.zeros(1 << SLOT_BITS, np.uint64)
        self._claims = np.zeros(1 << SLOT_BITS, np.int32)

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
        spelled[np.flatnonzero(letters)] = codes[np.flatnonzero(within)]  # faster than by the masks themselves
        powers, inverses = words.powers_of_base(1 << (len(spelled) - 1).bit_length())
        sums = np.diff(np.cumsum(spelled * powers[: len(spelled)])[ends - 1], prepend=np.uint64(0))
        tokens = sums * inverses[begins] + (ends - begins).astype(np.uint64)

        # [n-grams] of all orders, one order after the other: hash, index of the first token, tokens, text.
        keys, starts, orders, owners = [], [], [], []
        key = np.zeros(len(tokens), np.uint64)
        for order in range(1, min(self.ngram, len(tokens)) + 1):
            key = words.mix(key[: len(tokens) - order + 1] + tokens[order - 1 :])
            start = np.flatnonzero(text[: len(key)] == text[order - 1 :])  # all of one text
            keys.append(key[start])
            starts.append(start)
            orders.append(np.full(len(start), order))
            owners.append(text[start])
        first, owner = np.concatenate(starts), np.concatenate(owners)
        found = self._looked_up(np.concatenate(keys), first, first + np.concatenate(orders), spelled, begins)

        counts = np.bincount(owner, minlength=len(texts))
        found = found[np.argsort(owner.astype(np.min_scalar_type(len(texts))), kind="stable")]
        for end, count in zip(np.cumsum(counts).tolist(), counts.tolist(), strict=True):
            found[end - count : end].sort(kind="stable")  # of 16 bits: a radix sort
        return counts, found

    def _looked_up(
        self,
        keys: npt.NDArray[np.uint64],
        first: npt.NDArray[np.int64],
        beyond: npt.NDArray[np.int64],
        spelled: npt.NDArray[np.uint32],
        begins: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.uint16]:
        """Buckets of n-grams out of the table; those that are not there are hashed and take their slots.

        An n-gram is given by its hash and by the tokens first, ..., beyond - 1, which begin at `begins` in `spelled`.
        """
        utf8 = spelled.tobytes().decode("utf-32-le").encode()
        if len(utf8) > len(spelled):
            begins = np.flatnonzero(np.frombuffer(utf8, np.uint8) & 0xC0 != 0x80)[begins]
        offsets = np.append(begins, len(utf8))
        slots = (keys >> np.uint64(64 - SLOT_BITS)).astype(np.int64)
        tags = keys << BUCKET_BITS
        found = self._slots[slots]
        found ^= tags
        missing = np.flatnonzero(found > LARGEST)
        while len(missing):
            # One n-gram for each slot. What else wanted the slot is the same n-gram, or waits for the next round.
            place, rank = slots[missing], np.arange(len(missing), dtype=np.int32)
            self._claims[place] = rank
            one = missing[self._claims[place] == rank]
            fresh = _buckets(utf8, offsets[first[one]], offsets[beyond[one]] - 1, self.buckets)
            self._slots[slots[one]] = tags[one] | fresh
            found[missing] = self._slots[place] ^ tags[missing]
            missing = missing[found[missing] > LARGEST]
        return found.astype(np.uint16)


def _buckets(
    utf8: bytes, begins: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], buckets: int
) -> npt.NDArray[np.uint64]:
    """SHA-256 of each run of bytes, a big-endian integer, modulo `buckets`."""
    sha256 = hashlib.sha256
    digests = [sha256(utf8[begin:end]).digest() for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
    places = np.array([pow(256, 31 - place, buckets) for place in range(32)], np.float64)
    sums = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32) @ places  # 32 products below 2^24: exact
    return sums.astype(np.uint64) % np.uint64(buckets)


@lru_cache(maxsize=1)
def _classes() -> npt.NDArray[np.uint8]:
    """Per code point what the authors' regular expression (NLTK's WordPunctTokenizer) takes it for."""
    everything = "".join(map(chr, range(0x110000)))
    table = np.full(len(everything), PUNCTUATION, np.uint8)
    for kind, pattern in ((WORD, r"\w+"), (SPACE, r"\s+")):
        for run in re.finditer(pattern, everything):
            table[run.start() : run.end()] = kind
    return table
