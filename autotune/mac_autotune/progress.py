"""A study under way, on standard error: a panel on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from types import TracebackType

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.live import Live
from rich.table import Table

from .study import StudyPlan, feasible, finished

_LINE_EVERY_S = 15.0


class StudyPanel:
    """Shows best so far, trials and time left; call it after every trial."""

    def __init__(self, plan: StudyPlan, console: Console | None = None) -> None:
        self._plan, self._console = plan, console or Console(stderr=True)
        self._begin, self._mine, self._last_line = time.monotonic(), 0, float("-inf")
        self._live = Live(console=self._console, transient=True, auto_refresh=False)

    def __enter__(self) -> StudyPanel:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Show the state of the study after a trial."""
        self._mine += 1
        done, rows = finished(study), self._rows(study, trial)
        if self._console.is_terminal:
            table = Table.grid(padding=(0, 2))
            for name, value in rows.items():
                table.add_row(f"[bold]{name}[/]", value)
            self._live.update(table, refresh=True)
        elif done >= self._plan.trials or time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._last_line = time.monotonic()
            line = ", ".join(f"{name} {value}" for name, value in rows.items())
            self._console.print(line, soft_wrap=True, highlight=False)

    def _rows(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, str]:
        done, elapsed = finished(study), time.monotonic() - self._begin
        left = max(self._plan.trials - done, 0) * elapsed / self._mine
        if self._plan.timeout_s is not None:
            left = min(left, max(self._plan.timeout_s - elapsed, 0))
        kept = [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if feasible(t)]
        best = min(kept, key=lambda t: t.values[0], default=None)
        return {
            "study": self._plan.name,
            "trials": f"{done}/{self._plan.trials}",
            "best": "none yet"
            if best is None
            else f"{best.values[0]:.4f} (trial {best.number}; trial 0 is the default)",
            "last": f"{trial.state.name.lower()} {'' if not trial.values else f'{trial.values[0]:.4f}'}".strip(),
            "left": clock(left),
        }


def clock(seconds: float) -> str:
    """A duration for people."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
