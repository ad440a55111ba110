"""``tune kernel``: compile ahead, one study per bucket, measure the best again, write the file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from mac_kernels import HeadLayout, InputError, MissingError
from mac_kernels.launch import LaunchParams, default_launch
from mac_kernels.tuned import Bucket, KernelFile, KernelKey

from .compile import Job, compile_ahead
from .export import Rated, bucket_of, kernel_file, pick, provenance, rate, with_gain
from .kernel import CONFIG, HIT_RATES, SHORTEST, Bench, KernelObjective, Problem, make_store, num_sms
from .progress import StudyPanel
from .space import variants
from .study import StudyPlan, ranked, run_study

TOP = 5
"""How many of a study's best are measured again."""
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTask:
    """What ``tune kernel`` is asked for."""

    layout: HeadLayout
    dtype: torch.dtype
    page_size: int
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    cache_gb: float
    plan: StudyPlan
    command: str

    def problems(self) -> list[Problem]:
        """One per bucket, the smallest caches first; those whose cache would be larger than ``cache_gb`` are left out.

        Raises
        ------
        InputError
            If none is left.
        """
        every = [
            Problem(layout=self.layout, batch=batch, context=context, page_size=self.page_size, dtype=self.dtype)
            for batch in sorted(self.batches)
            for context in sorted(self.contexts)
        ]
        fitting = [problem for problem in every if problem.cache_bytes <= self.cache_gb * 1e9]
        if not fitting:
            least = min(problem.cache_bytes for problem in every) / 1e9
            raise InputError(f"--cache-gb {self.cache_gb:g}: the smallest bucket needs {least:.2g}; give more, or less")
        return fitting

    def study(self, problem: Problem) -> StudyPlan:
        """The plan of a bucket's study."""
        name = f"{self.plan.name}/{problem}" if self.plan.name else f"kernel/{gpu_name()}/{problem}"
        facts = {"problem": str(problem), "gpu": gpu_name(), "sampler": self.plan.sampler}
        return dataclasses.replace(self.plan, name=name, facts=facts)


def gpu_name() -> str:
    """The GPU that is tuned for.

    Raises
    ------
    MissingError
        Without one.
    """
    if not torch.cuda.is_available():
        raise MissingError("launch parameters are tuned on the GPU that they are for, and there is none here")
    return torch.cuda.get_device_name()


def tune_kernel(task: KernelTask, say: Say, *, export: bool = True) -> KernelFile | None:
    """Run or resume the studies of all buckets; with ``export``, measure their best again and put the file together.

    Raises
    ------
    ExportRefused
        If nothing beats the defaults.
    """
    problems = task.problems()
    jobs = compile_jobs(problems, task.plan.seed)
    say(f"compiling {sum(len(job.launches) for job in jobs)} launch parameters")
    refused = compile_ahead(jobs)
    say(f"{refused} of them do not fit on this GPU")
    store = make_store(max(problems, key=lambda problem: problem.cache_bytes), seed=task.plan.seed)
    buckets: list[Bucket] = []
    for problem in problems:
        bench = Bench(problem, seed=task.plan.seed, store=store)
        candidates = search(task, bench)
        if export:
            default, rated = measured_again(bench, candidates)
            buckets.append(bucket_of(problem.batch, problem.context, default, rated))
            say(line(problem, default, rated))
        del bench
        torch.cuda.empty_cache()
    return with_gain(kernel_file_of(task, buckets)) if export else None


def compile_jobs(problems: Sequence[Problem], seed: int) -> list[Job]:
    """What to compile for the buckets of a layout, those of equal batch size together."""
    short = dataclasses.replace(problems[0], batch=1, context=SHORTEST)
    space, kv_heads = Bench(short, seed=seed, hit_rates=(1.0,)).space, short.layout.num_kv_heads
    jobs = []
    for problem in {problem.batch: problem for problem in problems}.values():
        default = default_launch(problem.batch * kv_heads, CONFIG, num_sms("cuda"), problem.page_size)
        jobs.append(Job(problem, variants(dataclasses.replace(space, default=default))))
    return jobs


def search(task: KernelTask, bench: Bench) -> dict[int, LaunchParams]:
    """Run or resume the study of a bucket; its best launch parameters by trial number."""
    plan = task.study(bench.problem)
    with StudyPanel(plan) as panel:
        study = run_study(plan, KernelObjective(bench), panel)
    return {trial.number: bench.space.build(trial.params) for trial in ranked(study)[:TOP]}


def measured_again(bench: Bench, candidates: Mapping[int, LaunchParams]) -> tuple[Rated, list[Rated]]:
    """The default and the best candidate: chosen in one measurement, rated in another, which owes nothing to luck."""
    _, chosen = rate(bench.time, bench.default, candidates, HIT_RATES, rounds=5)
    best = {one.trial: one.launch for one in pick(chosen)}
    return rate(bench.time, bench.default, best, HIT_RATES)


def kernel_file_of(task: KernelTask, buckets: Sequence[Bucket]) -> KernelFile:
    """The file of all buckets."""
    key = kernel_key(task)
    study_name = task.study(task.problems()[0]).name.rpartition("/")[0]
    facts = provenance(gpu=key.gpu, study=study_name, trial=buckets[0].trial, basis="measured", command=task.command)
    return kernel_file(key, buckets, window=CONFIG.window, band=CONFIG.band, provenance=facts)


def kernel_key(task: KernelTask) -> KernelKey:
    """What the file of a task is found by."""
    return KernelKey(
        gpu=gpu_name(),
        num_qo_heads=task.layout.num_qo_heads,
        num_kv_heads=task.layout.num_kv_heads,
        head_dim=task.layout.head_dim,
        dtype=str(task.dtype).removeprefix("torch."),
        page_size=task.page_size,
    )


def estimate_s(task: KernelTask, *, workers: int = 16) -> float:
    """Rough time of the whole task where the CUDA kernels serve: compiling, trials, measuring again."""
    compile_s = len({problem.batch for problem in task.problems()}) * _LAUNCHES * _COMPILE_S / workers
    return _START_S + compile_s + len(task.problems()) * (task.plan.trials * _TRIAL_S + _EXPORT_S)


# launch parameters that hold every variant, and seconds for starting processes that compile, for compiling one (two
# guesses), for a trial, for a bucket's planting and measuring again (as it took on an H100)
_LAUNCHES, _START_S, _COMPILE_S, _TRIAL_S, _EXPORT_S = 8, 15.0, 1.5, 0.05, 2.0


def line(problem: Problem, default: Rated, rated: Sequence[Rated]) -> str:
    """What came out for a bucket, for people."""
    best = rated[0] if rated else default
    ratio = best.ratio
    verdict = "better" if best.better else "the default stays"
    rates = ", ".join(f"hit {hit} {one.value:.1f} us" for hit, one in best.latency.items())
    return f"{problem}: {ratio.value:.3f} of the default [{ratio.low:.3f}, {ratio.high:.3f}] ({rates}): {verdict}"
