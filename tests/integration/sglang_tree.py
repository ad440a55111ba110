"""Serves token lists on a real prefix cache of SGLang the way its scheduler does, without a model."""

from __future__ import annotations

import contextlib
import os
import random
import zlib
from array import array
from types import SimpleNamespace
from typing import Any

import torch

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "0")

import torchvision_ops  # noqa: F401  # imported for what it registers
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from mac_kernels import AttnState, HeadLayout, RingPool
from mac_sglang.radix import watch
from mac_sglang.staging import Staging
from mac_sglang.store import SnapshotService

NEW = hasattr(RadixCache, "checkpoint") or not hasattr(RadixCache, "cache_finished_req")
WINDOW, LAYOUT = 16, HeadLayout(2, 1, 8)
CORES = ("rust", "python", "radix") if NEW else ("radix", "unified")


class Request:
    """What the trees read of SGLang's request."""

    def __init__(self, rid: str, tokens: list[int], extra_key: str | None) -> None:
        self.rid, self.extra_key, self.cache_salt, self.lora_id = rid, extra_key, None, None
        self.origin_input_ids, self.output_ids = array("q", tokens), array("q")
        self.full_untruncated_fill_ids = array("q", tokens)
        self.session = self.session_id = self.kv_rotation_base = self.lock = self.last_node = None
        self.priority, self.ended = 0, False
        self.req_pool_idx: int | None = None
        self.cache_protected_len = 0
        self.inflight_middle_chunks = 1
        self.fill_end = 0
        self.swa_uuid_for_lock = None
        self.skip_lock_node_ids: dict[object, object] = {}
        self.swa_prefix_lock_released = False
        if NEW:
            from sglang.srt.managers.schedule_batch import ReqKvInfo

            del self.req_pool_idx
            self.kv = ReqKvInfo()
        else:
            # the unified tree of 0.5.17 keeps part of the state in a record
            self.kv = SimpleNamespace(swa_evicted_seqlen=0, kv_allocated_len=1)

    def finished(self) -> bool:
        return self.ended

    def get_fill_ids(self) -> array[int]:
        return self.full_untruncated_fill_ids[: self.fill_end]

    @property
    def row(self) -> int:
        row = self.kv.req_pool_idx if NEW else self.req_pool_idx
        assert row is not None
        return row

    @property
    def namespace(self) -> str:
        return self.extra_key or ""

    def tokens(self) -> list[int]:
        return [*self.origin_input_ids, *self.output_ids]


def stamp(namespace: str, tokens: list[int], position: int) -> int:
    """What a row at a position must hold: it follows from the tokens up to there."""
    return zlib.crc32(repr((namespace, tokens[: position + 1])).encode()) & 0xFFFFF


