"""Ring snapshots beside SGLang's real prefix caches: what is restored, and that the trees do what they did."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.sglang
# before the imports that need it, hence E402 below
sglang_tree = pytest.importorskip("sglang_tree", exc_type=ImportError)

from sglang_tree import CORES, NEW, WINDOW, Request, Server, random_workload  # noqa: E402

from mac_sglang.radix import watch  # noqa: E402

core = pytest.mark.parametrize("core", CORES)


@core
@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_trees_do_what_they_did_and_rings_what_their_tokens_say(core: str, page_size: int, seed: int) -> None:
    plain, watched = (Server(core, page_size=page_size, watched=watched) for watched in (False, True))
    for server in (plain, watched):
        random_workload(server, seed, 40)
    assert watched.trace == plain.trace
    assert watched.service.stats.notice_failures == 0
    stats = watched.service.stats
    assert stats.saves > 20 and stats.hits > 5 and stats.drops > 0 and sum(watched.restored) > 50
    assert plain.service.stats.saves == 0


@core
def test_the_next_turn_of_a_chat_starts_warm(core: str) -> None:
    server = Server(core, tokens=400)
    prompt = list(range(100, 160))
    assert server.serve("turn 1", prompt, [1, 2, 3, 4]) == 0
    turn = [*prompt, 1, 2, 3, 4, 50, 51]
    assert server.serve("turn 2", turn, [5]) == WINDOW
    assert server.serve("other user", [9, *turn], [5]) == 0
    assert server.service.stats.hits == 1


@core
def test_an_answer_that_is_left_out_of_the_next_turn_leaves_the_prompts_rows(core: str) -> None:
    server = Server(core, tokens=400)
    prompt = list(range(100, 160))
    server.serve("think", prompt, list(range(30)))
    assert server.serve("without the thoughts", [*prompt, 77, 78], []) == WINDOW


@core
def test_a_shared_system_prompt_gives_its_rows(core: str) -> None:
    server = Server(core, tokens=400)
    system = list(range(100, 160))
    server.serve("a", [*system, 1, 2, 3], [])
    assert server.serve("b", [*system, 4, 5], []) == WINDOW - 3


@core
@pytest.mark.parametrize("extra_key", ["other", "mac:exact", "user|mac:exact"])
def test_namespaces_share_nothing_and_exact_requests_store_nothing(core: str, extra_key: str) -> None:
    server = Server(core, tokens=400)
    prompt = list(range(100, 160))
    server.serve("a", prompt, [1])
    saves = server.service.stats.saves
    assert server.serve("b", [*prompt, 1, 2], [3], extra_key) == 0
    again = server.serve("c", [*prompt, 1, 2, 3, 4], [], extra_key)
    exact = "exact" in extra_key
    assert again == (0 if exact else WINDOW)
    assert (server.service.stats.saves == saves) == exact


@core
@pytest.mark.parametrize(
    "name", [pytest.param("cache_salt", marks=pytest.mark.skipif(not NEW, reason="0.5.17 has none")), "lora_id"]
)
def test_requests_of_another_salt_or_adapter_get_no_rows(core: str, name: str) -> None:
    server = Server(core, tokens=800)
    prompt = list(range(100, 160))
    server.serve("a", prompt, [1])
    for value in ("one", "other"):
        assert server.serve(f"{value} 1", [*prompt, 1, 2], [], **{name: value}) == 0
        assert server.serve(f"{value} 2", [*prompt, 1, 2, 3], [], **{name: value}) > 0
    assert server.serve("b", [*prompt, 1, 4], []) > 0


@core
def test_chunks_of_a_prompt_are_not_saved_one_by_one(core: str) -> None:
    server = Server(core, tokens=400)
    server.serve("a", list(range(100, 180)), [], chunk=8)
    assert (server.service.stats.saves, server.service.stats.repeats) == (1, 1)


@core
def test_a_retracted_request_gets_its_rows_back(core: str) -> None:
    server = Server(core, tokens=400)
    request = Request("a", list(range(100, 160)), None)
    server.prefill(request, server.admit(request))
    server.decode(request, [1, 2, 3])
    server.end(request, keep=False)
    request.full_untruncated_fill_ids = array("q", request.tokens())
    assert server.admit(request) == 60
    assert server.restored[-1] == WINDOW
    server.prefill(request, 60)
    server.decode(request, [4])
    server.end(request)
    assert server.serve("b", [*request.tokens(), 9], []) == WINDOW


@core
def test_eviction_drops_what_ended_in_the_leaf(core: str) -> None:
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    server = Server(core, tokens=400)
    server.serve("a", list(range(100, 160)), [])
    server.serve("b", list(range(200, 260)), [])
    assert server.service.stats.entries == 2
    server.tree.evict(EvictParams(num_tokens=60))
    assert server.service.stats.entries == 1
    server.tree.reset()
    assert server.service.stats.entries == 0


@core
def test_a_store_that_fails_never_reaches_the_tree(core: str, monkeypatch, caplog) -> None:
    plain, broken = (Server(core, watched=watched) for watched in (False, True))
    for name in ("note", "save", "drop", "forget", "clear"):
        monkeypatch.setattr(broken.service, name, lambda *args, **kwargs: 1 / 0)
    for server in (plain, broken):
        random_workload(server, 0, 20)
        server.note("before reset", 0)
    assert broken.trace == plain.trace
    assert set(broken.restored) == {0}
    broken.tree.reset()
    assert broken.service.stats.notice_failures > 40
    assert sum("ring snapshot failed" in record.message for record in caplog.records) == 1


@core
def test_rings_are_saved_after_the_tokens_of_a_pass_are_sent(core: str) -> None:
    server = Server(core, tokens=400)
    request = Request("a", list(range(100, 160)), None)
    matched = server.admit(request)
    with server.results():
        server.extend(request, matched, 60)
        request.fill_end = 60
        if NEW:
            server.tree.checkpoint(request, up_to=60)
        else:
            server.tree.cache_unfinished_req(request, chunked=False)
        assert server.service.stats.saves == 0
    assert server.service.stats.saves == 1
    server.end(request)
    assert server.serve("b", list(range(100, 170)), []) > 0


@core
def test_a_request_without_shareable_kv_is_not_saved(core: str) -> None:
    server = Server(core, tokens=400)
    request = Request("a", list(range(60)), None)
    server.tree.ring_notices.matched(SimpleNamespace(token_ids=[], extra_key=None), request)
    server.tree.ring_notices.computed(request, 60, finished=True)
    assert (server.service.stats.saves, server.service.stats.notice_failures) == (0, 0)


@core
def test_watching_twice_replaces_the_store(core: str) -> None:
    server, other = Server(core), Server(core)
    before = server.tree.match_prefix
    watch(server.tree, other.service)
    assert server.tree.match_prefix is before
    server.serve("a", list(range(60)), [])
    assert server.service.stats.saves == 0
    assert server.tree.ring_notices.service is other.service


def test_a_tree_that_shares_nothing_is_left_alone() -> None:
    server = Server(CORES[0], watched=False)
    server.tree.disable = True
    watch(server.tree, server.service)
    assert not hasattr(server.tree, "ring_notices") and "match_prefix" not in vars(server.tree)


def test_what_is_read_of_a_request_exists() -> None:
    import inspect

    from sglang.srt.managers.schedule_batch import Req

    source = inspect.getsource(Req.__init__)
    for name in (
        "rid",
        "origin_input_ids",
        "output_ids",
        "full_untruncated_fill_ids",
        "extra_key",
        "lora_id",
        "last_node",
    ):
        assert f"self.{name} " in source or f"self.{name}:" in source, f"Req.{name} is gone"
    assert Req.__hash__ is object.__hash__ and Req.__eq__ is object.__eq__
    assert "__weakref__" in dir(Req)


def test_the_version_under_test_is_the_one_that_the_driver_knows() -> None:
    from mac_sglang import compat

    kind: Any = compat.version()
    assert (kind > (0, 5, 17)) == NEW
