"""fastText's prediction over a mapped model file: one copy of a model for all processes of a machine.

The library reads a model into memory of its own, in each process. Here the input's matrix, nearly all of the file,
stays where it is: its pages are the system's cache. A process has 24 bytes per word of the dictionary for itself.

What the library does (fastText 0.9.2: dictionary.cc, model.cc, loss.cc) is done for many texts at once:

    tokens      between spaces, tabs, line breaks and NULs; the line ends with the token </s>, or with one in the text
    rows        one per known token; one per n-gram of tokens, known or not: (h1 * 116049371 + h2) ... modulo `bucket`,
                where h is the token's FNV-1a hash of 32 bits, signed, and all else is modulo 2^64
    left out    labels, and unknown tokens that begin as labels do
    hidden      the mean of the rows, summed in float32 in the library's order, so that not even the rounding differs
    output      softmax of output @ hidden, or of each the logistic function out of a table of 512 steps

A word is found in the dictionary by a 64-bit hash of its bytes. No two words of up to eight bytes have the same one; of
longer ones two would have to agree in 64 bits, once in 10^19 pairs, to be taken for each other.
"""

import hashlib
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from scorers import words
from scorers.classifiers.fasttext_file import NEGATIVE_SAMPLING, ONE_VS_ALL, SOFTMAX, ModelFile

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Floats = NDArray[np.float32]

MULTIPLIER = np.uint64(116049371)
FNV_BASIS, FNV_PRIME = 2166136261, 16777619
END, LABEL = b"</s>", b"__label__"
WINDOW = 8  # bytes that are hashed at once
LONG = 64  # bytes; the identity of a longer token is made by itself
FEW = 16  # tokens; for fewer, Python by itself is faster than a round of numpy
GROUP_CHARS = 1 << 20  # in one go; fewer are slower, of a million words the table is not in the cache anyway
LOW_BYTES = np.array([(1 << 8 * count) - 1 for count in range(WINDOW + 1)], np.uint64)
STEPS, BOUND = 512, 8  # of the library's table of the logistic function
ADDED = np.float32(1e-5)


def can_map(file: ModelFile) -> bool:
    """Whether Mapped computes what the library does with this model: no subwords, nothing quantised, a flat output."""
    flat = file.loss in (NEGATIVE_SAMPLING, SOFTMAX, ONE_VS_ALL)
    return flat and not file.maxn and not file.pruned and None not in (file.input, file.output)


