"""The index of MAC's misses on Triton: scores of the far tokens, and what a refresh writes, against the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_tca import (
    DEVICE,
    INTERPRETED,
    REAL,
    TINY,
    Shape,
    assert_selection,
    choice_of,
    lengths_of,
    queries,
    small,
    store_of,
    view,
)

from mac_kernels import RingPool
from mac_kernels.tca import MissIndex, fused, importance, refresh_index, select_prompt
from mac_kernels.tca import refresh as refresh_module
from mac_kernels.tca.config import far_blocks
from mac_kernels.tca.index import NEVER, dropped_mass
from mac_kernels.testing.conformance.batch import poisoned_empty

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
SHAPES = TINY if INTERPRETED else (*TINY, *REAL)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refresh with the kernels wherever this runs."""
    monkeypatch.setattr(refresh_module, "_on_kernels", lambda device: True)


def test_a_shape_without_a_kernel_is_selected_by_the_reference() -> None:
    config = dataclasses.replace(small(8, 16, 2), refresh=4)
    shape = dataclasses.replace(TINY[0], config=config)
    lengths, choice = lengths_of(config, 100), choice_of(shape.layout)
    assert fused.unsupported_reasons(shape.layout, config) == ("block=8 (at least 16)",)
    index = MissIndex([choice], config=config, num_rings=4, max_context=100, device=DEVICE)
    rings = RingPool(num_rings=4, num_layers=1, layout=shape.layout, window=4, index=index, device=DEVICE)
    slots = torch.tensor([rings.acquire(slot) for slot in range(4)], device=DEVICE)
    kv, q = view(shape, store_of(shape, lengths), lengths), queries(shape, len(lengths))
    refresh_index(q, kv, lengths, rings=rings, layer=0, slots=slots, generations=0 * slots, **shape.options)
    want, got = select_prompt(q, kv, lengths, choice, config=config, **shape.options).far, index.far(0, slots)
    assert torch.equal(got.count, want.count) and int(got.count[0, 0]) > config.sinks
    count = int(got.count[0, 0])
    assert torch.equal(got.ids[0, 0, :count], want.ids[0, 0, :count])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_refresh(shape: Shape) -> None:
    """Twice: the first selection is judged by itself, then by the next query; rows of a bad one are given up."""
    config = dataclasses.replace(shape.config, refresh=4, mass_target=0.7)
    lengths, choice = lengths_of(config, 8 * config.block + config.local_window + 7), choice_of(shape.layout)
    store = store_of(shape, [length + 3 for length in lengths])
    index = MissIndex([choice], config=config, num_rings=5, max_context=max(lengths) + 3, device=DEVICE)
    rings = RingPool(num_rings=5, num_layers=1, layout=shape.layout, window=4, num_slots=5, index=index, device=DEVICE)
    slots = torch.tensor([3, 1, 4, 0], device=DEVICE)
    for slot in (3, 1, 4):  # the last request has no ring
        rings.acquire(slot)
    ring = rings.lookup(slots, 0 * slots)[:3]
    rings.fields["seen"].fill_(lengths[0] - 1)
    for turn in range(2):
        lengths = [length + turn * 3 for length in lengths]
        index.limit = 1.0 - turn  # then whatever drops anything is bad
        kv, q = view(shape, store, lengths), queries(shape, len(lengths), seed=turn)
        before = index.far(0, ring)
        with poisoned_empty():
            refresh_index(
                q, kv, lengths, rings=rings, layer=0, slots=slots, generations=0 * slots, **shape.options
            )  # fmt: skip
        s = importance(q, kv, **shape.options)[:3, :, config.sinks :]
        after = index.far(0, ring)
        assert index.selected[0, ring].tolist() == [[length - 1] * len(choice) for length in lengths[:3]]
        judged = dropped_mass(s, before if turn else after, sinks=config.sinks)
        if turn:
            judged = torch.where(before.count > 0, judged, dropped_mass(s, after, sinks=config.sinks))
        torch.testing.assert_close(index.dropped[0, ring], judged, atol=2e-3, rtol=2e-2)
        for request, length in enumerate(lengths[:3]):
            count = index.count[0, ring[request]]
            assert bool((count > 0).tolist() == [far_blocks(length - 1, config) > 0 and one < 14 for one in choice])
        if not turn:
            want = fused.select_prompt(q, kv, lengths, choice, config=config, **shape.options)
            assert_selection(want, importance(q, kv, **shape.options).cpu(), lengths, choice, config)
            width = min(after.ids.shape[2], want.far.ids.shape[2])
            for one in range(3):
                for head in range(len(choice)):
                    count = int(after.count[one, head])
                    assert torch.equal(after.ids[one, head, :count], want.far.ids[one, head, :count]) and count <= width
    bad = index.dropped[0] > 0
    assert bool(bad[ring[0]].any())
    void = rings.fields["anchor"][0] == NEVER
    of_request = int(ring[0])
    assert torch.equal(void[of_request].all(0), bad[of_request] & (index.selected[0, of_request] >= 0))
    assert not bool(void[[r for r in range(5) if r != of_request]].any())
