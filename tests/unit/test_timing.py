"""Timing on the CPU path; the CUDA path has the same loop."""

import time

import pytest
import torch

from mac_kernels.testing.timing import Timing, cold_copies, measure


def test_quantiles_of_known_samples():
    timing = Timing.of([float(x) for x in range(101)])
    assert (timing.p20_us, timing.p50_us, timing.p80_us, timing.n) == (20.0, 50.0, 80.0, 101)
    assert Timing.of([3.0]) == Timing(3.0, 3.0, 3.0, 1)


@pytest.mark.parametrize(("used", "l2"), [(1, 1), (10, 50_000_000), (50_000_001, 50_000_000), (10**12, 50_000_000)])
def test_copies_put_five_caches_between_two_uses(used, l2):
    copies = cold_copies(used, device="cpu", l2_bytes=l2)
    assert (copies - 1) * used >= 5 * l2
    assert (copies - 2) * used < 5 * l2


def test_cpu_needs_one_copy():
    assert cold_copies(1000, device="cpu") == 1


def test_providers_take_turns_and_copies_rotate():
    log = []
    calls = {name: [lambda name=name, i=i: log.append((name, i)) for i in range(2)] for name in "ab"}
    result = measure(calls, device="cpu", repeats=3, warmup=1)
    assert log == [("a", 0), ("a", 1), ("b", 0), ("b", 1)] * 4
    assert result["a"].n == result["b"].n == 3


def test_slower_provider_measures_slower_per_call():
    result = measure(
        {"slow": [lambda: time.sleep(0.004)], "fast": [lambda: time.sleep(0.001)] * 3}, device="cpu", repeats=5
    )
    assert result["slow"].p50_us >= 4000
    assert 1000 <= result["fast"].p50_us < result["slow"].p50_us
    assert result["slow"].p20_us <= result["slow"].p50_us <= result["slow"].p80_us


@pytest.mark.parametrize(
    ("providers", "repeats", "message"),
    [({"a": []}, 1, "providers a have no calls"), ({"a": [lambda: None]}, 0, "repeats=0 must be >= 1")],
)
def test_misuse_is_named(providers, repeats, message):
    with pytest.raises(ValueError, match=message):
        measure(providers, device="cpu", repeats=repeats)
    with pytest.raises(ValueError, match="bytes_per_call=0 must be >= 1"):
        cold_copies(0, device="cpu")
    with pytest.raises(ValueError, match="is empty"):
        Timing.of([])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graph_path_times_a_copy_near_its_bandwidth():
    size = 64 << 20
    copies = cold_copies(2 * size, device="cuda")
    buffers = [torch.zeros(2, size, dtype=torch.uint8, device="cuda") for _ in range(copies)]
    calls = [lambda pair=pair: pair[0].copy_(pair[1]) for pair in buffers]
    result = measure({"copy": calls}, device="cuda", repeats=10)
    assert 10 < result["copy"].p50_us < 10_000
