"""Ring snapshots by content: whatever happens in between, a restored row is one that was saved for these tokens."""

from __future__ import annotations

import itertools
from collections import OrderedDict

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from stamped_rings import CAPACITY, SLOTS, make_service, read_rows, write_row

from mac_sglang.chain import TokenChain


class Request:
    def __init__(self, rid: str, space: str, tokens: list[int], first: int) -> None:
        self.rid, self.space, self.tokens, self.first = rid, space, tokens, first
        self.chain = TokenChain((space,), tokens)
        self.rows: dict[int, int] = {}


class Saved:
    def __init__(self, low: int, high: int, rows: dict[int, int], node: object) -> None:
        self.low, self.high, self.rows, self.node = low, high, rows, node


def common(one, other) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


class Store(RuleBasedStateMachine):
    """Requests come and go on a few slots; a list of token tuples with their rows is the whole specification."""

    window, block = 8, 1

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.service = make_service(self.window)
        self.running: dict[int, Request] = {}
        self.saved: OrderedDict[tuple[str, tuple[int, ...]], Saved] = OrderedDict()
        self.rids = itertools.count()
        self.counts = dict.fromkeys(("saves", "repeats", "hits", "misses", "rows_restored", "evictions", "drops"), 0)

    def candidates(self, space: str, tokens: list[int], prefix: int) -> dict[tuple[str, tuple[int, ...]], int]:
        """What may be restored, with the cut; only those that give most rows."""
        oldest = max(0, len(tokens) - self.window)
        gains: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = {}
        for key, saved in self.saved.items():
            cut = min(common(key[1], tokens), prefix)
            gain = cut - max(saved.low, oldest)
            if key[0] == space and gain > 0 and cut >= self.block:
                gains[key] = (gain, cut)
        most = max((gain for gain, _ in gains.values()), default=0)
        return {key: cut for key, (gain, cut) in gains.items() if gain == most}

    @rule(
        slot=st.integers(0, SLOTS - 1),
        source=st.integers(0, 2 * CAPACITY),
        cut=st.integers(0, 12),
        more=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        recompute=st.integers(1, 4),
        answer=st.lists(st.integers(0, 1), max_size=10),
        ahead=st.integers(0, 2),
        node=st.none() | st.integers(0, 2),
    )
    def serve(self, *, slot, source, cut, more, recompute, answer, ahead, node):
        """A request from its start to its prompt's end or its own, saved at both; most continue something stored."""
        space, tokens = "AB"[source % 2], more
        if source < len(self.saved):
            space, known = list(self.saved)[source]
            tokens = [*known[: max(0, len(known) - cut)], *more]
        self.start(slot, space, list(tokens), max(0, len(tokens) - recompute))
        self.compute(slot, [])
        self.save(slot, 0, node)
        if answer:
            self.compute(slot, answer)
            self.save(slot, min(ahead, len(answer)), node)

    def start(self, slot, space, tokens, prefix):
        """A request takes over a slot, whoever was there."""
        if slot in self.running:
            self.service.forget(self.running.pop(slot).rid)
            self.pool.release(slot)
        if self.pool.acquire(slot) < 0:
            return
        request = Request(f"r{next(self.rids)}", space, tokens, prefix)
        self.service.note(request.rid, request.chain)
        expected = self.candidates(space, tokens, prefix)
        got = self.service.restore(request.rid, slot, prefix)
        request.rows = read_rows(self.pool, slot)
        self.running[slot] = request
        useful = prefix > max(0, len(tokens) - self.window)
        if not expected:
            assert got == 0 and request.rows == {}
            self.counts["misses"] += useful
            return
        match = [
            key
            for key, cut in expected.items()
            if request.rows == {p: s for p, s in self.saved[key].rows.items() if p < cut}
            and got == cut - self.saved[key].low
        ]
        assert match, (request.rows, got, expected)
        # of equal ones the store is free to choose: follow it, it is the one that was used last
        key = next(key for key in match if self.service_used_last(key))
        self.saved.move_to_end(key)
        request.first = self.saved[key].low
        self.counts["hits"] += 1
        self.counts["rows_restored"] += got

    def service_used_last(self, key: tuple[str, tuple[int, ...]]) -> bool:
        digest = TokenChain((key[0],), key[1]).digests([len(key[1])])[len(key[1])]
        return next(reversed(self.service._entries)) == digest

    @rule(slot=st.integers(0, SLOTS - 1), more=st.lists(st.integers(0, 1), max_size=10))
    def compute(self, slot, more):
        """Prefill or decode: rows for the tokens from the request's first own position on."""
        request = self.running.get(slot)
        if request is None:
            return
        begin = max((*request.rows, request.first - 1)) + 1
        request.tokens.extend(more)
        for position in range(max(begin, len(request.tokens) - self.window), len(request.tokens)):
            stamp = write_row(self.pool, slot, position)
            request.rows = {p: s for p, s in request.rows.items() if p % self.window != position % self.window}
            request.rows[position] = stamp
        assert read_rows(self.pool, slot) == request.rows

    @rule(slot=st.integers(0, SLOTS - 1), behind=st.integers(0, 3), node=st.none() | st.integers(0, 2))
    def save(self, slot, behind, node):
        """At a boundary that later passes may have left behind by some tokens."""
        request = self.running.get(slot)
        if request is None:
            assert not self.service.save("nobody", slot, 4)
            return
        up_to = len(request.tokens) - behind
        request.chain.extend(request.tokens)
        low = max(request.first, up_to - self.window)
        key = (request.space, tuple(request.tokens[: max(0, up_to)]))
        possible = low < up_to and up_to >= self.block
        assert self.service.save(request.rid, slot, up_to, node=node) == possible
        if not possible:
            return
        known = self.saved.get(key)
        if known is not None and known.low <= low:
            self.saved.move_to_end(key)
            self.counts["repeats"] += 1
            return
        if known is not None:
            del self.saved[key]
        elif len(self.saved) == CAPACITY:
            self.saved.popitem(last=False)
            self.counts["evictions"] += 1
        rows = {p: s for p, s in request.rows.items() if p < up_to}
        self.saved[key] = Saved(low, up_to, rows, node)
        self.counts["saves"] += 1

    @rule(slot=st.integers(0, SLOTS - 1), other=st.integers(0, SLOTS - 1))
    def save_of_another_slot_is_refused(self, slot, other):
        if slot != other and slot in self.running:
            request = self.running[slot]
            request.chain.extend(request.tokens)
            assert not self.service.save(request.rid, other, len(request.tokens))

    @rule(slot=st.integers(0, SLOTS - 1))
    def abort(self, slot):
        if slot in self.running:
            request = self.running.pop(slot)
            self.service.forget(request.rid)
            assert not self.service.save(request.rid, slot, len(request.tokens))
            self.pool.release(slot)

    @rule(node=st.integers(0, 8))
    def drop(self, node):
        self.service.drop(node)
        gone = [key for key, saved in self.saved.items() if saved.node == node]
        for key in gone:
            del self.saved[key]
        self.counts["drops"] += len(gone)

    @rule(really=st.integers(0, 5))
    def clear(self, really):
        if really < 5:
            return
        self.service.clear()
        self.saved.clear()
        for slot, request in self.running.items():
            request.chain.extend(request.tokens)
            assert not self.service.save(request.rid, slot, len(request.tokens))
            self.service.forget(request.rid)
            self.pool.release(slot)
        self.running.clear()

    @invariant()
    def the_store_holds_what_the_model_holds(self):
        stats = self.service.stats
        assert {name: getattr(stats, name) for name in self.counts} == self.counts
        assert stats.entries == len(self.saved) <= CAPACITY
        assert stats.bytes * CAPACITY == len(self.saved) * stats.capacity_bytes
        assert [entry.high for entry in self.service._entries.values()] == [s.high for s in self.saved.values()]
        for slot, request in self.running.items():
            assert read_rows(self.pool, slot) == request.rows


class StoreOfLargerBlocks(Store):
    window, block = 24, 3


TestStore = Store.TestCase
TestStore.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestStoreOfLargerBlocks = StoreOfLargerBlocks.TestCase
TestStoreOfLargerBlocks.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
