"""What the benchmark commands do without a GPU: arguments, the kits before a timing, the rows after it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import plot, results, run, verify
from benchmarks.decode import BYPASSED, Measured
from benchmarks.registry import DECODE
from mac_kernels import MacConfig
from mac_kernels.testing.timing import Timing


@pytest.mark.parametrize("main", [run.main, verify.main])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode", "--only", "G9-"], "--only 'G9-' matches no case of decode; one is G8-B1-L32768-hit1"),
        (["prefill"], "invalid choice: 'prefill'"),
    ],
)
def test_wrong_arguments_are_told_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], main: Any, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("red", [0, 1])
@pytest.mark.parametrize(
    ("arguments", "kits"),
    [
        (["decode"], ["test_triton_conformance.py"]),
        (["decode", "--backends", "flashinfer"], ["test_flashinfer_conformance.py"]),
        (["decode", "--backends", "triton,flashinfer", "--only", "G8"],
         ["test_triton_conformance.py", "test_flashinfer_conformance.py"]),
        (["fill"], ["test_triton_conformance.py"]),
        (["tca", "--only", "prefill"], ["test_tca.py"]),
        (["tca"], ["test_tca.py", "test_tca_index.py", "test_triton_conformance.py"]),
    ],
)  # fmt: skip
def test_nothing_is_timed_on_red_kits(
    monkeypatch: pytest.MonkeyPatch, red: int, arguments: list[str], kits: list[str]
) -> None:
    commands, timed = [], []

    def judge(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=red)

    monkeypatch.setattr(verify, "missing", lambda: None)
    monkeypatch.setattr(subprocess, "run", judge)
    monkeypatch.setattr(verify, "run", lambda argv: timed.append(argv) or 0)
    assert verify.main(arguments) == red
    assert timed == ([] if red else [arguments])
    (command,) = commands
    assert command[1:8] == ["-m", "pytest", "-q", "-m", "gpu", "-n", "auto"]
    assert command[8:] == [f"tests/kernels/{kit}" for kit in kits]
    assert all((Path(__file__).parents[2] / path).is_file() for path in command[8:])


@pytest.mark.parametrize("main", [run.main, verify.main])
@pytest.mark.parametrize(("gpu", "message"), [(False, "no CUDA device"), (True, "pip install -e '.[flashinfer]'")])
def test_what_is_missing_is_told_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], main: Any, gpu: bool, message: str
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("started"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(run, "find_spec", lambda _: None)
    assert main(["decode"]) == 2
    assert message in capsys.readouterr().err


def timing(p50: float) -> Timing:
    return Timing(p20_us=p50 - 1, p50_us=p50, p80_us=p50 + 1, n=5)


def write(path: Path, name: str, latency: dict[str, float], *, hit_rate: float = 0.0) -> None:
    case = next(case for case in DECODE if case.hit_rate == hit_rate and case.context == 126976)
    measured = Measured({who: timing(p50) for who, p50 in latency.items()}, hit_rate, 10**6, 10**7)
    results.upsert(path, run._rows(case, measured, MacConfig(), name, FACTS))


FACTS = dict.fromkeys(("gpu", "driver", "torch", "triton", "flashinfer", "commit", "date", "command"), "none")


def test_every_row_keeps_the_baseline_of_its_own_run(tmp_path: Path) -> None:
    path = tmp_path / "decode.csv"
    write(path, "careful", {"triton": 50.0, "triton" + BYPASSED: 40.0, "flashinfer-tc": 100.0})
    write(path, "careful", {"flashinfer": 50.0, "flashinfer-tc": 110.0})
    write(path, "fast", {"triton": 50.0, "flashinfer-tc": 120.0})
    found = {
        (row["provider"], row["backend"], row["config"]): float(row["p50"])
        for row in results.read(path)
        if row["metric"] == "latency"
    }
    baselines = {
        (backend, config): found["flashinfer-tc", "fa2", results.beside(backend, config)]
        for provider, backend, config in found
        if provider == "mac"
    }
    assert baselines == {
        ("triton", "careful"): 100.0,
        ("triton", "careful, bypassed"): 100.0,
        ("flashinfer", "careful"): 110.0,
        ("triton", "fast"): 120.0,
    }
    assert len(found) == 2 * len(baselines)
    assert {row["p50"] for row in results.read(path) if row["metric"] == "bandwidth"} >= {"0.02", "0.1"}


def test_speedups_are_drawn_from_one_run(tmp_path: Path) -> None:
    path = tmp_path / "decode.csv"
    for hit_rate, ours in ((1.0, 20.0), (0.0, 125.0)):
        write(path, "careful", {"triton": ours, "flashinfer-tc": 100.0}, hit_rate=hit_rate)
    write(path, "careful", {"flashinfer": 40.0, "flashinfer-tc": 300.0}, hit_rate=1.0)
    write(path, "fast", {"triton": 10.0, "flashinfer-tc": 200.0}, hit_rate=1.0)
    rows = results.read(path)
    assert plot.speedups(rows, "126976") == {("8", "1"): [(0.0, 0.8), (1.0, 5.0)]}
    assert plot.speedups(rows, "32768") == {}
    alone = [row for row in rows if row["provider"] == "mac"]
    assert plot.speedups(alone, "126976") == {}, "no ratio without a baseline"
    assert plot.speedups([{**row, "lag": "160"} for row in rows], "126976") == {}
    lost = [row for row in rows if row["config"] != results.beside("triton", "careful")]
    assert plot.speedups(lost, "126976") == {}, "no ratio over another run's baseline"
    other = [{**row, "commit": "0000000"} if row["provider"] == "flashinfer-tc" else row for row in rows]
    assert plot.speedups(other, "126976") == {}, "no ratio over another commit's baseline"


def test_the_committed_tables_can_be_drawn() -> None:
    for path in results.RESULTS.glob("*/decode.csv"):
        assert len(plot.draw(path).axes) == 2
        for points in plot.speedups(results.read(path), "126976").values():
            assert {0.0, 1.0} <= dict(points).keys(), "where it loses and where it wins most"
