"""The budgets a head can have: how many blocks keep how many tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from .config import TcaConfig, far_blocks

NUM_SPARSE = 14
"""Candidates below dense, from the smallest budget up; the dense one has this number."""
_SIGMA = 1.0


@lru_cache
def keep_counts(block: int) -> tuple[int, ...]:
    """What a block may keep: 1, 2, 4, ... ``block`` tokens."""
    return tuple(1 << power for power in range(block.bit_length()))


@lru_cache
def block_shares(candidate: int, block: int) -> tuple[float, ...]:
    """Share of the blocks that keeps each of :func:`keep_counts`, summing to 1.

    A Gaussian over ``log2`` of the count, of deviation 1, whose centre rises evenly up to ``log2(block)`` at the last
    sparse candidate. The published method has 14 such candidates; their centres are not published, these are ours.
    """
    counts = keep_counts(block)
    if candidate == NUM_SPARSE:
        return (*(0.0 for _ in counts[:-1]), 1.0)
    centre = (candidate + 1) * math.log2(block) / NUM_SPARSE
    weight = [math.exp(-((math.log2(count) - centre) ** 2) / (2 * _SIGMA**2)) for count in counts]
    return tuple(one / sum(weight) for one in weight)


def mean_keep(candidate: int, block: int) -> float:
    """Mean number of tokens that a block keeps."""
    return sum(count * share for count, share in zip(keep_counts(block), block_shares(candidate, block), strict=True))


@lru_cache(maxsize=4096)
def block_counts(candidate: int, blocks: int, block: int) -> tuple[int, ...]:
    """How many of ``blocks`` blocks keep each of :func:`keep_counts`; rounded by largest remainder, ties to fewer."""
    exact = [blocks * share for share in block_shares(candidate, block)]
    counts = [math.floor(one) for one in exact]
    by_remainder = sorted(range(len(exact)), key=lambda place: (counts[place] - exact[place], place))
    for place in by_remainder[: blocks - sum(counts)]:
        counts[place] += 1
    return tuple(counts)


def keep_by_rank(candidate: int, blocks: int, block: int) -> list[int]:
    """Tokens that the best, second best, ... block keeps, falling."""
    pairs = zip(keep_counts(block), block_counts(candidate, blocks, block), strict=True)
    return [keep for keep, count in reversed(list(pairs)) for _ in range(count)]


def far_count(candidate: int, blocks: int, config: TcaConfig) -> int:
    """Tokens that a head keeps of ``blocks`` far blocks, sinks included; 0 for a dense head, which has no far part."""
    if candidate == NUM_SPARSE or blocks == 0:
        return 0
    pairs = zip(keep_counts(config.block), block_counts(candidate, blocks, config.block), strict=True)
    return config.sinks + sum(keep * count for keep, count in pairs)


def far_capacity(choice: Sequence[int], length: int, config: TcaConfig) -> int:
    """Room that the far tokens of a head can take, for heads of these candidates and requests of up to ``length``.

    It holds wherever the prompt ended and decoding began: rounding moves less than ``2 * block`` tokens.
    """
    blocks, block = far_blocks(max(length - 1, 0), config), config.block
    kept = (math.ceil(blocks * mean_keep(one, block)) + 2 * block for one in choice if one != NUM_SPARSE)
    return config.sinks + min(max(kept, default=0), blocks * block)


def decode_keep(candidate: int, block: int) -> int:
    """Tokens that a block keeps when it leaves the window during decoding; 0 marks a dense head."""
    return 0 if candidate == NUM_SPARSE else math.floor(mean_keep(candidate, block))