class Mapped:
    """Probabilities of all labels, for many lines at once. `file` is one that `can_map`."""

    def __init__(self, file: ModelFile) -> None:
        import torch

        assert file.input is not None
        assert file.output is not None
        self._file = file
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of a buffer that nobody may write to
            values = torch.frombuffer(
                file.data, dtype=torch.float32, count=(file.words + file.bucket) * file.dim, offset=file.input
            )
        self._input = values.view(-1, file.dim)
        output = np.frombuffer(file.data, "<f4", len(file.labels) * file.dim, file.output)
        self._output = output.reshape(-1, file.dim).astype(np.float32)

        buffer = np.frombuffer(file.data, np.uint8)
        self._table = _Table(_identities(buffer, file.starts, file.lengths))
        self._hashes = _fnv(buffer, file.starts, file.lengths) if file.word_ngrams > 1 else None
        end = np.frombuffer(END.ljust(WINDOW), np.uint8)
        self._end = _identities(end, np.zeros(1, np.int64), np.full(1, len(END)))[0]

    def __call__(self, lines: Sequence[str]) -> tuple[Floats, NDArray[np.bool_]]:
        """P(label) + 1e-5 as the library has it, [lines, labels]; whether the model knows anything of it, [lines]."""
        parts = [self._hidden(lines[part]) for part in words.groups(lines, GROUP_CHARS)]
        hidden = np.concatenate([np.empty((0, self._file.dim), np.float32), *(part for part, _ in parts)])
        known = np.concatenate([np.empty(0, bool), *(part for _, part in parts)])
        logits = np.zeros((len(hidden), len(self._output)), np.float32)
        for column in range(self._file.dim):  # in the library's order, which is one sum after the other
            logits += hidden[:, column, None] * self._output[:, column]
        if self._file.loss == SOFTMAX:
            logits -= logits.max(axis=1, keepdims=True)
            powers = np.exp(logits)
            return powers / powers.sum(axis=1, keepdims=True) + ADDED, known
        return _logistic(logits) + ADDED, known

    def _hidden(self, lines: Sequence[str]) -> tuple[Floats, NDArray[np.bool_]]:
        """The mean of each line's rows, [lines, dim], and whether it has any."""
        import torch

        rows, counts = self._rows(lines)
        firsts = torch.from_numpy(np.cumsum(counts) - counts)
        sums = torch.nn.functional.embedding_bag(torch.from_numpy(rows), self._input, firsts, mode="sum").numpy()
        return sums * (1 / np.maximum(counts, 1)).astype(np.float32)[:, None], counts > 0

    def _rows(self, lines: Sequence[str]) -> tuple[Ints, Ints]:
        """Rows of the input's matrix, line after line, those of words before those of n-grams; how many per line."""
        text = "\n" + f" {END.decode()}\n".join([*lines, " " * WINDOW])
        buffer = np.frombuffer(text.encode(), np.uint8)
        blank = (buffer == ord(" ")) | (buffer - np.uint8(ord("\t")) < 5) | (buffer == 0)  # \t \n \v \f \r
        edges = np.flatnonzero(blank[1:] != blank[:-1]) + 1
        starts, lengths = edges[::2], edges[1::2] - edges[::2]
        breaks = np.flatnonzero(buffer == ord("\n"))
        if len(breaks) != len(lines) + 1:
            raise ValueError("a line break within a line")
        identities = _identities(buffer, starts, lengths)
        entries = self._table.find(identities)

        # [lines + 1] places in the tokens, where each line begins.
        firsts = np.searchsorted(starts, breaks)
        keep = self._kept(buffer, starts, identities, entries, firsts)
        if not keep.all():
            starts, lengths, entries = starts[keep], lengths[keep], entries[keep]
            firsts = np.concatenate([[0], np.cumsum(keep)])[firsts]
        known = entries >= 0
        of_words = np.diff(np.concatenate([[0], np.cumsum(known)])[firsts])
        if self._hashes is None:
            return entries[known], of_words

        hashes = self._hashes[entries]
        unknown = np.flatnonzero(~known)
        hashes[unknown] = _fnv(buffer, starts[unknown], lengths[unknown])
        signed = hashes.view(np.int32).astype(np.int64).view(np.uint64)
        # [tokens, n-grams that begin there]: a line's end ends them too.
        following = np.repeat(firsts[1:], np.diff(firsts)) - np.arange(len(entries)) - 1
        grams = np.zeros((len(entries), self._file.word_ngrams - 1), np.int64)
        sums = signed
        for more in range(1, min(self._file.word_ngrams, len(entries))):
            sums = sums[:-1] * MULTIPLIER + signed[more:]
            grams[:-more, more - 1] = sums % np.uint64(self._file.bucket)
        there = following[:, None] >= np.arange(1, self._file.word_ngrams)
        of_grams = np.diff(np.concatenate([[0], np.cumsum(there.sum(axis=1))])[firsts])

        counts = of_words + of_grams
        begins = np.cumsum(counts) - counts
        rows = np.empty(counts.sum(), np.int64)
        rows[_places(begins, of_words)] = entries[known]
        rows[_places(begins + of_words, of_grams)] = grams[there] + self._file.words
        return rows, counts

    def _kept(self, buffer: Bytes, starts: Ints, identities: Hashes, entries: Ints, firsts: Ints) -> NDArray[np.bool_]:
        """The tokens of a line up to its first </s>, without labels, and without what looks like one."""
        keep = entries < self._file.words
        looks = np.flatnonzero((entries < 0) & (buffer[starts] == LABEL[0]))
        keep[looks] = [buffer[start : start + len(LABEL)].tobytes() != LABEL for start in starts[looks].tolist()]
        ends = identities == self._end
        if np.count_nonzero(ends) >= len(firsts):
            before = np.cumsum(ends) - ends
            keep &= before == np.repeat(before[firsts[:-1]], np.diff(firsts))
        return keep


