"""What the plugin did in this process: SGLang only logs a plugin's exception, so every step is recorded here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mac_kernels.errors import MacError


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the plugin: its name, whether it took effect, and otherwise the problem."""

    name: str
    done: bool
    problem: str = ""


_STEPS: dict[str, Step] = {}


def attempt(name: str, action: Callable[[], None]) -> bool:
    """Run one step and record how it went; an exception is kept as the step's problem."""
    try:
        action()
    except Exception as error:  # SGLang's interface may fail in any way; the report must name it
        prefix = "" if isinstance(error, MacError) else f"{type(error).__name__}: "
        _STEPS[name] = Step(name, done=False, problem=f"{prefix}{error}")
        return False
    _STEPS[name] = Step(name, done=True)
    return True


def steps() -> tuple[Step, ...]:
    """Every step that was attempted in this process, in order."""
    return tuple(_STEPS.values())


def problems() -> tuple[str, ...]:
    """The steps that failed, each with its reason."""
    return tuple(f"{step.name}: {step.problem}" for step in steps() if not step.done)


def summary() -> str:
    """One line for the log."""
    return "; ".join(f"{step.name}: {'done' if step.done else 'FAILED, ' + step.problem}" for step in steps())
