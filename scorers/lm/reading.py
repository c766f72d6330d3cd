"""Reading: texts become token ids, in memory that the longest text does not decide.

An encoding takes some 600 bytes a token until its ids are out: 14 GB for a text of 100 MB. So a text longer than PIECE
is encoded in pieces that overlap by twice MARGIN, and the pieces are joined where their readings have come to agree:

    piece      ...a b c d e f|
    next                |x y d e f g h...        joined between d and e, where RUN tokens on either side are equal

A tokenizer decides by what stands near: its words are of bounded length, and what it begins wrongly at a piece's edge
it has forgotten within a few words. So the joined ids are those of the whole text. Where two readings never agree (one
word of a hundred thousand letters) they are joined between two tokens all the same, and a token may be lost.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

GROUP = 1 << 21
"""Characters encoded at once, in parallel."""
PIECE = 1 << 18
"""Characters of a piece."""
MARGIN = 512
"""Characters on either side of where two pieces meet, in which both are read."""
RUN = 16
"""Tokens that must be equal before and after the place where pieces are joined."""


class Tokens(NamedTuple):
    """A text as the model reads it: ids without special tokens, and the UTF-8 bytes of the tokens to be predicted."""

    ids: NDArray[np.int64]
    n_bytes: int


class Place(NamedTuple):
    """A token of a seam: its place in its piece, its characters [start, stop) in the text, its id."""

    number: int
    start: int
    stop: int
    id: int


class Piece(NamedTuple):
    """Characters [start, stop) of text number `text`, of which the first and the last may be a neighbour's too."""

    text: int
    start: int
    stop: int


class Read(NamedTuple):
    """What is kept of an encoded piece: its ids, its tokens near either end, the character after its first token."""

    ids: NDArray[np.int64]
    head: list[Place]
    tail: list[Place]
    after_first: int


def read(tokenizer: "Tokenizer", texts: Sequence[str], *, skip_first: bool) -> list[Tokens | None]:
    """Each text's tokens, with the bytes of all of them or (`skip_first`) of all but the first; None for no Unicode.

    A character that is cut into several tokens counts whole with the last of them, as does white space that a tokenizer
    leaves out of its offsets, so that the bytes of all tokens sum to the text's. A string with surrogates that stand
    alone is no Unicode text: nothing can encode it.
    """
    sizes = [_utf8_bytes(text) for text in texts]
    found: list[list[Read]] = [[] for _ in texts]
    pieces = [p for number, size in enumerate(sizes) if size is not None for p in _pieces(number, len(texts[number]))]
    for group in _groups(pieces):
        encodings = tokenizer.encode_batch([texts[p.text][p.start : p.stop] for p in group], add_special_tokens=False)
        for piece, encoding in zip(group, encodings, strict=True):
            found[piece.text].append(_keep(encoding, piece, len(texts[piece.text])))
    tokens: list[Tokens | None] = []
    for text, size, parts in zip(texts, sizes, found, strict=True):
        if size is None:
            tokens.append(None)
        else:
            skipped = len(text[: parts[0].after_first].encode()) if skip_first else 0
            tokens.append(Tokens(_joined(parts), size - skipped))
    return tokens


def _utf8_bytes(text: str) -> int | None:
    try:
        return len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError:
        return None


def _pieces(text: int, length: int) -> Iterator[Piece]:
    for start in range(0, max(1, length - MARGIN), PIECE):
        yield Piece(text, max(0, start - MARGIN), min(length, start + PIECE + MARGIN))


def _groups(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces in runs of about GROUP characters."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += piece.stop - piece.start
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _keep(encoding: "Encoding", piece: Piece, length: int) -> Read:
    """An encoded piece of a text of `length` characters. The margins are read where there is a neighbour."""
    ids = encoding.ids

    def place(number: int) -> Place:
        start, stop = _characters(encoding, number)
        return Place(number, piece.start + start, piece.start + stop, ids[number])

    head = map(place, range(len(ids))) if piece.start else iter(())
    tail = map(place, reversed(range(len(ids)))) if piece.stop < length else iter(())
    return Read(
        np.asarray(ids, np.int64),
        list(takewhile(lambda p: p.start < piece.start + 2 * MARGIN, head)),
        list(takewhile(lambda p: p.start >= piece.stop - 2 * MARGIN, tail))[::-1],
        _after_first(encoding),
    )


def _after_first(encoding: "Encoding") -> int:
    """The character at which the second token begins to count; with fewer tokens, the text's end or 0."""
    if len(encoding) == 0:
        return 0
    end = _characters(encoding, 0)[1]
    return end if len(encoding) == 1 else min(end, _characters(encoding, 1)[0])


def _characters(encoding: "Encoding", token: int) -> tuple[int, int]:
    """The characters [start, stop) of a token; special tokens alone have none, and none was asked for."""
    return encoding.token_to_chars(token) or (0, 0)


def _joined(parts: Sequence[Read]) -> NDArray[np.int64]:
    """The ids of a text out of those of its pieces."""
    ids, begin = [], 0
    for left, right in pairwise(parts):
        stop, then = _seam(left.tail, right.head) if left.tail and right.head else (len(left.ids), 0)
        ids.append(left.ids[begin:stop])
        begin = then
    return np.concatenate([*ids, parts[-1].ids[begin:]])


def _seam(tail: list[Place], head: list[Place]) -> tuple[int, int]:
    """(tokens to take of the left piece, tokens to leave out of the right one)."""
    left, right = [p[1:] for p in tail], [p[1:] for p in head]
    where = {token: number for number, token in enumerate(right)}
    for i in range(RUN, len(left) - RUN + 1):
        j = where.get(left[i], 0)
        if j >= RUN and left[i - RUN : i + RUN] == right[j - RUN : j + RUN]:
            return tail[i].number, head[j].number
    middle = tail[len(tail) // 2]
    return middle.number, next((p.number for p in head if p.start >= middle.start), head[-1].number + 1)