class _Table:
    """Places of 64-bit hashes: they are sorted, and a search begins where the first of its leading bits is."""

    def __init__(self, identities: Hashes) -> None:
        order = np.argsort(identities)
        found = identities[order]
        bits = max(1, len(identities).bit_length())
        self._shift = np.uint64(64 - bits)
        leading = np.bincount((found >> self._shift).astype(np.int64), minlength=1 << bits)
        self._firsts = (np.cumsum(leading) - leading).astype(np.int32)
        self._hashes = np.append(found, LOW_BYTES[-1])  # nothing is beyond the last
        self._places = np.append(order, -1).astype(np.int32)

    def find(self, identities: Hashes) -> Ints:
        """The place of each, -1 for one that is not there."""
        at = self._firsts[identities >> self._shift]
        found = self._hashes[at]
        before = np.flatnonzero(found < identities)
        while len(before):
            at[before] += 1
            found[before] = self._hashes[at[before]]
            before = before[found[before] < identities[before]]
        return np.where(found == identities, self._places[at], -1)


def _identities(buffer: Bytes, starts: Ints, lengths: Ints) -> Hashes:
    """64 bits for each token: of its bytes, which hold no NUL. WINDOW bytes from its start on are in the buffer."""
    windows = np.ndarray((len(buffer) - WINDOW + 1,), "<u8", buffer, strides=(1,))
    found = words.mix(windows[starts] & LOW_BYTES[np.minimum(lengths, WINDOW)])
    more = np.flatnonzero(lengths > WINDOW)
    for place in range(WINDOW, LONG, WINDOW):
        more = more[lengths[more] > place]
        within = LOW_BYTES[np.minimum(lengths[more] - place, WINDOW)]
        found[more] = words.mix(found[more] ^ (windows[starts[more] + place] & within))
    for token in more[lengths[more] > LONG].tolist():
        whole = buffer[starts[token] : starts[token] + lengths[token]].tobytes()
        found[token] = int.from_bytes(hashlib.blake2b(whole, digest_size=8).digest())
    return found


def _fnv(buffer: Bytes, starts: Ints, lengths: Ints) -> NDArray[np.uint32]:
    """FNV-1a of 32 bits for each token, over its bytes as signed characters, as the library has it."""
    order = np.argsort(-lengths, kind="stable")
    starts, lengths = starts[order], lengths[order]
    signed = buffer.view(np.int8)
    hashes = np.full(len(order), FNV_BASIS, np.uint32)
    place, going = 0, len(order)
    while (going := int(np.searchsorted(-lengths[:going], -place))) >= FEW:
        hashes[:going] ^= signed[starts[:going] + place].astype(np.int32).view(np.uint32)
        hashes[:going] *= np.uint32(FNV_PRIME)
        place += 1
    for token in range(going):
        value = int(hashes[token])
        for code in signed[starts[token] + place : starts[token] + lengths[token]].tolist():
            value = (value ^ (code & 0xFFFFFFFF)) * FNV_PRIME & 0xFFFFFFFF
        hashes[token] = value
    found = np.empty_like(hashes)
    found[order] = hashes
    return found


def _places(begins: Ints, counts: Ints) -> Ints:
    """begin, begin + 1, ... of each run in turn."""
    shifts: Ints = np.repeat(begins - (np.cumsum(counts) - counts), counts)
    return shifts + np.arange(len(shifts))


def _logistic(values: Floats) -> Floats:
    """The library's sigmoid: the value at the left edge of one of 512 steps from -8 to 8; 0 and 1 beyond."""
    edges = np.arange(STEPS + 1, dtype=np.float32) * (2 * BOUND / STEPS) - BOUND
    table = (1 / (1 + np.exp(-edges))).astype(np.float32)
    steps = (np.clip(values, -BOUND, BOUND) + np.float32(BOUND)) * np.float32(STEPS) / BOUND / 2
    inside = table[steps.astype(np.int64)]
    return np.where(values < -BOUND, 0, np.where(values > BOUND, 1, inside)).astype(np.float32)
