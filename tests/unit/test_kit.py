"""The conformance kit itself: it covers what it says, and typical mistakes of a backend do not get past it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mac_kernels import AttnState, MacConfig, PagedKV, step
from mac_kernels.bypass import Bypass
from mac_kernels.ring import RingPool
from mac_kernels.testing.conformance import PAIRWISE_CASES, ChainOracle, Decision, DecodeConformance, pairwise, replay
from mac_kernels.testing.conformance.cases import Case, variant
from mac_kernels.types import covered_end


def test_pairwise_covers_every_pair_with_few_rows():
    factors = {"a": (1, 2, 3), "b": "xyz", "c": (True, False), "d": (0.5, 0.25)}
    rows = pairwise(factors)
    for first, second in itertools.combinations(factors, 2):
        seen = {(row[first], row[second]) for row in rows}
        assert seen == set(itertools.product(factors[first], factors[second]))
    assert len(rows) <= 12 < 3 * 3 * 2 * 2


def test_gpu_matrix_holds_every_required_shape():
    assert {case.head_dim for case in PAIRWISE_CASES} >= {16, 64, 80, 128, 192, 256}
    assert {case.group for case in PAIRWISE_CASES} == {1, 3, 5, 6, 7, 8, 12, 16}
    assert {case.page_size for case in PAIRWISE_CASES} == {1, 5, 16, 64}
    assert {case.kv_layout for case in PAIRWISE_CASES} == {"NHD", "HND"}
    assert len(PAIRWISE_CASES) < 110


original_correct, original_write = step.correct, RingPool.write


def off_by_one(position: torch.Tensor, *, band: int, sinks: int) -> torch.Tensor:
    return covered_end(position - 1, band=band, sinks=sinks)


def newest(q_pre: torch.Tensor, rows: Any, position: torch.Tensor, *, config: MacConfig) -> Any:
    found = step.find_match(q_pre, rows, position, config=config)
    last = ((position - 1) % config.window)[:, None].expand_as(found.row)
    index = last[:, None, :, None].expand(-1, 1, -1, q_pre.shape[-1])
    distance = (rows.q_pre.gather(1, index)[:, 0] - q_pre).norm(dim=-1)
    return type(found)(last, (position - 1)[:, None].expand_as(found.pos), distance)


def natural_base(state: AttnState, q_pre: torch.Tensor, matched: torch.Tensor, *, sm_scale: float) -> AttnState:
    return original_correct(state, q_pre, matched, sm_scale=sm_scale / 1.4427)


def without_anchor(pool: RingPool, layer: int, rings: Any, position: torch.Tensor, **row: Any) -> None:
    row["anchor"] = position[:, None].expand_as(row["anchor"])
    original_write(pool, layer, rings, position, **row)


def with_neighbour(pool: RingPool, layer: int, rings: torch.Tensor, position: torch.Tensor, **row: Any) -> None:
    original_write(pool, layer, rings, position, **row)
    pool.fields["lse2"][layer, rings, (position + 1) % pool.window] = 0.0


MISTAKES: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "covered end off by one": (step, "covered_end", off_by_one),
    "newest row instead of the nearest": (step.reference_step, "__kwdefaults__", newest),
    "correction in the natural base": (step, "correct", natural_base),
    "no correction": (step, "correct", lambda state, *_, **__: state),
    "anchor forgotten": (RingPool, "write", without_anchor),
    "another row touched": (RingPool, "write", with_neighbour),
    "generation ignored": (
        RingPool,
        "lookup",
        lambda pool, slots, generations: pool.slot_table[slots.clamp(0, pool.num_slots - 1)].long(),
    ),
    "last term of a merge lost": (step, "merge_state", lambda a, b: a),
}


class Kit(DecodeConformance):
    """Not collected: its name does not begin with Test."""

    steps = 12

    def everything(self) -> None:
        self._sessions = []
        self.test_rows_and_outputs(Case(), torch.float32)
        self.test_mixed_batch(torch.float32)
        for session in self._sessions:
            session.ledger.verify()


def test_the_reference_gets_past_the_kit():
    Kit().everything()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistaken_backend_does_not(name, monkeypatch):
    owner, attribute, mistake = MISTAKES[name]
    replacement = {"logits_soft_cap": 0.0, "find": mistake} if attribute == "__kwdefaults__" else mistake
    monkeypatch.setattr(owner, attribute, replacement)
    with pytest.raises(AssertionError):
        Kit().everything()


original_accept, original_gather = step.accept, PagedKV.gather


def without_scale(kv: PagedKV, first: torch.Tensor, count: int) -> Any:
    return original_gather(dataclasses.replace(kv, k_scale=1.0, v_scale=1.0), first, count)


OPTION_MISTAKES: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "scales forgotten": (PagedKV, "gather", without_scale),
    "limits of another layer": (step, "accept", lambda *args, layer, **named: original_accept(*args, layer=0, **named)),
    "hits never judged": (Bypass, "update", lambda *_: None),
    "a pause that searches": (Bypass, "paused", lambda self, layer: torch.tensor(False)),
}


@pytest.mark.parametrize("name", OPTION_MISTAKES)
def test_nor_does_one_that_mistakes_an_option(name, monkeypatch):
    monkeypatch.setattr(*OPTION_MISTAKES[name])
    kit = Kit()
    kit._sessions = []
    with pytest.raises(AssertionError):
        kit.test_limits_by_head(torch.float32)
        kit.test_bypass()
        kit.test_fp8_cache(torch.float32)
        for session in kit._sessions:
            session.ledger.verify()


def test_replay_composes_only_the_ancestors():
    """Rows replayed from recorded decisions equal those of the whole chain."""
    kit = Kit()
    kit._sessions = []
    session = kit.session(config=variant(max_age=None), batch=1, capacity=70)
    session.prefill_random(30)
    queries, decisions = {}, {}
    for t, query in session.queries[0].items():
        queries[t] = session.rotated(query[None], [t])[0]
    for _ in range(40):
        result = session.step_random()
        t = result.positions[0]
        queries[t] = result.q[0]
        decisions[t] = Decision(result.trace.hit[0].repeat_interleave(session.case.group), result.trace.matched_pos[0])
    truth = session.truth[0]
    fresh = ChainOracle(
        truth.config, truth.layout, truth.rope, dtype=session.dtype, row_dtype=session.row_dtype, plain=False
    )
    wanted = [60, 69]
    count = replay(fresh, wanted, query=queries.__getitem__, k=session.k[0], v=session.v[0], decisions=decisions)
    assert len(wanted) < count < 70
    for t in wanted:
        for name in ("q_pre", "out", "lse2", "kbar", "anchor"):
            torch.testing.assert_close(getattr(fresh.rows[t], name), getattr(truth.rows[t], name))
