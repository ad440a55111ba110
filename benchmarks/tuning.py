"""Tuned launch parameters beside the defaults and the best of a random search: ``python -m benchmarks.tuning``.

Kernels are compiled by many processes while the layouts are tuned by a few, which take turns on the GPU. Every bucket
is in the table, and in the tuned file of its layout, as soon as it is measured; another run leaves out those in a file.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import random
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch

from mac_autotune.compile import Job, compile_pool, submit
from mac_autotune.export import Rated, bucket_of, pick, rate, write
from mac_autotune.kernel import CONFIG, HIT_RATES, Bench, make_store, mean_ratio, unusable
from mac_autotune.latency import PLANTED_LAG
from mac_autotune.rounds import gpu_turn
from mac_autotune.study import StudyPlan
from mac_autotune.tune_kernel import KernelTask, compile_jobs, kernel_file_of, kernel_key, line, search
from mac_kernels import HeadLayout, MacConfig
from mac_kernels.launch import LaunchParams, default_launch
from mac_kernels.tuned import Bucket, KernelFile, load, planted_share

from . import results

_LONG = (32768, 126976)
LAYOUTS = {
    **{"32/8x128": _LONG, "9/3x64": (8192,), "14/2x64": (32768,), "12/2x128": (32768,), "32/4x128": _LONG},
    **{"40/8x128": _LONG, "64/8x128": _LONG, "64/8x64": _LONG, "32/8x64": _LONG},
}
"""Hq/HkvxD and contexts: two that frame what most models read, or the most that the models with these heads read."""
POLICIES = "policies"
"""In place of a layout: the steps of :func:`time_policies`."""
POLICY_LAYOUT = "9/3x64"
POLICY_CONFIGS = ((512, 256), (256, 512), (1024, 512), (512, 512), (1024, 256))
"""Window and band of steps that a policy for :data:`POLICY_LAYOUT` may choose."""
_CACHE_GB = 9.0
_FINALISTS = 10
_HOPE = 0.95  # of the fastest time so far: no point is expected to be faster at the hit rates that it still lacks
_NOISE = 1.05  # of the best so far: what is slower by more is no finalist
_LAUNCH_S = 0.05  # what a trial or a drawn point takes, beside others
_TRITON = -1000  # the defaults without CUDA kernels: neither a trial's number nor that of a drawn point


@dataclass(frozen=True, slots=True)
class Run:
    """What every process of a run is told; ``until``: when it ends, by :func:`time.time`."""

    trials: int
    points: int
    batches: tuple[int, ...]
    output: Path
    until: float

    def task(self, layout: str, contexts: tuple[int, ...] = ()) -> KernelTask:
        """What ``tune kernel`` would be asked for."""
        hq, hkv, dim = map(int, re.split("[/x]", layout))
        contexts = contexts or LAYOUTS.get(layout, _LONG)
        lists = (",".join(map(str, values)) for values in (self.batches, contexts))
        asked = "--batches {} --contexts {}".format(*lists)
        heads = f"--hq {hq} --hkv {hkv} --head-dim {dim}"
        return KernelTask(
            layout=HeadLayout(hq, hkv, dim),
            dtype=torch.bfloat16,
            page_size=1,
            batches=self.batches,
            contexts=contexts,
            cache_gb=_CACHE_GB,
            plan=StudyPlan(name="", trials=self.trials),
            command=f"mac-kernels tune kernel {heads} {asked} --trials {self.trials}",
        )

    @property
    def bucket_s(self) -> float:
        """Seconds that a bucket takes: begun with less time, it would be cut."""
        return _LAUNCH_S * (self.trials + self.points)

    @property
    def left_s(self) -> float:
        """Seconds until the end, at least 0."""
        return max(0.0, self.until - time.time())


@dataclass(frozen=True, slots=True)
class Gates:
    """What the process of a layout waits for: its turn, and the kernels of each batch size."""

    turn: Event
    compiled: Mapping[int, Event]


def random_search(bench: Bench, points: int, seed: int) -> dict[int, LaunchParams]:
    """The best three of so many launch parameters drawn at random, or of all if there are fewer, by negative number."""
    points = min(points, bench.space.size)
    draw, drawn, best = random.Random(seed), dict[LaunchParams, float](), float("inf")
    fastest = {hit: bench.time({"point": bench.default}, hit, repeats=3)["point"].p50_us for hit in HIT_RATES}
    while len(drawn) < points:
        launch = bench.space.suggest(_Drawing(draw))
        if launch not in drawn:
            drawn[launch] = _drawn_us(bench, launch, fastest, _NOISE * best)
            best = min(best, drawn[launch])
    order = sorted(drawn, key=drawn.__getitem__)
    finalists = {-1 - index: launch for index, launch in enumerate(order[:_FINALISTS])}
    _, rated = rate(bench.time, bench.default, finalists, HIT_RATES, rounds=2, repeats=4)
    return {one.trial: one.launch for one in rated[:3]}


def _drawn_us(bench: Bench, launch: LaunchParams, fastest: dict[float, float], limit: float) -> float:
    """Geometric mean over the hit rates, infinite where it does not run; ends once it must exceed the limit.

    ``fastest`` is kept up to date.
    """
    us = {hit: _HOPE * least for hit, least in fastest.items()}
    for hit in HIT_RATES:
        try:
            us[hit] = bench.time({"point": launch}, hit, repeats=1)["point"].p50_us
        except Exception as error:
            if not unusable(error):
                raise
            return float("inf")
        fastest[hit] = min(fastest[hit], us[hit])
        if (mean := mean_ratio(us.values())) > limit:
            break
    return mean


class _Drawing:
    def __init__(self, draw: random.Random) -> None:
        self._draw = draw

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._draw.choice(choices)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        raise NotImplementedError(f"{name}: launch parameters are all categorical")


def tune_layout(run: Run, layout: str, facts: results.Row, gates: Gates) -> None:
    """All buckets of a layout, as long as there is time."""
    gates.turn.wait(run.left_s)
    task = run.task(layout)
    buckets = _measured_before(task, run.output / "tuned")
    there = {(bucket.batch, bucket.context) for bucket in buckets}
    problems = [problem for problem in task.problems() if (problem.batch, problem.context) not in there]
    if not problems:
        return
    store = make_store(max(problems, key=lambda problem: problem.cache_bytes), seed=task.plan.seed)
    benches = []
    for problem in problems:  # while kernels are compiled
        benches.append(Bench(problem, store=store))
        torch.cuda.empty_cache()  # what planting needed: others are tuned beside this layout
    while benches:
        bench = benches.pop(0)
        problem = bench.problem
        gates.compiled[problem.batch].wait(run.left_s)
        if run.left_s < run.bucket_s:
            print(f"{problem}: no time left", flush=True)
            return
        begin = time.perf_counter()
        tuned, points = search(task, bench), min(run.points, bench.space.size)
        searched = time.perf_counter()
        drawn = random_search(bench, points, seed=problem.batch)
        drew = time.perf_counter()
        default, by_case = compared(bench, tuned, drawn)
        shipped = by_case["tuned"] if by_case["tuned"].better else default
        bucket = bucket_of(problem.batch, problem.context, default, [by_case["tuned"]])
        buckets.append(bucket)
        best = by_case.pop("random")
        cases = {"default": default, **by_case, "tuned": shipped, f"random {points}": best}
        rows = [row for name, one in cases.items() for row in _rows(bench, name, one)]
        with gpu_turn():  # the others write to the same table
            results.upsert(run.output / "tuning.csv", [{**row, **facts} for row in rows])
        took = f"{searched - begin:.1f} + {drew - searched:.1f} + {time.perf_counter() - drew:.1f} s"
        against = shipped.ratio.value / best.ratio.value
        print(f"{line(problem, default, [shipped] if shipped is not default else [])}; {took}", flush=True)
        triton = by_case["triton"].ratio.value
        fields = [{name: getattr(one.launch, name) for name in bench.space.params()} for one in (shipped, best)]
        print("  to random {:.3f}, Triton {:.3f}, {}, drawn {}".format(against, triton, *fields), flush=True)
        write(kernel_file_of(task, buckets), run.output / "tuned")
        del bench
        torch.cuda.empty_cache()


def _measured_before(task: KernelTask, folder: Path) -> list[Bucket]:
    """The buckets of a layout that an earlier run left."""
    path = folder / kernel_key(task).file_name
    file = load(path) if path.is_file() else None
    return list(file.buckets) if isinstance(file, KernelFile) else []


def compared(
    bench: Bench, tuned: Mapping[int, LaunchParams], drawn: Mapping[int, LaunchParams]
) -> tuple[Rated, dict[str, Rated]]:
    """The default, and beside it the best of both searches, chosen in a measurement before, and Triton's kernels.

    What both have found is measured once; the default may be the best of either.
    """
    numbers = {launch: number for number, launch in (*drawn.items(), *tuned.items())}
    candidates = {number: launch for launch, number in numbers.items() if launch != bench.default}
    default, chosen = rate(bench.time, bench.default, candidates, HIT_RATES, rounds=5, repeats=5)
    ranked = sorted((default, *chosen), key=lambda one: one.ratio.value)
    random_first = [one for one in ranked if one.launch in drawn.values()]
    best = {
        "tuned": next(iter(pick([one for one in chosen if one.launch in tuned.values()])), default).launch,
        "random": next((one for one in random_first if one.keeps), random_first[0]).launch,
        "triton": dataclasses.replace(bench.default, cluster_size=0),
    }
    numbers[best["triton"]] = _TRITON
    final = {numbers[launch]: launch for launch in best.values() if launch != bench.default}
    default, rated = rate(bench.time, bench.default, final, HIT_RATES, repeats=6)
    by_launch = {one.launch: one for one in (default, *rated)}
    return default, {name: by_launch[launch] for name, launch in best.items()}


def time_policies(run: Run, facts: results.Row, gates: Gates) -> None:
    """Steps of the defaults under several windows and bands: what the policies of a model are compared by."""
    gates.turn.wait(run.left_s)
    for compiled in gates.compiled.values():
        compiled.wait(run.left_s)
    problems = run.task(POLICY_LAYOUT, _LONG).problems()
    store = make_store(max(problems, key=lambda problem: problem.cache_bytes), seed=0)
    for window, band in POLICY_CONFIGS:
        for problem in problems:
            if run.left_s < run.bucket_s / 2:
                return
            bench = Bench(problem, store=store, config=_policy_config(window, band))
            default, _ = rate(bench.time, bench.default, {}, HIT_RATES, rounds=5, repeats=5)
            rows = _rows(bench, "default", default, window, band)
            latencies = [{**row, **facts} for row in rows if row["metric"] == "latency"]
            results.upsert(run.output / "policy.csv", latencies)
            del bench
            torch.cuda.empty_cache()
    print("policies: done", flush=True)


def _policy_config(window: int, band: int) -> MacConfig:
    return dataclasses.replace(CONFIG, window=window, band=band)


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
    for metric, scores in (("latency", rated.latency), ("ratio", rated.ratios), ("ratio", {"all": rated.ratio})):
        for hit, score in scores.items():
            share = hit if hit == "all" else f"{planted_share(float(hit), groups):.4g}"
            quantiles = (("p20", score.low), ("p50", score.value), ("p80", score.high))
            measured = {name: f"{value:.4g}" for name, value in quantiles}
            rows.append({**key, "hit_rate": share, "metric": metric, "unit": score.unit, **measured, "n": score.n})
    return results.as_text(rows)


def jobs_of(run: Run, name: str) -> list[Job]:
    """What to compile for a layout, or for :func:`time_policies`."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    configs = [CONFIG] if name != POLICIES else [_policy_config(*one) for one in POLICY_CONFIGS]
    layout = name if name != POLICIES else POLICY_LAYOUT
    problems = run.task(layout).problems()
    jobs = [] if name == POLICIES else compile_jobs(problems, 0)
    for config in configs:
        for problem in {problem.batch: problem for problem in problems}.values():
            default = default_launch(problem.batch * problem.layout.num_kv_heads, config, sms, problem.page_size)
            jobs.append(Job(problem, [default, dataclasses.replace(default, cluster_size=0)], config))
    return jobs


