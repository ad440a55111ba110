"""Which request owns which ring: decided on the host before every forward pass, so that no row can leak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from mac_kernels.ring import EMPTY, RingPool

SCRATCH_ROW = 0
"""Row of SGLang's pool that padded graph entries name; it never owns a ring."""
MOST_STEADY_PASSES = 64
"""After so many decode passes of the same requests all of them are looked at again."""
PASSES_BETWEEN_TRIES = 16
WINDOW_PER_FEWEST = 32
"""A pass has to bring at least this part of a window of a request's queries for them to be stored."""
EXACT_NAMESPACE = "mac:exact"
"""Ends the radix key of a request that asked for exact attention, so that it never reads KV made under MAC."""


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


class Restore(Protocol):
    """Fills the ring that a request was just given from a snapshot; returns the rows restored."""

    def __call__(self, rid: str, slot: int, prefix_len: int) -> int:
        """``prefix_len`` tokens of the request have keys and values before this pass."""
        ...


class RequestRings:
    """Gives rings to requests and takes them back; the device only ever sees a slot table.

    A ring belongs to one (slot, generation, rid), the generation counting how often the pool gave the row out. Whatever
    happened to the former request of a row (finished, aborted, retracted, preempted), its ring is gone before the next
    pass that names the row.

    Parameters
    ----------
    rings : RingPool
        With one slot per row of the request pool, row 0 included.
    pool : RowPool
        The request pool.
    worthwhile : int, tokens
        Context from which a request gets a ring.
    reasons : Counter
        Requests that run without a ring are counted here, by reason, once each.
    """

    def __init__(self, rings: RingPool, pool: RowPool, *, worthwhile: int, reasons: Counter[str]) -> None:
        self._rings, self._pool, self._worthwhile, self._reasons = rings, pool, worthwhile, reasons
        self._fewest = max(1, rings.window // WINDOW_PER_FEWEST)
        self._owner: dict[int, tuple[int, str]] = {}
        self._with_ring: set[int] = set()
        self._counted: set[int] = set()
        self._free_rows_swept = -1
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
        """Settle the rings of a forward pass; returns which of its requests' last queries are to be stored (prefill).

        Those with a ring whose chunk comes within a window of the prompt's end: later rows would replace all others.
        And not for a handful of queries, as at the end of a prompt that is cached already: they would attend to the
        whole context with hardly any parallelism, for rows that a full ring hardly misses.
        """
        self._drop_reused()
        fill: list[int] = []
        slots = [row.slot for row in rows]
        for index, (row, generation) in enumerate(zip(rows, self._generations(slots), strict=True)):
            if row.slot == SCRATCH_ROW:
                continue
            if self._owner.get(row.slot) != (generation, row.rid):
                self._drop(row.slot)
                self._owner[row.slot] = (generation, row.rid)
            if row.slot not in self._with_ring:
                self._try(row, restore)
            near_end = row.extend and row.end > row.tokens - self._rings.window
            if near_end and row.slot in self._with_ring and row.end - row.prefix >= self._fewest:
                fill.append(index)
        self._batch, self._watched = slots, [*slots, *self._with_ring]
        self._seen = self._generations(self._watched)
        self._steady_passes = min((self._passes_until_change(row) for row in rows), default=0)
        return fill

    def clear(self) -> None:
        """Empty and release every ring (after a change of the weights, a flush, or the graphs' warm-up)."""
        self._rings.reset()
        self._owner.clear()
        self._with_ring.clear()
        self._counted.clear()
        self._free_rows_swept = -1
        self._steady_passes = 0

    def _try(self, row: BatchRow, restore: Restore | None) -> None:
        if row.exact:
            self._note(row.slot, row.exact)
            return
        if max(row.tokens, row.end) < self._worthwhile:
            return  # not counted: it may still grow
        if not self._rings.free_rings:
            self._take_back()
        if self._rings.acquire(row.slot) == EMPTY:
            self._note(row.slot, "no free ring")
            return
        self._with_ring.add(row.slot)
        if restore is not None:
            restore(row.rid, row.slot, row.prefix)

    def _passes_until_change(self, row: BatchRow) -> int:
        if row.extend:
            return 0
        if row.slot in self._with_ring or row.exact:
            return MOST_STEADY_PASSES
        missing = self._worthwhile - row.end
        # a request that found no free ring asks again now and then
        return min(MOST_STEADY_PASSES, missing - 1) if missing > 0 else PASSES_BETWEEN_TRIES

    def _generations(self, slots: list[int]) -> list[int]:
        found: list[int] = self._pool.req_generation[slots].tolist()
        return found

    def _drop_reused(self) -> None:
        """Release the rings of rows that were given out again, to whomever: not every row belongs to a request."""
        slots = list(self._with_ring)
        for slot, generation in zip(slots, self._generations(slots), strict=True):
            if self._owner[slot][0] != generation:
                self._drop(slot)

    def _take_back(self) -> None:
        """Release the rings of rows that run no longer; they keep them until then, in case nobody needs them."""
        free = self._pool.free_slots
        if len(free) == self._free_rows_swept:
            return
        self._free_rows_swept = len(free)
        for slot in self._with_ring.intersection(free):
            self._drop(slot)

    def _drop(self, slot: int) -> None:
        self._owner.pop(slot, None)
        self._counted.discard(slot)
        if slot in self._with_ring:
            self._with_ring.remove(slot)
            self._rings.release(slot)

    def _note(self, slot: int, reason: str) -> None:
        if slot not in self._counted:
            self._counted.add(slot)
            self._reasons[reason] += 1
