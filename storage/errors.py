"""Errors, named by what the reader does next.

    CorpusmillError
    ├── RecipeError     edit the recipe, or install what it names; exit 2, no traceback
    │   └── QueryError  edit the SQL
    ├── LockedError     another run writes this table: wait for it; exit 2
    ├── SourceError     a file cannot be read any further: its rest is one rejected record, the run goes on
    ├── SchemaError     a contract is broken: the shard fails, and a retry would fail again
    └── ShardError      may pass: the shard is tried again

A record that cannot become a document is no error but a row of `rejects`.
"""


class CorpusmillError(Exception):
    """The root; never raised itself."""


class RecipeError(CorpusmillError):
    """The user's input is wrong. `problems` holds one line each, with the field and the remedy."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

    def __reduce__(self) -> tuple[type["RecipeError"], tuple[str, ...]]:
        return type(self), self.problems


class QueryError(RecipeError):
    """A piece of SQL is refused or does not run; the message says what to write instead."""


class LockedError(CorpusmillError):
    """Another process holds the lock of a table; the message names it."""


class SourceError(CorpusmillError):
    """An input file breaks off or cannot be decoded. `reason` is a word of the rejects table."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type["SourceError"], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


class SchemaError(CorpusmillError):
    """A scorer, a shard or a table breaks its contract (rows, order, types, NaN)."""


class ShardError(CorpusmillError):
    """Work on one shard failed for a reason that may pass (a lost worker, a full disk, a busy catalog)."""
