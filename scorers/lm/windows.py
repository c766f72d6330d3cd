"""Windows of texts, and batches of windows: what one forward pass reads.

A text longer than the context is cut into windows that advance by `stride` tokens. A token is predicted once, in the
first window that holds it; what a later window holds before it is its context:

    text     0 1 2 3 4 5 6 7 8 9        (width 4, stride 2, no BOS: the first token is only context)
    window   0[1 2 3]
                 2 3[4 5]
                     4 5[6 7]
                         6 7[8 9]       [predicted here]

Windows are read longest first, in batches whose padding is bounded.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

PADDING = 0.05
"""Largest share of a batch that may be padding, unless the batch is small."""
SMALL = 32
"""A batch of less than 1/SMALL of the tokens that may go through at once is filled up whatever its padding: it costs
little, and many small passes cost more."""


class Window(NamedTuple):
    """Tokens [start, stop) of text number `text`, of which [first, stop) are predicted here."""

    text: int
    start: int
    stop: int
    first: int


def windows(text: int, n: int, width: int, stride: int, first: int) -> Iterator[Window]:
    """Windows of at most `width` tokens over a text of `n`, whose tokens from `first` on are each predicted once.

    A stride at which windows would no longer touch is cut to the largest at which they do: `width`, where a BOS stands
    before each window (first = 0); else width - 1, so that a window's first token is the last of the one before it.
    """
    start, stride = 0, max(1, min(stride, width - first))
    while first < n:
        stop = min(start + width, n)
        yield Window(text, start, stop, first)
        first, start = stop, start + stride


def longest_first(todo: list[Window]) -> list[Window]:
    """Windows in the order in which they are read: what does not fit into memory shows at once."""
    return sorted(todo, key=lambda w: (w.start - w.stop, w))


def batch_size(lengths: Sequence[int], begin: int, tokens: int) -> int:
    """How many windows from number `begin` on, of lengths that fall, go through together.

    At most `tokens` places, padding included, and at least one window; no more than PADDING of the places hold no
    token, unless there are fewer than tokens / SMALL.
    """
    longest, fed = lengths[begin], 0
    for rows, length in enumerate(islice(lengths, begin, None), start=1):
        fed += length
        places = rows * longest
        if rows > 1 and (places > tokens or (places - fed > PADDING * places and places * SMALL > tokens)):
            return rows - 1
    return len(lengths) - begin
