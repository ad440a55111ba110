"""``tune policy``: record once, replay trial after trial, confirm the best in a closed loop, write the file."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from optuna.trial import FrozenTrial

from mac_kernels import HeadLayout, MacConfig
from mac_kernels.tuned import Coverage, KernelKey, ModelKey, PolicyFile, find_kernel
from mac_transformers.model_key import model_key
from mac_transformers.weights import Weights, find_weights

from .calibrate import calibrate
from .confirm import Effort, confirm
from .export import covered, policy_file, provenance, remember
from .latency import LatencyModel, curves_in, curves_of, latency_model
from .policy import SLACK, PolicyObjective
from .progress import StudyPanel
from .quality import texts
from .quality.suites import Bench
from .replay import full_attention
from .study import StudyPlan, ranked, run_study
from .traces import Trace, trace_of_text

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTask:
    """What ``tune policy`` is asked for; ``layers`` and ``tokens`` of every trace, after ``prompt_tokens``."""

    model: str | None
    preset: str
    gpu: str
    timings: Path | None
    names: tuple[texts.PassageName, ...]
    prompt_tokens: int
    tokens: int
    layers: int
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    plan: StudyPlan
    effort: Effort
    top: int
    device: str
    command: str

    def study(self, key: ModelKey, latency: LatencyModel) -> StudyPlan:
        """The plan, named and with what its trials share."""
        plan = self.plan
        facts = {
            "model": key.short_name,
            "preset": self.preset,
            "traces": f"{','.join(self.names)}: {self.tokens} tokens after {self.prompt_tokens}, {self.layers} layers",
            "latency": f"{latency.basis} on {self.gpu}: {latency.buckets}",
            "sampler": plan.sampler,
        }
        name = plan.name or f"policy/{key.short_name}/{self.preset}/{self.gpu}/{plan.mode}"
        return dataclasses.replace(plan, name=name, facts=facts)


def tune_policy(task: PolicyTask, say: Say, *, export: bool = True) -> PolicyFile | None:
    """Run or resume the study; with ``export``, confirm its best and put the file together.

    Raises
    ------
    ExportRefused
        If no trial is faster than the preset and keeps its limits.
    """
    weights = find_weights(task.model)
    model, tokenizer = weights.load()
    model.to(task.device)  # type: ignore[arg-type]  # the library wraps it without types
    key = model_key(model.config, _name(weights, task.model))
    bench = Bench(model, tokenizer, _lines(say))
    traces = [_trace(bench, weights, task, name, say) for name in task.names]
    latency = _latency(task, traces[0].layout)
    say(f"latency is {latency.basis} for {task.gpu}, buckets (batch, context): {latency.buckets}")
    objective = PolicyObjective(
        MacConfig.preset(task.preset),
        [(trace, full_attention(trace)) for trace in traces],
        latency,
        constrained=task.plan.mode == "single",
    )
    plan = task.study(key, latency)
    with StudyPanel(plan) as panel:
        study = run_study(plan, objective, panel)
    if not export:
        return None
    trials = spread(ranked(study), study.trials[0].user_attrs["divergence"], task.top)
    configs = {str(trial.number): objective.build(trial.params) for trial in trials}
    say(f"confirming {len(configs)} trials and the preset in a closed loop")
    confirmed = confirm(bench, task.preset, configs, latency, task.effort)
    remember(study, confirmed)
    return policy_file(
        key,
        task.preset,
        configs,
        confirmed,
        coverage=Coverage(
            batch=covered([b for b, _ in latency.buckets], [1]).batch,
            context=covered([1], [task.effort.needle_tokens, task.effort.prompt_tokens]).context,
        ),
        provenance=lambda trial: provenance(
            gpu=task.gpu, study=plan.name, trial=trial, basis=latency.basis, command=task.command
        ),
    )


def spread(trials: Sequence[FrozenTrial], preset: float, count: int) -> list[FrozenTrial]:
    """The fastest trials at falling levels of divergence, relative to the preset's.

    The factor between divergence and KL differs between policies: the fastest alone might all fail in the closed loop.
    """
    chosen: list[FrozenTrial] = []
    for level in range(count):
        limit = preset * SLACK * _LEVEL**level
        found = [trial for trial in trials if trial.user_attrs["divergence"] <= limit and trial not in chosen]
        chosen += found[:1]
    return chosen


_LEVEL = 0.65
_LINE_EVERY_S = 15.0


def estimate_s(task: PolicyTask) -> float:
    """Rough time of the whole task on two quiet CPU cores, for a model of the default's size."""
    steps = len(task.names) * task.tokens
    loop = (task.top + 1) * len(task.names) * task.effort.tokens
    needles = (task.top + 2) * 2 * task.effort.needle_trials
    return (
        len(task.names) * _RECORD_S
        + task.plan.trials * steps * task.layers * _STEP_S
        + loop * _TOKEN_S
        + needles * _NEEDLE_S
    )


# seconds for recording and calibrating one text, one replayed step of a layer, one closed-loop token of a policy, one
# needle trial of a policy: measured with SmolLM2-135M on two cores
_RECORD_S, _STEP_S, _TOKEN_S, _NEEDLE_S = 50.0, 0.006, 0.35, 10.0


def _trace(bench: Bench, weights: Weights, task: PolicyTask, name: texts.PassageName, say: Say) -> Trace:
    config = MacConfig.preset(task.preset)
    return trace_of_text(
        bench,
        name,
        f"{weights.folder.name}/{weights.name} {task.preset}",
        prompt=task.prompt_tokens,
        steps=task.tokens,
        max_layers=task.layers,
        say=say,
        scale=lambda prompt: calibrate(bench.model, prompt, config=config),
    )


def _latency(task: PolicyTask, layout: HeadLayout) -> LatencyModel:
    """Curves of the table that was given, else of the tuned kernel file for this GPU and layout, else the estimate."""
    buckets = [(batch, context) for batch in task.batches for context in task.contexts]
    if task.timings is not None:
        return latency_model(layout, task.gpu, curves_in(task.timings, layout), buckets)
    for page_size in (1, 16):
        key = KernelKey(
            gpu=task.gpu,
            num_qo_heads=layout.num_qo_heads,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            dtype="bfloat16",
            page_size=page_size,
        )
        if found := find_kernel(key):
            return latency_model(layout, task.gpu, curves_of(found.file), buckets)
    return latency_model(layout, task.gpu, (), buckets)


def _name(weights: Weights, asked: str | None) -> str:
    """The name that serving will know the model by: what was asked for, the file, or the default's hub id."""
    if weights.gguf_file is not None:
        return weights.gguf_file
    return asked or weights.name


def _lines(say: Say) -> Callable[[str, int, int], None]:
    """Progress as a line now and then."""
    last = time.monotonic()

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > _LINE_EVERY_S:
            last = time.monotonic()
            say(f"{what}: {done}/{total}")

    return progress
