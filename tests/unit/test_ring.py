"""The ring pool: who owns what, tags, wrap-around, snapshots, bytes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mac_kernels import AttnState, ConfigError, HeadLayout, RingPool, SnapshotError
from mac_kernels.testing.scenario import poison_rings

LAYOUT = HeadLayout(num_qo_heads=4, num_kv_heads=2, head_dim=8)
W = 5


def make_pool(**changes) -> RingPool:
    options = {"num_rings": 2, "num_layers": 3, "layout": LAYOUT, "window": W, "num_slots": 4, "dtype": torch.float32}
    pool = RingPool(**{**options, **changes})
    poison_rings(pool)
    return pool


def write(pool: RingPool, rings: list[int], positions: list[int], *, layer: int = 0) -> None:
    """Rows whose every number is their position."""
    position = torch.tensor(positions)
    value = position[:, None, None].float().expand(-1, 4, 8)
    state = AttnState(value, value[..., 0], value)
    pool.write(layer, torch.tensor(rings), position, q_pre=value, state=state, anchor=position[:, None].expand(-1, 2))


def tags(pool: RingPool, ring: int, *, layer: int = 0) -> list[int]:
    return pool.fields["pos"][layer, ring].tolist()


@given(st.lists(st.integers(0, 60), unique=True, max_size=30))
def test_rows_lie_at_their_position_modulo_window(positions):
    pool = make_pool()
    ring = pool.acquire(1)
    expected = [-1] * W
    for position in positions:
        write(pool, [ring], [position])
        expected[position % W] = position
    assert tags(pool, ring) == expected
    rows = pool.rows(0, torch.tensor([ring]))
    assert rows.pos[0].tolist() == expected
    for row, position in enumerate(expected):
        if position >= 0:
            assert bool((rows.q_pre[0, row] == position).all()) and bool((rows.anchor[0, row] == position).all())
            state = pool.state(0, torch.tensor([ring]), torch.full((1, 4), row))
            assert all(bool((field == position).all()) for field in state)


def test_writes_touch_one_layer_and_skip_missing_rings():
    pool = make_pool()
    ring = pool.acquire(0)
    other = pool.acquire(1)
    write(pool, [ring, -1], [7, 8], layer=1)
    assert tags(pool, ring, layer=1) == [-1, -1, 7, -1, -1]
    assert tags(pool, ring) == tags(pool, other) == tags(pool, other, layer=1) == [-1] * W


def test_rows_without_a_ring_are_empty():
    pool = make_pool()
    write(pool, [pool.acquire(0)], [3])
    rows = pool.rows(0, torch.tensor([-1]))
    assert rows.pos.tolist() == [[-1] * W]
    state = pool.state(0, torch.tensor([-1]), torch.zeros(1, 4, dtype=torch.int64))
    assert bool(torch.isneginf(state.lse2).all()) and bool((state.out == 0).all()) and bool((state.kbar == 0).all())
    nothing = pool.state(0, torch.tensor([0]), torch.full((1, 4), -1))
    assert bool(torch.isneginf(nothing.lse2).all()) and bool((nothing.out == 0).all())


def test_acquire_empties_and_counts_down():
    pool = make_pool()
    ring = pool.acquire(0)
    write(pool, [ring], [1])
    assert pool.acquire(0, generation=5) == ring
    assert tags(pool, ring) == [-1] * W
    assert pool.free_rings == 1
    assert pool.acquire(3) != ring
    assert pool.free_rings == 0
    assert pool.acquire(2) == -1
    assert pool.slot_table.tolist() == [ring, -1, -1, 1 - ring]


def test_lookup_wants_the_same_generation():
    pool = make_pool()
    ring = pool.acquire(3, generation=7)

    def lookup(slot: int, generation: int) -> int:
        return int(pool.lookup(torch.tensor([slot]), torch.tensor([generation])))

    assert lookup(3, 7) == ring
    assert [lookup(3, 6), lookup(3, 8), lookup(1, 7), lookup(-1, 7), lookup(4, 7)] == [-1] * 5
    pool.release(3)
    assert lookup(3, 7) == -1


def test_release_and_reset():
    pool = make_pool()
    pool.release(1)
    ring = pool.acquire(1)
    write(pool, [ring], [2])
    pool.release(1)
    assert pool.free_rings == 2 and pool.slot_table.tolist() == [-1] * 4
    pool.acquire(0)
    pool.acquire(1)
    write(pool, [0, 1], [3, 4])
    pool.reset()
    assert pool.free_rings == 2 and pool.slot_table.tolist() == [-1] * 4
    assert bool((pool.fields["pos"] == -1).all())


class Ownership(RuleBasedStateMachine):
    """Any order of acquire and release leaves every ring with at most one slot, and table and free list in step."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool(num_rings=3, num_layers=1, num_slots=5)
        self.model: dict[int, int] = {}

    @rule(slot=st.integers(0, 4), generation=st.integers(0, 3))
    def acquire(self, slot, generation):
        full = slot not in self.model and len(self.model) == 3
        ring = self.pool.acquire(slot, generation)
        assert (ring == -1) == full
        if ring >= 0:
            self.model[slot] = generation
            assert tags(self.pool, ring) == [-1] * W
            write(self.pool, [ring], [slot])

    @rule(slot=st.integers(0, 4))
    def release(self, slot):
        self.pool.release(slot)
        self.model.pop(slot, None)

    @rule()
    def reset(self):
        self.pool.reset()
        self.model.clear()

    @invariant()
    def owners_are_distinct(self):
        table = self.pool.slot_table.tolist()
        held = [ring for ring in table if ring >= 0]
        assert len(set(held)) == len(held) == len(self.model) == 3 - self.pool.free_rings
        for slot in range(5):
            for generation in range(4):
                ring = int(self.pool.lookup(torch.tensor([slot]), torch.tensor([generation])))
                assert ring == (table[slot] if self.model.get(slot) == generation else -1)
            if slot in self.model:
                assert slot in tags(self.pool, table[slot])


