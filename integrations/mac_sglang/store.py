"""Ring snapshots by content: a byte-bounded store in host memory, kept beside SGLang's prefix cache."""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch

from mac_kernels import RingPool
from mac_kernels.errors import ConfigError

from .chain import TokenChain
from .staging import HostBuffer, HostBuffers, Staging

logger = logging.getLogger(__name__)

MAX_BLOCK = 64
Key = TypeVar("Key", bound=Hashable)


@dataclass(slots=True)
class SnapshotStats:
    """Counts since the start, and bytes now.

    ``saves`` snapshots copied out; ``repeats`` saves that found the same tokens already stored; ``hits`` and
    ``misses`` restores that found a snapshot or none (restores that no snapshot could help are in neither);
    ``rows_restored`` rows of all hits; ``evictions`` for room, ``drops`` because the prefix left the tree;
    ``failures`` restores that raised and left an empty ring; ``notice_failures`` what else raised between the tree and
    the store, such as a save; ``entries`` and ``bytes`` stored now; ``capacity_bytes`` most of them.
    """

    saves: int = 0
    repeats: int = 0
    hits: int = 0
    misses: int = 0
    rows_restored: int = 0
    evictions: int = 0
    drops: int = 0
    failures: int = 0
    notice_failures: int = 0
    entries: int = 0
    bytes: int = 0
    capacity_bytes: int = 0


@dataclass(slots=True, eq=False)
class _Entry:
    """A stored ring: rows at positions ``[low, high)`` of the tokens that end in ``tail``, which begins at ``base``."""

    key: bytes
    low: int
    high: int
    base: int
    tail: np.ndarray[tuple[int], np.dtype[np.int64]]
    boundaries: tuple[bytes, ...]
    node: Hashable | None
    buffer: HostBuffer

    def shared(self, chain: TokenChain, length: int) -> int:
        """How many tokens it has in common with a chain that is known to share the first ``length``."""
        theirs = chain.tokens(length, self.high)
        differs = np.flatnonzero(self.tail[length - self.base :][: len(theirs)] != theirs)
        return length + int(differs[0] if len(differs) else len(theirs))


@dataclass(slots=True)
class _Owner:
    """The request whose ring is in a slot, its first row, and the stream that writes the ring."""

    rid: str
    first: int
    stream: torch.cuda.Stream | None


