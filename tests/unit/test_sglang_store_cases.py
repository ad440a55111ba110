"""Ring snapshots by content, case by case."""

from __future__ import annotations

import pytest
from stamped_rings import CAPACITY, make_pool, make_service, read_rows, write_row

from mac_kernels import ConfigError, RingPool
from mac_kernels.errors import MacError
from mac_sglang import staging
from mac_sglang.chain import TokenChain
from mac_sglang.staging import HostBuffer
from mac_sglang.store import SnapshotService


def run(pool: RingPool, service: SnapshotService, slot: int, rid: str, tokens: list[int], prefix: int) -> TokenChain:
    """Serve a request up to its prompt's end; returns the chain, which lives as long as the request."""
    chain = TokenChain((None,), tokens)
    pool.acquire(slot)
    service.note(rid, chain)
    service.restore(rid, slot, prefix)
    for position in range(max(prefix, len(tokens) - pool.window), len(tokens)):
        write_row(pool, slot, position)
    return chain


def test_a_branch_inside_a_snapshot_keeps_the_shared_rows_only():
    pool, service = make_service(16)
    tokens = list(range(100, 140))
    chain = run(pool, service, 0, "a", tokens, 0)
    assert service.save("a", 0, 40)
    branch = [*tokens[:33], 7, 8, 9]
    other = TokenChain((None,), branch)
    pool.acquire(1)
    service.note("b", other)
    assert service.restore("b", 1, 35) == 33 - 24
    assert sorted(read_rows(pool, 1)) == list(range(24, 33))
    assert read_rows(pool, 1).items() <= read_rows(pool, 0).items()
    assert len(chain) == 40


def test_rows_of_later_passes_are_not_even_stored():
    pool, service = make_service(16)
    chain = run(pool, service, 0, "a", list(range(40)), 0)
    assert service.save("a", 0, 37)
    (entry,) = service._entries.values()
    stored = service._staging.fields_of(entry.buffer.memory)["pos"]
    assert sorted(stored[0].tolist()) == [-1, -1, -1, *range(24, 37)]
    assert len(chain) == 40


def test_a_prefix_that_the_tree_has_lost_cuts_the_snapshot():
    pool, service = make_service(16)
    chain = run(pool, service, 0, "a", list(range(40)), 0)
    service.save("a", 0, 40)
    again = TokenChain((None,), list(range(41)))
    service.note("b", again)
    pool.acquire(1)
    assert service.restore("b", 1, 32) == 32 - 24
    assert sorted(read_rows(pool, 1)) == list(range(24, 32))
    assert len(chain) == 40


def test_rows_that_the_prompt_itself_replaces_are_not_fetched():
    pool, service = make_service(16)
    chain = run(pool, service, 0, "a", list(range(40)), 0)
    service.save("a", 0, 40)
    far = TokenChain((None,), list(range(60)))
    service.note("b", far)
    pool.acquire(1)
    assert service.restore("b", 1, 40) == 0
    assert (service.stats.hits, service.stats.misses) == (0, 0)
    assert len(chain) == 40


def test_two_living_requests_of_one_name_get_empty_rings():
    pool, service = make_service(16)
    first = run(pool, service, 0, "a", list(range(40)), 0)
    assert service.save("a", 0, 40)
    twin = TokenChain((None,), list(range(40)))
    service.note("a", twin)
    pool.acquire(1)
    assert service.restore("a", 1, 39) == 0
    assert not service.save("a", 1, 40)
    service.forget("a")
    service.note("a", twin)
    pool.acquire(1)
    assert service.restore("a", 1, 39) == 39 - 24
    assert len(first) == 40


def test_a_request_that_is_gone_leaves_nothing_behind():
    pool, service = make_service(16)
    chain = run(pool, service, 0, "a", list(range(40)), 0)
    assert len(chain) == 40
    del chain
    assert not service.save("a", 0, 40)
    assert len(service._chains) == 0


def test_a_slot_without_a_ring_is_neither_saved_nor_filled():
    pool, service = make_service(16)
    chain = run(pool, service, 0, "a", list(range(40)), 0)
    service.save("a", 0, 40)
    pool.release(0)
    assert not service.save("a", 0, 39)
    assert service.restore("a", 0, 40) == 0
    assert len(chain) == 40


def test_short_prefixes_are_not_saved():
    pool, service = make_service(16, min_tokens=50)
    chain = run(pool, service, 0, "a", list(range(60)), 0)
    assert not service.save("a", 0, 49)
    assert service.save("a", 0, 50)
    assert len(chain) == 60


def test_a_ring_with_hardly_a_row_takes_no_place_of_a_full_one():
    pool, service = make_service(16, min_rows=4)
    chain = run(pool, service, 0, "a", list(range(60)), 57)  # cached but for three tokens, without a snapshot
    assert not service.save("a", 0, 60)
    chain.extend(list(range(61)))
    assert service.save("a", 0, 61)
    assert service.stats.entries == 1


def test_a_copy_that_fails_costs_nothing(monkeypatch):
    pool, service = make_service(16)
    chain = run(pool, service, 0, "a", list(range(40)), 0)
    for attempt in range(2 * CAPACITY):
        monkeypatch.setattr(service._staging, "save", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            service.save("a", 0, 40 - attempt)
        monkeypatch.undo()
    assert service.stats.entries == 0 and len(service._buffers._free) == CAPACITY
    assert service.save("a", 0, 40)
    assert len(chain) == 40


def test_a_restore_that_fails_half_way_leaves_an_empty_ring(monkeypatch, caplog):
    pool, service = make_service(16)
    chain = run(pool, service, 0, "a", list(range(40)), 0)
    assert service.save("a", 0, 40)
    restore = service._staging.restore

    def half(*args):
        restore(*args)
        raise RuntimeError("interrupted")

    monkeypatch.setattr(service._staging, "restore", half)
    again = TokenChain((None,), list(range(41)))
    service.note("b", again)
    for _ in range(2):
        pool.acquire(1)
        assert service.restore("b", 1, 40) == 0
        assert read_rows(pool, 1) == {}
    assert (service.stats.failures, service.stats.hits) == (2, 0)
    assert sum("could not be restored" in record.message for record in caplog.records) == 1
    monkeypatch.undo()
    assert service.restore("b", 1, 40) == 16
    assert len(chain) == 40


def test_memory_that_cannot_be_had_bounds_the_store(monkeypatch, caplog):
    given = []

    def scarce(nbytes, device):
        if given:
            raise MacError("no memory")
        given.append(nbytes)
        return HostBuffer(nbytes, device)

    monkeypatch.setattr(staging, "HostBuffer", scarce)
    pool, service = make_service(16)
    assert [record.message for record in caplog.records] == ["no memory; ring snapshots go on with 1 of 3 buffers"]
    chain = run(pool, service, 0, "a", list(range(40)), 0)
    assert all(service.save("a", 0, up_to) for up_to in (40, 39, 38))
    assert (service.stats.entries, service.stats.evictions) == (1, 2)
    assert len(chain) == 40


def test_a_budget_below_one_ring_is_refused():
    pool = make_pool(16)
    with pytest.raises(ConfigError, match=r"holds no ring: one takes \d+ bytes; raise snapshot_memory_gb"):
        SnapshotService(pool, 1000)
