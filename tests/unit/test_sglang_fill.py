"""What a prefill pass stores: the last queries of the requests that are named, and of no other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mac_kernels import HeadLayout, MacConfig, PagedKV, RingPool, RowTable, fill_rings
from mac_kernels.rope import Rope
from mac_sglang.layers import LayerKind, LayerMap, ServedLayer
from mac_sglang.mac_plan import RingFill, compile_fill
from mac_sglang.serving import Site

LAYOUT = HeadLayout(num_qo_heads=4, num_kv_heads=2, head_dim=8)
CONFIG = MacConfig(window=8, band=4, sinks=1, min_context=8, nominees=None)
ROWS, CONTEXT = 5, 64
# row of the pool, tokens before the pass, tokens of the pass
BATCH = [(3, 0, 20), (1, 30, 5), (4, 10, 1), (2, 0, 11)]


def serving() -> Any:
    """What `RingFill` uses of it: a ring for each row but 4, a cache of random keys and values, and one layer."""
    generator = torch.Generator().manual_seed(0)
    slots = torch.randperm(ROWS * CONTEXT, generator=generator).view(ROWS, CONTEXT).int()
    cache = torch.randn(2, ROWS * CONTEXT, LAYOUT.num_kv_heads, LAYOUT.head_dim, generator=generator)
    rings = RingPool(num_rings=ROWS, num_layers=1, layout=LAYOUT, window=8, num_slots=ROWS, dtype=torch.float32)
    for row in (1, 2, 3):
        rings.acquire(row)
    rope = Rope.from_inv_freq(100.0 ** -(torch.arange(0, 8, 2) / 8))
    layer = ServedLayer(0, LayerKind(rope, 0.3, 0.0))
    runner = SimpleNamespace(
        req_to_token_pool=SimpleNamespace(req_to_token=slots),
        token_to_kv_pool=SimpleNamespace(get_kv_buffer=lambda number: tuple(cache)),
        dtype=torch.float32,
    )
    site = Site(runner, LayerMap({0: layer}, {}, LAYOUT), CONTEXT, "reference")
    caches = tuple(one.unsqueeze(1) for one in cache)
    return SimpleNamespace(site=site, rings=rings, config=CONFIG, chosen=(), caches=caches, layer=layer)


def forward_batch() -> Any:
    return SimpleNamespace(
        req_pool_indices=torch.tensor([row for row, _, _ in BATCH]),
        seq_lens=torch.tensor([before + count for _, before, count in BATCH]),
        extend_seq_lens_cpu=[count for _, _, count in BATCH],
    )


def filled_alone(names: list[int], q: torch.Tensor) -> dict[str, torch.Tensor]:
    """The rings when every request is filled by itself, from all of its queries."""
    state, first = serving(), 0
    for index, (row, before, count) in enumerate(BATCH):
        if index in names:
            table = RowTable(
                state.site.runner.req_to_token_pool.req_to_token, torch.tensor([row]), torch.tensor([before + count])
            )
            fill_rings(
                q[first : first + count], torch.tensor([0, count], dtype=torch.int32),
                PagedKV(*state.caches, table, LAYOUT), rings=state.rings, layer=0, slots=torch.tensor([row]),
                generations=torch.zeros(1, dtype=torch.int64), rope=state.layer.kind.rope, config=CONFIG, sm_scale=0.3,
                backend="reference",
            )  # fmt: skip
        first += count
    return state.rings.fields


@pytest.mark.parametrize("names", [[0], [1, 3], [0, 1, 2, 3], [2, 1]], ids=str)
def test_the_named_requests_are_stored_as_if_each_were_alone(names: list[int]) -> None:
    state = serving()
    state.chosen = names
    q = torch.randn(sum(count for _, _, count in BATCH), 4, 8, generator=torch.Generator().manual_seed(1))
    exact = torch.zeros(len(q), 32)
    assert RingFill.of(forward_batch(), state).run(q, exact, state.caches, (1.0, 1.0), state.layer) is exact
    assert not exact.any()
    for name, field in filled_alone(names, q).items():
        torch.testing.assert_close(state.rings.fields[name], field, msg=name)
    rings = [int(state.rings.lookup(torch.tensor([row]), torch.zeros(1, dtype=torch.int64))) for row, _, _ in BATCH]
    stored = [ring >= 0 and bool((state.rings.fields["pos"][0, ring] >= 0).any()) for ring in rings]
    assert stored == [index in names and BATCH[index][0] != 4 for index in range(len(BATCH))]


def test_compiling_stores_nothing() -> None:
    state = serving()
    compile_fill(state)
    assert bool((state.rings.fields["pos"] < 0).all())
