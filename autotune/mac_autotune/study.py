"""Run a study: storage, sampler, trial 0, resume after any end, several workers."""

from __future__ import annotations

import datetime
import math
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState

from mac_kernels import InputError
from mac_kernels.settings import cache_dir

from .objective import Objective

Mode = Literal["single", "pareto"]
SamplerName = Literal["tpe", "random", "nsga2"]
DONE = (TrialState.COMPLETE, TrialState.PRUNED)
_WORKER, _COPY, _AGAIN = "worker", "copy of trial", "second try"
_STARTUP = 12
_SIGNING_TIME = datetime.timedelta(seconds=15)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyPlan:
    """How a study is run.

    ``trials``: finished ones that the study shall have in all, those of earlier runs and other workers included;
    ``timeout_s``: of this run. ``storage``: path of a journal file, or a URL (``postgresql://...``) for many machines.
    ``facts``: what all trials of a study must share to be comparable (texts, buckets, ...).
    """

    name: str
    storage: str | None = None
    trials: int = 100
    timeout_s: float | None = None
    mode: Mode = "single"
    sampler: SamplerName = "tpe"
    seed: int = 0
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def location(self) -> str:
        """Where the trials are: the storage given, or a journal in the cache folder named after the study."""
        if self.storage is not None:
            return self.storage
        return str(cache_dir() / "studies" / f"{self.name.replace('/', '--').replace(' ', '_')}.journal")


Watch = Callable[[optuna.Study, FrozenTrial], None]
"""Called after every trial of this run."""


def open_storage(location: str) -> BaseStorage:
    """Open a storage; anything with ``://`` is a database URL, all else the path of a journal file."""
    if "://" in location:
        # a worker that stops beating has died: its trial is put back
        with _stable():
            retry = RetryHeartbeatStaleTrialCallback(max_retry=3)
            return RDBStorage(location, heartbeat_interval=60, heartbeat_stale_trial_callback=retry)
    path = Path(location).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    _cut_torn_line(path)
    return JournalStorage(JournalFileBackend(str(path), _lock(path)))


def _lock(path: Path) -> JournalFileSymlinkLock:
    # a worker that is killed while it writes leaves its lock; writing takes milliseconds
    return JournalFileSymlinkLock(str(path), grace_period=10)


@contextmanager
def _stable() -> Iterator[None]:
    """Without Optuna's warning that heartbeats and metric names, as they have been for years, may change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def open_study(plan: StudyPlan, metrics: tuple[str, ...]) -> optuna.Study:
    """Create the study, or go on with it.

    Raises
    ------
    InputError
        If the study in the storage was begun in another mode or with other facts.
    """
    count = len(metrics) if plan.mode == "pareto" else 1
    study = optuna.create_study(
        study_name=plan.name,
        storage=open_storage(plan.location),
        directions=["minimize"] * count,
        load_if_exists=True,
        sampler=_PerTrial(plan),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=_STARTUP) if count == 1 else optuna.pruners.NopPruner(),
    )
    if len(study.directions) != count:
        raise InputError(
            f"study {plan.name!r} in {plan.location} was begun with --mode "
            f"{'pareto' if count == 1 else 'single'}; give --mode so, or another --study"
        )
    for name, value in plan.facts.items():
        before = study.user_attrs.get(name, value)
        if before != value:
            raise InputError(
                f"study {plan.name!r} in {plan.location} was begun with {name} = {before}, not {value}; its trials "
                "cannot be compared with new ones: give the same options, or another --study"
            )
        study.set_user_attr(name, value)
    with _stable():
        study.set_metric_names(list(metrics[:count]))
    return study


def run_study(plan: StudyPlan, objective: Objective, watch: Watch | None = None) -> optuna.Study:
    """Run trials until the study has as many as planned, or the time is up.

    Finished trials are in the storage at once: whatever ends this process loses at most the trial under way, which the
    next run of the same command repeats.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = open_study(plan, objective.metrics)
    _adopt(study)

    def signed(trial: optuna.Trial) -> list[float]:
        trial.set_user_attr(_WORKER, _this_worker())
        return _measure(study, trial, objective)

    if not study.get_trials(deepcopy=False):
        for params in objective.first():
            study.enqueue_trial(params, skip_if_exists=True)
    deadline = math.inf if plan.timeout_s is None else time.monotonic() + plan.timeout_s
    try:
        while finished(study) < plan.trials and time.monotonic() < deadline:
            study.optimize(signed, n_trials=1, callbacks=[] if watch is None else [watch])
    except KeyboardInterrupt:
        print("interrupted: no finished trial is lost, the same command goes on", file=sys.stderr)
        raise
    return study


