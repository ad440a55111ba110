"""Rounds of calls with a cold L2 cache: captured once, replayed in turn, by one process of this GPU at a time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mac_kernels.settings import cache_dir
from mac_kernels.testing.timing import Timing, captured, clock_us, event_us

Call = Callable[[], Any]
_ROW = 128  # numbers that one thread block of the sum below reads at least


@dataclass(frozen=True, slots=True)
class Round:
    """``count`` calls, each behind a read of twice the L2 cache; ``call`` keeps alive what the graph points to."""

    call: Call
    replay: Callable[[], None]
    count: int


class Rounds:
    """Makes rounds and times them.

    Parameters
    ----------
    device : str
        ``"cuda"``, or ``"cpu"`` to try things out: then calls run as they are.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        l2 = torch.cuda.get_device_properties(0).L2_cache_size if self._cuda else 0
        # read, not written: lines that wait to be written back would make the step's own reads wait
        self._cold = torch.zeros(max(1, 2 * l2 // (4 * _ROW)), _ROW, device=device)
        self._sums = torch.empty(len(self._cold), device=device)
        self._idle_us: dict[int, float] = {}
        self._shuffle = random.Random(0).shuffle
        self._flush()  # loads its kernel, which must not happen within a capture

    def make(self, call: Call, count: int) -> Round:
        """A round of ``count`` calls; on a GPU they must have run before and not allocate."""
        return Round(call, self._prepared([self._flush, call] * count), count)

    def time(self, rounds: Mapping[str, Round], *, repeats: int) -> dict[str, Timing]:
        """Microseconds per call, all rounds in turn, without the flush."""
        sample, names = event_us if self._cuda else clock_us, list(rounds)
        samples: dict[str, list[float]] = {name: [] for name in rounds}
        with gpu_turn(self._cuda):
            idle = {one.count: self._idle(one.count, sample) for one in rounds.values()}
            for one in rounds.values():  # the first replay of a graph takes longer, and another process had the GPU
                one.replay()
            for _ in range(repeats):
                self._shuffle(names)  # a round is faster behind one whose code it shares
                for name in names:
                    one = rounds[name]
                    samples[name].append(sample(one.replay) / one.count - idle[one.count])
        return {name: Timing.of(values) for name, values in samples.items()}

    def alone_us(self, call: Call) -> float:
        """Microseconds of one call that ran before, roughly."""
        sample = event_us if self._cuda else clock_us
        return min(sample(call) for _ in range(2))

    def _idle(self, count: int, sample: Callable[[Call], float]) -> float:
        """A flush with nothing behind it, per call."""
        if count not in self._idle_us:
            replay = self._prepared([self._flush] * count)
            replay()
            self._idle_us[count] = Timing.of([sample(replay) / count for _ in range(20)]).p50_us
        return self._idle_us[count]

    def _flush(self) -> None:
        torch.sum(self._cold, 1, out=self._sums)

    def _prepared(self, calls: list[Call]) -> Callable[[], None]:
        if self._cuda:
            return captured(calls)

        def run() -> None:
            for call in calls:
                call()

        return run


@contextmanager
def gpu_turn(cuda: bool = True) -> Iterator[None]:
    """Hold the GPU against other tuning processes: work of two at once would be timed as one's."""
    if not cuda:
        yield
        return
    import fcntl  # not there on Windows, where Triton is not either

    name = torch.cuda.get_device_properties(0).uuid
    path = cache_dir() / f"gpu-{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go with the file
        yield
        torch.cuda.synchronize()