class SnapshotService:
    """Saves rings under the tokens they were computed from and gives them to requests that begin with these tokens.

    A row depends on tokens and positions alone, so a snapshot stays right however the tree moves or evicts KV. Rows
    beyond the tokens that two requests share are cut. Whatever is missing or doubtful leaves a ring as it is, empty:
    the request is then computed exactly until it has rows of its own.

    Everything is decided from tokens and calls, never from the progress of the device, so tensor-parallel ranks, each
    with a store of its own, decide alike. All calls come from the scheduler's thread. Slots alone say whose a ring is:
    the pool's generations stay 0.

    Parameters
    ----------
    rings : RingPool
        Whose rings are saved.
    budget_bytes : int
        Host memory for snapshots, at least one ring; taken at once, pinned with a GPU.
    min_tokens : int, default 0
        Prefixes shorter than this are not saved: they would never be used.
    min_rows : int, default 1
        Nor are rings that can have fewer rows: they would take the place of full ones.

    Raises
    ------
    ConfigError
        If the budget holds no snapshot.

    Notes
    -----
    A snapshot is indexed at every block of ``W / 8`` tokens (at most 64) that ends inside it, so that a request which
    branches off there finds it as well, and keeps the tokens of that range to tell the exact branch point.
    """

    def __init__(self, rings: RingPool, budget_bytes: int, *, min_tokens: int = 0, min_rows: int = 1) -> None:
        self._rings, self._min_tokens, self._min_rows = rings, max(1, min_tokens), min_rows
        self._window, self._block = rings.window, max(1, min(MAX_BLOCK, rings.window // 8))
        self._staging = Staging(rings)
        capacity = budget_bytes // self._staging.nbytes
        if capacity < 1:
            raise ConfigError(
                f"a snapshot budget of {budget_bytes} bytes holds no ring: one takes {self._staging.nbytes} bytes; "
                "raise snapshot_memory_gb, or set it to 0"
            )
        self._buffers = HostBuffers(self._staging.nbytes, capacity, rings.device)
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._index: dict[bytes, dict[bytes, _Entry]] = {}
        self._at_node: dict[Hashable, dict[bytes, _Entry]] = {}
        self._owners: dict[int, _Owner] = {}
        self._chains: WeakValueDictionary[str, TokenChain] = WeakValueDictionary()
        self._ambiguous: set[str] = set()
        self._stats = SnapshotStats()

    @property
    def stats(self) -> SnapshotStats:
        """A copy of the counts."""
        used, each = len(self._entries), self._staging.nbytes
        return dataclasses.replace(
            self._stats, entries=used, bytes=used * each, capacity_bytes=self._buffers.capacity * each
        )

    def note(self, rid: str, chain: TokenChain) -> None:
        """Remember which tokens a request has, for as long as somebody else keeps the chain."""
        if self._chains.setdefault(rid, chain) is not chain:
            self._ambiguous.add(rid)

    def forget(self, rid: str) -> None:
        """The request gave its row back: what was noted of it holds no longer."""
        self._chains.pop(rid, None)
        self._ambiguous.discard(rid)

    def save(self, rid: str, slot: int, up_to: int, *, node: Hashable | None = None) -> bool:
        """Store the slot's rows before ``up_to`` under the request's first ``up_to`` tokens.

        Enqueues the copy on the stream that :meth:`restore` was called on for this slot. Call it when the passes that
        compute these rows have been launched; later ones may have been, their rows are cut. Returns whether the
        tokens have a snapshot now.

        Parameters
        ----------
        rid : str
            The request; its chain must have been noted and hold ``up_to`` tokens.
        slot : int
            Its ring's slot. Refused if the slot was last registered for another request.
        up_to : int
            Tokens whose rows are complete.
        node : hashable, optional
            Where the prefix ends in the tree, for :meth:`drop`.
        """
        chain, owner = self._chain_of(rid), self._owners.get(slot)
        if chain is None or owner is None or owner.rid != rid or not self._rings.holds(slot):
            return False
        low = max(owner.first, up_to - self._window)
        if up_to - low < self._min_rows or up_to < self._min_tokens or up_to > len(chain):
            return False
        boundaries = self._boundaries(up_to)
        if not boundaries:
            return False
        digests = chain.digests(sorted({*boundaries, up_to}))
        key = digests[up_to]
        known = self._entries.get(key)
        if known is not None and known.low <= low:
            self._entries.move_to_end(key)
            self._stats.repeats += 1
            return True
        if known is not None:
            self._remove(known)
        buffer = self._take_buffer()
        if buffer is None:
            return False
        try:
            self._staging.save(slot, buffer.memory, up_to, owner.stream)
        except BaseException:
            self._buffers.give(buffer)
            raise
        ends = tuple(digests[length] for length in boundaries)
        tail = chain.tokens(boundaries.start, up_to)
        self._add(_Entry(key, low, up_to, boundaries.start, tail, ends, node, buffer))
        self._stats.saves += 1
        return True

    def restore(self, rid: str, slot: int, prefix_len: int) -> int:
        """Register whose ring is in the slot, and fill it from the snapshot that gives it most rows.

        Call it whenever a slot is given an empty ring, on the stream of the pass that is about to run. Returns the
        rows that were restored, 0 for an empty ring.

        Parameters
        ----------
        rid : str
            The request.
        slot : int
            The slot that was given a ring.
        prefix_len : int
            Tokens whose KV exists before the pass; no row at or beyond it is restored.
        """
        stream = self._staging.current_stream()
        self._owners[slot] = owner = _Owner(rid, prefix_len, stream)
        chain = self._chain_of(rid)
        if chain is None or not self._rings.holds(slot):
            return 0
        try:
            return self._fill(slot, owner, chain, prefix_len)
        except Exception:
            self._stats.failures += 1
            if self._stats.failures == 1:
                logger.exception("a ring could not be restored; it starts empty, later failures are counted")
            self._rings.acquire(slot)
            return 0

    def drop(self, node: Hashable) -> None:
        """The tree evicted a node: free what ends there, since nothing can continue from it."""
        for entry in list(self._at_node.get(node, {}).values()):
            self._remove(entry)
            self._stats.drops += 1

    def clear(self) -> None:
        """Forget every snapshot, and that slots were registered; copies in flight may end."""
        for entry in list(self._entries.values()):
            self._remove(entry)
        self._owners.clear()

    def notice_failed(self) -> int:
        """Count something that raised on its way from the tree to here; returns how often that was."""
        self._stats.notice_failures += 1
        return self._stats.notice_failures

    def _chain_of(self, rid: str) -> TokenChain | None:
        return None if rid in self._ambiguous else self._chains.get(rid)

    def _fill(self, slot: int, owner: _Owner, chain: TokenChain, prefix_len: int) -> int:
        # older rows would be overwritten by those of the prompt's end
        oldest = max(0, max(prefix_len, len(chain)) - self._window)
        limit = min(prefix_len, len(chain))
        if limit <= oldest:
            return 0
        found = self._find(chain, limit, oldest)
        if found is None:
            self._stats.misses += 1
            return 0
        entry, cut = found
        self._staging.restore(slot, entry.buffer.memory, cut, owner.stream)
        self._entries.move_to_end(entry.key)
        owner.first = entry.low
        self._stats.hits += 1
        self._stats.rows_restored += cut - entry.low
        return cut - entry.low

    def _boundaries(self, end: int) -> range:
        """Block boundaries within the last ``W`` tokens before ``end``, and the one before these."""
        first = max(1, (end - self._window) // self._block)
        return range(first * self._block, end + 1, self._block)

    def _find(self, chain: TokenChain, limit: int, oldest: int) -> tuple[_Entry, int] | None:
        best, most = None, 0
        seen: set[bytes] = set()
        for length, digest in reversed(chain.digests(self._boundaries(limit)).items()):
            for key, entry in reversed(self._index.get(digest, {}).items()):
                if key in seen:
                    continue
                seen.add(key)
                cut = min(entry.shared(chain, length), limit)
                rows = cut - max(entry.low, oldest)
                if rows > most:
                    best, most = (entry, cut), rows
        return best

    def _take_buffer(self) -> HostBuffer | None:
        buffer = self._buffers.take()
        if buffer is None and self._entries:
            self._remove(next(iter(self._entries.values())))
            self._stats.evictions += 1
            buffer = self._buffers.take()
        return buffer

    def _add(self, entry: _Entry) -> None:
        self._entries[entry.key] = entry
        for digest in entry.boundaries:
            self._index.setdefault(digest, {})[entry.key] = entry
        if entry.node is not None:
            self._at_node.setdefault(entry.node, {})[entry.key] = entry

    def _remove(self, entry: _Entry) -> None:
        del self._entries[entry.key]
        for digest in entry.boundaries:
            _discard(self._index, digest, entry.key)
        if entry.node is not None:
            _discard(self._at_node, entry.node, entry.key)
        self._buffers.give(entry.buffer)


def _discard(table: dict[Key, dict[bytes, _Entry]], at: Key, key: bytes) -> None:
    del table[at][key]
    if not table[at]:
        del table[at]
