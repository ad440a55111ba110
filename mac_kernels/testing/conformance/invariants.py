"""Points 1, 2, 4 and 5 of the contract: rows, exactness, ranges, long chains, prefill."""

from __future__ import annotations

import torch

from ...errors import UnsupportedError
from ...match.accept import HANDOVER
from ...rope import Rope
from ...types import Reason
from ..scenario import plant_step
from ..tolerances import assert_close, max_error
from .base import Kit
from .cases import PAPER, Case, variant


class Invariants(Kit):
    """Every step is judged by the oracle: decisions, ranges, row, output, and that nothing else changed."""

    def test_rows_and_outputs(self, case: Case, dtype: torch.dtype) -> None:
        """After prefill and a mix of hits and misses every row is the composed recurrence over [F, E(t))."""
        session = self.session(case, dtype=dtype, batch=2, capacity=40 + self.steps)
        session.prefill_random(29, 37)
        assert session.check_rows(0) == session.check_rows(1) == session.config.window
        for revisit in (1.0, 0.0, *[0.75] * (self.steps - 2)):
            session.step_random(revisit=revisit)
        assert session.check_rows(0) == session.check_rows(1) == session.config.window
        assert 0 < session.hits[0] < session.hits[1], f"hits and misses must both occur, got {session.hits}"

    def test_rules(self, rule: str, dtype: torch.dtype) -> None:
        """Every acceptance rule, from an empty cache past the first ring wrap."""
        config = self.rules[rule]
        steps = self.rule_steps + config.window
        session = self.session(config=config, dtype=dtype, capacity=steps)
        for _ in range(steps):
            session.step_random()
        assert 0 < session.hits[0] < session.hits[1], f"hits and misses must both occur, got {session.hits}"
        assert session.judged[1] <= 0.15 * sum(session.judged), f"too many decisions were too close: {session.judged}"

    def test_rows_in_another_dtype(self) -> None:
        """fp32 queries over 16-bit rows."""
        session = self.session(row_dtype=torch.bfloat16, capacity=64)
        session.prefill_random(30, 21)
        for _ in range(self.steps):
            session.step_random()
        session.check_rows(0)

    def test_exact_preset_is_full_attention(self, case: Case, dtype: torch.dtype) -> None:
        """With threshold 1 nothing is reused and the output is that of full attention, repeated queries or not."""
        session = self.session(case, config=variant(threshold=1.0), dtype=dtype, capacity=40)
        session.prefill_random(20, 33)
        for _ in range(4):
            result = session.step(torch.stack([session.queries[r][session.lengths[r] - 1] for r in range(2)]))
            assert not bool(result.trace.hit.any())
            states = [
                [oracle.full_attention(result.q[r], k, v) for oracle in (session.truth[r], session.plain[r])]
                for r in range(2)
                for k, v in [(session.k[r, : session.lengths[r]], session.v[r, : session.lengths[r]])]
            ]
            truth, plain = (torch.stack(x) for x in zip(*states, strict=True))
            assert_close("output", result.out, plain, truth, dtype=dtype, what="against full attention")

    def test_identical_query_is_reused_exactly(self, dtype: torch.dtype) -> None:
        """Where the phase repeats every 8 tokens, the query of 8 tokens ago is reused and full attention comes out."""
        angle = torch.arange(64)[:, None] % 8 * (torch.pi / 4) * torch.arange(1, self.cases[0].head_dim // 2 + 1)
        table = torch.cat((angle.cos(), angle.sin()), -1)
        session = self.session(
            dtype=dtype,
            rope=lambda device: Rope.from_cos_sin_cache(table.to(device)),
            capacity=40,
        )
        session.prefill_random(30, 23)
        for _ in range(4):
            result = session.step(torch.stack([session.queries[r][session.lengths[r] - 8] for r in range(2)]))
            assert bool(result.trace.hit.all()), f"reasons {result.trace.reason}"
            assert bool((result.trace.matched_pos == torch.tensor(result.positions)[:, None] - 8).all())
            for r in range(2):
                k, v = session.k[r, : session.lengths[r]], session.v[r, : session.lengths[r]]
                truth, plain = (x[r].full_attention(result.q[r], k, v) for x in (session.truth, session.plain))
                # the stored row was rounded once more than one pass over the keys rounds
                assert_close("output", result.out[r], 2 * plain - truth, truth, dtype=dtype, what="reused exactly")

    def test_long_chain(self, dtype: torch.dtype) -> None:
        """Hundreds of chained steps, the ring wrapping many times: rows and outputs stay those of the recurrence."""
        session = self.session(dtype=dtype, capacity=self.chain_steps)
        for t in range(self.chain_steps):
            session.step_random()
            if t % 64 == 63:
                session.check_rows(0)
        assert session.hits[0] > 0.3 * session.hits[1], f"the chain must reuse, got {session.hits}"
        oldest = min(int(row.anchor.min()) for row in session.truth[0].rows.values() if row.lse2.isfinite().all())
        assert oldest >= -HANDOVER * self.chain_steps, "a state is handed on once a step at most"

    def test_ages_past_the_window(self) -> None:
        """A state may descend from a prefix that left the ring long ago; its anchor still says so."""
        session = self.session(config=variant(window=6), batch=1, capacity=80)
        query = session.draw(1, session.layout.num_qo_heads, session.case.head_dim)
        oldest = 0
        for _ in range(60):
            result = session.step(0.98 * query + 0.1 * session.draw(*query.shape))
            anchors = session.truth[0].rows[session.lengths[0] - 1].anchor
            oldest = max(oldest, result.positions[0] - int(anchors.min()))
        assert oldest > 3 * session.config.window, f"the oldest state reused has age {oldest}"

    def test_prefill_in_chunks(self, case: Case, dtype: torch.dtype) -> None:
        """Rows filled over several chunks equal those of one chunk, and the oracle's."""
        pools = []
        for chunks in (1, 4):
            session = self.session(case, dtype=dtype, capacity=48)
            session.prefill_random(41, 10, chunks=chunks)
            assert session.check_rows(0) == session.config.window
            session.check_rows(1)
            pools.append(session.rings.fields)
        assert torch.equal(pools[0]["pos"], pools[1]["pos"])
        tagged = (pools[0]["pos"] >= 0) & pools[0]["lse2"].isfinite().all(-1)
        for name in ("q_pre", "out", "lse2"):
            assert max_error(pools[1][name][tagged], pools[0][name][tagged]) <= 4 * torch.finfo(dtype).eps * 8

    def test_prefill_then_decode_across_chunks(self) -> None:
        """Decode, another prefill chunk, decode again."""
        session = self.session(capacity=70)
        session.prefill_random(25, 9)
        for _ in range(5):
            session.step_random()
        session.prefill_random(7, 21, chunks=2)
        session.check_rows(0)
        for _ in range(8):
            session.step_random()
        session.check_rows(1)

    def test_soft_cap(self, dtype: torch.dtype) -> None:
        """A logit soft-cap is honoured, without the correction."""
        session = self.session(config=variant(correction=False), dtype=dtype, logits_soft_cap=3.0, capacity=60)
        session.prefill_random(25, 30)
        for _ in range(self.steps):
            session.step_random()
        assert session.hits[0] > 0

    def test_large_logits(self) -> None:
        """States whose masses differ by more than 88 nats merge without overflow or NaN."""
        session = self.session(key_scale=25.0, capacity=60)
        session.prefill_random(25, 30)
        for _ in range(self.steps):
            session.step_random()
        spread = max(float(row.lse2.max()) for row in session.truth[0].rows.values())
        assert spread > 88, f"the case must be extreme, largest lse2 {spread}"

    def test_planted_outcomes(self, case: Case, dtype: torch.dtype) -> None:
        """Groups planted just inside and just outside the cap decide as planted, and match the planted rows."""
        for scope, influence in (("head", None), ("group", None), ("head", 0.1)):
            config = variant(window=24, match_scope=scope, influence=influence)
            step = plant_step(
                config,
                case.layout,
                kv_lens=(47, 60, 33),
                hit=0.5,
                rope=case.rope(self.device),
                page_size=case.page_size,
                kv_layout=case.kv_layout,
                dtype=dtype,
                device=self.device,
            )
            wrapper = self.make_wrapper(case.kv_layout)
            table = step.kv.table
            wrapper.plan(
                *table.pointers,
                layout=case.layout,
                page_size=case.page_size,
                rope=step.rope,
                config=config,
            )
            _, trace = wrapper.run_return_trace(
                step.q,
                (step.kv.k_cache, step.kv.v_cache),
                rings=step.rings,
                layer=0,
                slots=step.slots,
                generations=step.generations,
            )
            assert torch.equal(trace.hit, step.hit), f"{scope}, influence {influence}: {trace.reason}, {step.hit}"
            assert torch.equal(trace.matched_pos, step.matched_pos)
            assert set(trace.reason.flatten().tolist()) <= {Reason.HIT, Reason.DISTANCE}

    def test_paper_rule(self) -> None:
        """The published rule runs where it is offered; elsewhere it is refused with a reason."""
        if self.runs_paper:
            session = self.session(config=PAPER, capacity=80)
            for _ in range(80):
                session.step_random()
            assert session.hits[0] > 0
            return
        try:
            self.session(config=PAPER, capacity=4).step_random()
        except UnsupportedError as error:
            assert error.reasons
        else:
            raise AssertionError(f"backend {self.backend!r} must refuse recompute_loaded_groups=False")
