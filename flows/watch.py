"""Who watches a run: bars with rates on a terminal, quiet log lines anywhere else. Both on standard error."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{_amount(task.completed, task.fields['unit'])}" + (f" {_amount(speed, '')}/s" if speed else ""))


class Terminal:
    """One bar per step."""

    def __init__(self) -> None:
        columns = TextColumn("{task.description:<28}"), BarColumn(), _Rate(), TimeRemainingColumn()
        self._bars = Progress(*columns, console=Console(stderr=True))
        self._bars.start()
        self._task: TaskID | None = None

    def begin(self, step: str, total: int, unit: str) -> None:
        self.stop()
        self._bars.start()
        self._task = self._bars.add_task(step, total=total, unit=unit)

    def advance(self, amount: int) -> None:
        if self._task is not None:
            self._bars.advance(self._task, amount)

    def end(self, step: str, counts: Mapping[str, Any], seconds: float) -> None:
        self.stop()
        self._bars.console.print(f"[green]✓[/] {step}  {told(counts)}  {seconds:.1f} s", highlight=False)

    def stop(self) -> None:
        """Take the bar off the screen; what was printed above it stays."""
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        self._bars.stop()


class Log:
    """A line when a step begins, at most one every ten seconds while it goes on, and one at its end."""

    SECONDS = 10.0

    def __init__(self) -> None:
        self._step, self._unit, self._total, self._done = "", "", 0, 0
        self._begun = self._said = time.monotonic()

    def begin(self, step: str, total: int, unit: str) -> None:
        self._step, self._unit, self._total, self._done = step, unit, total, 0
        self._begun = self._said = time.monotonic()

    def advance(self, amount: int) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._said > self.SECONDS:
            self._said = now
            rate = _amount(self._done / (now - self._begun), "")
            self._say(f"{self._step}: {self._done:,} of {self._total:,} {self._unit}, {rate}/s")

    def end(self, step: str, counts: Mapping[str, Any], seconds: float) -> None:
        self._say(f"{step}: {told(counts)} in {seconds:.1f} s")

    def stop(self) -> None:
        pass

    @staticmethod
    def _say(line: str) -> None:
        print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)  # noqa: T201


def watcher() -> Terminal | Log:
    """The right one for where standard error goes."""
    return Terminal() if sys.stderr.isatty() else Log()


def told(counts: Mapping[str, Any]) -> str:
    """Counts in one line; what is nested is summed up or left out."""
    if counts and all(isinstance(value, dict) for value in counts.values()):  # ingest: per source
        sums = {key: sum(line[key] for line in counts.values()) for key in ("records", "documents", "rejects")}
        return f"{len(counts)} sources, " + told(sums)
    plain = {key: value for key, value in counts.items() if not isinstance(value, dict) and value is not None}
    return ", ".join(
        f"{value:,} {key.replace('_', ' ')}"
        if isinstance(value, int) and not isinstance(value, bool)
        else f"{key.replace('_', ' ')}"
        if value is True
        else f"{key.replace('_', ' ')} {value}"
        for key, value in plain.items()
        if value is not False
    )


def _amount(number: float | None, unit: str) -> str:
    number = number or 0
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.1f}{suffix} {unit}".rstrip()
    return f"{number:.0f} {unit}".rstrip()
