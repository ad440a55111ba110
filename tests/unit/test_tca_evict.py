"""TCA: the evicted cache reads what the index reads, and holds nothing else."""

from __future__ import annotations

import itertools

import pytest
import torch
from tca_requests import CHOICE, CONFIG, SCALE, Requests, decode_loop

from mac_kernels import InputError, partial_attention
from mac_kernels.tca import EvictedKV
from mac_kernels.tca.candidates import NUM_SPARSE, decode_keep, far_count
from mac_kernels.tca.config import far_blocks


def evict(requests: Requests) -> EvictedKV:
    return EvictedKV(requests.kv(), requests.lengths, requests.select(), CHOICE, config=CONFIG)


def step(evicted: EvictedKV, requests: Requests, *, token: bool = True) -> torch.Tensor:
    """Append the token after the present end of every request and decode it, [B, Hq, D]."""
    q = torch.stack([q[length] for q, length in zip(requests.q, evicted.kv_len, strict=True)])
    evicted.append(*(torch.stack([x[length] for x, length in zip(part, evicted.kv_len, strict=True)])
                     for part in (requests.k, requests.v)))  # fmt: skip
    evicted.compact(q, sm_scale=SCALE)
    kv = evicted.paged()
    kv.table.check(num_pages=len(kv.k_cache))
    rows = q.view(-1, kv.layout.num_qo_heads, 16)
    start = torch.zeros(len(rows), kv.layout.num_qo_heads, dtype=torch.int64)
    return partial_attention(rows, kv, start, kv.table.kv_len(), sm_scale=SCALE).out.view(q.shape)


def test_every_step_is_that_of_the_index() -> None:
    start, steps = [44, 3, 60], 40
    indexed, evicted = (Requests(start, room=steps) for _ in "ie")
    held = evict(evicted)
    _, outs = decode_loop(indexed, indexed.select(), steps)
    for number, expected in enumerate(outs):
        torch.testing.assert_close(step(held, evicted), expected, atol=2e-5, rtol=2e-5)
        assert held.kv_len == [length + number + 1 for length in start]


def test_what_is_held_is_what_is_read() -> None:
    start, steps = [60, 17], 30
    requests = Requests(start, room=steps)
    held = evict(requests)
    for _ in range(steps):
        step(held, requests)
    pages = 0
    for row, got in enumerate(held.lengths):
        request, head = divmod(row, 3)
        candidate, length = CHOICE[head], start[request] + steps
        first, last = (far_blocks(n - 1, CONFIG) for n in (start[request], length))
        kept = far_count(candidate, first, CONFIG) or CONFIG.sinks
        kept += (last - first) * decode_keep(candidate, 8)
        expected = length if candidate == NUM_SPARSE else kept + length - CONFIG.sinks - last * 8
        assert got == expected
        pages += -(-got // 16)
    assert held.nbytes == pages * 16 * 16 * 4 * 2


def test_freed_pages_are_used_again() -> None:
    requests = Requests([60], room=300)
    held = evict(requests)
    used = []
    for _ in range(300):
        step(held, requests)
        used.append(held.paged().table.indices.tolist())
        assert len(set(used[-1])) == len(used[-1])
    falls = sum(len(after) < len(before) for before, after in itertools.pairwise(used))
    assert falls > 10
    # the pool grows by a quarter of what it has
    assert len(held.paged().k_cache) <= max(map(len, used)) * 5 // 4


def test_two_blocks_at_once_are_refused() -> None:
    requests = Requests([44], room=30)
    held = evict(requests)
    for t in range(44, 64):
        held.append(requests.k[0][t][None], requests.v[0][t][None])
    with pytest.raises(InputError, match="2 blocks left the window at once"):
        held.compact(requests.q[0][63][None], sm_scale=SCALE)
