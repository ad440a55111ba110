"""Confirm policies in a closed loop, on texts that were not tuned on, side by side with their preset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mac_kernels import MacConfig
from mac_transformers.compare import Comparison, compare
from mac_transformers.policies import Mac

from .export import PRESET
from .latency import LatencyModel, Reads
from .limits import violations
from .quality import texts
from .quality.metrics import BLOCK, Estimate, divergence, estimate
from .quality.suites import Bench, needle_suite

NEEDLE_TASKS = ("single", "multi_key")


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is decoded: ``tokens`` per text after ``prompt_tokens``, over ``passages``; needle trials per task."""

    names: tuple[texts.PassageName, ...] = ("docs", "code")
    prompt_tokens: int = 3600
    tokens: int = 512
    passages: int = 2
    needle_tokens: int = 2048
    needle_trials: int = 10


@dataclass(frozen=True, slots=True)
class Confirmed:
    """One policy: its metrics, its latency relative to the preset's (interval over steps), and the limits it breaks."""

    metrics: Mapping[str, Estimate]
    ratio: Estimate
    broken: Mapping[str, str]


def confirm(
    bench: Bench,
    preset: str,
    configs: Mapping[str, MacConfig],
    latency: LatencyModel,
    effort: Effort,
) -> dict[str, Confirmed]:
    """Decode under the preset and every config, and judge them; the preset itself is among the results.

    Worst text counts: every metric is that of the text where it is worst.
    """
    configs = {PRESET: MacConfig.preset(preset), **configs}
    rules = {name: Mac(config) for name, config in configs.items()}
    steps = effort.tokens // effort.passages
    batch = torch.cat([_passages(bench, name, effort, steps) for name in effort.names])
    prompt = effort.prompt_tokens
    result = compare(
        bench.model,
        batch[:, :prompt],
        batch[:, prompt:],
        rules,
        progress=bench.step(f"confirming {len(configs)} policies"),
    )
    slices = [slice(i * effort.passages, (i + 1) * effort.passages) for i in range(len(effort.names))]
    found = {name: _worst([divergence(result, name, rows) for rows in slices]) for name in configs}
    if effort.needle_trials:
        for cells in needle_suite(
            bench,
            rules,
            tasks=NEEDLE_TASKS,
            modes=("asked",),
            prompt_tokens=effort.needle_tokens,
            trials=effort.needle_trials,
            rows=16,
        ):
            for cell in cells:
                if cell.config in found:
                    recall = cell.metrics["recall"]
                    before = found[cell.config].get("recall", recall)
                    found[cell.config]["recall"] = min(before, recall, key=lambda x: x.value)
    return {
        name: Confirmed(
            found[name], _ratio(result, name, configs, latency, prompt), violations(preset, found[name], found[PRESET])
        )
        for name in configs
    }


def _passages(bench: Bench, name: texts.PassageName, effort: Effort, steps: int) -> torch.Tensor:
    """Passages one after the other, from the beginning of a text on; traces are of its end."""
    length = effort.prompt_tokens + steps + 1
    seeds = range(1, effort.passages + 1)
    return torch.cat([texts.passages(bench.tokenizer, name, length=length, seed=seed) for seed in seeds])


_HIGHER_IS_BETTER = ("top1",)


def _worst(parts: Sequence[Mapping[str, Estimate]]) -> dict[str, Estimate]:
    return {
        name: (min if name in _HIGHER_IS_BETTER else max)((part[name] for part in parts), key=lambda x: x.value)
        for name in parts[0]
    }


def _ratio(
    result: Comparison, name: str, configs: Mapping[str, MacConfig], latency: LatencyModel, prompt: int
) -> Estimate:
    """Latency relative to the preset's, with a block bootstrap over the decoded steps."""
    both = [_per_step(result, policy, prompt) for policy in (name, PRESET)]

    def ratio(rows: np.ndarray) -> float:
        reads = [_reads(rows[:, 2 * which : 2 * which + 2]) for which in range(2)]
        return latency.ratio(configs[name], reads[0], configs[PRESET], reads[1])

    return estimate(np.concatenate(both, axis=1), ratio, block=BLOCK)


def _per_step(result: Comparison, policy: str, prompt: int) -> np.ndarray:
    """Group hit rate and KV tokens that hits read per kv group, [steps, 2], means over layers and texts."""
    index = result.index(policy)
    hit = result.group_hit[:, :, index].mean((1, 2)).double().numpy()
    share = result.kv_read[:, :, index].mean((1, 2)).double().numpy()
    context = prompt + 1 + np.arange(len(hit))
    return np.stack([hit, (share - (1 - hit)) * context], axis=1)


def _reads(rows: np.ndarray) -> Reads:
    hit, tokens = rows.mean(0)
    return Reads(float(hit), float(tokens / hit) if hit > 0 else 0.0)
