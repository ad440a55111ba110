"""``tune kernel``: compile ahead, one study per bucket, measure the best again, write the file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mac_kernels import HeadLayout, MissingError
from mac_kernels.tuned import Bucket, KernelFile, KernelKey

from .compile import compile_ahead
from .export import Rated, bucket_of, kernel_file, provenance, rate
from .kernel import CONFIG, HIT_RATES, Bench, KernelObjective, Problem, make_store
from .progress import StudyPanel
from .space import LaunchSpace, variants
from .study import StudyPlan, ranked, run_study

TOP = 3
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
    plan: StudyPlan
    command: str

    def problems(self) -> list[Problem]:
        """One per bucket, the smallest caches first."""
        return [
            Problem(layout=self.layout, batch=batch, context=context, page_size=self.page_size, dtype=self.dtype)
            for batch in sorted(self.batches)
            for context in sorted(self.contexts)
        ]

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
    buckets: list[Bucket] = []
    compiled: set[int] = set()
    for problem in task.problems():
        if problem.batch not in compiled:
            compiled.add(problem.batch)
            launches = variants()
            say(f"compiling {len(launches)} variants for batch {problem.batch}")
            refused = compile_ahead(problem, launches)
            say(f"{refused} of {len(launches)} do not fit on this GPU")
        store = make_store(problem, seed=task.plan.seed)
        bench = Bench(problem, seed=task.plan.seed, store=store)
        plan = task.study(problem)
        with StudyPanel(plan) as panel:
            study = run_study(plan, KernelObjective(bench), panel)
        if export:
            space = LaunchSpace(bench.default)
            candidates = {trial.number: space.build(trial.params) for trial in ranked(study)[:TOP]}
            default, rated = rate(bench.time, bench.default, candidates, HIT_RATES)
            buckets.append(bucket_of(problem.batch, problem.context, default, rated))
            say(_line(problem, default, rated))
        del bench, store
        torch.cuda.empty_cache()
    if not export:
        return None
    key = KernelKey(
        gpu=gpu_name(),
        num_qo_heads=task.layout.num_qo_heads,
        num_kv_heads=task.layout.num_kv_heads,
        head_dim=task.layout.head_dim,
        dtype=str(task.dtype).removeprefix("torch."),
        page_size=task.page_size,
    )
    study_name = task.study(task.problems()[0]).name.rpartition("/")[0]
    facts = provenance(gpu=key.gpu, study=study_name, trial=buckets[0].trial, basis="measured", command=task.command)
    return kernel_file(key, buckets, window=CONFIG.window, band=CONFIG.band, provenance=facts)


def estimate_s(task: KernelTask, *, workers: int = 16) -> float:
    """Rough time of the whole task on a GPU machine: compiling, trials, measuring again."""
    compile_s = len(set(task.batches)) * len(variants()) * _COMPILE_S / workers
    return compile_s + len(task.problems()) * (task.plan.trials * _TRIAL_S + _EXPORT_S)


# seconds for one variant of the four kernels, one trial, one bucket's export and planting: first estimates for an H100
_COMPILE_S, _TRIAL_S, _EXPORT_S = 4.0, 0.4, 15.0


def _line(problem: Problem, default: Rated, rated: Sequence[Rated]) -> str:
    best = rated[0] if rated else default
    ratio = best.ratio
    verdict = "better" if best.better else "the default stays"
    rates = ", ".join(f"hit {hit} {one.value:.1f} us" for hit, one in best.latency.items())
    return f"{problem}: {ratio.value:.3f} of the default [{ratio.low:.3f}, {ratio.high:.3f}] ({rates}): {verdict}"
