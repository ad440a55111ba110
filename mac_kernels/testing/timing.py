"""Fair timing: cold L2 by rotating buffers, providers in turn, CUDA graphs on both sides, quantiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Calls = Sequence[Callable[[], Any]]
_COLD_FACTOR = 5  # sizes of the L2 cache between two uses of one buffer


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds per call: 20%, 50% and 80% quantile over ``n`` samples."""

    p20_us: float
    p50_us: float
    p80_us: float
    n: int

    @staticmethod
    def of(samples_us: Sequence[float]) -> Timing:
        """Quantiles of at least one sample.

        Raises
        ------
        ValueError
            If there is none.
        """
        if not samples_us:
            raise ValueError("samples_us is empty; measure at least once (repeats >= 1)")
        if len(samples_us) == 1:
            return Timing(samples_us[0], samples_us[0], samples_us[0], 1)
        cuts = statistics.quantiles(samples_us, n=10, method="inclusive")
        return Timing(cuts[1], cuts[4], cuts[7], len(samples_us))


def cold_copies(bytes_per_call: int, *, device: torch.device | str, l2_bytes: int | None = None) -> int:
    """How many copies of a call's buffers to rotate through, so that every call finds its own evicted from L2.

    Parameters
    ----------
    bytes_per_call : int, bytes, >= 1
        What one call reads and writes.
    device : torch.device or str
        On the CPU one copy is enough: nothing is claimed about its caches.
    l2_bytes : int, optional
        Default: the device's.

    Returns
    -------
    int
        At least 1; ``(copies - 1) * bytes_per_call >= 5 * l2_bytes``.

    Raises
    ------
    ValueError
        If ``bytes_per_call`` is below 1.
    """
    if bytes_per_call < 1:
        raise ValueError(f"bytes_per_call={bytes_per_call} must be >= 1; count what one call reads and writes")
    if l2_bytes is None:
        device = torch.device(device)
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return -(-_COLD_FACTOR * l2_bytes // bytes_per_call) + 1


def measure(
    providers: Mapping[str, Calls],
    *,
    device: torch.device | str,
    repeats: int = 50,
    warmup: int = 3,
    capture: bool = True,
) -> dict[str, Timing]:
    """Time several providers of the same work in turn: A, B, A, B, ...

    Parameters
    ----------
    providers : mapping of str to sequence of callables
        Per provider the same call on each copy of its buffers, see :func:`cold_copies`. On a CUDA device the calls are
        captured, in order, in one graph that is replayed; they must be capturable and must not allocate.
    device : torch.device or str
        CUDA: events around each replay. Otherwise ``time.perf_counter`` around each round of calls.
    repeats : int, default 50
        Samples per provider; each is the mean over one round through the copies.
    warmup : int, default 3
        Rounds before the first sample.
    capture : bool, default True
        False: calls on a CUDA device are launched one by one, for what cannot be captured; their host time counts.

    Returns
    -------
    dict of str to Timing
        Microseconds per call.

    Raises
    ------
    ValueError
        If a provider has no calls, or ``repeats`` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be >= 1")
    empty = [name for name, calls in providers.items() if not calls]
    if empty:
        raise ValueError(f"providers {', '.join(empty)} have no calls; give one per buffer copy")
    if torch.device(device).type == "cuda":
        rounds = {name: (_captured if capture else _in_order)(calls) for name, calls in providers.items()}
        sample = event_us
    else:
        rounds = {name: _in_order(calls) for name, calls in providers.items()}
        sample = clock_us
    samples: dict[str, list[float]] = {name: [] for name in providers}
    for repeat in range(warmup + repeats):
        for name, run in rounds.items():
            elapsed = sample(run) / len(providers[name])
            if repeat >= warmup:
                samples[name].append(elapsed)
    return {name: Timing.of(values) for name, values in samples.items()}


def _in_order(calls: Calls) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _captured(calls: Calls) -> Callable[[], None]:
    run = _in_order(calls)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types for it
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def captured(calls: Calls) -> Callable[[], None]:
    """Capture calls that ran before, in order, in one CUDA graph; returns its replay.

    ``torch.cuda.graph`` would also empty the allocator's cache, which takes longer than a short measurement.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]  # as above
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    return graph.replay


def calls_per_round(call: Callable[[], object], *, round_us: float) -> int:
    """How many calls make a round of about ``round_us`` on the GPU, 2 to 20."""
    return max(2, min(20, int(round_us / max(event_us(call), 1.0))))


def event_us(run: Callable[[], object]) -> float:
    """Microseconds between two CUDA events around ``run``."""
    # torch has no types for it
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def clock_us(run: Callable[[], object]) -> float:
    """Microseconds of ``run`` on the host."""
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e6
