"""Points 6 and 7 of the contract, and batches: replay, poison, order and company of requests, counters."""

from __future__ import annotations

import dataclasses

import torch

from ...paged import RowTable
from ...types import Reason
from ..tolerances import floor_error, max_error
from .base import Kit
from .cases import variant
from .session import Session


class Serving(Kit):
    """What a server does to a backend."""

    def test_mixed_batch(self, dtype: torch.dtype) -> None:
        """Short, without a ring, under an old generation, with an empty ring and ready: nobody affects another."""
        session = self.session(dtype=dtype, batch=5, capacity=60, rings_for=(0, 2, 3, 4))
        session.prefill_random(2, 30, 31, 32, 33)
        session.generations[2] += 1
        session.has_ring[2] = False
        session.acquire(3)
        for step in range(6):
            result = session.step(torch.stack([session.queries[r][session.lengths[r] - 1] for r in range(5)]))
            reasons = [Reason(int(x[0])) for x in result.trace.reason]
            third = Reason.NO_ROW if step == 0 else Reason.HIT
            assert reasons == [Reason.SHORT_CONTEXT, Reason.NO_RING, Reason.NO_RING, third, Reason.HIT]

    def test_order_and_company_do_not_matter(self, dtype: torch.dtype) -> None:
        """The same requests in another order, and each alone, decide alike and give the same outputs and rows."""
        together, turned, alone = (self._ready(dtype) for _ in range(3))
        order = (2, 0, 1)
        for _ in range(self.steps // 2):
            q_pre = torch.stack([together.next_query(r) for r in range(3)])
            reference = together.step(q_pre)
            by_order = turned.step(q_pre[list(order)], order)
            singles = [alone.step(q_pre[r : r + 1], (r,)) for r in range(3)]
            self._same(reference.out[list(order)], by_order.out, dtype)
            self._same(reference.out, torch.cat([s.out for s in singles]), dtype)
            for name in ("reason", "matched_pos", "start", "stop", "kv_read"):
                want = getattr(reference.trace, name)
                assert torch.equal(want[list(order)], getattr(by_order.trace, name)), name
                assert torch.equal(want, torch.cat([getattr(s.trace, name) for s in singles])), name
            for other in (turned, alone):  # their own random numbers were not used
                other.queries = [dict(history) for history in together.queries]

    def test_strided_inputs(self) -> None:
        """Keys and values as views of one tensor, queries as a view of a fused projection, out inside a canary."""
        session = self.session(batch=2, capacity=60, fused_cache=True)
        session.prefill_random(25, 30)
        for _ in range(self.steps // 2):
            session.step_random()
        heads, dim = session.layout.num_qo_heads, session.case.head_dim
        q = session.rotated(session.draw(2, heads, dim), [t - 1 for t in session.lengths])
        fused = torch.full((2, heads + 3, dim), torch.nan, dtype=q.dtype, device=self.device)
        fused[:, :heads] = q
        canary = torch.full((4, heads, dim), torch.nan, dtype=q.dtype, device=self.device)
        first = session.run(q, session.lengths).clone()
        out = session.run(fused[:, :heads], session.lengths, out=canary[1:3])
        assert out.data_ptr() == canary[1:3].data_ptr()
        assert bool(canary[[0, 3]].isnan().all()), "the rows around out were written"
        self._same(out, first, session.dtype)

    def test_empty_request(self) -> None:
        """A padded entry without pages gives zeros and changes nothing."""
        session = self.session(batch=2, capacity=60)
        session.prefill_random(25, 30)
        q = session.rotated(session.draw(2, session.layout.num_qo_heads, session.case.head_dim), [24, 29])
        full = session.run(q, [25, 30]).clone()
        before = session.rings.fields["pos"].clone()
        some = session.run(q, [0, 30])
        assert bool((some[0] == 0).all())
        self._same(some[1], full[1], session.dtype)
        assert torch.equal(session.rings.fields["pos"], before)

    def test_replay(self, dtype: torch.dtype) -> None:
        """One plan, one capture; then other lengths, pages, slots, queries and hits in the same tensors."""
        self._replay(self._ready(dtype), self._ready(dtype), dtype)

    def test_replay_of_rows(self) -> None:
        """The same over rows of token slots."""
        self._replay(self._ready_rows(), self._ready_rows(), self.dtypes[0])

    def _replay(self, expected: Session, replayed: Session, dtype: torch.dtype) -> None:
        heads, dim = expected.layout.num_qo_heads, expected.case.head_dim
        q = torch.zeros(3, heads, dim, dtype=dtype, device=self.device)
        out = torch.full_like(q, torch.nan)
        scratch = replayed.rings.fields["pos"].clone()
        slots = torch.full((3,), -1, dtype=torch.int64, device=self.device)  # warm-up and capture touch no ring
        generations = torch.full_like(slots, 7)
        for store in (expected, replayed):
            for request, length in enumerate(store.lengths):
                store.append(request, store.capacity - length)
                store.lengths[request] = length
        replayed.plan_static()
        replay = self.capture(lambda: replayed.run_static(q, slots, generations, out))
        assert torch.equal(replayed.rings.fields["pos"], scratch)
        outcomes = set()
        for step in range(self.steps):
            order = [(r + step) % 3 for r in range(3)]
            result = expected.step(torch.stack([expected.next_query(r) for r in order]), order)
            outcomes |= set(result.trace.reason.flatten().tolist())
            replayed.batches.refill_static([expected.lengths[r] for r in order], order)
            q.copy_(result.q)
            slots.copy_(torch.tensor([replayed.slots[r] for r in order]))
            out.fill_(torch.nan)
            replay()
            self._same(out, result.out, dtype)
        assert len(outcomes) > 1, "hits and misses must both occur"
        self._same_rows(replayed, expected)

    def test_rows_of_token_slots(self) -> None:
        """A batch planned over rows of token slots is judged like one over pages."""
        session = self._ready_rows()
        for _ in range(self.steps):
            session.step_random()
        session.check_rows(0)
        assert 0 < session.hits[0] < session.hits[1], f"hits and misses must both occur, got {session.hits}"

    def test_padding(self) -> None:
        """Entries that name the scratch row, with 1 or 0 tokens, and all the same slot, disturb nobody."""
        alone, padded = self._ready_rows(), self._ready_rows()
        for step in range(self.steps // 2):
            result = alone.step_random()
            for request in range(3):
                padded.append(request, 1)
            table = padded.store.row_table(padded.lengths)
            zero, length = torch.zeros_like(table.seq_lens), torch.full_like(table.seq_lens, step % 2)
            table = RowTable(
                table.req_to_token,
                torch.cat((table.req_pool_indices, zero.to(table.req_pool_indices.dtype))),
                torch.cat((table.seq_lens, length)),
            )
            padded.batches.plan(table)
            out = padded.run_planned(
                torch.cat((result.q, result.q)).to(self.device),
                torch.tensor([*padded.slots, 0, 0, 0], device=self.device),
                torch.tensor([*padded.generations, 0, 7, 7], device=self.device),
            )
            self._same(out[:3], result.out, alone.dtype)
            assert step % 2 or bool((out[3:] == 0).all())
        self._same_rows(padded, alone)

    def test_counters(self) -> None:
        """The pool's counters add up to the traces."""
        session = self.session(config=variant(influence=0.35), capacity=60)
        session.prefill_random(25, 9)
        session.rings.counters.drain()
        groups, read, total = dict.fromkeys(Reason, 0), 0, 0
        for _ in range(self.steps):
            trace = session.step_random().trace
            for reason in trace.reason.flatten().tolist():
                groups[Reason(reason)] += 1
            read += int(trace.kv_read.sum())
            total += int(trace.kv_len.sum()) * session.case.kv_heads
        counted = session.rings.counters.drain()
        assert {name: counts[session.layer] for name, counts in counted.groups.items()} == {
            reason.name: count for reason, count in groups.items()
        }
        assert counted.kv_tokens_read[session.layer] == read
        assert counted.kv_tokens_skipped[session.layer] == total - read
        assert sum(map(sum, session.rings.counters.drain().groups.values())) == 0

    def test_out_is_returned(self) -> None:
        """``run`` and ``run_return_trace`` give the same output, new or in place."""
        session = self.session(batch=1, capacity=40)
        session.prefill_random(30)
        q = session.rotated(session.draw(1, session.layout.num_qo_heads, session.case.head_dim), [29])
        new = session.run(q, [30])
        assert new.dtype == q.dtype and new.shape == q.shape
        given, traced = torch.full_like(q, torch.nan), torch.full_like(q, torch.nan)
        assert session.run(q, [30], out=given) is given
        assert session.run_return_trace(q, (0,), out=traced)[0] is traced
        assert torch.equal(given, new) and torch.equal(traced, new), "the same step must give the same output"
        assert torch.equal(session.run_return_trace(q, (0,))[0], new)

    def _ready(self, dtype: torch.dtype) -> Session:
        session = self.session(dtype=dtype, batch=3, capacity=60)
        session.prefill_random(21, 30, 14)
        return session

    def _ready_rows(self) -> Session:
        case = dataclasses.replace(self.cases[0], page_size=1)
        session = self.session(case, batch=3, capacity=60, rows=True)
        session.prefill_random(21, 30, 14, chunks=2)
        return session

    def _same_rows(self, a: Session, b: Session) -> None:
        assert torch.equal(a.rings.fields["pos"], b.rings.fields["pos"])
        tagged = b.rings.fields["pos"][b.layer] >= 0
        got, want = (session.rings.fields["out"][session.layer][tagged] for session in (a, b))
        self._same(got, want, b.dtype)

    @staticmethod
    def _same(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> None:
        allowed = 2 * floor_error("output", dtype, b)
        assert max_error(a, b) <= allowed, f"differ by {max_error(a, b):.3g}, allowed {allowed:.3g}"
