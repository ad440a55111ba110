"""Progress on standard error: bars on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from .output import err

_LINE_EVERY_S = 15.0


class Stages:
    """One bar per named stage; calling it again with the same name moves its bar."""

    def __init__(self, console: Console, *, in_bytes: bool = False) -> None:
        self._console = console
        amount = DownloadColumn() if in_bytes else MofNCompleteColumn()
        columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True)
        self._tasks: dict[str, TaskID] = {}
        self._last_line = 0.0

    def __enter__(self) -> Stages:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` is done."""
        new = stage not in self._tasks
        if new:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)
        now = time.monotonic()
        if not self._console.is_terminal and (new or done == total or now - self._last_line > _LINE_EVERY_S):
            self._last_line = now
            self._console.print(f"{stage}: {done}/{total}", soft_wrap=True, highlight=False)


@contextmanager
def stages(*, in_bytes: bool = False) -> Iterator[Stages]:
    """Open a display on standard error."""
    with Stages(err(), in_bytes=in_bytes) as display:
        yield display
