"""``tune kernel`` from the first trial to the file, with a GPU whose latency a formula gives."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("optuna")

from typer.testing import CliRunner

from benchmarks import results, tuning
from mac_autotune import kernel, tune_kernel
from mac_autotune.cli import tune_command
from mac_autotune.command import command_line
from mac_autotune.errors import ExportRefused
from mac_autotune.kernel import Problem
from mac_autotune.rounds import Rounds, gpu_turn
from mac_autotune.space import TRITON, LaunchSpace
from mac_kernels import HeadLayout, MacConfig, tuned
from mac_kernels.launch import LaunchParams, default_launch
from mac_kernels.testing.timing import Timing

ARGUMENTS = ("kernel", "--hq", "32", "--hkv", "8", "--head-dim", "128", "--batches", "1,16", "--contexts", "4096,32768")


class FakeBench:
    """The best is reached with four splits; nothing else matters."""

    gain = 0.1

    def __init__(self, problem: Problem, *, seed: int = 0, store: Any = None, **options: Any) -> None:
        del seed, store, options
        self.problem = problem
        self.default = default_launch(problem.batch * problem.layout.num_kv_heads, MacConfig(), 132, problem.page_size)
        self.space = LaunchSpace(self.default, TRITON)

    def time(self, launches: Mapping[str, LaunchParams], hit: float, *, repeats: int) -> dict[str, Timing]:
        def of(launch: LaunchParams) -> Timing:
            us = (100 - 50 * hit) * (1 if launch == self.default else 1 - self.gain / (1 + abs(launch.splits - 4)))
            return Timing(us, us, us, repeats)

        return {name: of(launch) for name, launch in launches.items()}


@pytest.fixture(autouse=True)
def fake_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    compiled: list[int] = []
    monkeypatch.setenv("MAC_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune_kernel, "gpu_name", lambda: "Fake GPU")
    monkeypatch.setattr(tune_kernel, "Bench", FakeBench)
    monkeypatch.setattr(tune_kernel, "make_store", lambda problem, seed: None)
    monkeypatch.setattr(tune_kernel, "num_sms", lambda device: 132)
    monkeypatch.setattr(tune_kernel, "compile_ahead", lambda jobs: compiled.extend(j.problem.batch for j in jobs) or 3)
    return compiled


def run(*more: Any) -> Any:
    return CliRunner().invoke(tune_command, [*ARGUMENTS, *map(str, more)])


def test_a_file_for_all_buckets_is_written_and_found(tmp_path: Path, fake_gpu: list[int]) -> None:
    first = run("--trials", 6, "--no-export")
    assert first.exit_code == 0, first.output
    second = run("--trials", 12, "--output", tmp_path / "out", "--json")
    assert second.exit_code == 0, second.output
    assert fake_gpu == [1, 16] * 2, "once per batch size"
    (path,) = (tmp_path / "out").iterdir()
    file = tuned.load(path)
    assert path.name == "kernel,device_name=Fake_GPU,hq=32,hkv=8,d=128,dtype=bfloat16,page_size=1.json"
    assert isinstance(file, tuned.KernelFile)
    assert json.loads(second.stdout)["provenance"]["study"] == "kernel/Fake GPU/hq32-hkv8-d128-bfloat16-p1"
    assert [(b.batch, b.context) for b in file.buckets] == [(1, 4096), (1, 32768), (16, 4096), (16, 32768)]
    for bucket in file.buckets:
        assert bucket.launch is not None and bucket.launch.splits == 4 and bucket.ratio.value == pytest.approx(0.9)
        assert set(bucket.latency) == {"1", "0.9", "0.5", "0"}
    tuned.forget()
    choice = tuned.launch_for(file.key, batch=12, context=20_000, environ={"MAC_KERNELS_CONFIG": str(tmp_path / "out")})
    assert choice.launch == file.buckets[3].launch and choice.source == "environment"


def test_a_comparison_keeps_every_bucket_that_it_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "Bench", FakeBench)
    monkeypatch.setattr(tuning, "make_store", lambda problem, seed: None)
    monkeypatch.setattr(tuning, "gpu_turn", contextlib.nullcontext)
    run = tuning.Run(12, 20, (1, 64), tmp_path, until=time.time() + 3600)
    gates = tuning.Gates(multiprocessing.Event(), {1: multiprocessing.Event(), 64: multiprocessing.Event()})
    for event in (gates.turn, *gates.compiled.values()):
        event.set()
    facts = dict.fromkeys(results.COLUMNS[len(results.KEY) + 5 :], "x")
    tuning.tune_layout(run, "32/8x128", facts, gates)
    rows = [row for row in results.read(tmp_path / "tuning.csv") if row["metric"] == "ratio"]
    buckets = {("1", "32768"), ("1", "126976"), ("64", "32768")}
    assert {(row["batch"], row["context"]) for row in rows} == buckets, "64 x 126976 tokens need 33 GB"
    assert {row["case"] for row in rows} == {"default", "tuned", "random 20", "triton"}
    assert all(float(row["p50"]) == pytest.approx(0.9) for row in rows if row["case"] in ("tuned", "random 20"))
    (path,) = (tmp_path / "tuned").iterdir()
    file = tuned.load(path)
    assert isinstance(file, tuned.KernelFile) and len(file.buckets) == 3
    assert file.provenance.command.endswith(
        "--hq 32 --hkv 8 --head-dim 128 --batches 1,64 --contexts 32768,126976 --trials 12"
    )
    late = tuning.Run(12, 20, (1,), tmp_path / "late", until=0.0)
    tuning.tune_layout(late, "32/8x128", facts, gates)
    assert not (tmp_path / "late").exists()
    monkeypatch.setattr(tuning, "Bench", None)
    tuning.tune_layout(run, "32/8x128", facts, gates)  # nothing is left to measure


def test_a_small_space_is_drawn_whole_and_the_default_may_be_its_best() -> None:
    class FrontBench(FakeBench):
        def __init__(self, problem: Problem) -> None:
            super().__init__(problem)
            self.space, self.timed = LaunchSpace(self.default, ("front",)), []

        def time(self, launches: Mapping[str, LaunchParams], hit: float, *, repeats: int) -> dict[str, Timing]:
            self.timed.append(list(launches.values()))
            slower = {name: 1 + 0.1 * (launch != self.default) for name, launch in launches.items()}
            return {name: Timing(us, us, us, repeats) for name, us in slower.items()}

    bench = FrontBench(Problem(layout=HeadLayout(32, 8, 128), batch=1, context=4096))
    drawn = tuning.random_search(bench, 200, seed=0)
    timed = {launch for launches in bench.timed for launch in launches}
    assert len(timed) == bench.space.size == 8 and bench.default in drawn.values()
    other = next(launch for launch in timed if launch != bench.default)
    bench.timed.clear()
    default, found = tuning.compared(bench, {5: other}, {**drawn, -9: other})
    assert found["random"] is default and found["tuned"].launch == other and not found["tuned"].better
    assert found["triton"].launch == dataclasses.replace(bench.default, cluster_size=0)
    assert all(len(set(launches)) == len(launches) for launches in bench.timed), "nothing is timed twice"


@pytest.mark.parametrize(("dim", "kernels"), [(128, ("front",)), (256, ("front", "rest"))])
def test_only_fields_of_kernels_that_serve_are_varied(
    monkeypatch: pytest.MonkeyPatch, dim: int, kernels: tuple[str, ...]
) -> None:
    kv = SimpleNamespace(layout=HeadLayout(8, 1, dim))
    scenario: Any = SimpleNamespace(q=None, kv=kv, rings=SimpleNamespace(correction=True), config=MacConfig())
    monkeypatch.setattr(kernel, "unsupported_front", lambda *_: None)
    monkeypatch.setattr(kernel.compiler, "missing", lambda: None)
    assert kernel.tuned_kernels(scenario) == kernels
    monkeypatch.setattr(kernel.compiler, "missing", lambda: "no NVRTC")
    assert kernel.tuned_kernels(scenario) == TRITON


def test_rounds_follow_each_other_in_changing_order() -> None:
    order: list[str] = []
    rounds = Rounds("cpu")
    made = {name: rounds.make(lambda name=name: order.append(name), 1) for name in "abc"}
    rounds.time(made, repeats=8)
    turns = [tuple(order[first : first + 3]) for first in range(0, len(order), 3)]
    assert len(turns) == 9 and all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len({turn[0] for turn in turns}) == 3


def test_tuning_processes_take_turns_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0-1"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    inside, most = 0, 0

    def turn() -> None:
        nonlocal inside, most
        with gpu_turn():
            inside += 1
            most = max(most, inside)
            time.sleep(0.05)
            inside -= 1

    threads = [threading.Thread(target=turn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert (inside, most) == (0, 1)
    with pytest.raises(RuntimeError, match="a trial failed"), gpu_turn():
        raise RuntimeError("a trial failed")
    turn()  # let go all the same


def test_no_gain_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeBench, "gain", 0.0)
    refused = run("--trials", 3, "--output", tmp_path / "out")
    assert isinstance(refused.exception, ExportRefused) and not (tmp_path / "out").exists()


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("--trials", 3)
    assert "there is none here" in str(done.exception)


def test_the_command_in_a_file_has_no_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").touch()
    given = [
        "policy",
        "--model",
        str(tmp_path / "m.gguf"),
        "--output",
        str(tmp_path),
        f"--storage={tmp_path}/j",
        "--top",
        "3",
    ]
    monkeypatch.setattr("sys.argv", ["/usr/bin/mac-kernels", "tune", *given, "--json"])
    tuned = "mac-kernels tune policy --model m.gguf --top 3"
    assert command_line("tune") == tuned
    monkeypatch.setattr("sys.argv", ["/usr/bin/mac-autotune", *given])
    assert command_line("tune") == tuned
    rules = "careful " * 100
    hub = ["--model", "owner/name", f"--scale={tmp_path}/s.json", "--configs", rules]
    monkeypatch.setattr("sys.argv", ["__main__.py", "kl", *hub])
    assert command_line("eval") == f"mac-kernels eval kl --model owner/name --scale=s.json --configs '{rules}'"
