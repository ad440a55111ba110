"""Tuned launch parameters beside the defaults and the best of a random search: ``python -m benchmarks.tuning``.

Kernels are compiled by many processes while the layouts are tuned by a few, which take turns on the GPU. Every bucket
is in the table, and in the tuned file of its layout, as soon as it is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import random
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mac_autotune.compile import Job, compile_pool, submit
from mac_autotune.errors import ExportRefused
from mac_autotune.export import Rated, bucket_of, rate, write
from mac_autotune.kernel import CONFIG, HIT_RATES, Bench, make_store, unusable
from mac_autotune.latency import PLANTED_LAG
from mac_autotune.rounds import gpu_turn
from mac_autotune.study import StudyPlan
from mac_autotune.tune_kernel import KernelTask, compile_jobs, kernel_file_of, line, search
from mac_kernels import HeadLayout
from mac_kernels.launch import LaunchParams, default_launch
from mac_kernels.tuned import Bucket, planted_share

from . import results

POLICIES = "policies"
"""In place of a layout: the steps of :func:`time_policies`."""
LAYOUTS = (
    *("9/3x64", POLICIES, "32/8x128", "32/4x128", "14/2x64", "12/2x128", "40/8x128", "64/8x128"),
    *("32/8x64", "64/8x64"),
)
POLICY_LAYOUT = "9/3x64"
POLICY_CONFIGS = ((512, 256), (256, 512), (1024, 512), (512, 512), (1024, 256))
"""Window and band of steps that a policy for :data:`POLICY_LAYOUT` may choose."""
_SMOLLM2_CONTEXT = 8192  # all that a model of this layout reads
_FINALISTS = 10
_LEFT_S = 12.0  # a bucket begun with less time would be cut
_TRITON = -1000  # the defaults without the CUDA front: neither a trial's number nor that of a drawn point


@dataclass(frozen=True, slots=True)
class Run:
    """What every process of a run is told; ``until``: when it ends, by :func:`time.time`."""

    trials: int
    points: int
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    output: Path
    until: float

    def task(self, layout: str) -> KernelTask:
        """What ``tune kernel`` would be asked for."""
        hq, hkv, dim = map(int, re.split("[/x]", layout))
        contexts = self.contexts if layout != POLICY_LAYOUT else (_SMOLLM2_CONTEXT, *self.contexts)
        lists = (",".join(map(str, values)) for values in (self.batches, contexts))
        asked = "--batches {} --contexts {}".format(*lists)
        return KernelTask(
            layout=HeadLayout(hq, hkv, dim),
            dtype=torch.bfloat16,
            page_size=1,
            batches=self.batches,
            contexts=contexts,
            cache_gb=9.0,
            plan=StudyPlan(name="", trials=self.trials),
            command=f"mac-kernels tune kernel --hq {hq} --hkv {hkv} --head-dim {dim} {asked} --trials {self.trials}",
        )


def random_search(bench: Bench, points: int, seed: int) -> dict[int, LaunchParams]:
    """The best three of so many launch parameters drawn at random, by negative number."""
    draw, drawn = random.Random(seed), dict[LaunchParams, float]()
    while len(drawn) < points:
        launch = bench.space.suggest(_Drawing(draw))
        if launch in drawn:
            continue
        try:
            times = [bench.time({"point": launch}, hit, repeats=1)["point"].p50_us for hit in HIT_RATES]
            drawn[launch] = math.exp(statistics.mean(map(math.log, times)))
        except Exception as error:
            if not unusable(error):
                raise
            drawn[launch] = math.inf
    order = sorted(drawn, key=drawn.__getitem__)
    finalists = {-1 - index: launch for index, launch in enumerate(order[:_FINALISTS])}
    _, rated = rate(bench.time, bench.default, finalists, HIT_RATES, rounds=2, repeats=4)
    return {one.trial: one.launch for one in rated[:3]}


class _Drawing:
    def __init__(self, draw: random.Random) -> None:
        self._draw = draw

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._draw.choice(choices)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        raise NotImplementedError(f"{name}: launch parameters are all categorical")


def tune_layout(run: Run, layout: str, facts: results.Row) -> None:
    """All buckets of a layout, as long as there is time."""
    task = run.task(layout)
    problems = task.problems()
    store = make_store(max(problems, key=lambda problem: problem.cache_bytes), seed=task.plan.seed)
    buckets: list[Bucket] = []
    for problem in problems:
        if time.time() > run.until - _LEFT_S:
            print(f"{problem}: no time left", flush=True)
            return
        begin = time.perf_counter()
        bench = Bench(problem, store=store)
        torch.cuda.empty_cache()  # what planting needed: others are tuned beside this layout
        tuned = search(task, bench)
        searched = time.perf_counter()
        drawn = random_search(bench, run.points, seed=problem.batch)
        _, chosen = rate(bench.time, bench.default, {**tuned, **drawn}, HIT_RATES, rounds=5, repeats=5)
        best = {("tuned" if one.trial >= 0 else "random"): one for one in reversed(chosen)}
        triton = dataclasses.replace(bench.default, cluster_size=0)
        final = {one.trial: one.launch for one in best.values()} | {_TRITON: triton}
        default, rated = rate(bench.time, bench.default, final, HIT_RATES, repeats=6)
        by_trial = {one.trial: one for one in rated}
        bucket = bucket_of(problem.batch, problem.context, default, [one for one in rated if one.trial >= 0])
        buckets.append(bucket)
        shipped = by_trial[bucket.trial] if bucket.launch is not None else default
        cases = {"default": default, "tuned": shipped, f"random {run.points}": by_trial[best["random"].trial]}
        cases["triton front"] = by_trial[_TRITON]
        rows = [row for name, one in cases.items() for row in _rows(bench, name, one)]
        with gpu_turn():  # the others write to the same table
            results.upsert(run.output / "tuning.csv", [{**row, **facts} for row in rows])
        took = f"{searched - begin:.1f} + {time.perf_counter() - searched:.1f} s"
        against = shipped.ratio.value / cases[f"random {run.points}"].ratio.value
        print(f"{line(problem, default, [shipped] if shipped is not default else [])}; {took}", flush=True)
        print(f"  to random {against:.3f}, Triton {by_trial[_TRITON].ratio.value:.3f}, {shipped.launch}", flush=True)
        try:
            write(kernel_file_of(task, buckets), run.output / "tuned")
        except ExportRefused as refused:
            print(refused, flush=True)
        del bench
        torch.cuda.empty_cache()


def time_policies(run: Run, facts: results.Row) -> None:
    """Steps of the defaults under several windows and bands: what the policies of a model are compared by."""
    task = run.task(POLICY_LAYOUT)
    problems = [problem for problem in task.problems() if problem.context >= 32768]
    store = make_store(max(problems, key=lambda problem: problem.cache_bytes), seed=0)
    for window, band in POLICY_CONFIGS:
        for problem in problems:
            if time.time() > run.until - _LEFT_S / 2:
                return
            config = dataclasses.replace(CONFIG, window=window, band=band)
            bench = Bench(problem, store=store, config=config)
            default, _ = rate(bench.time, bench.default, {}, HIT_RATES, rounds=5, repeats=5)
            rows = _rows(bench, "default", default, window, band)
            latencies = [{**row, **facts} for row in rows if row["metric"] == "latency"]
            results.upsert(run.output / "policy.csv", latencies)
            del bench
            torch.cuda.empty_cache()
    print("policies: done", flush=True)


def _rows(
    bench: Bench, case: str, rated: Rated, window: int = CONFIG.window, band: int = CONFIG.band
) -> list[results.Row]:
    problem = bench.problem
    key = {
        **dict.fromkeys(results.COLUMNS, ""),
        **{"suite": "tuning", "case": case, "provider": "mac", "backend": "triton"},
        **{"batch": problem.batch, "context": problem.context, "page_size": problem.page_size, "dtype": "bfloat16"},
        **{"hq": problem.layout.num_qo_heads, "hkv": problem.layout.num_kv_heads},
        **{"head_dim": problem.layout.head_dim, "window": window, "band": band, "lag": PLANTED_LAG},
        **{"config": "careful", "miss_pattern": "scattered", "tp": 1},
    }
    rows: list[Mapping[str, Any]] = []
    groups = problem.batch * problem.layout.num_kv_heads
    for hit, score in {planted_share(float(hit), groups): score for hit, score in rated.latency.items()}.items():
        us = {name: f"{value:.4g}" for name, value in (("p20", score.low), ("p50", score.value), ("p80", score.high))}
        rows.append({**key, "hit_rate": f"{hit:.4g}", "metric": "latency", "unit": "us", **us, "n": score.n})
    ratio = rated.ratio
    spread = {name: f"{x:.4f}" for name, x in (("p20", ratio.low), ("p50", ratio.value), ("p80", ratio.high))}
    rows.append({**key, "hit_rate": "all", "metric": "ratio", "unit": "of the default", **spread, "n": ratio.n})
    return results.as_text(rows)


def policy_jobs(run: Run) -> list[Job]:
    """What to compile for :func:`time_policies`."""
    layout = run.task(POLICY_LAYOUT)
    jobs = []
    for window, band in POLICY_CONFIGS:
        config = dataclasses.replace(CONFIG, window=window, band=band)
        for problem in {problem.batch: problem for problem in layout.problems()}.values():
            sms = torch.cuda.get_device_properties(0).multi_processor_count
            default = default_launch(problem.batch * problem.layout.num_kv_heads, config, sms, problem.page_size)
            jobs.append(Job(problem, [default], config))
    return jobs


def main(argv: Sequence[str] | None = None) -> int:
    """Tune and compare all layouts asked for; 1 if a process failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="Hq/HkvxD or policies, separated by commas")
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--points", type=int, default=200, help="of the random search")
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--contexts", default="32768,126976")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin nothing that would take longer")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    parser.add_argument("--beside", type=int, default=4, help="layouts that are tuned side by side")
    parser.add_argument("--output", type=Path, default=results.folder(), help="tables and tuned/")
    args = parser.parse_args(argv)
    batches, contexts = (tuple(map(int, text.split(","))) for text in (args.batches, args.contexts))
    run = Run(args.trials, args.points, batches, contexts, args.output, time.time() + args.seconds)
    args.output.mkdir(parents=True, exist_ok=True)
    facts = results.facts(f"python -m benchmarks.tuning --trials {args.trials} --points {args.points}")
    begin = time.perf_counter()
    pool = compile_pool(args.workers)
    pending: dict[str, list[Future[int]]] = {}
    for name in args.layouts.split(","):
        jobs = policy_jobs(run) if name == POLICIES else compile_jobs(run.task(name).problems(), 0)
        pending[name] = [future for job in jobs for future in submit(pool, job)]

    def one(name: str) -> int:
        wait(pending[name], timeout=max(0.0, run.until - time.time()))
        errors = {str(f.exception()) for f in pending[name] if f.done() and f.exception()}
        refused = sum(f.result() for f in pending[name] if f.done() and not f.exception())
        print(f"{name}: compiled at {time.perf_counter() - begin:.0f} s, {refused} refused {errors or ''}", flush=True)
        target, given = (time_policies, (run, facts)) if name == POLICIES else (tune_layout, (run, name, facts))
        process = multiprocessing.get_context("spawn").Process(target=target, args=given)
        process.start()
        process.join()
        print(f"{name}: exit {process.exitcode} at {time.perf_counter() - begin:.0f} s", flush=True)
        return process.exitcode or 0

    with ThreadPoolExecutor(args.beside) as lanes:
        failed = any(list(lanes.map(one, pending)))
    pool.shutdown(wait=False, cancel_futures=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
