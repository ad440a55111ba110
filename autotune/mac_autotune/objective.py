"""What a study optimises: the interface that the real objectives and the tests' fake one share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from .space import Suggest

Report = Callable[[float, int], None]
"""``report(value so far, step)`` after every part of a measurement; raises ``optuna.TrialPruned`` to end it."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one trial measured.

    ``values``: one per metric of the objective, the first is latency. ``constraints``: by name, kept if ``<= 0``.
    ``notes``: anything else worth keeping, as JSON values.
    """

    values: tuple[float, ...]
    constraints: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


class Objective(Protocol):
    """A space and how to measure a point of it."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the values, all to be minimised; a single-objective study takes the first."""
        ...

    @property
    def noisy(self) -> bool:
        """Whether measuring the same point again gives another value; if not, it is not measured again."""
        ...

    def first(self) -> list[dict[str, Any]]:
        """What to try before anything is drawn: the default's parameters, which are trial 0, and what else must be."""
        ...

    def suggest(self, trial: Suggest) -> Any:
        """Let a trial choose a point."""
        ...

    def measure(self, point: Any, report: Report) -> Measured:
        """Measure a point."""
        ...
