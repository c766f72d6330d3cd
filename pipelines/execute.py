"""How work is spread over workers, and what becomes of an item that cannot be done.

    map(make, items)      make(resources) -> work     once per worker: a model is loaded here
                          work(item) -> result        (item, result | Failed), as they finish, in any order
    gang(work)            work(resources) -> result   once on every member of a group, all at the same time: training

What `work` raises decides:

    RecipeError, LockedError                    raised to the caller at once; the rest is dropped
    ShardError, OSError, MemoryError,
    a lost worker                               tried again after a pause, ATTEMPTS times in all, then Failed
    SchemaError                                 Failed; a retry would fail again
    any other exception                         Failed; a bug in a scorer, its traceback is kept

One item's failure never stops the others. An error of `make` is raised to the caller: every item would meet it.
A gang is one item: what fails it is raised to the caller.
`Serial` runs in this process; flows.ray_executor spreads over processes. Results are for the caller to commit.
"""

import heapq
import os
import pickle
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from storage.errors import CorpusmillError, LockedError, RecipeError, ShardError

Item = TypeVar("Item")
Result = TypeVar("Result")

PAUSES = (0.2, 1.0)
"""Seconds before the second and the third attempt: a busy file system or catalog is free again, a full disk is not."""
ATTEMPTS = len(PAUSES) + 1


@dataclass(frozen=True)
class Resources:
    """What one worker is given: a torch device's name ("cpu", "cuda", "cuda:1"), and the CPU threads it may use.

    A member of a gang also knows its `rank`, 0 to `world` - 1; anyone else is alone.
    """

    device: str
    threads: int
    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class Failed:
    """An item that could not be done.

    `error` pickles: one that would not is replaced by a ShardError with its text. `traceback` is the text of where it
    was raised, "" when a worker was lost.
    """

    error: Exception
    attempts: int
    traceback: str = ""


class Executor(Protocol):
    """Where items are worked on."""

    def map(
        self, make: Callable[[Resources], Callable[[Item], Result]], items: Sequence[Item], *, gpu: bool = False
    ) -> Iterator[tuple[Item, Result | Failed]]:
        """Each item once, with its result or why there is none, as they finish.

        Nothing starts before the first `next`; closing the iterator drops what is not done. `gpu` asks for an
        accelerator per worker where there is one.
        """
        ...

    def gang(self, work: Callable[[Resources], Result], *, gpu: bool = True) -> Result:
        """`work` once on every member of a torch process group at the same time; the result of rank 0.

        `gpu` asks for one member per GPU; where there is none, or one, `work` runs once with all that there is, and
        `world` is 1. Where `world` is more, torch.distributed is initialised (nccl on GPUs, gloo on CPUs) and
        `device` is the member's own.

        When one member raises or is lost, all are ended and, by the table above, begun again: `work` goes on from what
        it has kept. The result is no torch tensor and holds none.

        Raises:
            RecipeError, LockedError: a member raised it.
            ShardError, OSError, MemoryError: still there, or members still lost, after ATTEMPTS attempts.
            Exception: any other that a member raised, the member's traceback being a note of it.
        """
        ...


class Serial:
    """One item after the other, in this process; `device` serves maps that ask for a GPU."""

    def __init__(self, device: str = "cpu", threads: int | None = None) -> None:
        self.device = device
        self.threads = threads or cpus()

    def map(
        self, make: Callable[[Resources], Callable[[Item], Result]], items: Sequence[Item], *, gpu: bool = False
    ) -> Iterator[tuple[Item, Result | Failed]]:
        """See Executor. `make` is called at the first `next`, and not at all without items."""
        if not items:
            return
        work = make(Resources(self.device if gpu else "cpu", self.threads))
        todo = Todo[Item, Result](items)
        while todo.unfinished:
            number = todo.take()
            if number is None:
                time.sleep(todo.pause() or 0)
            else:
                yield from todo.settle(number, attempt(work, items[number]))

    def gang(self, work: Callable[[Resources], Result], *, gpu: bool = True) -> Result:
        """See Executor. `work` runs in this process, alone."""
        return only(self.map(lambda resources: lambda _: work(resources), [None], gpu=gpu))


def only(outcomes: Iterable[tuple[object, Result | Failed]]) -> Result:
    """The result of a map of one item. Why there is none is raised, with the worker's traceback as a note."""
    [(_, outcome)] = outcomes
    if isinstance(outcome, Failed):
        if outcome.traceback:
            outcome.error.add_note(outcome.traceback)
        raise outcome.error
    return outcome


@dataclass(frozen=True)
class Done(Generic[Result]):
    """An attempt that gave a result."""

    result: Result


@dataclass(frozen=True)
class Raised:
    """An attempt that raised `error` (which pickles), and what that means for its item or for the map."""

    error: Exception
    then: Literal["stop", "again", "fail"]
    traceback: str = ""


def attempt(work: Callable[[Item], Result], item: Item) -> Done[Result] | Raised:
    """Call `work(item)` and judge what it raises by the table above."""
    try:
        return Done(work(item))
    except Exception as error:  # noqa: BLE001  whatever bug a scorer has, the other items go on
        return Raised(_portable(error), _judge(error), "".join(traceback.format_exception(error)))


def _judge(error: Exception) -> Literal["stop", "again", "fail"]:
    match error:
        case RecipeError() | LockedError():
            return "stop"
        case ShardError() | OSError() | MemoryError():
            return "again"
        case _:  # SchemaError, or a bug
            return "fail"


def _portable(error: Exception) -> Exception:
    """`error`, or its text in an error that pickles: an exception's own arguments often do not rebuild it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  pickling runs the exception's own code
        kind: type[CorpusmillError] = RecipeError if isinstance(error, RecipeError) else ShardError
        return kind(f"{type(error).__qualname__}: {error}")
    return error


class Todo(Generic[Item, Result]):
    """The items of one map that are not settled yet: which to try now, which again and when."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.unfinished = len(items)
        self._items = items
        self._fresh = deque(range(len(items)))
        self._again: list[tuple[float, int]] = []  # a heap of (monotonic second when it is due, number)
        self._attempts: Counter[int] = Counter()

    def __len__(self) -> int:
        """Items that nobody works on: fresh ones and those that pause."""
        return len(self._fresh) + len(self._again)

    def take(self) -> int | None:
        """The number of an item to try now; None when all are being worked on or pause."""
        if self._again and self._again[0][0] <= time.monotonic():
            return heapq.heappop(self._again)[1]
        return self._fresh.popleft() if self._fresh else None

    def put_back(self, number: int) -> None:
        """The item was taken and never begun; it counts as no attempt and is next."""
        self._fresh.appendleft(number)

    def pause(self) -> float | None:
        """Seconds until the next retry is due, 0 when one is; None when none waits."""
        return max(0.0, self._again[0][0] - time.monotonic()) if self._again else None

    def settle(self, number: int, tried: Done[Result] | Raised) -> Iterator[tuple[Item, Result | Failed]]:
        """Book an attempt: yields the item with its outcome, or nothing when it will be tried again.

        Raises the error of an attempt that stops the map.
        """
        self._attempts[number] += 1
        attempts = self._attempts[number]
        if isinstance(tried, Done):
            self.unfinished -= 1
            yield self._items[number], tried.result
        elif tried.then == "stop":
            raise tried.error
        elif tried.then == "again" and attempts < ATTEMPTS:
            heapq.heappush(self._again, (time.monotonic() + PAUSES[attempts - 1], number))
        else:
            self.unfinished -= 1
            yield self._items[number], Failed(tried.error, attempts, tried.traceback)


def cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
