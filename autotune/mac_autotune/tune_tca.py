"""``tca tune``: the block, window and mass target that read least of a context at a given divergence from the model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import optuna
import torch
from optuna.trial import FrozenTrial

from mac_kernels.tca import TcaBudgets, TcaConfig
from mac_transformers.compare import compare
from mac_transformers.policies import Tca

from .errors import ExportRefused
from .progress import StudyPanel
from .quality import texts
from .quality.metrics import Estimate, divergence
from .quality.suites import Bench
from .replay import full_attention
from .study import StudyPlan, run_study
from .tca_objective import Calibrated, TcaObjective
from .traces import trace_of_text

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TcaTask:
    """What ``tca tune`` is asked for.

    ``kl``: nats, what the winner may differ from full attention on the text where it differs most; ``context``: tokens,
    where the share that is read is counted; ``layers`` and ``tokens`` of every trace, after ``prompt_tokens``; ``top``
    trials at once are confirmed in a closed loop of ``confirm_tokens`` per text.
    """

    name: str
    base: TcaConfig
    kl: float
    context: int
    names: tuple[texts.PassageName, ...]
    prompt_tokens: int
    tokens: int
    layers: int
    top: int
    confirm_tokens: int
    plan: StudyPlan

    def study(self) -> StudyPlan:
        """The plan, named and with what its trials share."""
        facts = {
            "model": self.name,
            "traces": f"{','.join(self.names)}: {self.tokens} tokens after {self.prompt_tokens}, {self.layers} layers",
            "context": str(self.context),
            "rule": f"{self.base.rule}, {self.base.sinks} sinks",
        }
        return dataclasses.replace(self.plan, name=self.plan.name or f"tca/{self.name}", mode="pareto", facts=facts)


@dataclass(frozen=True, slots=True)
class Tried:
    """A trial in the closed loop: its config, the share of the context that it reads, and its KL on the worst text."""

    trial: int
    config: TcaConfig
    share: float
    kl: Estimate


def tune_tca(task: TcaTask, bench: Bench, calibrated: Calibrated, say: Say) -> tuple[Tried, list[Tried]]:
    """Run or resume the study and confirm trials along its front, closer and closer to the limit.

    Returns the one that reads least, and all that were confirmed, least read first.

    Parameters
    ----------
    task : TcaTask
    bench : Bench
        The model.
    calibrated : callable
        Budgets of the model for a block and a window.
    say : callable
        Takes a line of progress.

    Raises
    ------
    ExportRefused
        If no confirmed trial keeps the limit.
    InputError
        If the prompts are too short for the windows of the context.
    """
    traces = [
        trace_of_text(
            bench,
            name,
            f"{task.name} tca",
            prompt=task.prompt_tokens,
            steps=task.tokens,
            max_layers=task.layers,
            say=say,
        )
        for name in task.names
    ]
    objective = TcaObjective(
        task.base, [(trace, full_attention(trace)) for trace in traces], calibrated, context=task.context
    )
    plan = task.study()
    with StudyPanel(plan) as panel:
        study = run_study(plan, objective, panel)
    front, tried = front_of(study), list[Tried]()
    while chosen := next_round(front, tried, task.kl, task.top):
        say(f"confirming {len(chosen)} of {len(front)} trials along the front in a closed loop")
        configs = {trial.number: objective.build(trial.params) for trial in chosen}
        tried = sorted([*tried, *confirm_selected(task, bench, configs, calibrated)], key=lambda one: one.share)
    kept = [one for one in tried if one.kl.value <= task.kl]
    if not kept:
        said = "; ".join(f"trial {one.trial} reads {one.share:.3f}, KL {one.kl.value:.4g}" for one in tried)
        raise ExportRefused(f"no trial keeps a KL of {task.kl:g}: {said}. Nothing was written; allow a larger --kl")
    return min(kept, key=lambda one: one.share), tried


def front_of(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that none beats in both values, from the least to the most read."""
    front = {trial.values[0]: trial for trial in study.best_trials}
    return [front[share] for share in sorted(front)]


def next_round(front: Sequence[FrozenTrial], tried: Sequence[Tried], limit: float, count: int) -> list[FrozenTrial]:
    """The next to confirm, at most ``count``: evenly between the last to break the limit and the first to keep it."""
    kl = {one.trial: one.kl.value for one in tried}
    kept = [place for place, trial in enumerate(front) if kl.get(trial.number, math.inf) <= limit]
    end = min(kept, default=len(front))
    begin = max((place for place in range(end) if front[place].number in kl), default=-1) + 1
    between = front[begin:end]
    places = {round(index * (len(between) - 1) / max(count - 1, 1)) for index in range(min(count, len(between)))}
    return [between[place] for place in sorted(places)]


def confirm_selected(
    task: TcaTask, bench: Bench, configs: Mapping[int, TcaConfig], calibrated: Calibrated
) -> list[Tried]:
    """Decode other passages under all configs at once."""
    rules = {str(number): Tca(config, calibrated(config), "dense") for number, config in configs.items()}
    length = task.prompt_tokens + task.confirm_tokens + 1
    batch = torch.cat([texts.passages(bench.tokenizer, name, length=length, seed=1) for name in task.names])
    result = compare(
        bench.model,
        batch[:, : task.prompt_tokens],
        batch[:, task.prompt_tokens :],
        rules,
        progress=bench.step(f"confirming {len(configs)} trials"),
    )
    rows = [slice(index, index + 1) for index in range(len(task.names))]
    tried = [
        Tried(
            number,
            config,
            calibrated(config).share_read(config, task.context),
            max((divergence(result, str(number), row)["kl"] for row in rows), key=lambda one: one.value),
        )
        for number, config in configs.items()
    ]
    return tried


class Calibrations:
    """Budgets by block and window, each measured once."""

    def __init__(self, measure: Callable[[TcaConfig], TcaBudgets]) -> None:
        self._measure = measure
        self._found: dict[tuple[int, int], TcaBudgets] = {}

    def __call__(self, config: TcaConfig) -> TcaBudgets:
        """The budgets for a config's block and window."""
        key = config.block, config.local_window
        if key not in self._found:
            self._found[key] = self._measure(config)
        return self._found[key]