TestOwnership = Ownership.TestCase
TestOwnership.settings = settings(max_examples=30)


@pytest.mark.parametrize("up_to", [None, 0, 8, 9, 100])
def test_snapshot_and_restore_keep_rows_before_a_position(up_to):
    pool = make_pool()
    ring = pool.acquire(0)
    for position in range(4, 11):
        write(pool, [ring], [position])
        write(pool, [ring], [position], layer=2)
    original = tags(pool, ring)
    kept = [p if p >= 0 and (up_to is None or p < up_to) else -1 for p in original]

    snapshot = pool.snapshot(0, up_to=up_to)
    assert tags(pool, ring) == original, "taking a snapshot changed the ring"
    target = pool.restore(3, snapshot, generation=9)
    assert target not in (ring, -1)
    assert tags(pool, target) == tags(pool, target, layer=2) == kept
    assert tags(pool, target, layer=1) == [-1] * W
    assert int(pool.lookup(torch.tensor([3]), torch.tensor([9]))) == target
    for name, field in pool.fields.items():
        if name != "pos":
            torch.testing.assert_close(field[:, target], field[:, ring], equal_nan=True, atol=0, rtol=0)

    again = pool.restore(3, pool.snapshot(0), up_to=up_to)
    assert tags(pool, again) == kept


def test_snapshots_are_copies():
    pool = make_pool()
    ring = pool.acquire(0)
    write(pool, [ring], [1])
    snapshot = pool.snapshot(0).to("cpu")
    write(pool, [ring], [6])
    pool.release(0)
    pool.restore(2, snapshot)
    assert tags(pool, int(pool.slot_table[2])) == [-1, 1, -1, -1, -1]
    assert snapshot.nbytes == pool.nbytes // 2


def test_restore_without_a_free_ring_changes_nothing():
    pool = make_pool()
    write(pool, [pool.acquire(0), pool.acquire(1)], [3, 4])
    before = {name: field.clone() for name, field in pool.fields.items()}
    assert pool.restore(2, pool.snapshot(0)) == -1
    assert pool.slot_table.tolist()[2] == -1
    for name, field in pool.fields.items():
        torch.testing.assert_close(field, before[name], equal_nan=True, atol=0, rtol=0)


def test_snapshot_of_another_pool_is_refused_with_every_reason():
    pool = make_pool()
    pool.acquire(0)
    snapshot = pool.snapshot(0)
    other = make_pool(layout=HeadLayout(2, 1, 8), window=6, num_layers=1, correction=False, dtype=torch.bfloat16)
    with pytest.raises(SnapshotError) as error:
        other.restore(1, dataclasses.replace(snapshot, version=99))
    for reason in ("format version 99", "layout HeadLayout", "window 5", "layers [3]", "row fields", "empty ring"):
        assert reason in str(error.value)
    assert other.slot_table.tolist() == [-1] * 4 and other.free_rings == 2


def test_a_budget_buys_whole_rings():
    each = RingPool.bytes_per_ring(num_layers=2, layout=LAYOUT, window=W, dtype=torch.float32)
    pool = RingPool.from_budget(3 * each - 1, num_layers=2, layout=LAYOUT, window=W, dtype=torch.float32, num_slots=9)
    assert (pool.num_rings, pool.num_slots, pool.nbytes) == (2, 9, 2 * each)
    with pytest.raises(ConfigError, match=rf"budget of {each - 1} bytes .* one takes {each} bytes; raise the budget"):
        RingPool.from_budget(each - 1, num_layers=2, layout=LAYOUT, window=W, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("correction", [True, False])
@pytest.mark.parametrize("sketch_dim", [None, 0, 4, 16])
def test_bytes_per_ring_is_what_a_ring_takes(dtype, correction, sketch_dim):
    options = {"layout": LAYOUT, "window": W, "dtype": dtype, "correction": correction, "sketch_dim": sketch_dim}
    pool = RingPool(num_rings=3, num_layers=2, **options)
    assert 3 * RingPool.bytes_per_ring(num_layers=2, **options) == pool.nbytes
    assert pool.nbytes == sum(field.untyped_storage().nbytes() for field in pool.fields.values())


def test_documented_size_of_a_ring():
    # per row and head: query, output and mean key of 128 x 2 bytes, one fp32 lse2; then tags and the sketch
    size = RingPool.bytes_per_ring(num_layers=1, layout=HeadLayout(32, 8, 128), window=512)
    assert size == 512 * (32 * (3 * 256 + 4) + 4 + 8 * 4 + 8 * (128 + 4))
