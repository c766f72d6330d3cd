"""A supervised fastText model's file (.bin, .ftz): what it holds, where, and whether it is whole.

    int32       magic number, version
    12 int32    dim, ws, epoch, minCount, neg, wordNgrams, loss, model, bucket, minn, maxn, lrUpdateRate; double t
    3 int32     entries, words, labels; int64 tokens, pruned n-grams (-1: the model was never pruned)
    entries     bytes of the word, NUL, int64 count, int8 type (0 word, 1 label); the words come first
    pairs       2 int32 per pruned n-gram
    bool        is the input quantised?  then the input's matrix, [words + bucket, dim]
    bool        is the output quantised?  then the output's matrix, [labels, dim]

Numbers are little-endian and nothing is aligned. A matrix is int64 rows, int64 columns and its float32s; a quantised
one has codes and centroids. The library (fastText 0.9.2: fasttext.cc, dictionary.cc, quantmatrix.cc,
productquantizer.cc) does not look whether its reads gave it anything, and so may load a file that was cut short.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import RecipeError

MAGIC, VERSION = 793712314, 12
SUPERVISED = 3
NEGATIVE_SAMPLING, SOFTMAX, ONE_VS_ALL = 2, 3, 4  # hierarchical softmax is 1
AFTER_WORD = 10  # bytes from a word's NUL to the next word
CENTROIDS = 256


@dataclass(frozen=True)
class ModelFile:
    """What was read, and where the rest is.

    data: the file, mapped: its pages are the system's, one copy for all processes of a machine.
    bucket: rows for n-grams; loss: one of the above; maxn: characters of the longest subword, 0 for none.
    starts, lengths: of the dictionary's entries, in bytes, [words + labels].
    input, output: where the float32s of the matrices begin; None for a quantised one.
    """

    path: str
    data: mmap.mmap
    dim: int
    word_ngrams: int
    loss: int
    bucket: int
    maxn: int
    words: int
    labels: list[str]
    pruned: bool
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    input: int | None
    output: int | None


def read(path: str) -> ModelFile:
    """The file's tables, after a look at its length; the dictionary is read (0.2 s for a million words), no matrix.

    RecipeError where the file is none of fastText's, is cut short, or has no labels.
    """
    if os.path.isdir(path):
        raise _broken(path, "it is a folder")
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise _broken(path, "it is empty")
        data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    cursor = _Cursor(path, data)
    magic, version = cursor.take("ii")
    if magic != MAGIC or version > VERSION:
        raise _broken(path, "it does not begin as one")
    dim, _, _, _, _, word_ngrams, loss, model, bucket, _, maxn, _, _ = cursor.take("12id")
    entries, words, labels, _, pruned = cursor.take("iiiqq")
    if model != SUPERVISED or not labels:
        raise RecipeError(f"model: {path!r} was not trained with labels; name a supervised fastText model")
    if min(dim, words, labels, bucket) < 0 or words + labels != entries:
        raise _broken(path, f"it says of itself {words} words and {labels} labels in {entries} entries")
    starts, lengths = _dictionary(cursor, entries)
    cursor.skip(max(0, pruned) * 8)
    quantised = cursor.take("?")[0]
    if not quantised:  # the length of all the rest is known
        cursor.within(cursor.place + 16 + (words + bucket) * dim * 4 + 17 + labels * dim * 4)
    input = _matrix(cursor, quantised, words + bucket, dim)
    quantised = cursor.take("?")[0] and quantised
    output = _matrix(cursor, quantised, labels, dim)
    names = [
        data[start : start + length].decode(errors="replace")
        for start, length in zip(starts[words:].tolist(), lengths[words:].tolist(), strict=True)
    ]
    maxn = maxn if version > 11 else 0  # what the library does for models of before 2017, which have none
    return ModelFile(
        path, data, dim, word_ngrams, loss, bucket, maxn, words, names, pruned >= 0, starts, lengths, input, output
    )


class _Cursor:
    """A place in the file. To go beyond the end is an error that names the bytes that are missing."""

    def __init__(self, path: str, data: mmap.mmap) -> None:
        self.path, self.data, self.place = path, data, 0

    def take(self, form: str) -> tuple[Any, ...]:
        begin = self.skip(struct.calcsize("<" + form))
        return struct.unpack_from("<" + form, self.data, begin)

    def skip(self, length: int) -> int:
        """Where the next bytes begin, which are passed over."""
        self.within(self.place + length)
        self.place += length
        return self.place - length

    def within(self, end: int) -> None:
        if end > len(self.data):
            raise _broken(self.path, f"it was cut short, {len(self.data):,} bytes of at least {end:,}")


def _broken(path: str, how: str) -> RecipeError:
    return RecipeError(f"model: {path!r} is no whole fastText model: {how}; name a .bin or .ftz file that is")


def _dictionary(cursor: _Cursor, entries: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts and lengths of the words, [entries]."""
    first, find = cursor.place, cursor.data.find

    def found() -> Iterator[int]:
        place = first
        for _ in range(entries):
            end = find(b"\0", place)
            if end < 0:
                return
            yield end
            place = end + AFTER_WORD

    ends = np.fromiter(found(), np.int64)
    cursor.place = int(ends[-1]) + AFTER_WORD if len(ends) else first
    cursor.within(cursor.place + (entries - len(ends)) * (AFTER_WORD + 1))
    starts = np.concatenate([[first], ends + AFTER_WORD])[: len(ends)]
    return starts, ends - starts


def _matrix(cursor: _Cursor, quantised: bool, rows: int, columns: int) -> int | None:
    """Passes over a matrix; where its float32s begin."""
    if quantised:
        with_norms, found_rows, found_columns, codes = cursor.take("?qqi")
        cursor.skip(codes)
        _centroids(cursor)
        if with_norms:
            cursor.skip(found_rows)
            _centroids(cursor)
        return None
    found_rows, found_columns = cursor.take("qq")
    if (found_rows, found_columns) != (rows, columns):
        raise _broken(cursor.path, f"a matrix of {found_rows} x {found_columns} where {rows} x {columns} is due")
    return cursor.skip(rows * columns * 4)


def _centroids(cursor: _Cursor) -> None:
    dim, _, _, _ = cursor.take("iiii")
    cursor.skip(dim * CENTROIDS * 4)
