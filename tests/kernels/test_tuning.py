"""Every launch parameter set that a study may draw computes the same as the default, and a trial measures it."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from mac_autotune.compile import Job, compile_ahead
from mac_autotune.kernel import CONFIG, HIT_RATES, SLOWER_IN_TRIAL, Bench, KernelObjective, Problem
from mac_autotune.space import LAUNCH_CHOICES
from mac_kernels import HeadLayout, MacConfig
from mac_kernels.launch import LaunchParams
from mac_kernels.testing.timing import Timing

pytest.importorskip("optuna")
CUDA = torch.cuda.is_available()
SMALL = MacConfig(window=16, band=8, sinks=2, min_context=16, nominees=4, influence=None)


@pytest.fixture(scope="module")
def bench() -> Bench:
    if CUDA:
        return Bench(Problem(layout=HeadLayout(8, 2, 64), batch=2, context=2560))
    if not triton_is_interpreted():
        pytest.skip("needs a CUDA device or TRITON_INTERPRET=1")
    problem = Problem(layout=HeadLayout(4, 2, 16), batch=1, context=40)
    return Bench(problem, config=SMALL, device="cpu")


def triton_is_interpreted() -> bool:
    import os

    return os.environ.get("TRITON_INTERPRET") == "1"


def drawn(seed: int) -> LaunchParams:
    draw = random.Random(seed)
    return LaunchParams(**{name: draw.choice(values) for name, values in LAUNCH_CHOICES.items()})


@pytest.mark.parametrize("seed", range(2))
def test_drawn_launch_parameters_compute_what_the_default_does(bench: Bench, seed: int) -> None:
    timed = bench.time({"drawn": drawn(seed)}, 0.5, repeats=1)  # raises ArithmeticError where the output differs
    assert timed["drawn"].n == 1


def test_a_trial_is_relative_to_the_default(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def timing(us: float) -> Timing:
        return Timing(us, us, us, 1)

    def time(launches: object, hit: float, *, repeats: int) -> dict[str, Timing]:
        del launches, repeats
        return {"default": timing(10.0), "trial": timing(20.0 if hit == 1.0 else 5.0)}

    monkeypatch.setattr(bench, "time", time)
    objective, seen = KernelObjective(bench), []
    measured = objective.measure(bench.default, lambda value, step: seen.append((step, value)))
    assert measured.values[0] == pytest.approx((2 * 0.5**3) ** (1 / 4))
    assert measured.constraints == {"usable": 0.0, "slower": pytest.approx(2 - SLOWER_IN_TRIAL)}
    assert [step for step, _ in seen] == list(range(len(HIT_RATES))) and seen[0][1] == pytest.approx(2)


def test_a_wrong_result_is_a_broken_constraint(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def time(launches: object, hit: float, *, repeats: int) -> dict[str, Timing]:
        raise ArithmeticError("off by 0.3 of the output's norm")

    monkeypatch.setattr(bench, "time", time)
    measured = KernelObjective(bench).measure(bench.default, lambda value, step: None)
    assert measured.constraints["usable"] > 0 and "off by 0.3" in measured.notes["error"]


def test_outputs_are_compared(bench: Bench) -> None:
    bench.time({"default": bench.default}, 0.5, repeats=1)
    right = bench._right[0.5]
    bench._right[0.5] = right * 1.5
    try:
        with pytest.raises(ArithmeticError, match="of the output's norm"):
            bench.time({"other": dataclasses.replace(bench.default, block_parts=16)}, 0.5, repeats=1)
    finally:
        bench._right[0.5] = right


@pytest.mark.gpu
def test_compiling_ahead_fills_the_cache() -> None:
    problem = Problem(layout=HeadLayout(8, 2, 64), batch=2, context=4096)
    assert compile_ahead([Job(problem, [LaunchParams(), drawn(1)])], workers=2) <= 2


def test_trial_0_is_in_the_space(bench: Bench) -> None:
    assert all(value in LAUNCH_CHOICES[name] for name, value in bench.space.params().items())
    assert CONFIG.influence is None
