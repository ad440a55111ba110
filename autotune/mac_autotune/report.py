"""A study as a page: history, parameter importance, Pareto front and the best trials, static HTML beside PNG files."""

from __future__ import annotations

import html
import io
import warnings
from pathlib import Path
from typing import Any

import optuna
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from mac_kernels import InputError
from mac_transformers.outdir import OutputFolder

from .study import DONE, feasible

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; font-size: 13px }} td, th {{ border: 1px solid #ccc; padding: .2em .5em }}
img {{ max-width: 100% }} .lost {{ color: #999 }}
</style></head><body><h1>{title}</h1>{body}</body></html>
"""


def write_report(study: optuna.Study, folder: Path, dashboard: str) -> list[Path]:
    """Write ``index.html`` and the figures; returns their paths.

    Raises
    ------
    InputError
        If the study has no complete trial.
    """
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not complete:
        raise InputError(f"study {study.study_name!r} has no complete trial yet; run it first")
    target = OutputFolder(folder)
    figures = {"history.png": _history, "importance.png": _importance, "front.png": _front}
    written, pictures = [], []
    for name, draw in figures.items():
        figure = draw(study, complete)
        if figure is not None:
            written.append(target.write(name, _png(figure)))
            pictures.append(f'<p><img src="{name}" alt="{name.partition(".")[0]}"></p>')
    counts = {state: sum(trial.state == state for trial in trials) for state in (*DONE, TrialState.FAIL)}
    facts = ", ".join(f"{count} {state.name.lower()}" for state, count in counts.items())
    body = [
        f"<p>{len(trials)} trials: {facts}. Trial 0 is the default. Live: <code>{html.escape(dashboard)}</code></p>",
        *pictures,
        "<h2>Best trials</h2>",
        best_table(study, complete),
        _confirmed(study),
    ]
    page = _PAGE.format(title=html.escape(study.study_name), body="\n".join(body))
    return [target.write("index.html", page.encode()), *written]


def metric_names(study: optuna.Study) -> list[str]:
    """Names of the values."""
    names = study.metric_names
    return list(names) if names else [f"value {index}" for index in range(len(study.directions))]


def best_table(study: optuna.Study, complete: list[FrozenTrial], count: int = 20) -> str:
    """The best trials as an HTML table, the default among them, those that break a constraint in grey."""
    names = sorted({name for trial in complete for name in trial.params})
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("trial", *metric_names(study), *names, "breaks"))
    best = sorted(complete, key=lambda t: (not feasible(t), t.values[0]))[:count]
    first = [trial for trial in complete if trial.number == 0 and trial not in best]
    rows = []
    for trial in (*first, *best):
        broken = ", ".join(name for name, value in trial.constraints.items() if value > 0)
        cells = [
            trial.number,
            *(f"{value:.4g}" for value in trial.values),
            *(trial.params.get(n) for n in names),
            broken,
        ]
        line = "".join(f"<td>{html.escape(_text(cell))}</td>" for cell in cells)
        rows.append(f'<tr class="{"" if feasible(trial) else "lost"}">{line}</tr>')
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _confirmed(study: optuna.Study) -> str:
    """What was decoded in a closed loop."""
    found = {name: value for name, value in study.user_attrs.items() if name.startswith("confirmed ")}
    if not found:
        return ""
    metrics = sorted({metric for one in found.values() for metric in one["metrics"]})
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", "latency ratio", *metrics, "breaks"))
    rows = [
        [
            name.partition(" ")[2],
            f"{one['ratio']:.4g}",
            *(f"{one['metrics'].get(m, float('nan')):.4g}" for m in metrics),
            "; ".join(one["broken"]),
        ]
        for name, one in sorted(found.items())
    ]
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<h2>Confirmed in a closed loop</h2><table><tr>{head}</tr>{lines}</table>"


def _history(study: optuna.Study, complete: list[FrozenTrial]) -> Figure:
    figure, axes = _axes("trial", metric_names(study)[0])
    for kept, colour, label in ((True, "#3b7dd8", "within the constraints"), (False, "#bbbbbb", "breaks a constraint")):
        some = [trial for trial in complete if feasible(trial) is kept]
        if some:
            axes.scatter([t.number for t in some], [t.values[0] for t in some], s=14, color=colour, label=label)
    best, numbers, values = float("inf"), [], []
    for trial in complete:
        if feasible(trial):
            best = min(best, trial.values[0])
            numbers.append(trial.number)
            values.append(best)
    axes.step(numbers, values, where="post", color="#d8573b", label="best so far")
    axes.set_title("History", size=11)
    axes.legend(fontsize=8)
    return figure


def _importance(study: optuna.Study, complete: list[FrozenTrial]) -> Figure | None:
    if len(complete) < 4:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = optuna.importance.get_param_importances(study, target=_first_value)
        except (ValueError, RuntimeError):  # all trials alike: nothing has any importance
            return None
    figure, axes = _axes("share of the explained spread", "")
    names = list(found)[::-1]
    axes.barh(names, [found[name] for name in names], color="#3b7dd8")
    axes.set_title(f"Importance for {metric_names(study)[0]} (PED-ANOVA)", size=11)
    return figure


def _front(study: optuna.Study, complete: list[FrozenTrial]) -> Figure | None:
    names = metric_names(study)
    if len(names) < 2:
        return None
    figure, axes = _axes(names[0], names[1])
    axes.scatter(*_columns(complete), s=12, color="#bbbbbb", label="trials")
    front = sorted(study.best_trials, key=lambda t: t.values[0])
    axes.plot(*_columns(front), marker="o", color="#d8573b", label="Pareto front")
    axes.scatter(*_columns([t for t in complete if t.number == 0]), marker="*", s=120, color="#222222", label="default")
    axes.set_yscale("log")
    axes.set_title("Pareto front", size=11)
    axes.legend(fontsize=8)
    return figure


def _columns(trials: list[FrozenTrial]) -> tuple[list[float], list[float]]:
    return [trial.values[0] for trial in trials], [trial.values[1] for trial in trials]


def _first_value(trial: FrozenTrial) -> float:
    return float(trial.values[0])


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
