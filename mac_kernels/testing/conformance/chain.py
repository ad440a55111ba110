"""The invariant on a recorded chain: chosen rows, replayed from the decisions of their ancestors alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from .oracle import ChainOracle


@dataclass(frozen=True, slots=True)
class Decision:
    """What one decode step of one request and layer decided: ``reuse`` [Hq] bool and ``matched_pos`` [Hq]."""

    reuse: torch.Tensor
    matched_pos: torch.Tensor


def ancestors(wanted: Iterable[int], decisions: Mapping[int, Decision]) -> list[int]:
    """The wanted positions and all that their rows descend from, in order."""
    found: set[int] = set()
    open_positions = set(wanted)
    while open_positions:
        t = open_positions.pop()
        found.add(t)
        if t in decisions:
            matched = decisions[t].matched_pos[decisions[t].reuse].tolist()
            open_positions |= set(matched) - found
    return sorted(found)


def replay(
    oracle: ChainOracle,
    wanted: Iterable[int],
    *,
    query: Callable[[int], torch.Tensor],
    k: torch.Tensor,
    v: torch.Tensor,
    decisions: Mapping[int, Decision],
) -> int:
    """Compose the rows of chosen positions into ``oracle.rows``; returns how many rows that took.

    Parameters
    ----------
    oracle : ChainOracle
        Fresh, in fp64 or plain.
    wanted : iterable of int
        Positions.
    query : callable
        Position -> the rotated query [Hq, D] that the backend saw.
    k, v : torch.Tensor, [L, Hkv, D]
        Dense keys (rotated) and values.
    decisions : mapping of int to Decision
        Of every decode step; any other position is a prefill row.

    Raises
    ------
    AssertionError
        If a decision is impossible: outside the window, or onto an empty row.
    """
    needed = ancestors(wanted, decisions)
    for t in needed:
        if t in decisions:
            choice = decisions[t]
            oracle.step(t, query(t), k, v, reuse=choice.reuse, matched_pos=choice.matched_pos)
        else:
            oracle.fill(t, query(t), k[: t + 1], v[: t + 1])
    return len(needed)
