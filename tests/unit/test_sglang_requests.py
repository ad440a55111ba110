"""Rings follow requests, whatever a scheduler does with its rows."""

from __future__ import annotations

import functools
import random
from collections import Counter

import pytest
import torch

from mac_kernels import HeadLayout, RingPool
from mac_kernels.types import AttnState
from mac_sglang.mac_serving import worth_storing
from mac_sglang.requests import BatchRow, RequestTable

LAYOUT = HeadLayout(num_qo_heads=2, num_kv_heads=1, head_dim=4)
WINDOW, WORTHWHILE, ROWS = 4, 10, 5


class Pool:
    """SGLang's request pool, as far as it is used: row 0 is scratch, and 0.5.17 hands out what is free the longest."""

    def __init__(self, rows: int = ROWS, *, oldest_first: bool = False) -> None:
        self.free_slots = list(range(1, rows + 1))
        self.req_generation = torch.zeros(rows + 1, dtype=torch.int64)
        self._next = 0 if oldest_first else -1

    def give(self) -> int:
        slot = self.free_slots.pop(self._next)
        self.req_generation[slot] += 1
        return slot


class World:
    def __init__(
        self,
        num_rings: int = ROWS,
        window: int = WINDOW,
        latest: int | None = None,
        rows: int = ROWS,
        *,
        oldest_first: bool = False,
    ) -> None:
        self.pool = Pool(rows, oldest_first=oldest_first)
        self.rings = RingPool(num_rings=num_rings, num_layers=1, layout=LAYOUT, window=window, num_slots=rows + 1)
        self.reasons: Counter[str] = Counter()
        self.table = RequestTable(
            self.rings, self.pool, what="ring", worthwhile=WORTHWHILE, latest=latest, reasons=self.reasons,
            wanted=functools.partial(worth_storing, window=window),
        )  # fmt: skip
        self.restored: list[tuple[str, int, int]] = []
        self.steady_passes = 0

    def begin(self, *rows: BatchRow) -> list[int]:
        if all(not row.extend for row in rows) and self.table.steady([row.slot for row in rows]):
            self.steady_passes += 1
            return []
        return self.table.begin(rows, self.restore)

    def restore(self, rid: str, slot: int, prefix_len: int) -> int:
        self.restored.append((rid, slot, prefix_len))
        return 0

    def ring_of(self, slot: int) -> int:
        return int(self.rings.lookup(torch.tensor([slot]), torch.zeros(1, dtype=torch.int64)))

    def write(self, slot: int, position: int) -> None:
        ring = torch.tensor([self.ring_of(slot)])
        state = AttnState(*(torch.zeros(1, *shape) for shape in ((2, 4), (2,), (2, 4))))
        here = torch.tensor([position])
        self.rings.write(0, ring, here, q_pre=torch.ones(1, 2, 4), state=state, anchor=here[:, None])

    def positions(self, slot: int) -> list[int]:
        return sorted(p for p in self.rings.fields["pos"][0, self.ring_of(slot)].tolist() if p >= 0)


def prefill(slot: int, rid: str, tokens: int, end: int | None = None, *, prefix: int = 0, exact: str = "") -> BatchRow:
    return BatchRow(slot, rid, tokens, tokens if end is None else end, prefix, extend=True, exact=exact)


def decode(slot: int, rid: str, tokens: int, *, exact: str = "") -> BatchRow:
    return BatchRow(slot, rid, tokens, tokens, tokens - 1, extend=False, exact=exact)


def test_request_gets_a_ring_when_its_context_is_worth_it() -> None:
    world = World()
    slot = world.pool.give()
    world.begin(prefill(slot, "a", WORTHWHILE - 2))
    assert world.ring_of(slot) < 0
    world.begin(decode(slot, "a", WORTHWHILE - 1))
    assert world.ring_of(slot) < 0
    world.begin(decode(slot, "a", WORTHWHILE))
    assert world.ring_of(slot) >= 0
    assert world.restored == [("a", slot, WORTHWHILE - 1)]


def test_whole_prompt_counts_at_its_first_chunk_and_only_the_last_chunks_are_stored() -> None:
    world = World()
    slot = world.pool.give()
    assert not world.begin(prefill(slot, "a", 30, 8))
    assert world.ring_of(slot) >= 0
    assert not world.begin(prefill(slot, "a", 30, 26, prefix=8))
    assert world.begin(prefill(slot, "a", 30, 27, prefix=26))
    assert world.begin(prefill(slot, "a", 30, prefix=27))
    assert len(world.restored) == 1


def test_a_handful_of_queries_is_not_stored() -> None:
    world = World(window=128)
    slot = world.pool.give()
    assert world.begin(prefill(slot, "a", 200, 196)) == [0]
    assert world.begin(prefill(slot, "a", 200, prefix=197)) == []
    assert world.begin(prefill(slot, "a", 200, prefix=196)) == [0]


