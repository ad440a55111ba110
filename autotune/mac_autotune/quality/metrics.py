"""Numbers that sum up a comparison, each with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mac_transformers.compare import Comparison

from .bootstrap import Statistic, interval

BLOCK = 32
"""Neighbouring tokens that the bootstrap keeps together."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its 95 % bootstrap interval over ``n`` observations."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Reuse:
    """Shares of kv groups and heads that were reused and of the KV cache that was read, averaged over all else."""

    group_hit: float
    head_hit: float
    kv_read: float


def estimate(values: NDArray[np.float64], statistic: Statistic, *, block: int) -> Estimate:
    """The statistic of ``values`` [N] or [N, K] and its interval."""
    value = statistic(values) if len(values) else float("nan")
    return Estimate(value, *interval(values, statistic, block=block), n=len(values))


def divergence(result: Comparison, policy: str, texts: slice) -> dict[str, Estimate]:
    """KL mean, median and p99 in nats, perplexity ratio and top-1 agreement of a policy over some texts."""
    index = result.index(policy)

    def column(values: torch.Tensor) -> NDArray[np.float64]:
        return values[:, index, texts].T.flatten().double().numpy()  # text after text, in order

    kl, top1 = column(result.kl), column(result.top1)
    excess = column(result.nll - result.nll[:, :1])
    known = excess[~np.isnan(excess)]
    found = {
        "kl": estimate(kl, lambda x: float(x.mean()), block=BLOCK),
        "kl_median": estimate(kl, lambda x: float(np.median(x)), block=BLOCK),
        "kl_p99": estimate(kl, lambda x: float(np.quantile(x, 0.99)), block=BLOCK),
        "top1": estimate(top1, lambda x: float(x.mean()), block=BLOCK),
    }
    if len(known):
        found["ppl_ratio"] = estimate(known, lambda x: float(np.exp(x.mean())), block=BLOCK)
    return found


def equal_read_ratio(result: Comparison, policy: str, curve: Sequence[str], texts: slice) -> Estimate | None:
    """Mean KL of a policy over that of other policies where they read as much.

    The others' KL between the points of their curve is interpolated, its logarithm linear in the share of the KV cache
    read. ``None`` if the policy reads more or less than all of them.
    """

    def columns(name: str) -> list[NDArray[np.float64]]:
        index = result.index(name)
        both = result.kl[:, index, texts], result.kv_read[:, :, index, texts].mean(1)
        return [values.T.flatten().double().numpy() for values in both]

    def ratio(values: NDArray[np.float64]) -> float:
        kl, read = values.mean(0).reshape(-1, 2).T
        order = np.argsort(read[1:])
        at, level = read[1:][order], np.log(np.maximum(kl[1:][order], 1e-12))
        left = int(np.clip(np.searchsorted(at, read[0]) - 1, 0, len(at) - 2))
        # resampled, the policy may read a little less or more than all others: then the nearest of them is taken
        step = np.clip((read[0] - at[left]) / max(at[left + 1] - at[left], 1e-12), 0, 1)
        return float(kl[0] / np.exp(level[left] + step * (level[left + 1] - level[left])))

    values = np.stack([column for name in (policy, *curve) for column in columns(name)], axis=1)
    read = values.mean(0)[1::2]
    if len(curve) < 2 or not read[1:].min() <= read[0] <= read[1:].max():
        return None
    return estimate(values, ratio, block=BLOCK)


def reuse(result: Comparison, policy: str, texts: slice | list[int]) -> Reuse:
    """Hit rates and KV share of a policy over some texts."""
    index = result.index(policy)
    means = (values[:, :, index, texts].mean().item() for values in (result.group_hit, result.head_hit, result.kv_read))
    return Reuse(*means)


def repetition(tokens: Sequence[int], *, length: int = 4) -> float:
    """Share of the n-grams of ``length`` that occurred before, in [0, 1]; NaN for fewer tokens."""
    grams = [tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else float("nan")
