"""Study mechanics with a fake latency: nothing finished is lost or repeated, whatever ends a worker."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

optuna = pytest.importorskip("optuna")  # before the imports that need it, hence E402 below

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from optuna.trial import TrialState  # noqa: E402

from mac_autotune.objective import Measured, Report  # noqa: E402
from mac_autotune.space import KERNELS, LAUNCH_CHOICES, TRITON, LaunchSpace, PolicySpace, variants  # noqa: E402
from mac_autotune.study import DONE, StudyPlan, _adopt, finished, open_study, ranked, run_study  # noqa: E402
from mac_kernels import PRESETS, InputError, MacConfig  # noqa: E402
from mac_kernels.launch import LaunchParams, default_launch  # noqa: E402
from mac_kernels.tuned import launch_problems  # noqa: E402

SERVING = (TRITON, ("front", "rest"), ("front",))


class FakeLatency:
    """A latency that a formula gives; ``log`` gets a line per measurement."""

    metrics = ("latency", "divergence")

    def __init__(self, log: Path, *, delay_s: float = 0.0, noisy: bool = False) -> None:
        self._space = LaunchSpace(LaunchParams(), TRITON)
        self._log, self._delay_s, self.noisy = log, delay_s, noisy

    def first(self) -> list[dict[str, Any]]:
        return self._space.first()

    def suggest(self, trial: Any) -> LaunchParams:
        return self._space.suggest(trial)

    def measure(self, point: LaunchParams, report: Report) -> Measured:
        latency = 1 + abs(point.splits - 4) / 4 + abs(point.programs_per_sm - 3) + point.block_parts / 64
        report(latency, 0)
        time.sleep(self._delay_s)
        report(latency, 1)
        with self._log.open("a") as file:
            file.write(f"{os.getpid()} {latency:.6f}\n")
        return Measured((latency, 1 / latency), {"few stages": point.rest_stages - 4.5}, {"note": point.splits})


def main(journal: str, log: str, trials: int, delay_s: float) -> None:
    run_study(
        StudyPlan(name="fake", storage=journal, trials=trials), FakeLatency(Path(log), delay_s=delay_s, noisy=True)
    )


def worker(journal: Path, log: Path, *, trials: int, delay_s: float) -> subprocess.Popen[bytes]:
    code = f"import test_study; test_study.main({str(journal)!r}, {str(log)!r}, {trials}, {delay_s})"
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)})


def run(tmp_path: Path, trials: int, name: str = "fake", **plan: Any) -> Any:
    journal = str(tmp_path / f"{name}.journal")
    return run_study(StudyPlan(name="fake", storage=journal, trials=trials, **plan), FakeLatency(tmp_path / "log"))


def wait_for(condition: Any, timeout_s: float = 90.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.05)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def trials_of(journal: Path) -> list[Any]:
    study = open_study(StudyPlan(name="fake", storage=str(journal)), FakeLatency.metrics)
    return list(study.get_trials(deepcopy=False))


def test_trial_0_is_the_default_and_trials_count_in_all(tmp_path: Path) -> None:
    study = run(tmp_path, 5)
    assert study.trials[0].params == LaunchSpace(LaunchParams(), TRITON).params()
    assert finished(study) == 5 and finished(run(tmp_path, 5)) == 5 and finished(run(tmp_path, 8)) == 8


def test_a_small_space_is_tried_whole(tmp_path: Path) -> None:
    class Small(FakeLatency):
        def __init__(self) -> None:
            super().__init__(tmp_path / "log", noisy=True)
            self._space = LaunchSpace(LaunchParams(cluster_size=2), ("front",))

    plan = StudyPlan(name="fake", storage=str(tmp_path / "small.journal"), trials=3)
    run_study(plan, Small())
    trials = run_study(dataclasses.replace(plan, trials=10), Small()).trials  # what was to come is in the study
    points = [tuple(trial.params.values()) for trial in trials]
    assert points[0] == (2, 8) and len(set(points[:8])) == 8 and len(points) == 10


def test_a_resumed_study_draws_what_an_unbroken_one_would(tmp_path: Path) -> None:
    for count in (3, 9, 20):
        broken = run(tmp_path, count, "broken")
    whole = run(tmp_path, 20, "whole")
    assert [trial.params for trial in broken.trials] == [trial.params for trial in whole.trials]
    other = run(tmp_path, 20, "other", seed=1)
    assert [trial.params for trial in other.trials] != [trial.params for trial in whole.trials]


def test_it_finds_what_is_best_under_the_constraint(tmp_path: Path) -> None:
    study = run(tmp_path, 60)
    best = ranked(study)[0]
    assert best.params["programs_per_sm"] == 3 and best.params["splits"] == 4 and best.params["rest_stages"] <= 4
    assert all(trial.constraints["few stages"] <= 0 for trial in ranked(study))
    assert any(trial.state == TrialState.PRUNED for trial in study.trials)
    points = [tuple(trial.params.items()) for trial in ranked(study)]
    assert len(set(points)) == len(points)


def test_killed_and_resumed_nothing_finished_is_lost_or_repeated(tmp_path: Path) -> None:
    journal, log = tmp_path / "fake.journal", tmp_path / "log"
    process = worker(journal, log, trials=100, delay_s=0.3)
    wait_for(lambda: lines(log) >= 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = [trial for trial in trials_of(journal) if trial.state in DONE]
    under_way = [trial for trial in trials_of(journal) if trial.state == TrialState.RUNNING]
    assert len(before) >= 3
    study = run(tmp_path, len(before) + 5)
    after = study.trials
    assert [after[trial.number].values for trial in before] == [trial.values for trial in before]
    assert finished(study) == len(before) + 5
    assert [after[trial.number].state for trial in under_way] == [TrialState.FAIL] * len(under_way)
    again = [trial for trial in after if trial.user_attrs.get("second try")]
    assert len(again) == len(under_way) <= 1 and all(trial.state in DONE for trial in again)
    # it may have been killed before all parameters were drawn
    assert all(before.params.items() <= after.params.items() for before, after in zip(under_way, again, strict=True))
    assert not [trial for trial in after if trial.state == TrialState.RUNNING]


def test_ctrl_c_gives_the_trial_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Interrupted(FakeLatency):
        def measure(self, point: LaunchParams, report: Report) -> Measured:
            if lines(tmp_path / "log") == 3:
                raise KeyboardInterrupt
            return super().measure(point, report)

    plan = StudyPlan(name="fake", storage=str(tmp_path / "fake.journal"), trials=9)
    with pytest.raises(KeyboardInterrupt):
        run_study(plan, Interrupted(tmp_path / "log"))
    assert capfd.readouterr().err == "interrupted: no finished trial is lost, the same command goes on\n"
    study = run(tmp_path, 9)
    failed = [trial for trial in study.trials if trial.state == TrialState.FAIL]
    assert len(failed) == 1 and finished(study) == 9
    assert [trial.params for trial in study.trials if trial.state in DONE].count(failed[0].params) == 1


def test_a_worker_that_died_before_its_first_word_leaves_the_default_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mac_autotune.study._SIGNING_TIME", datetime.timedelta(seconds=1))
    plan = StudyPlan(name="fake", storage=str(tmp_path / "fake.journal"))
    study = open_study(plan, FakeLatency.metrics)
    study.enqueue_trial(LaunchSpace(LaunchParams(), TRITON).params())
    study.ask()
    after = run(tmp_path, 3).trials
    assert [trial.state for trial in after[:1]] == [TrialState.FAIL]
    assert after[1].state in DONE and after[1].params == LaunchSpace(LaunchParams(), TRITON).params()


def test_a_point_that_kills_its_worker_is_tried_twice_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mac_autotune.study._is_dead", lambda worker: True)
    study = open_study(StudyPlan(name="fake", storage=str(tmp_path / "fake.journal")), FakeLatency.metrics)
    study.enqueue_trial({"splits": 8})
    for _ in range(2):
        trial = study.ask()
        trial.set_user_attr("worker", {})
        trial.suggest_categorical("splits", LAUNCH_CHOICES["splits"])
        _adopt(study)
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.FAIL, TrialState.FAIL] and study.trials[1].params == {"splits": 8}


def test_a_torn_last_line_is_cut(tmp_path: Path) -> None:
    before = len(run(tmp_path, 4).trials)
    with (tmp_path / "fake.journal").open("a") as file:
        file.write('{"op_code":4,"worker_id":"half a li')
    study = run(tmp_path, 6)
    assert finished(study) == 6 and len(study.trials) >= before + 2


def test_two_workers_share_one_study(tmp_path: Path) -> None:
    journal, log = tmp_path / "fake.journal", tmp_path / "log"
    processes = [worker(journal, log, trials=16, delay_s=0.15) for _ in range(2)]
    assert [process.wait(timeout=180) for process in processes] == [0, 0]
    trials = trials_of(journal)
    done = [trial for trial in trials if trial.state in DONE]
    assert 16 <= len(done) <= 17, "each worker may have had one under way when the other finished"
    assert [trial.number for trial in trials] == list(range(len(trials)))
    complete = [trial for trial in done if trial.state == TrialState.COMPLETE]
    assert lines(log) == len(complete), "every complete trial was measured once"
    workers = collections.Counter(line.split()[0] for line in log.read_text().splitlines())
    assert len(workers) == 2
    assert sum(trial.params == LaunchSpace(LaunchParams(), TRITON).params() for trial in trials[:2]) >= 1


def test_a_point_without_noise_is_measured_once(tmp_path: Path) -> None:
    class Narrow(FakeLatency):
        def suggest(self, trial: Any) -> LaunchParams:
            return LaunchParams(splits=trial.suggest_categorical("splits", (1, 2)))

        def first(self) -> list[dict[str, Any]]:
            return [{"splits": 1}]

    plan = StudyPlan(name="fake", storage=str(tmp_path / "n.journal"), trials=8)
    study = run_study(plan, Narrow(tmp_path / "log"))
    assert finished(study) == 8 and lines(tmp_path / "log") == 2
    assert all("copy of trial" in trial.user_attrs for trial in study.trials[2:] if trial.state == TrialState.COMPLETE)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_pareto_has_two_values_and_no_pruning(tmp_path: Path, sampler: Any) -> None:
    study = run(tmp_path, 20, mode="pareto", sampler=sampler)
    assert all(trial.state == TrialState.COMPLETE and len(trial.values) == 2 for trial in study.trials)
    assert len(study.best_trials) >= 2
    with pytest.raises(InputError, match="--mode pareto"):
        run(tmp_path, 21, mode="single")


def test_trials_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    run(tmp_path, 2, facts={"texts": "docs"})
    with pytest.raises(InputError, match="begun with texts = docs, not code"):
        run(tmp_path, 4, facts={"texts": "code"})


def test_the_time_is_a_limit(tmp_path: Path) -> None:
    plan = StudyPlan(name="fake", storage=str(tmp_path / "t.journal"), trials=10**6, timeout_s=1.0)
    assert finished(run_study(plan, FakeLatency(tmp_path / "log", delay_s=0.2))) < 10


def test_a_database_is_taken_too(tmp_path: Path) -> None:
    plan = StudyPlan(name="fake", storage=f"sqlite:///{tmp_path / 'study.db'}", trials=3)
    assert finished(run_study(plan, FakeLatency(tmp_path / "log"))) == 3


@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_every_sampled_point_is_legal(data: Any) -> None:
    class Drawing:
        def suggest_categorical(self, name: str, choices: Any) -> Any:
            return data.draw(st.sampled_from(choices))

        def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
            return float(data.draw(st.floats(low, high)))

    assert launch_problems(LaunchSpace(LaunchParams(), data.draw(st.sampled_from(SERVING))).suggest(Drawing())) == []
    config = PolicySpace(PRESETS["careful"]).suggest(Drawing())  # raises ConfigError if it is not legal
    assert config.influence is not None and config.correction and config.min_context == 2048


def test_the_space_holds_every_field_and_every_default() -> None:
    triton, beside, front = (LaunchSpace(LaunchParams(), kernels).params() for kernels in SERVING)
    assert set(LAUNCH_CHOICES) == {*triton, *front} == {field.name for field in dataclasses.fields(LaunchParams)}
    assert set(front) == {"cluster_size", "front_warps"}, "nothing else has an effect"
    assert set(beside) == {*front, "programs_per_sm", "rest_tile_bytes", "rest_warps", "rest_stages"}
    assert LaunchSpace(LaunchParams(), ("front",)).size == 8
    for groups, page_size, kernels in itertools.product((1, 8, 40, 128, 500, 1024), (1, 16), SERVING):
        default = LaunchSpace(default_launch(groups, MacConfig(), num_sms=132, page_size=page_size), kernels).params()
        assert {name: value for name, value in default.items() if value not in LAUNCH_CHOICES[name]} == {}
    for preset in ("careful", "balanced", "fast"):
        space = PolicySpace(PRESETS[preset])
        assert space.build(space.params()) == PRESETS[preset]


@pytest.mark.parametrize("kernels", SERVING)
def test_variants_hold_every_variant_of_every_kernel(kernels: tuple[str, ...]) -> None:
    default = default_launch(8, MacConfig(), num_sms=132, page_size=16)
    found = variants(LaunchSpace(default, kernels))
    assert len(found) <= {TRITON: 180, ("front", "rest"): 26, ("front",): 8}[kernels]
    for fields in (KERNELS[kernel] for kernel in kernels):
        seen = {tuple(getattr(launch, name) for name in ("splits", *fields)) for launch in found}
        every = itertools.product(*(LAUNCH_CHOICES[name] for name in fields))
        splits = LAUNCH_CHOICES["splits"] if kernels == TRITON else {default.splits}
        wanted = set(itertools.product(splits, every))
        if "cluster_size" in fields:  # where the front can serve, it does
            wanted = {point for point in wanted if point[1][0] > 0}
        assert {(point[0], point[1:]) for point in seen} == wanted, fields
