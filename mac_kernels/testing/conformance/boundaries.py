"""Point 3 of the contract: the edges of window, band and sinks, and who owns a ring."""

from __future__ import annotations

import torch

from ...rope import Rope
from ...types import Reason
from .base import Kit
from .cases import variant
from .session import Session, StepResult


class Boundaries(Kit):
    """Each test plants one row that would match if a boundary were off by one."""

    def test_from_the_first_token(self, dtype: torch.dtype) -> None:
        """Where m < F, m < S, m = S, p + 1 - S <= F, m < W, and the first wraps, under the earliest min_context."""
        for changes in ({}, {"sinks": 0}, {"band": 1, "sinks": 0}, {"band": 1, "sinks": 7}, {"window": 2}):
            config = variant(**changes)
            config = variant(**changes, min_context=config.band + config.sinks + 1)
            steps = self.rule_steps
            session = self.session(config=config, dtype=dtype, capacity=steps)
            for _ in range(steps):
                session.step_random()

    def test_previous_position_matches(self) -> None:
        """Position m - 1 is eligible."""
        self._planted_lag(1)

    def test_oldest_row_matches(self) -> None:
        """Position m - W + 1 is eligible."""
        self._planted_lag(self.rules_window() - 1)

    def test_row_about_to_be_overwritten_never_matches(self) -> None:
        """Position m - W is not, although its query is the same and its row is still in the ring."""
        session = self._session_with_random_rows()
        window = session.config.window
        session.truth[0].rows.pop(session.lengths[0] - window, None)
        result = session.step(self._query_of_lag(session, window), check=True)
        assert bool((result.trace.matched_pos != result.positions[0] - window).all())
        assert not bool(result.trace.hit.any())

    def test_threshold_one_refuses_even_an_equal_query(self) -> None:
        """The cap is exclusive: where nothing rotates, the distance to the same query is 0, and 0 < 0 is false."""
        half = self.cases[0].head_dim // 2
        session = self.session(
            config=variant(threshold=1.0),
            rope=lambda device: Rope.from_inv_freq(torch.zeros(half, device=device)),
            batch=1,
            capacity=50,
        )
        session.prefill_random(40)
        result = session.step(self._query_of_lag(session, 3))
        assert result.matched == {result.positions[0] - 3}
        assert result.reasons == {Reason.DISTANCE}

    def test_of_equal_rows_the_newest_matches(self) -> None:
        """Two rows at exactly the same distance."""
        for scope in ("head", "group"):
            session = self._session_with_random_rows(match_scope=scope)
            twin = self._query_of_lag(session, 3)
            session.step(twin)
            for _ in range(2):
                session.step(session.draw(*twin.shape))
            row = session.config.window
            fields = session.rings.fields
            ring = int(session.rings.slot_table[session.slots[0]])
            newest, oldest = session.lengths[0] - 3, session.lengths[0] - 6
            fields["q_pre"][session.layer, ring, oldest % row] = fields["q_pre"][session.layer, ring, newest % row]
            for oracle in (session.truth[0], session.plain[0]):
                oracle.rows[oldest].q_pre.copy_(oracle.rows[newest].q_pre)
            result = session.step(twin)
            assert result.matched == {newest}

    def test_empty_rows_never_match(self) -> None:
        """Rows with p + 1 - S <= F hold nothing, whatever their query is."""
        session = self.session(batch=1, capacity=40, config=variant(min_context=9))
        session.prefill_random(9)
        twin = session.queries[0][7]  # 7 + 1 - 6 = 2 = F: empty
        result = session.step(twin[None])
        assert bool((result.trace.matched_pos != 7).all())

    def test_short_context_is_exact(self) -> None:
        """Below min_context nothing is reused, from min_context on it is."""
        session = self.session(batch=1, capacity=40, config=variant(min_context=20))
        session.prefill_random(16)
        query = session.queries[0][15][None]
        for _ in range(6):
            result = session.step(query)
            want = Reason.HIT if result.positions[0] >= 20 else Reason.SHORT_CONTEXT
            assert result.reasons == {want}, f"at {result.positions[0]}"

    def test_empty_ring(self) -> None:
        """A fresh ring has nothing to match and takes the row."""
        session = self.session(batch=1, capacity=40)
        session.prefill_random(30)
        session.acquire(0)
        result = session.step_random()
        assert result.reasons == {Reason.NO_ROW}
        assert session.check_rows(0) == 1

    def test_no_ring(self, dtype: torch.dtype) -> None:
        """A request without a ring is exact and writes nowhere."""
        session = self.session(dtype=dtype, capacity=50, rings_for=())
        for _ in range(self.steps + 12):
            result = session.step_random()
        assert result.reasons == {Reason.NO_RING}

    def test_slot_reuse(self) -> None:
        """A ring that changes hands shows nothing of its former owner."""
        session = self.session(batch=2, capacity=50, rings_for=(0,))
        session.prefill_random(30, 30)
        ring = int(session.rings.slot_table[session.slots[0]])
        session.rings.release(session.slots[0])
        session.has_ring[0] = False
        session.acquire(1)
        assert int(session.rings.slot_table[session.slots[1]]) == ring
        twin = torch.stack([session.queries[0][29], session.queries[0][29]])
        result = session.step(twin)
        assert result.trace.reason[0].eq(Reason.NO_RING).all()
        assert result.trace.reason[1].eq(Reason.NO_ROW).all()

    def test_generation_change(self) -> None:
        """A request under another generation than the ring's neither reads nor writes it."""
        session = self.session(batch=1, capacity=50)
        session.prefill_random(30)
        session.generations[0] += 1
        session.has_ring[0] = False
        twin = session.queries[0][29][None]
        assert session.step(twin).reasons == {Reason.NO_RING}
        session.acquire(0)
        assert session.step(twin).reasons == {Reason.NO_ROW}
        assert session.step(twin).reasons == {Reason.HIT}

    def test_slots_out_of_range_are_misses(self) -> None:
        """Padded batch entries carry slot -1 (or one beyond the table), and must not reach another slot's ring."""
        session = self.session(batch=2, capacity=50)
        session.prefill_random(30, 30)
        last = session.rings.num_slots - 1
        assert session.rings.acquire(last, session.generations[0]) >= 0  # where slot -1 leads if it is taken for one
        session.slots, session.has_ring = [-1, last + 1], [False, False]
        for _ in range(2):
            assert session.step_random().reasons == {Reason.NO_RING}

    def test_skipped_writes_leave_no_trap(self) -> None:
        """Steps taken without a ring leave holes; rows behind them still match by their tag, holes never do."""
        session = self.session(batch=1, capacity=70)
        session.prefill_random(30)
        for skipped in (3, session.config.window + 2):
            session.generations[0] += 1
            session.has_ring[0] = False
            for _ in range(skipped):
                session.step_random()
            session.generations[0] -= 1
            session.has_ring[0] = True
            for _ in range(4):
                session.step_random()

    def test_snapshot_restores_a_prefix(self) -> None:
        """A ring restored up to a position, or into a shorter context, matches only what lies before it."""
        for up_to in (26, None):
            session = self.session(batch=2, capacity=60)
            session.prefill_random(30, 30)
            snapshot = session.rings.snapshot(session.slots[0])
            session.k[1], session.v[1] = session.k[0], session.v[0]
            session.lengths[1] = 0
            session.append(1, 26)
            session.rings.restore(session.slots[1], snapshot, generation=session.generations[1], up_to=up_to)
            for oracle, donor in ((session.truth[1], session.truth[0]), (session.plain[1], session.plain[0])):
                oracle.rows = {t: row for t, row in donor.rows.items() if up_to is None or t < up_to}
            beyond = session.queries[0][28]
            result = session.step(beyond[None], requests=(1,))
            assert max(result.matched) < 26
            result = session.step(session.queries[0][25][None], requests=(1,))
            assert result.matched == {25}
            session.append(1, 4)  # tokens that were not decoded: rows 28 and 29 would now be in reach
            result = session.step(session.queries[0][29][None], requests=(1,))
            assert max(result.matched) < 28 or up_to is None

    def rules_window(self) -> int:
        """Window of the first rule."""
        return next(iter(self.rules.values())).window

    def _session_with_random_rows(self, **changes: str) -> Session:
        session = self.session(batch=1, capacity=80, config=variant(**changes))
        session.prefill_random(44)
        for _ in range(3):
            session.step(session.draw(1, session.layout.num_qo_heads, session.case.head_dim))
        return session

    @staticmethod
    def _query_of_lag(session: Session, lag: int) -> torch.Tensor:
        return session.queries[0][session.lengths[0] - lag][None]

    def _planted_lag(self, lag: int) -> StepResult:
        session = self._session_with_random_rows()
        result = session.step(self._query_of_lag(session, lag))
        assert result.matched == {result.positions[0] - lag}
        assert bool(result.trace.hit.all())
        return result
