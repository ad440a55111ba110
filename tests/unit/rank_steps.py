"""One tensor-parallel rank's share of a decode: ``python rank_steps.py RANK SIZE BACKEND DEVICE OUT``.

All random numbers are drawn for all heads, in the same order on every rank, and cut to the heads of this one: ranks get
equal queries, keys and values without a word between them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from mac_kernels import BatchMacDecodeWithPagedKVCacheWrapper, HeadLayout, MacConfig, RingPool, fill_rings
from mac_kernels.rope import Rope
from mac_kernels.testing.scenario import PagedStore
from mac_sglang.layers import LayerKind, LayerMap, ServedLayer
from mac_sglang.mac_serving import for_rank

LAYERS, QO_HEADS, KV_HEADS, DIM = 2, 8, 4, 64
BATCH, PROMPT, STEPS = 3, 48, 24
CONFIG = MacConfig(
    window=32,
    band=8,
    sinks=2,
    min_context=40,
    nominees=8,
    thresholds=[[0.3 + 0.05 * head for head in range(QO_HEADS)], [0.4] * QO_HEADS],
    influence=0.5,
    influence_scale=[[0.5 + 0.1 * head for head in range(QO_HEADS)]] * LAYERS,
    break_even=None,  # counts the hits of a rank's heads
)


class RankDecode:
    """The heads of one rank: their rings, caches and wrappers."""

    def __init__(self, rank: int, size: int, backend: Any, device: str) -> None:
        self.rank, self.size, self.backend, self.device = rank, size, backend, device
        self.layout = layout = HeadLayout(QO_HEADS // size, KV_HEADS // size, DIM)
        self.rope = Rope.from_inv_freq(10_000.0 ** -(torch.arange(0, DIM, 2, device=device) / DIM))
        served = {number: ServedLayer(number, LayerKind(self.rope, DIM**-0.5, 0.0)) for number in range(LAYERS)}
        self.config = for_rank(CONFIG, LayerMap(served, {}, layout), layout, rank)
        self.rings = RingPool(
            num_rings=BATCH, num_layers=LAYERS, layout=layout, window=CONFIG.window, dtype=torch.float32, device=device
        )
        for slot in range(BATCH):
            self.rings.acquire(slot)
        self.owners = {
            "slots": torch.arange(BATCH, device=device),
            "generations": torch.zeros(BATCH, dtype=torch.int64, device=device),
        }
        order, capacity = torch.Generator().manual_seed(1), PROMPT + STEPS
        self.stores = [
            PagedStore(BATCH, capacity, layout, page_size=4, device=device, generator=order) for _ in range(LAYERS)
        ]
        self.wrapper = BatchMacDecodeWithPagedKVCacheWrapper(backend=backend)
        self.generator = torch.Generator().manual_seed(0)
        self.directions = self._drawn(6, QO_HEADS, DIM)

    def _drawn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def _mine(self, heads: torch.Tensor) -> torch.Tensor:
        """This rank's share of [..., H, D]."""
        return heads.chunk(self.size, -2)[self.rank].contiguous().to(self.device)

    def _queries(self, first: int, count: int) -> torch.Tensor:
        """A few directions that come back again and again, more or less exactly, [B, count, Hq of this rank, D]."""
        chosen = torch.randint(0, len(self.directions), (BATCH, count), generator=self.generator)
        noise = torch.rand(BATCH, count, QO_HEADS, 1, generator=self.generator) * 1.5
        q = self._mine(self.directions[chosen] + noise * self._drawn(BATCH, count, QO_HEADS, DIM))
        return torch.stack([self.rope.rotate(one, torch.arange(first, first + count, device=self.device)) for one in q])

    def _write(self, layer: int, first: int, count: int) -> None:
        for request in range(BATCH):
            k, v = (self._mine(self._drawn(count, KV_HEADS, DIM)) for _ in range(2))
            self.stores[layer].write(request, first, k, v)

    def prefill(self) -> None:
        """Store the prompts' last queries."""
        bounds = torch.arange(BATCH + 1, dtype=torch.int32, device=self.device) * PROMPT
        for layer, store in enumerate(self.stores):
            self._write(layer, 0, PROMPT)
            fill_rings(
                self._queries(0, PROMPT).flatten(0, 1),
                bounds,
                store.kv(store.table([PROMPT] * BATCH)),
                rings=self.rings,
                layer=layer,
                **self.owners,
                rope=self.rope,
                config=self.config,
                backend=self.backend,
            )

    def step(self, length: int, layer: int) -> dict[str, torch.Tensor]:
        """Decode one token of every request in one layer; what was decided, and the output."""
        self._write(layer, length - 1, 1)
        store = self.stores[layer]
        table = store.table([length] * BATCH)
        self.wrapper.plan(
            table.indptr,
            table.indices,
            table.last_page_len,
            layout=self.layout,
            page_size=4,
            rope=self.rope,
            config=self.config,
            kv_data_type=torch.float32,
        )
        q = self._queries(length - 1, 1)[:, 0]
        out, trace = self.wrapper.run_return_trace(
            q, (store.k_cache, store.v_cache), rings=self.rings, layer=layer, **self.owners
        )
        decided = {name: getattr(trace, name).cpu() for name in ("reason", "matched_pos", "start")}
        return {**decided, "out": out.flatten(1).cpu()}


def main(rank: int, size: int, backend: Any, device: str, path: str) -> None:
    """Decode and save what was decided, [steps * layers, B, heads of this rank]."""
    torch.set_num_threads(1)
    decode = RankDecode(rank, size, backend, device)
    decode.prefill()
    steps = [decode.step(length, layer) for length in range(PROMPT + 1, PROMPT + STEPS + 1) for layer in range(LAYERS)]
    assert not torch.distributed.is_initialized()
    torch.save({name: torch.stack([step[name] for step in steps]) for name in steps[0]}, path)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
