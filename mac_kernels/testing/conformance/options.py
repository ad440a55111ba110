"""What may be asked for beyond the plain step: an 8-bit cache, limits by head, a bypass."""

from __future__ import annotations

import torch

from ... import bypass
from ...types import Reason
from .base import Kit
from .cases import variant
from .session import Session, StepResult


class Options(Kit):
    """Judged like the plain step."""

    def test_fp8_cache(self, dtype: torch.dtype) -> None:
        """Keys and values in 8 bits, scaled by numbers or by device scalars: fill, decode, rows and outputs."""
        on_device = (torch.tensor(0.3, device=self.device), torch.tensor([2.5], device=self.device))
        for scales in ((0.25, 1.7), on_device, None):
            session = self.session(dtype=dtype, kv_dtype=torch.float8_e4m3fn, scales=scales, capacity=60)
            session.prefill_random(29, 37)
            assert session.check_rows(0) == session.config.window
            for _ in range(self.steps):
                session.step_random()
            assert session.hits[0] > 0, "nothing was reused"

    def test_fp8_cache_under_a_soft_cap(self) -> None:
        """The scale acts before the cap."""
        session = self.session(
            config=variant(correction=False),
            kv_dtype=torch.float8_e4m3fn,
            scales=(0.5, 0.5),
            logits_soft_cap=3.0,
            capacity=50,
        )
        session.prefill_random(29, 37)
        for _ in range(self.steps // 2):
            session.step_random()

    def test_limits_by_head(self, dtype: torch.dtype) -> None:
        """Thresholds and influence scales by layer and query head, and thresholds by layer alone."""
        heads = self.cases[0].layout.num_qo_heads
        own = tuple(0.3 + 0.3 * head / heads for head in range(heads))
        scale = tuple(0.5 + 2.0 * head / heads for head in range(heads))
        for changes in (
            {"thresholds": ((-5.0,) * heads, own), "influence": None},
            {"influence_scale": ((1e9,) * heads, scale), "influence": 0.35},
            {"thresholds": ((1.0,), (0.4,)), "influence_scale": ((9.0,), (0.5,)), "influence": 0.35},
        ):
            session = self.session(config=variant(**changes), dtype=dtype, capacity=44 + self.steps)
            session.prefill_random(30, 40)
            for _ in range(self.steps):
                session.step_random()
            assert session.hits[0] > 0, "nothing was reused"

    def test_bypass(self) -> None:
        """A layer with a poor record pauses, keeps writing rows, and finds them when it tries again."""
        session = self.session(config=variant(break_even=0.5), capacity=60)
        session.prefill_random(30, 21)
        state = session.rings.bypass.values[session.layer]
        state.copy_(torch.tensor([3, bypass.TRIAL_GROUPS - 1, 0, 0]))
        self._followed(session, revisit=0.0)
        assert int(state[2]) == bypass.PAUSE_STEPS, "the pause must begin"
        session.rings.counters.drain()
        for _ in range(3):
            assert self._followed(session).reasons == {Reason.BYPASSED}
        state[2] = 1
        assert self._followed(session).reasons == {Reason.BYPASSED}
        counted = session.rings.counters.drain().groups[Reason.BYPASSED.name]
        assert counted == [0, 4 * 2 * session.case.kv_heads]
        twin = torch.stack([session.queries[r][session.lengths[r] - 2] for r in range(2)])
        result = session.step(twin)
        assert result.reasons == {Reason.HIT}, "what a pause stored must be found"
        assert bool((result.trace.matched_pos == torch.tensor(result.positions)[:, None] - 2).all())

    def test_bypass_lets_good_layers_be(self) -> None:
        """A layer whose hits pay is never paused; its record fades."""
        session = self.session(config=variant(break_even=0.5), capacity=60)
        session.prefill_random(30, 21)
        state = session.rings.bypass.values[session.layer]
        state.copy_(torch.tensor([bypass.TRIAL_GROUPS - 20, bypass.TRIAL_GROUPS - 1, 0, 0]))
        for _ in range(self.steps // 2):
            assert Reason.BYPASSED not in self._followed(session).reasons
        assert int(state[1]) < bypass.TRIAL_GROUPS and int(state[2]) == 0

    @staticmethod
    def _followed(session: Session, revisit: float = 0.75) -> StepResult:
        """A step whose effect on the layer's record is foreseen."""
        hits, judged, pause, _ = session.rings.bypass.values[session.layer].tolist()
        result = session.step_random(revisit=revisit)
        reasons = result.trace.reason.flatten().tolist()
        hits += reasons.count(Reason.HIT)
        unjudged = (Reason.NO_RING, Reason.SHORT_CONTEXT, Reason.BYPASSED, Reason.NO_ROW)
        judged += sum(reason not in unjudged for reason in reasons)
        pause = max(pause - 1, 0)
        if judged >= bypass.TRIAL_GROUPS:
            if hits / judged < 0.5:
                hits, judged, pause = 0, 0, bypass.PAUSE_STEPS
            else:
                hits, judged = hits // 2, judged // 2
        assert session.rings.bypass.values[session.layer].tolist()[:3] == [hits, judged, pause]
        assert not bool(session.rings.bypass.values[1 - session.layer].any()), "another layer was counted"
        return result