class Server:
    """A tree of the given core over pools of ``tokens`` token slots; ``watched`` adds the snapshot store."""

    def __init__(self, core: str, *, page_size: int = 1, tokens: int = 160, watched: bool = True, entries: int = 24):
        self.page = page_size
        self.pool = ReqToTokenPool(8, 512, "cpu", False)
        if page_size == 1:
            self.allocator = TokenToKVPoolAllocator(tokens, torch.float32, "cpu", None, False)
        else:
            self.allocator = PagedTokenToKVPoolAllocator(tokens, page_size, torch.float32, "cpu", None, False)
        self.tree = make_tree(core, self.pool, self.allocator, page_size)
        self.rings = RingPool(num_rings=8, num_layers=1, layout=LAYOUT, window=WINDOW, num_slots=9, dtype=torch.float32)
        for field in self.rings.fields.values():
            field.fill_(torch.nan if field.dtype.is_floating_point else -2)
        self.rings.fields["pos"].fill_(-1)
        budget = entries * Staging(self.rings).nbytes
        self.service = SnapshotService(self.rings, budget)
        if watched:
            self.tree = watch(self.tree, self.service)
        self.trace: list[tuple[Any, ...]] = []
        self.restored: list[int] = []

    def admit(self, request: Request) -> int:
        """Match the prefix, lock it, take a row and give it a ring; returns the cached tokens."""
        tokens = request.full_untruncated_fill_ids
        salt = {"cache_salt": request.cache_salt} if request.cache_salt else {}
        key = RadixKey(tokens, request.extra_key, limit=len(tokens) - 1, **salt)
        result = self.tree.match_prefix(MatchPrefixParams(key=key, req=request))
        indices = self.tree.path_device_indices(result.last_device_node) if NEW else result.device_indices
        matched = len(indices)
        request.last_node = result.last_device_node
        if NEW:
            request.lock = self.tree.lock(request.last_node)
            request.kv.cache_protected_len = matched
        else:
            self.tree.inc_lock_ref(request.last_node)
            request.cache_protected_len = matched
        self.pool.alloc([request])
        self.pool.write((request.row, slice(0, matched)), indices.to(torch.int32))
        self.allocated = matched
        self.rings.acquire(request.row)
        self.restored.append(self.service.restore(request.rid, request.row, matched))
        self.check_ring(request)
        self.note("admit", matched)
        return matched

    def check_ring(self, request: Request) -> None:
        """Every row of the request's ring is the one that follows from its own tokens."""
        tokens, ring = request.tokens(), int(self.rings.slot_table[request.row])
        for position, value in zip(
            self.rings.fields["pos"][0, ring].tolist(), self.rings.fields["q_pre"][0, ring], strict=True
        ):
            if position >= 0:
                assert bool((value == stamp(request.namespace, tokens, position)).all()), (position, tokens)

    def extend(self, request: Request, start: int, end: int) -> None:
        """Token slots and ring rows for positions ``[start, end)``."""
        held = -(-start // self.page) * self.page
        need = -(-end // self.page) * self.page - held
        if need > 0:
            short = need - self.allocator.available_size()
            if short > 0:
                self.tree.evict(EvictParams(num_tokens=short))
            slots = self.allocator.alloc(need)
            assert slots is not None, "the pool is too small for the workload"
            self.pool.write((request.row, slice(held, held + need)), slots.to(torch.int32))
        ring = torch.tensor([int(self.rings.slot_table[request.row])])
        for position in range(max(start, end - WINDOW), end):
            value = torch.full((1, 2, 8), float(stamp(request.namespace, request.tokens(), position)))
            state = AttnState(value, value[..., 0], value)
            where = torch.tensor([position])
            self.rings.write(0, ring, where, q_pre=value, state=state, anchor=where[:, None])

    def prefill(self, request: Request, matched: int, chunk: int | None = None) -> None:
        end = len(request.full_untruncated_fill_ids)
        stops = [end] if chunk is None else [*range(matched + chunk, end, chunk), end]
        for start, stop in zip([matched, *stops], stops, strict=False):
            self.extend(request, start, stop)
            request.fill_end = stop
            with self.results():
                if NEW:
                    self.tree.checkpoint(request, up_to=stop)
                else:
                    self.tree.cache_unfinished_req(request, chunked=stop != end)
            self.note("prefill", stop)

    def decode(self, request: Request, tokens: list[int]) -> None:
        for token in tokens:
            request.output_ids.append(token)
            self.extend(request, len(request.tokens()) - 1, len(request.tokens()))

    def end(self, request: Request, *, keep: bool = True) -> None:
        """Finish (``keep``) or retract: give the row back."""
        length, row = len(request.tokens()), request.row
        request.ended = keep
        with self.results() if keep else contextlib.nullcontext():
            self._release(request, length, keep=keep)
        self.rings.release(row)
        self.note("end", length)

    def results(self) -> contextlib.AbstractContextManager[None]:
        """As while SGLang processes the results of a pass."""
        notices = getattr(self.tree, "ring_notices", None)
        return contextlib.nullcontext() if notices is None else notices.postponed()

    def _release(self, request: Request, length: int, *, keep: bool) -> None:
        if NEW:
            request.full_untruncated_fill_ids = array("q", request.tokens())
            if keep:
                self.tree.checkpoint(request, up_to=length)
            self.tree.free_kv_row(request.kv, [(request.kv.cache_protected_len, length)])
            self.tree.unlock(request.lock)
            self.tree.on_release(request, checkpointed=keep)
            self.pool.free(request)
            request.kv.cache_protected_len = 0
        else:
            self.tree.cache_finished_req(request, is_insert=keep, kv_len_to_handle=length)
            self.pool.free(request)

    def note(self, what: str, value: int) -> None:
        sizes = self.tree.evictable_size(), self.tree.protected_size(), self.tree.total_size()
        self.trace.append((what, value, *sizes, self.allocator.available_size()))

    def serve(
        self,
        rid: str,
        tokens: list[int],
        answer: list[int],
        extra_key: str | None = None,
        *,
        chunk: int | None = None,
        **attributes: str,
    ) -> int:
        """One request, with these attributes, from start to finish; returns the rows that its ring began with."""
        request = Request(rid, tokens, extra_key)
        vars(request).update(attributes)
        self.prefill(request, self.admit(request), chunk)
        self.decode(request, answer)
        self.end(request)
        return self.restored[-1]


def make_tree(core: str, pool: Any, allocator: Any, page_size: int) -> Any:
    """A tree of SGLang: ``radix``, or a unified one: that of 0.5.17, or of later versions in ``rust`` or ``python``."""
    params = CacheInitParams(
        disable=False, req_to_token_pool=pool, token_to_kv_pool_allocator=allocator, page_size=page_size
    )
    if core == "radix":
        return RadixCache(params)
    from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    params.tree_components = (ComponentType.FULL,)
    if NEW:
        params.tree_core_backend = core
    return UnifiedRadixCache(params)


def random_workload(server: Server, seed: int, requests: int) -> None:
    """Conversations that share, continue and branch, with chunks, retractions, evictions and requests side by side."""
    rng = random.Random(seed)
    seen: list[list[int]] = [[]]
    running: list[Request] = []
    for index in range(requests):
        begin = rng.choice(seen)
        tokens = [*begin[: max(0, len(begin) - rng.randrange(10))], *rng.choices(range(3), k=rng.randrange(1, 12))][
            -48:
        ]
        request = Request(f"r{index}", tokens, rng.choice([None, None, "key"]))
        matched = server.admit(request)
        server.prefill(request, matched, rng.choice([None, server.page * 4]))
        server.decode(request, rng.choices(range(3), k=rng.randrange(6)))
        if rng.random() < 0.15:
            server.end(request, keep=False)
            request.full_untruncated_fill_ids = array("q", request.tokens())
            server.prefill(request, server.admit(request))
        running.append(request)
        if len(running) > 1 or rng.random() < 0.6:
            done = running.pop(rng.randrange(len(running)))
            seen = [*seen[-7:], done.tokens()]
            server.end(done)
