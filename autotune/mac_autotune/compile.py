"""Compile launch parameters ahead, in parallel processes: compiling, not running, is what makes a trial slow."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import torch

from mac_kernels import BatchMacDecodeWithPagedKVCacheWrapper, MacConfig, RingPool, Rope
from mac_kernels.launch import LaunchParams

from .kernel import CONFIG, Problem, unusable

Progress = Callable[[int, int], None]
_PIECE = 2  # launch parameters that a process is handed at once
_TOKENS = 64  # of the step that is compiled; the context is not compiled in
_STEP: dict[tuple[str, MacConfig], Callable[[LaunchParams], None]] = {}
"""In a worker: the step of the problem that it compiled last."""


@dataclass(frozen=True, slots=True)
class Job:
    """Launch parameters of a problem to compile the kernels for."""

    problem: Problem
    launches: Sequence[LaunchParams]
    config: MacConfig = CONFIG


def compile_ahead(jobs: Iterable[Job], *, workers: int | None = None, progress: Progress | None = None) -> int:
    """Compile all kernels of the launch parameters into the disk caches; returns how many do not fit on this GPU.

    Parameters
    ----------
    jobs : iterable of Job
        Heads, batch size and page size are compiled in, the context is not: a short one is used.
    workers : int, optional
        Processes; default: one per core, at most 16. Each holds a CUDA context and a small cache.
    progress : callable, optional
        Called as ``progress(done, total)``.
    """
    workers = min(16, os.cpu_count() or 1) if workers is None else workers
    with compile_pool(workers) as pool:
        futures = [future for job in jobs for future in submit(pool, job)]
        for done, _ in enumerate(as_completed(futures), start=1):
            if progress is not None:
                progress(done, len(futures))
        return sum(future.result() for future in futures)


def compile_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that compile, for :func:`submit`; they give way to others."""
    return ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=os.nice, initargs=(10,)
    )


def submit(pool: ProcessPoolExecutor, job: Job) -> list[Future[int]]:
    """Hand a job to the pool in small pieces; each yields how many launch parameters do not fit."""
    pieces = [job.launches[first : first + _PIECE] for first in range(0, len(job.launches), _PIECE)]
    return [pool.submit(_compile, job.problem, piece, job.config) for piece in pieces]


def _compile(problem: Problem, launches: Sequence[LaunchParams], config: MacConfig) -> int:
    """In a worker: run every launch once, which compiles what is not in the disk caches yet."""
    if (str(problem), config) not in _STEP:
        _STEP.clear()
        _STEP[str(problem), config] = _small_step(problem, config)
    refused = 0
    for launch in launches:
        try:
            _STEP[str(problem), config](launch)
        except Exception as error:
            if not unusable(error):
                raise
            refused += 1
    return refused


def _small_step(problem: Problem, config: MacConfig, device: str = "cuda") -> Callable[[LaunchParams], None]:
    """A step of the problem's batch whose requests share one short context: the same kernels, little memory."""
    layout, batch, pages = problem.layout, problem.batch, -(-_TOKENS // problem.page_size)
    shape = (pages, problem.page_size, layout.num_kv_heads, layout.head_dim)
    cache = torch.zeros(2, *shape, dtype=problem.dtype, device=device)
    q = torch.zeros(batch, layout.num_qo_heads, layout.head_dim, dtype=problem.dtype, device=device)
    out, slots = torch.empty_like(q), torch.arange(batch, device=device)
    rope = Rope.from_inv_freq(torch.ones(layout.head_dim // 2, device=device))
    rings = RingPool(
        num_rings=1,
        num_slots=batch,
        num_layers=1,
        layout=layout,
        window=config.window,
        dtype=problem.dtype,
        correction=config.correction,
        device=device,
    )
    indptr = torch.arange(batch + 1, dtype=torch.int32, device=device) * pages
    indices = torch.arange(pages, dtype=torch.int32, device=device).repeat(batch)
    last = torch.full((batch,), _TOKENS - (pages - 1) * problem.page_size, dtype=torch.int32, device=device)

    def run(launch: LaunchParams) -> None:
        mac = BatchMacDecodeWithPagedKVCacheWrapper("NHD", backend="triton")
        mac.plan(
            indptr,
            indices,
            last,
            layout=layout,
            page_size=problem.page_size,
            config=config,
            rope=rope,
            kv_data_type=problem.dtype,
            launch=launch,
        )
        generations = torch.zeros_like(slots)
        mac.run(q, (cache[0], cache[1]), rings=rings, layer=0, slots=slots, generations=generations, out=out)
        if device == "cuda":
            torch.cuda.synchronize()

    return run
