"""Rings whose rows carry a number that no other row has, so that a restored row can be told from any other."""

from __future__ import annotations

import itertools

import torch

from mac_kernels import AttnState, HeadLayout, RingPool
from mac_kernels.testing.scenario import poison_rings
from mac_sglang.staging import Staging
from mac_sglang.store import SnapshotService

LAYOUT = HeadLayout(num_qo_heads=2, num_kv_heads=1, head_dim=8)
LAYERS, SLOTS, RINGS, CAPACITY = 2, 4, 3, 3
STAMPS = itertools.count(1)


def make_pool(window: int) -> RingPool:
    pool = RingPool(
        num_rings=RINGS, num_layers=LAYERS, layout=LAYOUT, window=window, num_slots=SLOTS, dtype=torch.float32
    )
    poison_rings(pool)
    return pool


def make_service(window: int, **options) -> tuple[RingPool, SnapshotService]:
    pool = make_pool(window)
    return pool, SnapshotService(pool, CAPACITY * Staging(pool).nbytes, **options)


def ring_of(pool: RingPool, slot: int) -> int:
    return int(pool.slot_table[slot])


def write_row(pool: RingPool, slot: int, position: int) -> int:
    """A row whose every number is a stamp that no other row has."""
    stamp = next(STAMPS)
    value = torch.full((1, LAYOUT.num_qo_heads, LAYOUT.head_dim), float(stamp))
    where = torch.tensor([ring_of(pool, slot)]), torch.tensor([position])
    for layer in range(LAYERS):
        state = AttnState(value + layer, (value + layer)[..., 0], value + layer)
        pool.write(layer, *where, q_pre=value + layer, state=state, anchor=torch.tensor([[stamp]]))
    return stamp


def read_rows(pool: RingPool, slot: int) -> dict[int, int]:
    """Position -> stamp of every row, after checking that all fields of all layers agree and nothing is poisoned."""
    ring, rows = ring_of(pool, slot), {}
    at = {name: field[:, ring] for name, field in pool.fields.items()}
    for index in range(pool.window):
        position = int(at["pos"][0, index])
        assert at["pos"][:, index].tolist() == [position] * LAYERS
        if position < 0:
            continue
        assert position % pool.window == index
        stamp = int(at["anchor"][0, index, 0])
        for layer in range(LAYERS):
            for name in ("q_pre", "out", "kbar", "lse2"):
                assert bool((at[name][layer, index] == stamp + layer).all()), name
        rows[position] = stamp
    return rows
