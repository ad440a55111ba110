"""Bootstrap intervals for statistics of a sequence whose neighbours depend on each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Statistic = Callable[[NDArray[np.float64]], float]


def interval(
    values: NDArray[np.float64],
    statistic: Statistic,
    *,
    block: int = 1,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of ``statistic`` under a moving-block bootstrap.

    Parameters
    ----------
    values : numpy.ndarray, [N] or [N, K]
        Observations in order; a row is resampled as a whole.
    statistic : callable
        Maps resampled values of the same shape to a number.
    block : int, default 1
        Neighbours drawn together, so that their dependence is kept, at most a tenth of the sequence; 1 for independent
        trials.
    level : float, in (0, 1), default 0.95
    resamples : int, default 1000
    seed : int, default 0

    Returns
    -------
    low, high : float
        NaN for an empty sequence.

    References
    ----------
    H. R. Kuensch, The jackknife and the bootstrap for general stationary observations, Ann. Statist. 17 (1989).
    """
    count = len(values)
    if count == 0:
        return float("nan"), float("nan")
    block = min(block, max(1, count // 10))
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, count - block + 1, size=(resamples, -(-count // block)))
    index = (starts[:, :, None] + np.arange(block)).reshape(resamples, -1)[:, :count]
    estimates = [statistic(values[row]) for row in index]
    tail = (1 - level) / 2
    low, high = np.quantile(estimates, [tail, 1 - tail])
    return float(low), float(high)
