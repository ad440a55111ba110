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


def reuse(result: Comparison, policy: str, texts: slice | list[int]) -> Reuse:
    """Hit rates and KV share of a policy over some texts."""
    index = result.index(policy)
    means = (values[:, :, index, texts].mean().item() for values in (result.group_hit, result.head_hit, result.kv_read))
    return Reuse(*means)


def repetition(tokens: Sequence[int], *, length: int = 4) -> float:
    """Share of the n-grams of ``length`` that occurred before, in [0, 1]; NaN for fewer tokens."""
    grams = [tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else float("nan")
