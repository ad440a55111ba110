"""Ring snapshots on a GPU: copies run beside the forward passes, and no byte of another row gets in."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from mac_kernels import HeadLayout, RingPool
from mac_sglang.chain import TokenChain
from mac_sglang.staging import Staging
from mac_sglang.store import SnapshotService

pytestmark = pytest.mark.gpu
WINDOW = 64
SLEEP = 20_000_000
"""Clock cycles that a stream is held up for, about 10 ms: far longer than any copy here."""


def make(entries: int, **changes) -> tuple[RingPool, SnapshotService]:
    options = {"num_rings": 4, "num_layers": 4, "layout": HeadLayout(8, 2, 64), "window": WINDOW, "num_slots": 4}
    pool = RingPool(**{**options, **changes}, device="cuda")
    return pool, SnapshotService(pool, entries * Staging(pool).nbytes)


@pytest.fixture
def forward() -> Iterator[torch.cuda.Stream]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.synchronize()


def fill(pool: RingPool, slot: int, value: int, end: int) -> None:
    """Write rows of the last ``W`` positions before ``end``, every number ``value``, on the current stream."""
    ring = pool._slots.place_of(slot)
    position = torch.arange(end - pool.window, end, dtype=torch.int32, device="cuda")
    for name, field in pool.fields.items():
        if name != "pos":
            field[:, ring].fill_(value)
    pool.fields["pos"][:, ring, position.long() % pool.window] = position


def values(pool: RingPool, slot: int) -> tuple[set[float], list[int]]:
    """Every number of the tagged rows, and the positions of these rows; the same in all layers."""
    ring = pool._slots.place_of(slot)
    pos = pool.fields["pos"][:, ring]
    assert bool((pos == pos[0]).all())
    rows = (pos[0] >= 0).nonzero().flatten()
    found = {
        float(number)
        for name, field in pool.fields.items()
        if name != "pos"
        for number in field[:, ring][:, rows].float().unique().tolist()
    }
    return found, sorted(pos[0, rows].tolist())


class Client:
    """Requests of one token value each, so that a stored ring is told by its numbers."""

    def __init__(self, pool: RingPool, service: SnapshotService) -> None:
        self.pool, self.service = pool, service
        self.chains: dict[int, TokenChain] = {}

    def admit(self, slot: int, value: int, length: int, prefix: int) -> int:
        rid = f"{slot}"
        self.service.forget(rid)
        self.chains[slot] = TokenChain((), [value] * length)
        self.service.note(rid, self.chains[slot])
        self.pool.acquire(slot)
        return self.service.restore(rid, slot, prefix)

    def save(self, slot: int, up_to: int) -> bool:
        return self.service.save(f"{slot}", slot, up_to)


def hold_up(stream: torch.cuda.Stream) -> None:
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)


@pytest.mark.parametrize("slow", ["nothing", "the copies", "the passes"])
def test_a_ring_may_be_overwritten_and_read_back_at_once(forward, slow):
    pool, service = make(8)
    client = Client(pool, service)
    side = service._staging._side
    assert side is not None
    for value in range(1, 7):
        slot = value % 2
        client.admit(slot, value, 200, 0)
        fill(pool, slot, value, 203)
        if slow == "the copies":
            hold_up(side)
        elif slow == "the passes":
            hold_up(forward)
            fill(pool, slot, value, 203)
        assert client.save(slot, 200)
        fill(pool, slot, 99, 264)
        client.admit(2, value, 210, 200)
        assert values(pool, 2) == ({float(value)}, list(range(139, 200)))
    for value in range(1, 7):
        client.admit(3, value, 210, 180)
        assert values(pool, 3) == ({float(value)}, list(range(139, 180)))


def test_an_evicted_buffer_is_not_reused_before_it_was_read(forward):
    pool, service = make(1)
    client = Client(pool, service)
    for value in range(1, 20):
        client.admit(0, value, 200, 0)
        fill(pool, 0, value, 200)
        assert client.save(0, 200)
        hold_up(forward)
        assert client.admit(1, value, 210, 200) > 0
        client.admit(0, value + 100, 200, 0)
        fill(pool, 0, value + 100, 200)
        assert client.save(0, 200), "takes the only buffer, which the restore above has yet to read"
        assert values(pool, 1)[0] == {float(value)}
    assert service.stats.evictions == 2 * 19 - 1


def test_a_random_mix_gives_what_was_saved(forward):
    rng = random.Random(0)
    pool, service = make(3)
    client = Client(pool, service)
    side = service._staging._side
    assert side is not None
    hits = 0
    for _ in range(300):
        slot, value, length = rng.randrange(4), rng.randrange(1, 8), rng.randrange(100, 300)
        if rng.random() < 0.1:
            hold_up(rng.choice([side, forward]))
        restored = client.admit(slot, value, length, rng.randrange(length - 40, length))
        numbers, rows = values(pool, slot)
        assert numbers <= {float(value)} and (len(rows) >= restored if restored else not rows)
        hits += restored > 0
        fill(pool, slot, value, length)
        client.save(slot, length)
        if rng.random() < 0.03:
            service.clear()
    assert hits > 30 and service.stats.evictions > 30


def test_nothing_waits_on_the_host(forward):
    pool, service = make(2)
    client = Client(pool, service)
    client.admit(0, 1, 200, 0)
    fill(pool, 0, 1, 200)
    assert client.save(0, 200) and client.save(0, 150)
    client.admit(1, 1, 210, 200)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(10 * SLEEP)
        begin = time.perf_counter()
        client.admit(1, 1, 210, 200)
        client.admit(0, 1, 199, 0)
        client.save(0, 199)
        assert time.perf_counter() - begin < 0.03, "the stream is busy for 100 ms"
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_pinned_within_the_budget_and_given_back():
    pool, service = make(2)
    client = Client(pool, service)
    for value in range(1, 5):
        client.admit(0, value, 200, 0)
        fill(pool, 0, value, 200)
        assert client.save(0, 200)
    buffers = [entry.buffer.memory for entry in service._entries.values()]
    assert len(buffers) == service._buffers.capacity == 2
    assert all(memory.is_pinned() for memory in buffers)
    assert sum(memory.numel() for memory in buffers) == service.stats.capacity_bytes
    del service, client
    gc.collect()
    assert not any(memory.is_pinned() for memory in buffers)


def timed(name: str, action: Callable[[], object], *streams: torch.cuda.Stream) -> None:
    """Print the host time of an action and, per stream, when it was through with it; medians of 7."""
    rows = []
    for _ in range(7):
        torch.cuda.synchronize()
        begin = [torch.cuda.Event(enable_timing=True) for _ in streams]
        end = [torch.cuda.Event(enable_timing=True) for _ in streams]
        for stream, event in zip(streams, begin, strict=True):
            event.record(stream)
        start = time.perf_counter()
        action()
        host = 1e3 * (time.perf_counter() - start)
        for stream, event in zip(streams, end, strict=True):
            event.record(stream)
        torch.cuda.synchronize()
        rows.append([host, *(first.elapsed_time(last) for first, last in zip(begin, end, strict=True))])
    medians = [sorted(column)[3] for column in zip(*rows, strict=True)]
    print(f"\n{name}: host {medians[0]:.3f} ms, streams {' '.join(f'{ms:.3f}' for ms in medians[1:])} ms", end="")


@pytest.mark.slow
def test_times_of_a_ring_of_8b_size(forward, capsys):
    begin = time.perf_counter()
    pool, service = make(4, num_layers=32, layout=HeadLayout(32, 8, 128), window=512, num_rings=2)
    started = 1e3 * (time.perf_counter() - begin)
    client = Client(pool, service)
    client.admit(0, 1, 4096, 0)
    fill(pool, 0, 1, 4096)
    side = service._staging._side
    assert side is not None
    lengths = iter(range(4096, 4000, -1))
    with capsys.disabled():
        size = service.stats.capacity_bytes / 4 / 2**20
        print(f"\none ring: {size:.1f} MiB; a pool and 4 pinned buffers: {started:.0f} ms", end="")
        timed("save (passes, copies)", lambda: client.save(0, next(lengths)), forward, side)
        timed("restore (passes)", lambda: client.admit(1, 1, 4097, 4080), forward)
        print()
    assert values(pool, 1) == ({1.0}, list(range(4080 - 512 + 16, 4080)))
