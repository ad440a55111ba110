"""Which request owns which ring or far set: decided on the host before every forward pass, so that no row can leak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from mac_kernels.slots import EMPTY

SCRATCH_ROW = 0
"""Row of SGLang's pool that padded graph entries name; it never owns anything."""
MOST_STEADY_PASSES = 64
"""After so many decode passes of the same requests all of them are looked at again."""
PASSES_BETWEEN_TRIES = 16
EXACT_NAMESPACE = "mac:exact"
"""Ends the radix key of a request that asked for exact attention, so that it never reads KV made by approximation."""


def in_exact_namespace(extra_key: str | None) -> bool:
    """Whether a radix key is one of exact requests alone, whoever set it."""
    return (extra_key or "").endswith(EXACT_NAMESPACE)


class BatchRow(NamedTuple):
    """One request of a forward pass, as the host sees it.

    ``slot`` its row in the request pool; ``tokens`` known so far, the whole prompt included; ``end`` position after the
    last token of this pass; ``prefix`` tokens whose keys and values exist before it; ``extend`` whether this pass is
    (part of) a prefill; ``exact`` why the request runs exactly (empty: it does not).
    """

    slot: int
    rid: str
    tokens: int
    end: int
    prefix: int
    extend: bool
    exact: str


class RowPool(Protocol):
    """What is used of SGLang's ``ReqToTokenPool``."""

    free_slots: list[int]
    req_generation: torch.Tensor


class StatePool(Protocol):
    """What requests own a part of: the rings of MAC, the far sets of TCA."""

    def acquire(self, slot: int) -> int:
        """Give the slot an empty part and return its number; -1 if none is free."""
        ...

    def release(self, slot: int) -> None:
        """Take the slot's part back."""
        ...

    def reset(self) -> None:
        """Take all parts back."""
        ...


class Restore(Protocol):
    """Fills the ring that a request was just given from a snapshot; returns the rows restored."""

    def __call__(self, rid: str, slot: int, prefix_len: int) -> int:
        """``prefix_len`` tokens of the request have keys and values before this pass."""
        ...


class RequestTable:
    """Gives parts of a pool (a ring, or far sets) to requests and takes them back; the device only sees a slot table.

    A part belongs to one (slot, generation, rid), the generation counting how often the request pool gave the row out.
    Whatever happened to the former request of a row (finished, aborted, retracted, preempted), its part is gone before
    the next pass that names the row.

    Parameters
    ----------
    parts : StatePool
        With one slot per row of the request pool, row 0 included.
    pool : RowPool
        The request pool.
    what : str
        Name of a part in reasons.
    worthwhile : int, tokens
        Context from which a request gets a part.
    wanted : callable
        Whether a pass of a request that owns a part is one that :meth:`begin` is to name.
    reasons : Counter
        Requests that run without a part are counted here, by reason, once each.
    latest : int, tokens, optional
        Context up to which a request that is decoding still gets one; default: any.
    """

    def __init__(
        self,
        parts: StatePool,
        pool: RowPool,
        *,
        what: str,
        worthwhile: int,
        wanted: Callable[[BatchRow], bool],
        reasons: Counter[str],
        latest: int | None = None,
    ) -> None:
        self._parts, self._pool, self._what, self._worthwhile = parts, pool, what, worthwhile
        self._wanted, self._reasons, self._latest = wanted, reasons, latest
        self._owner: dict[int, tuple[int, str]] = {}
        self._owning: set[int] = set()
        self._counted: set[int] = set()
        self._batch: list[int] = []  # rows of the last pass, if nothing can change in the next ones
        self._watched: list[int] = []
        self._seen: list[int] = []
        self._steady_passes = 0

    def steady(self, slots: list[int]) -> bool:
        """Whether this decode pass continues the last one in every respect, so that there is nothing to settle."""
        if self._steady_passes <= 0 or slots != self._batch or self._generations(self._watched) != self._seen:
            return False
        self._steady_passes -= 1
        return True

    def begin(self, rows: Sequence[BatchRow], restore: Restore | None) -> list[int]:
        """Settle who owns what in a forward pass; returns the places of those requests whose pass is ``wanted``."""
        self._take_back()
        named: list[int] = []
        slots = [row.slot for row in rows]
        for index, (row, generation) in enumerate(zip(rows, self._generations(slots), strict=True)):
            if row.slot == SCRATCH_ROW:
                continue
            if self._owner.get(row.slot) != (generation, row.rid):
                self._drop(row.slot)
                self._owner[row.slot] = (generation, row.rid)
            if row.slot not in self._owning:
                self._try(row, restore)
            if row.slot in self._owning and self._wanted(row):
                named.append(index)
        self._batch, self._watched = slots, [*slots, *self._owning]
        self._seen = self._generations(self._watched)
        self._steady_passes = min((self._passes_until_change(row) for row in rows), default=0)
        return named

    def clear(self) -> None:
        """Empty and release everything (after a change of the weights, a flush, or the graphs' warm-up)."""
        self._parts.reset()
        self._owner.clear()
        self._owning.clear()
        self._counted.clear()
        self._steady_passes = 0

    def _try(self, row: BatchRow, restore: Restore | None) -> None:
        if row.exact:
            self._note(row.slot, row.exact)
            return
        if max(row.tokens, row.end) < self._worthwhile:
            return  # not counted: it may still grow
        if self._too_late(row):
            self._note(row.slot, f"no {self._what} in time")
            return
        if self._parts.acquire(row.slot) == EMPTY:
            self._note(row.slot, f"no free {self._what}")
            return
        self._owning.add(row.slot)
        if restore is not None:
            restore(row.rid, row.slot, row.prefix)

    def _too_late(self, row: BatchRow) -> bool:
        return not row.extend and self._latest is not None and row.end > self._latest

    def _passes_until_change(self, row: BatchRow) -> int:
        if row.extend:
            return 0
        if row.slot in self._owning or row.exact or self._too_late(row):
            return MOST_STEADY_PASSES
        missing = self._worthwhile - row.end
        # a request that found nothing free asks again now and then
        return min(MOST_STEADY_PASSES, missing - 1) if missing > 0 else PASSES_BETWEEN_TRIES

    def _generations(self, slots: list[int]) -> list[int]:
        found: list[int] = self._pool.req_generation[slots].tolist()
        return found

    def _take_back(self) -> None:
        """Release what rows own that are free, or that were given out again, to whomever: not always to a request."""
        for slot in self._owning.intersection(self._pool.free_slots):
            self._drop(slot)
        slots = list(self._owning)
        for slot, generation in zip(slots, self._generations(slots), strict=True):
            if self._owner[slot][0] != generation:
                self._drop(slot)

    def _drop(self, slot: int) -> None:
        self._owner.pop(slot, None)
        self._counted.discard(slot)
        if slot in self._owning:
            self._owning.remove(slot)
            self._parts.release(slot)

    def _note(self, slot: int, reason: str) -> None:
        if slot not in self._counted:
            self._counted.add(slot)
            self._reasons[reason] += 1
