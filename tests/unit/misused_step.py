"""A decode step that works, to be misused, and what every misuse has in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import mac_kernels as mk
from mac_kernels.testing.scenario import PagedStore

LAYOUT = mk.HeadLayout(num_qo_heads=4, num_kv_heads=2, head_dim=8)
CONFIG = mk.MacConfig(window=8, band=3, sinks=1, min_context=5)
LENGTHS = (11, 14)


@dataclass
class Setup:
    """A step that works: every misuse changes one thing about it."""

    wrapper: mk.BatchMacDecodeWithPagedKVCacheWrapper
    rings: mk.RingPool
    store: PagedStore
    plan_arguments: dict[str, Any]
    run_arguments: dict[str, Any]

    def plan(self, **changes: Any) -> None:
        self.wrapper.plan(**{**self.plan_arguments, **changes})

    def run(self, **changes: Any) -> torch.Tensor:
        return self.wrapper.run(**{**self.run_arguments, **changes})

    def fill(self, **changes: Any) -> None:
        prompt = {
            "q": torch.randn(5, 4, 8),
            "qo_indptr": torch.tensor([0, 2, 5]),
            "kv": self.store.kv(self.store.table(LENGTHS)),
            "rope": self.plan_arguments["rope"],
            "config": CONFIG,
            **{name: self.run_arguments[name] for name in ("rings", "layer", "slots", "generations")},
        }
        mk.fill_rings(**{**prompt, **changes})


def pool(**changes: Any) -> mk.RingPool:
    options = {"num_rings": 2, "num_layers": 2, "layout": LAYOUT, "window": 8, "dtype": torch.float32}
    return mk.RingPool(**{**options, **changes})


def ready_setup() -> Setup:
    """Planned, filled and run once, by the reference backend."""
    generator = torch.Generator().manual_seed(0)
    store = PagedStore(2, 16, LAYOUT, page_size=4, generator=generator)
    for request, length in enumerate(LENGTHS):
        store.write(request, 0, *torch.randn(2, length, 2, 8, generator=generator))
    rings = pool()
    for slot in range(2):
        rings.acquire(slot)
    table = store.table(LENGTHS)
    plan = {
        "indptr": table.indptr,
        "indices": table.indices,
        "last_page_len": table.last_page_len,
        "layout": LAYOUT,
        "page_size": 4,
        "rope": mk.Rope.from_inv_freq(torch.tensor([1.0, 0.1, 0.01, 0.001])),
        "config": CONFIG,
    }
    run = {
        "q": torch.randn(2, 4, 8, generator=generator),
        "paged_kv_cache": (store.k_cache, store.v_cache),
        "rings": rings,
        "layer": 0,
        "slots": torch.tensor([0, 1]),
        "generations": torch.tensor([0, 0]),
    }
    ready = Setup(mk.BatchMacDecodeWithPagedKVCacheWrapper(backend="reference"), rings, store, plan, run)
    ready.plan()
    ready.fill()
    ready.run()
    return ready


def check_refused(setup: Setup, misuse: Callable[[Setup], Any], error: type[Exception], parts: Sequence[str]) -> None:
    """Misuse raises ``error`` with all ``parts`` in its message, and no ring is changed."""
    rings = setup.rings
    tables = {"slots": rings.slot_table, "generation": rings.ring_generation, "counters": rings.counters.values}
    watched = {**rings.fields, **tables}
    before = {key: tensor.clone() for key, tensor in watched.items()}
    with pytest.raises(error) as caught:
        misuse(setup)
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    for key, tensor in watched.items():
        assert torch.equal(tensor.nan_to_num(), before[key].nan_to_num()), f"{key} was changed"
    assert rings.free_rings == 0
