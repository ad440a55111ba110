"""Misses that read selected tokens (``MacConfig.tca``): what they read, what is stored, and when they are exact."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ...counters import READ
from ...tca.config import TcaConfig
from ...tca.index import NEVER, MissIndex
from ...tca.refresh import refresh_index
from ...types import Reason
from .base import Kit
from .cases import Case, variant
from .session import Session, StepResult

_REFRESH = 5
# random queries spread their attention: a low target calls a selection good that drops most of it
_TCA = TcaConfig(block=16, local_window=32, sinks=2, refresh=_REFRESH, mass_target=0.05)
_PROMPTS = 100, 55, 20  # several far blocks, none until some steps later, never any
_CASE = Case(kv_heads=4)


class Selected(Kit):
    """Steps are judged by the oracle over the sets that the index names; whether they may be read, by a rule here."""

    @pytest.fixture(autouse=True)
    def _offered(self, request: pytest.FixtureRequest) -> None:
        if not self.runs_selected and request.function.__name__.startswith("test_selected"):
            pytest.skip("the backend has no selected misses")

    def test_selected_tokens_are_read(self, case: Case, dtype: torch.dtype) -> None:
        """Every shape: outputs and rows over the selected tokens, on misses and on the hits that descend from them."""
        session = self._selecting(case=case, dtype=dtype)
        sparse = sum(int(self._foreseen(session).trace.sparse.sum()) for _ in range(self.steps))
        assert sparse, "nothing was selected"

    def test_selected_tokens_over_many_steps(self) -> None:
        """Beyond the window: selections replace each other, rows of several of them are merged with what follows."""
        session = self._selecting(capacity=110 + self.rule_steps)
        sparse = 0
        for step in range(self.rule_steps):
            if step % _REFRESH == _REFRESH - 1:
                refresh(session)
            sparse += int(self._foreseen(session).trace.sparse.sum())
        assert sparse > self.rule_steps and session.hits[0] > 0
        assert len(set(session.rings.fields["seen"][session.layer].flatten().tolist())) > 2

    def test_selected_tokens_of_old_selections_are_not_used(self) -> None:
        """After ``refresh`` steps misses are exact, until tokens are selected anew; a new ring has no selection."""
        session = self._selecting()
        for _ in range(_REFRESH):
            assert bool(self._foreseen(session, revisit=0.0).trace.sparse[0].any())
        assert not bool(self._foreseen(session, revisit=0.0).trace.sparse.any())
        refresh(session)
        assert bool(self._foreseen(session, revisit=0.0).trace.sparse[0].any())
        session.acquire(0, generation=9)
        assert not bool(self._foreseen(session, revisit=0.0).trace.sparse[0].any())

    def test_selected_tokens_that_miss_too_much(self) -> None:
        """A selection that is found out is used no more, nor are the rows that were read with it."""
        session = self._selecting(mass_target=0.999)
        index = _index(session)
        assert not bool(self._foreseen(session, revisit=0.0).trace.sparse.any()), "the first query finds it out"
        index.dropped.zero_()
        result = self._foreseen(session, revisit=0.0)
        t, sparse = result.positions[0], result.trace.sparse[0]
        assert bool(sparse.any())
        refresh(session)
        assert not bool(self._foreseen(session, revisit=0.0).trace.sparse.any())
        ring = session.rings.slot_table[session.slots[0]]
        anchor = session.rings.fields["anchor"][session.layer, ring, t % session.config.window].cpu()
        assert torch.equal(anchor == NEVER, sparse)
        result = session.step(torch.stack([session.queries[r][session.lengths[r] - 2] for r in range(3)]), check=False)
        assert int(result.trace.matched_pos[0, 0]) == t
        reasons = result.trace.reason[0]
        assert torch.equal(reasons == Reason.AGE, sparse) and torch.equal(reasons == Reason.HIT, ~sparse)

    def _selecting(self, *, case: Case = _CASE, mass_target: float = _TCA.mass_target, **options: object) -> Session:
        """A session whose prompts have been selected from."""
        tca = dataclasses.replace(_TCA, mass_target=mass_target)
        config = variant(max_age=64, tca=tca)
        capacity = {"capacity": max(_PROMPTS) + self.steps + 10}
        session = self.session(case, config=config, batch=len(_PROMPTS), **{**capacity, **options})
        session.prefill_random(*_PROMPTS)
        refresh(session)
        return session

    @staticmethod
    def _foreseen(session: Session, *, revisit: float = 0.75) -> StepResult:
        """A step of which it is foreseen who may read selected tokens, and which selection the rows name."""
        fields, layer, window = session.rings.fields, session.layer, session.config.window
        before, counted = fields["seen"][layer].clone(), session.rings.counters.values[layer, READ].clone()
        result = session.step_random(revisit=revisit)
        counted = session.rings.counters.values[layer, READ] - counted
        assert int(counted) == int(result.trace.kv_read.sum()), "the counters tell another reading than the trace"
        index, trace, group = _index(session), result.trace, session.case.group
        for i, (request, t) in enumerate(zip(result.requests, result.positions, strict=True)):
            ring = int(session.rings.slot_table[session.slots[request]])
            for head, reason in enumerate(trace.reason[i].tolist()):
                at = layer, ring, head
                selected = int(index.selected[at])
                young = 0 <= selected <= t <= selected + _REFRESH and int(index.count[at]) > 0
                missed = reason not in (Reason.HIT, Reason.SHORT_CONTEXT)
                usable = missed and young and float(index.dropped[at]) <= index.limit
                assert bool(trace.sparse[i, head]) == usable, f"head {head} at {t}: sparse is not {usable}"
                for one in range(head * group, head * group + group):
                    source = int(before[ring, int(trace.matched_pos[i, one]) % window, one])
                    want = source if reason == Reason.HIT else selected if usable else -1
                    assert int(fields["seen"][layer, ring, t % window, one]) == want
        return result


def refresh(session: Session) -> None:
    """Select anew for all requests, by their newest queries."""
    lengths = session.lengths
    q = [session.rotated(session.queries[r][length - 1][None], [length - 1])[0] for r, length in enumerate(lengths)]
    refresh_index(
        torch.stack(q),
        dataclasses.replace(session.store.kv(session.batches.table(lengths)), **session._scale_arguments()),
        lengths,
        rings=session.rings,
        layer=session.layer,
        slots=session._ids(session.slots),
        generations=session._ids(session.generations),
        sm_scale=session.layout.head_dim**-0.5,
        logits_soft_cap=session.soft_cap,
    )


def _index(session: Session) -> MissIndex:
    assert session.rings.index is not None
    return session.rings.index
