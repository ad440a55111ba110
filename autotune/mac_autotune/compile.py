"""Compile launch parameters ahead, in parallel processes: compiling, not running, is what makes a trial slow."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from mac_kernels.launch import LaunchParams

from .kernel import CONFIG, Bench, Problem, unusable

Progress = Callable[[int, int], None]
_SHORTEST = CONFIG.min_context + 1


def compile_ahead(
    problem: Problem, launches: Sequence[LaunchParams], *, workers: int | None = None, progress: Progress | None = None
) -> int:
    """Compile all kernels of the launch parameters into Triton's disk cache; returns how many do not fit on this GPU.

    Parameters
    ----------
    problem : Problem
        The batch size and page size are compiled in, the context is not: short caches are used.
    launches : sequence of LaunchParams
    workers : int, optional
        Processes; default: one per core, at most 16. Each holds a CUDA context and a small cache.
    progress : callable, optional
        Called as ``progress(done, total)``.
    """
    workers = min(16, os.cpu_count() or 1) if workers is None else workers
    size = max(1, min(8, -(-len(launches) // workers)))
    chunks = [list(launches[first : first + size]) for first in range(0, len(launches), size)]
    done = refused = 0
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_compile, problem, chunk): len(chunk) for chunk in chunks}
        for future in as_completed(futures):
            refused += future.result()
            done += futures[future]
            if progress is not None:
                progress(done, len(launches))
    return refused


_BENCH: dict[str, Bench] = {}


def _compile(problem: Problem, launches: list[LaunchParams]) -> int:
    """In a worker: run every launch once on a short cache, which compiles what is not in the disk cache yet."""
    short = Problem(
        layout=problem.layout,
        batch=problem.batch,
        context=_SHORTEST,
        page_size=problem.page_size,
        dtype=problem.dtype,
    )
    if str(short) not in _BENCH:
        _BENCH[str(short)] = Bench(short, hit_rates=(1.0,))
    bench = _BENCH[str(short)]
    refused = 0
    for launch in launches:
        try:
            bench.run_once(launch)
        except Exception as error:
            if not unusable(error):
                raise
            refused += 1
    return refused
