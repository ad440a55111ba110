"""The break-even hit rate of the start-up line: its estimate beside the committed measurements."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import results
from mac_kernels import HeadLayout
from mac_kernels.tuned import Bucket, Score
from mac_sglang import break_even as module
from mac_sglang.break_even import MISS_US, break_even, describe

H100_BYTES_PER_US = 3.06e6
G4, G8 = HeadLayout(32, 8, 128), HeadLayout(32, 4, 128)
BF16_TOKEN = 2 * 128 * 2


def estimate(layout: HeadLayout, batch: int, context: int) -> float | None:
    return break_even(layout, batch=batch, context=context, token_bytes=BF16_TOKEN, bytes_per_us=H100_BYTES_PER_US)


def measured_rates() -> list[tuple[HeadLayout, int, int, float]]:
    """What the table of the H100 says, by layout, batch and context."""
    times: dict[tuple[str, ...], float] = {}
    for row in results.read(results.RESULTS / "NVIDIA_H100_80GB_HBM3" / "decode.csv"):
        shape = tuple(row[name] for name in ("hq", "hkv", "head_dim", "batch", "context"))
        who = row["backend"], row["config"]
        of_one_run = who in (("triton", "careful"), ("fa2", results.beside("triton", "careful")))
        planted = row["lag"] == "64" and row["miss_pattern"] == "scattered"
        if row["metric"] == "latency" and row["dtype"] == "bfloat16" and of_one_run and planted:
            times[(row["provider"], row["hit_rate"], *shape)] = float(row["p50"])
    found = []
    for (provider, hit_rate, *shape), full in times.items():
        if provider == "mac" or hit_rate != "0":
            continue
        points = sorted((float(rate), us) for (who, rate, *of), us in times.items() if who == "mac" and of == shape)
        for (low, before), (high, after) in itertools.pairwise(points):
            if before > full >= after:
                rate = low + (high - low) * (before - full) / (before - after)
                found.append((HeadLayout(*map(int, shape[:3])), int(shape[3]), int(shape[4]), rate))
    return found


def test_the_estimate_is_near_what_was_measured() -> None:
    rates = measured_rates()
    larger = [found for found in rates if found[1] > 1]
    assert len(larger) == 8
    for layout, batch, context, rate in larger:
        assert estimate(layout, batch, context) == pytest.approx(rate, abs=0.04), (layout, batch, context)
    # After a step of misses alone the next one of batch 1 begins ahead of its decisions and takes as long as full
    # attention: it crosses at 0 or nowhere. The estimate is for hit rates at which that is rare.
    assert all(rate < 0.01 for _, batch, _, rate in rates if batch == 1)


def test_more_to_read_needs_fewer_hits() -> None:
    rates = [estimate(G4, 1, context) for context in (8_192, 32_768, 131_072)]
    assert rates[0] > rates[1] > rates[2] > 0
    assert estimate(G4, 8, 32_768) < rates[1]
    assert estimate(G8, 1, 32_768) > rates[1]  # half the keys and values


def test_measured_steps_win() -> None:
    def rate(*points: tuple[float, float]) -> float | None:
        return break_even(G4, batch=1, context=8, token_bytes=1, bytes_per_us=1.0, measured=points)

    full = 90.0 - MISS_US
    assert rate((0.0, 90.0), (1.0, 20.0)) == MISS_US / 70
    assert rate((0.0, 90.0), (0.5, full), (1.0, full - 40)) == 0.5
    assert rate((0.0, 90.0), (0.5, full + 10), (0.9, full + 5), (1.0, full - 15)) == pytest.approx(0.925)
    assert rate((0.0, 90.0), (0.5, full + 10), (1.0, full + 1)) is None


def test_the_line_names_a_figure_and_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("triton.testing")
    monkeypatch.setattr(testing, "get_dram_gbps", lambda device: 3352.0)  # an H100's
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    where = {"dtype": torch.bfloat16, "page_size": 1, "context_len": 131_072}
    line = describe(torch.device("cuda"), G4, **where)
    assert "about 0.16 at 32768 tokens" in line and "at 131072 tokens" in line and "estimated" in line
    latency = {"1": us(20.0), "0": us(20.0 + MISS_US * 4)}
    found = SimpleNamespace(
        path=Path("tuned.json"),
        file=SimpleNamespace(
            coverage=SimpleNamespace(missing=lambda batch, context: None),
            nearest=lambda batch, context: Bucket(
                batch=batch, context=context, trial=0, launch=None, ratio=us(1.0), latency=latency
            ),
        ),
    )
    monkeypatch.setattr(module, "find_kernel", lambda key: found)
    line = describe(torch.device("cuda"), G4, **where)
    assert "about 0.25 at 32768 tokens, about 0.25 at 131072 tokens" in line and "from tuned.json" in line
    latency["0.9"] = us(20.0)  # of two groups both hit where .9 was planted
    line = describe(torch.device("cuda"), HeadLayout(8, 2, 128), **where)
    assert "about 0.25 at 32768 tokens" in line


def us(value: float) -> Score:
    return Score(value=value, low=value, high=value, unit="us", n=1)


def test_no_figure_without_a_gpu() -> None:
    line = describe(torch.device("cpu"), G4, dtype=torch.bfloat16, page_size=1, context_len=1000)
    assert line == "break-even hit rate unknown without a GPU"
