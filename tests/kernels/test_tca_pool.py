"""TCA on Triton over a pool of far sets: whose sets are whose is read on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_tca import (
    DEVICE,
    INTERPRETED,
    REAL,
    TINY,
    Shape,
    assert_state,
    choice_of,
    decoding,
    queries,
    shapes,
    store_of,
    tensors,
    view,
)

from mac_kernels import InputError, PagedKV, RowTable, tca
from mac_kernels.tca import FarSet, Selection, fused
from mac_kernels.tca.candidates import decode_keep
from mac_kernels.tca.pool import FarPool
from mac_kernels.testing.conformance.batch import poisoned_empty
from mac_kernels.types import AttnState

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@shapes
def test_decode_from_a_pool(shape: Shape) -> None:
    """Sets lie anywhere in a pool; what belongs to others stays, and a request without sets is read whole."""
    config = shape.config
    lengths, store, keep, (mine, theirs) = decoding(shape, capacity=config.sinks + 4 * config.block)
    sets = torch.tensor([5, 2, 0, -1], dtype=torch.int32, device=DEVICE)
    own = sets[:3].long()
    pool = FarSet(*(torch.full((7, *x.shape[1:]), 9, dtype=torch.int32, device=DEVICE) for x in tensors(mine)), sets)
    for parts, part, rest in zip(tensors(pool), tensors(mine), tensors(theirs), strict=True):
        parts[own] = part[:3]
        rest[3] = 0
    for step in range(4):
        q, kv = queries(shape, len(lengths), seed=step), view(shape, store, [length + step for length in lengths])
        with poisoned_empty():
            fused.compact(q, kv, pool, keep, config=config, **shape.options)
            got = fused.sparse_decode(q, kv, pool, **shape.options)
        tca.compact(q, kv, theirs, keep, config=config, **shape.options)
        for parts, part in zip(tensors(pool), tensors(theirs), strict=True):
            assert torch.equal(parts[own], part[:3])
            assert bool((parts[[1, 3, 4, 6]] == 9).all())
        assert_state(got, tca.sparse_decode(q, kv, theirs, **shape.options), shape.dtype)
        assert_state(got, tca.sparse_decode(q, kv, pool, **shape.options), shape.dtype)
    assert mine.far_end[0, 0] < theirs.far_end[0, 0], "no block left the window: the test proves nothing"


def test_prefill_takes_no_sets_of_a_pool() -> None:
    shape = TINY[0]
    kv, q = view(shape, store_of(shape, [60]), [60]), queries(shape, 60)
    found = fused.select_prompt(q[-1:], kv, [60], [5, 5], config=shape.config, **shape.options)
    pooled = Selection(FarSet(*tensors(found.far), torch.zeros(1, dtype=torch.int32, device=DEVICE)), found.prefix)
    indptr = torch.tensor([0, 60], dtype=torch.int32, device=DEVICE)
    with pytest.raises(InputError, match=r"belong to a pool.*of_batch"):
        fused.sparse_prefill(q, indptr, kv, pooled, config=shape.config, **shape.options)


@pytest.mark.gpu
def test_a_replay_finds_the_sets_of_its_rows() -> None:
    """A graph is captured over rows that own nothing; then rows with sets, and one without, take their places."""
    shape, room, owners = REAL[1], 2048, [1, 2, 4]
    config, choice = shape.config, choice_of(shape.layout)
    edge = config.sinks + config.local_window + config.block
    lengths = torch.tensor([0, edge + 300, edge + 40, 9, edge + 7], device=DEVICE)  # by row; row 0 belongs to nobody
    store = store_of(shape, [room] * 4)
    rows, now, q = (
        torch.full((2,), 3, device=DEVICE),
        torch.ones(2, dtype=torch.int64, device=DEVICE),
        queries(shape, 2),
    )
    req_to_token = store.row_table([room] * 4).req_to_token

    def kv_of(rows: torch.Tensor, lengths: torch.Tensor) -> PagedKV:
        table = RowTable(req_to_token, rows, lengths)
        return PagedKV(store.k_cache, store.v_cache, table, shape.layout, shape.kv_layout)

    some = torch.tensor(owners, device=DEVICE)
    prompts = kv_of(some, lengths[some])
    found = tca.select_prompt(
        queries(shape, 3), prompts, lengths[some].tolist(), choice, config=config, **shape.options
    ).far
    pools = [
        FarPool(num_sets=3, num_slots=5, choices=[choice], max_len=room, config=config, device=DEVICE) for _ in "ab"
    ]
    for pool in pools:
        for slot in owners:
            pool.acquire(slot)
        pool.store(0, pool.sets_of(some), found)
    keep = torch.tensor([decode_keep(one, config.block) for one in choice], dtype=torch.int32, device=DEVICE)
    kv = kv_of(rows, now)

    def step(run: Any, pool: FarPool) -> AttnState:
        far = pool.far(0, pool.sets_of(rows))
        run.compact(q, kv, far, keep, config=config, **shape.options)
        state: AttnState = run.sparse_decode(q, kv, far, **shape.options)
        return state

    step(fused, pools[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(fused, pools[0])
    for turn, pair in enumerate(([1, 2], [4, 1], [2, 4], [3, 1])):  # the reference takes one block at a time
        rows.copy_(torch.tensor(pair))
        lengths += config.block // 2
        now.copy_(lengths[rows])
        q.copy_(queries(shape, 2, seed=turn))
        graph.replay()
        assert_state(got, step(tca, pools[1]), shape.dtype)
        assert torch.equal(pools[0].count, pools[1].count) and torch.equal(pools[0].far_end, pools[1].far_end)
    assert bool((pools[0].far_end[0, :, 0] > found.far_end[:, 0].amin()).any())
