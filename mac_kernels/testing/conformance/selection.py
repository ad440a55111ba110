"""Misses that read selected tokens: the index of a session, and an account of what it lets a group read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...config import MacConfig
from ...tca.candidates import NUM_SPARSE
from ...tca.index import MissIndex
from .cases import Case

if TYPE_CHECKING:
    from .session import Session, StepResult

_CANDIDATES = (3, 7, NUM_SPARSE, 0)  # of the kv heads in turn: two budgets, a dense head, the smallest budget


def index_of(
    config: MacConfig, case: Case, *, num_rings: int, max_context: int, device: torch.device | str
) -> MissIndex | None:
    """The index of a pool of two layers, if the config has misses read selected tokens."""
    if config.tca is None:
        return None
    choice = [_CANDIDATES[head % len(_CANDIDATES)] for head in range(case.kv_heads)]
    return MissIndex([choice] * 2, config=config.tca, num_rings=num_rings, max_context=max_context, device=device)


def kept_positions(session: Session, result: StepResult, i: int) -> torch.Tensor:
    """Positions that each kv group of entry ``i`` of a step may read, [Hkv, t + 1] bool, as the trace has it."""
    t, request, index = result.positions[i], result.requests[i], session.rings.index
    kept = torch.ones(session.case.kv_heads, t + 1, dtype=torch.bool)
    for head in result.trace.sparse[i].nonzero().flatten().tolist():
        assert index is not None and session.has_ring[request], f"head {head} at {t} has nothing to select from"
        at = session.layer, int(session.rings.slot_table[session.slots[request]]), head
        listed = index.ids[at][: int(index.count[at])].tolist()
        window = int(index.far_end[at])
        assert listed == sorted(set(listed)) and listed[-1] < window, f"{listed} overlap the window from {window}"
        assert window <= t + 1 - session.config.band, f"the window from {window} does not reach the band at {t}"
        kept[head, :window] = False
        kept[head, listed] = True
    return kept