def finished(study: optuna.Study) -> int:
    """Trials that were measured, to the end or until they were pruned."""
    return len(study.get_trials(deepcopy=False, states=DONE))


def feasible(trial: FrozenTrial) -> bool:
    """Whether a trial kept all constraints."""
    return all(value <= 0 for value in trial.constraints.values())


def ranked(study: optuna.Study) -> list[FrozenTrial]:
    """Complete trials within the constraints, best first value first; every point once, the default's left out."""
    trials = study.get_trials(deepcopy=False)
    seen = [trials[0].params] if trials else []
    found = []
    complete = (trial for trial in trials if trial.state == TrialState.COMPLETE)
    for trial in sorted(complete, key=lambda t: t.values[0]):
        if feasible(trial) and trial.params not in seen:
            seen.append(trial.params)
            found.append(trial)
    return found


def _measure(study: optuna.Study, trial: optuna.Trial, objective: Objective) -> list[float]:
    """Values of one trial; an interruption leaves its point for the next run."""
    point = objective.suggest(trial)
    single = len(study.directions) == 1
    if not objective.noisy and (twin := _twin(study, trial)) is not None:
        for name, value in {**twin.user_attrs, **trial.user_attrs, _COPY: twin.number}.items():
            trial.set_user_attr(name, value)
        for name, value in twin.constraints.items():
            trial.set_constraint(name, value)
        return list(twin.values)

    def report(value: float, step: int) -> None:
        if single:  # Optuna has no pruning for several objectives
            trial.report(value, step)
            if trial.should_prune():
                raise optuna.TrialPruned

    try:
        measured = objective.measure(point, report)
    except KeyboardInterrupt:
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # or it would log a traceback
        study.enqueue_trial(trial.params)
        raise
    for name, value in measured.constraints.items():
        trial.set_constraint(name, value)
    for name, note in measured.notes.items():
        trial.set_user_attr(name, note)
    return list(measured.values[: len(study.directions)])


def _twin(study: optuna.Study, trial: optuna.Trial) -> FrozenTrial | None:
    """An earlier complete trial at the same point."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return next((other for other in complete if other.params == trial.params), None)


def _adopt(study: optuna.Study) -> None:
    """Put back what dead workers of this machine had under way (those of other machines: a database's heartbeat)."""
    running = (TrialState.RUNNING,)
    while any(_WORKER not in trial.user_attrs for trial in study.get_trials(deepcopy=False, states=running)):
        unsigned = [t for t in study.get_trials(deepcopy=False, states=running) if _WORKER not in t.user_attrs]
        for trial in unsigned:
            if trial.datetime_start is None or datetime.datetime.now() - trial.datetime_start > _SIGNING_TIME:
                _give_back(study, trial)  # a worker signs right after it took a trial: this one never came to it
        time.sleep(0.5)
    for trial in study.get_trials(deepcopy=False, states=running):
        if _is_dead(trial.user_attrs[_WORKER]):
            _give_back(study, trial)


def _give_back(study: optuna.Study, trial: FrozenTrial) -> None:
    study.tell(trial.number, state=TrialState.FAIL)
    if not trial.user_attrs.get(_AGAIN):  # twice at the same point: the point is what kills the worker
        params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        study.enqueue_trial(params, user_attrs={_AGAIN: True})


def _this_worker() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _start_time(os.getpid())}


def _is_dead(worker: dict[str, Any]) -> bool:
    if worker["host"] != socket.gethostname():
        return False
    try:
        os.kill(worker["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return bool(worker["started"] != _start_time(worker["pid"]))


def _start_time(pid: int) -> str:
    """When a process began, so that a reused number is told apart; empty where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _cut_torn_line(path: Path) -> None:
    """Remove the half line that a crash while writing left, or every later reader would stumble over it."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    lock = _lock(path)
    lock.acquire()
    try:
        with path.open("rb+") as file:
            content = file.read()
            if not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)
    finally:
        lock.release()


class _PerTrial(BaseSampler):
    """A sampler that is seeded anew for every trial by its number: a resumed study draws what an unbroken one would."""

    def __init__(self, plan: StudyPlan) -> None:
        self._plan = plan
        self._sampler = self._make(0)

    def _make(self, number: int) -> BaseSampler:
        seed = (self._plan.seed * 1_000_003 + number) % 2**32
        if self._plan.sampler == "random":
            return RandomSampler(seed=seed)
        if self._plan.sampler == "nsga2":
            return NSGAIISampler(seed=seed, population_size=24)
        return TPESampler(seed=seed, n_startup_trials=_STARTUP)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._sampler = self._make(trial.number)
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Any:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self._sampler.after_trial(study, trial, state, values)