def main(argv: Sequence[str] | None = None) -> int:
    """Tune and compare all layouts asked for; 1 if a process failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="Hq/HkvxD or policies, separated by commas")
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--points", type=int, default=200, help="of the random search")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin nothing that would take longer")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    parser.add_argument("--beside", type=int, default=5, help="layouts that are tuned side by side")
    parser.add_argument("--output", type=Path, default=results.folder(), help="tables and tuned/")
    args = parser.parse_args(argv)
    batches, names = tuple(map(int, args.batches.split(","))), args.layouts.split(",")
    run = Run(args.trials, args.points, batches, args.output, time.time() + args.seconds)
    args.output.mkdir(parents=True, exist_ok=True)
    pool, begin = compile_pool(args.workers), time.perf_counter()
    for _ in range(args.workers):  # they begin to import now
        pool.submit(os.getpid)
    context = multiprocessing.get_context("spawn")
    gates = {name: Gates(context.Event(), {batch: context.Event() for batch in batches}) for name in names}
    facts = results.facts(f"python -m benchmarks.tuning --trials {args.trials} --points {args.points}")
    processes = {}
    for name in names:  # all at once: what they import takes longer than a bucket
        given = (
            (time_policies, (run, facts, gates[name]))
            if name == POLICIES
            else (tune_layout, (run, name, facts, gates[name]))
        )
        processes[name] = context.Process(target=given[0], args=given[1], daemon=True)
        processes[name].start()

    def announce(name: str, batch: int, futures: Sequence[Future[int]]) -> None:
        wait(futures, timeout=run.left_s)
        errors = {str(f.exception()) for f in futures if f.done() and f.exception()}
        refused = sum(f.result() for f in futures if f.done() and not f.exception())
        at = time.perf_counter() - begin
        print(f"{name} B{batch}: compiled at {at:.0f} s, {refused} refused {errors or ''}", flush=True)
        gates[name].compiled[batch].set()

    for name in names:
        jobs = jobs_of(run, name)
        for batch in batches:
            futures = [future for job in jobs if job.problem.batch == batch for future in submit(pool, job)]
            threading.Thread(target=announce, args=(name, batch, futures), daemon=True).start()

    def one(name: str) -> int:
        gates[name].turn.set()
        processes[name].join(run.left_s)
        processes[name].kill()
        processes[name].join()
        print(f"{name}: exit {processes[name].exitcode} at {time.perf_counter() - begin:.0f} s", flush=True)
        return processes[name].exitcode or 0

    with ThreadPoolExecutor(args.beside) as lanes:
        failed = any(list(lanes.map(one, names)))
    pool.shutdown(wait=False, cancel_futures=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