def test_row_that_was_given_out_again_starts_empty() -> None:
    world = World()
    slot = world.pool.give()
    world.begin(prefill(slot, "a", 20))
    world.write(slot, 19)
    world.pool.free_slots.append(slot)
    assert world.pool.give() == slot
    world.begin(prefill(slot, "a", 20))  # the same name and row: only the generation tells them apart
    assert world.positions(slot) == []


def test_ring_of_a_row_that_nobody_in_the_batch_names_is_taken_when_the_row_is_given_out_again() -> None:
    world = World()
    slot, other = world.pool.give(), world.pool.give()
    world.begin(prefill(slot, "a", 20), prefill(other, "b", 20))
    world.pool.free_slots.append(slot)
    assert world.pool.give() == slot  # to something that is no request, such as a beam
    world.begin(decode(other, "b", 21))
    assert world.ring_of(slot) < 0
    assert world.ring_of(other) >= 0


def test_without_a_free_ring_a_request_is_exact_until_one_is_free() -> None:
    world = World(num_rings=1)
    first, second = world.pool.give(), world.pool.give()
    world.begin(prefill(first, "a", 20))
    world.begin(prefill(second, "b", 20))
    world.begin(decode(first, "a", 21), decode(second, "b", 21))
    assert world.ring_of(second) < 0
    assert world.reasons == {"no free ring": 1}
    world.pool.free_slots.append(first)
    world.begin(decode(second, "b", 22))
    assert world.ring_of(second) >= 0
    assert world.ring_of(first) < 0


@pytest.mark.parametrize("oldest_first", [False, True])
def test_every_request_gets_a_ring_where_as_many_rings_are_free_as_requests_run(oldest_first: bool) -> None:
    world = World(num_rings=4, rows=12, oldest_first=oldest_first)
    running: list[int] = []
    for number in range(60):
        if len(running) == 2:
            world.pool.free_slots.append(running.pop(0))
        running.append(world.pool.give())
        world.begin(prefill(running[-1], f"{number}", 20))
        world.begin(*(decode(slot, f"{number - len(running) + 1 + at}", 21) for at, slot in enumerate(running)))
        assert all(world.ring_of(slot) >= 0 for slot in running)
    assert not world.reasons


def test_exact_request_gets_no_ring_and_is_counted_once() -> None:
    world = World()
    slot = world.pool.give()
    for tokens in (20, 21, 22):
        world.begin(decode(slot, "a", tokens, exact="asked for exact"))
    assert world.ring_of(slot) < 0
    assert world.reasons == {"asked for exact": 1}


def test_scratch_row_never_owns_a_ring() -> None:
    world = World()
    world.begin(decode(0, "pad", 50))
    assert world.ring_of(0) < 0
    assert world.rings.free_rings == world.rings.num_rings


def test_clear_leaves_nothing_and_requests_start_again() -> None:
    world = World()
    slot = world.pool.give()
    world.begin(prefill(slot, "a", 20))
    world.write(slot, 19)
    world.table.clear()
    assert world.rings.free_rings == world.rings.num_rings
    world.begin(decode(slot, "a", 21))
    assert world.positions(slot) == []


def test_passes_of_the_same_requests_are_steady_until_something_changes() -> None:
    world = World()
    short, long = world.pool.give(), world.pool.give()
    world.begin(prefill(short, "a", 5), prefill(long, "b", 20))
    for step in range(1, 8):
        world.begin(decode(short, "a", 5 + step), decode(long, "b", 20 + step))
        assert (world.ring_of(short) >= 0) == (5 + step >= WORTHWHILE)
    assert world.steady_passes == 5
    for step in range(8, 10):
        world.begin(decode(short, "a", 5 + step), decode(long, "b", 20 + step))
    assert world.steady_passes == 7
    world.begin(decode(long, "b", 30))
    assert world.steady_passes == 7


@pytest.mark.parametrize("seed", range(20))
def test_no_row_ever_shows_what_another_request_stored(seed: int) -> None:
    draw, world = random.Random(seed), World(num_rings=3, oldest_first=seed % 2 == 0)
    running: dict[int, tuple[str, int, int]] = {}  # slot -> rid, tokens, first token written
    for step in range(200):
        if world.pool.free_slots and draw.random() < 0.4:
            slot = world.pool.give()
            running[slot] = (draw.choice("abc"), draw.randrange(5, 40), 1000 * (step + 1))
        for slot in [slot for slot in running if draw.random() < 0.15]:  # finished, aborted or retracted
            del running[slot]
            world.pool.free_slots.append(slot)
        if draw.random() < 0.03:
            world.table.clear()
        batch = [slot for slot in running if draw.random() < 0.8]
        world.begin(*(decode(slot, *running[slot][:2]) for slot in batch))
        for slot in batch:
            rid, tokens, first = running[slot]
            if world.ring_of(slot) >= 0:
                assert all(first <= position < first + tokens for position in world.positions(slot))
                world.write(slot, first + tokens)
            running[slot] = (rid, tokens + 1, first)
