"""Drives a backend through the public API, step by step, and judges every step by the oracle."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...config import MacConfig
from ...paged import Scale
from ...prefill import fill_rings
from ...ring import RingPool
from ...rope import Rope
from ...types import Reason, StepTrace
from ..scenario import PagedStore, poison_rings
from ..tolerances import Ledger
from .batch import Batches, poisoned_empty
from .cases import Case
from .decisions import check_decisions, check_ranges
from .oracle import ChainOracle
from .rows import check_row, check_untouched
from .selection import index_of, kept_positions


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step as the backend saw it: request numbers, positions, q [B, Hq, D], output and trace."""

    requests: tuple[int, ...]
    positions: tuple[int, ...]
    q: torch.Tensor
    out: torch.Tensor
    trace: StepTrace

    @property
    def reasons(self) -> set[Reason]:
        """All reasons of the step."""
        return {Reason(value) for value in self.trace.reason.flatten().tolist()}

    @property
    def matched(self) -> set[int]:
        """All matched positions of the step."""
        return set(self.trace.matched_pos.flatten().tolist())


class Session:
    """A few requests in one layer, decoded together or apart, each with its fp64 and its plain oracle.

    Every cache token beyond the lengths, every ring row without a tag and every output buffer starts as NaN. ``judged``
    counts the groups whose decision was checked and those too close to call (``margin``, relative); ``hits`` the reused
    groups and all; ``ledger`` holds the errors of rows and outputs.

    Parameters
    ----------
    make_wrapper : callable
        ``kv_layout -> wrapper`` of the backend under test.
    case, config, dtype, device
        What to run; rings store ``row_dtype`` (default ``dtype``).
    batch, capacity : int
        Requests, and tokens that each may grow to.
    rings_for : sequence of int, optional
        Requests that get a ring, default all.
    rope : callable, optional
        ``device -> Rope``, default the case's.
    logits_soft_cap, key_scale, seed
        Soft-cap of the logits; standard deviation of the random keys; of the random numbers.
    fused_cache : bool, default False
        Keys and values are strided views of one tensor.
    rows : bool, default False
        Plan rows of token slots instead of pages; for cases with pages of one token.
    kv_dtype, scales : optional
        Dtype of the cache (default ``dtype``), and ``(k_scale, v_scale)`` of what is stored there (default 1).
    sums_rounded : bool, default False
        See :attr:`Kit.sums_rounded`.
    fill : callable
        Same signature as :func:`mac_kernels.fill_rings`, its default.
    """

    def __init__(
        self,
        make_wrapper: Callable[..., Any],
        case: Case,
        config: MacConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        row_dtype: torch.dtype | None = None,
        batch: int = 2,
        capacity: int = 64,
        rings_for: Sequence[int] | None = None,
        rope: Callable[[torch.device | str], Rope] | None = None,
        logits_soft_cap: float = 0.0,
        key_scale: float = 1.0,
        fused_cache: bool = False,
        rows: bool = False,
        kv_dtype: torch.dtype | None = None,
        scales: tuple[Scale, Scale] | None = None,
        sums_rounded: bool = False,
        fill: Callable[..., None] = fill_rings,
        seed: int = 0,
    ) -> None:
        self.case, self.config, self.dtype, self.device = case, config, dtype, device
        self.layout, self.soft_cap, self._fill = case.layout, logits_soft_cap, fill
        self.sums_rounded = sums_rounded
        make_rope = case.rope if rope is None else rope
        self.rope = make_rope(device)
        self.row_dtype = dtype if row_dtype is None else row_dtype
        self.generator = torch.Generator().manual_seed(seed)
        shape = (batch, capacity, case.kv_heads, case.head_dim)
        self.kv_dtype, self._scales = dtype if kv_dtype is None else kv_dtype, scales
        self.k = self._as_stored(torch.randn(shape, generator=self.generator) * key_scale, 0)
        self.v = self._as_stored(torch.randn(shape, generator=self.generator), 1)
        self.store = PagedStore(
            batch,
            capacity,
            self.layout,
            page_size=case.page_size,
            kv_layout=case.kv_layout,
            dtype=self.kv_dtype,
            device=device,
            fused=fused_cache,
            generator=self.generator,
        )
        self.rings = RingPool(
            num_rings=batch + 1,
            num_layers=2,
            layout=self.layout,
            window=config.window,
            num_slots=batch + 2,
            dtype=self.row_dtype,
            correction=config.correction,
            index=index_of(config, case, num_rings=batch + 1, max_context=capacity, device=device),
            device=device,
        )
        poison_rings(self.rings)
        self.layer, self.paused = 1, False
        self.margin = 2e-3 if dtype == self.row_dtype == torch.float32 else 2e-2
        self.capacity = capacity
        self.ledger = Ledger()
        self.judged, self.hits = [0, 0], [0, 0]
        self.lengths = [0] * batch
        self.slots, self.generations = list(range(1, batch + 1)), [7] * batch
        self.has_ring = [False] * batch
        self.truth = [self._oracle(make_rope("cpu"), plain=False) for _ in range(batch)]
        self.plain = [self._oracle(make_rope("cpu"), plain=True) for _ in range(batch)]
        self.queries: list[dict[int, torch.Tensor]] = [{} for _ in range(batch)]
        for request in range(batch) if rings_for is None else rings_for:
            self.acquire(request)
        self.wrapper = make_wrapper(case.kv_layout)
        self.batches = Batches(
            self.wrapper, self.store, rope=self.rope, config=config, logits_soft_cap=logits_soft_cap, rows=rows
        )

    def _as_stored(self, x: torch.Tensor, which: int) -> torch.Tensor:
        """What is left of keys (0) or values (1) in the cache."""
        scale = self.scale(which)
        return (x / scale).to(self.kv_dtype).to(self.dtype if self._scales is None else torch.float32) * scale

    def scale(self, which: int) -> float:
        """Scale of keys (0) or values (1)."""
        return 1.0 if self._scales is None else float(self._scales[which])

    def _oracle(self, rope: Rope, *, plain: bool) -> ChainOracle:
        return ChainOracle(
            self.config,
            self.layout,
            rope,
            logits_soft_cap=self.soft_cap,
            dtype=self.dtype,
            row_dtype=self.row_dtype,
            plain=plain,
            sums_rounded=self.sums_rounded,
        )

    def acquire(self, request: int, *, generation: int | None = None) -> None:
        """Give a request an empty ring, under a new generation if one is named."""
        if generation is not None:
            self.generations[request] = generation
        assert self.rings.acquire(self.slots[request], self.generations[request]) >= 0
        self.has_ring[request] = True
        self.forget(request)

    def forget(self, request: int) -> None:
        """Drop the rows that the oracles expect of a request."""
        self.truth[request].rows.clear()
        self.plain[request].rows.clear()

    def draw(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers, fp32, on the CPU."""
        return torch.randn(*shape, generator=self.generator)

    def rotated(self, q_pre: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
        """Rotate queries [N, Hq, D] to their positions and round them to the session's dtype."""
        position = torch.tensor(positions, device=self.device)
        return self.rope.rotate(q_pre.to(self.device), position).to(self.dtype)

    def append(self, request: int, count: int) -> None:
        """Write the next tokens of a request into the cache."""
        first = self.lengths[request]
        stop = first + count
        k, v = (x[request, first:stop] / self.scale(which) for which, x in enumerate((self.k, self.v)))
        self.store.write(request, first, k, v)
        self.lengths[request] = stop

    def prefill(self, lengths: Sequence[int], q_pre: Sequence[torch.Tensor], *, chunks: int = 1) -> None:
        """Append a prompt to every request and fill the rings, in chunks; ``q_pre[b]`` is [lengths[b], Hq, D]."""
        pieces = [q.tensor_split(chunks) for q in q_pre]
        for chunk in range(chunks):
            queries, counts = [], [0]
            for request, piece in enumerate(pieces):
                count, first = len(piece[chunk]), self.lengths[request]
                self.append(request, count)
                queries.append(self.rotated(piece[chunk], range(first, first + count)))
                counts.append(counts[-1] + count)
                self._record(request, first, piece[chunk], queries[-1])
            with poisoned_empty():
                self._fill(
                    torch.cat(queries),
                    torch.tensor(counts, dtype=torch.int32, device=self.device),
                    dataclasses.replace(self.store.kv(self.batches.table(self.lengths)), **self._scale_arguments()),
                    rings=self.rings,
                    layer=self.layer,
                    slots=self._ids(self.slots),
                    generations=self._ids(self.generations),
                    rope=self.rope,
                    config=self.config,
                    logits_soft_cap=self.soft_cap,
                )

    def _record(self, request: int, first: int, q_pre: torch.Tensor, q: torch.Tensor) -> None:
        for i in range(max(0, len(q_pre) - self.config.window), len(q_pre)):
            t = first + i
            self.queries[request][t] = q_pre[i]
            if self.has_ring[request]:
                for oracle in (self.truth[request], self.plain[request]):
                    oracle.fill(t, q[i].cpu(), self.k[request, : t + 1], self.v[request, : t + 1])

    def prefill_random(self, *lengths: int, chunks: int = 1) -> None:
        """Prefill with standard normal queries."""
        heads, dim = self.layout.num_qo_heads, self.case.head_dim
        self.prefill(lengths, [self.draw(length, heads, dim) for length in lengths], chunks=chunks)

    def _scale_arguments(self) -> dict[str, Any]:
        return {} if self._scales is None else {"k_scale": self._scales[0], "v_scale": self._scales[1]}

    def _ids(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def step(self, q_pre: torch.Tensor, requests: Sequence[int] | None = None, *, check: bool = True) -> StepResult:
        """Append one token to the requests (default all), decode it and check everything about it.

        ``q_pre`` [N, Hq, D] in the order of ``requests``.
        """
        requests = tuple(range(len(self.lengths)) if requests is None else requests)
        for request in requests:
            self.append(request, 1)
        positions = tuple(self.lengths[r] - 1 for r in requests)
        q = self.rotated(q_pre, positions)
        for request, t, query in zip(requests, positions, q_pre, strict=True):
            self.queries[request][t] = query
        before = {name: field.clone() for name, field in self.rings.fields.items()}
        self.paused = bool(self.rings.bypass.paused(self.layer))
        out, trace = self.run_return_trace(q, requests)
        trace = StepTrace(*(field.cpu() for field in trace))
        result = StepResult(requests, positions, q.cpu(), out.cpu(), trace)
        self._judge(result, before, check=check)
        self.hits[0] += int(trace.hit.sum())
        self.hits[1] += trace.hit.numel()
        return result

    def next_query(self, request: int, *, revisit: float = 0.75) -> torch.Tensor:
        """A query [Hq, D] for the request's next position, of the norm of a standard normal one.

        With probability ``revisit`` a kv group returns to recent queries, each head to its own or all to one, at .2-.95
        of the distance cap of threshold .45; half of the others do so too, but for one head just beyond the cap.
        """
        t, window, group = self.lengths[request], self.config.window, self.case.group
        query = self.draw(self.layout.num_qo_heads, self.case.head_dim)
        history = self.queries[request]
        for kv_head in range(self.case.kv_heads):
            chance, shared, far_chance = torch.rand(3, generator=self.generator).tolist()
            if not history or (chance > revisit and far_chance < 0.5):
                continue
            lags = torch.randint(1, min(window, t) + 1, (group,), generator=self.generator)
            lags = lags[:1].expand(group) if shared < 0.5 else lags
            part = 0.2 + 0.75 * torch.rand(group, generator=self.generator)
            if chance > revisit:
                part[int(torch.randint(group, (1,), generator=self.generator))] = 1.1
            for head, lag, f in zip(range(kv_head * group, (kv_head + 1) * group), lags.tolist(), part, strict=True):
                if t - lag in history:
                    c = 1 - (0.55 * f) ** 2  # keeps the norm: a plain sum would grow from hop to hop
                    query[head] = c * history[t - lag][head] + (1 - c * c).sqrt() * query[head]
        return query

    def step_random(
        self, requests: Sequence[int] | None = None, *, revisit: float = 0.75, check: bool = True
    ) -> StepResult:
        """:meth:`step` with :meth:`next_query`."""
        chosen = range(len(self.lengths)) if requests is None else requests
        return self.step(torch.stack([self.next_query(r, revisit=revisit) for r in chosen]), requests, check=check)

    def run(self, q: torch.Tensor, lengths: Sequence[int], *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Plan and run all requests at the given lengths, unjudged."""
        with poisoned_empty():
            self.batches.plan(self.batches.table(lengths))
            return self.run_planned(q, self._ids(self.slots), self._ids(self.generations), out)

    def run_planned(
        self, q: torch.Tensor, slots: torch.Tensor, generations: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run what was planned last, unjudged."""
        result: torch.Tensor = self.wrapper.run(
            q,
            (self.store.k_cache, self.store.v_cache),
            rings=self.rings,
            layer=self.layer,
            slots=slots,
            generations=generations,
            out=out,
            **self._scale_arguments(),
        )
        return result

    def plan_static(self) -> None:
        """Plan all requests at full capacity; their tables then change in place (``batches.refill_static``)."""
        self.batches.plan_static([self.capacity] * len(self.lengths))

    def run_static(self, q: torch.Tensor, slots: torch.Tensor, generations: torch.Tensor, out: torch.Tensor) -> None:
        """Run what :meth:`plan_static` planned; nothing but the given tensors is touched, so it can be captured."""
        self.run_planned(q, slots, generations, out)

    def run_return_trace(
        self, q: torch.Tensor, requests: Sequence[int], *, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, StepTrace]:
        """Plan and run some requests at their lengths, unjudged."""
        with poisoned_empty():
            self.batches.plan(self.batches.table([self.lengths[r] for r in requests], requests))
            result: tuple[torch.Tensor, StepTrace] = self.wrapper.run_return_trace(
                q,
                (self.store.k_cache, self.store.v_cache),
                rings=self.rings,
                layer=self.layer,
                slots=self._ids([self.slots[r] for r in requests]),
                generations=self._ids([self.generations[r] for r in requests]),
                out=out,
                **self._scale_arguments(),
            )
        return result

    def _judge(self, result: StepResult, before: dict[str, torch.Tensor], *, check: bool) -> None:
        ring_of = self.rings.slot_table.cpu()
        outputs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for i, (request, t) in enumerate(zip(result.requests, result.positions, strict=True)):
            ring = int(ring_of[self.slots[request]]) if self.has_ring[request] else -1
            rows = {name: field[self.layer, ring].cpu() for name, field in before.items()} if ring >= 0 else None
            if check:
                check_decisions(self, result, i, rows)
            else:
                check_ranges(self.config, self.case, result.trace, i, t, kept=kept_positions(self, result, i))
            outputs.append(self._replay(result, i))
            if ring >= 0 and check:
                self.check_row(request, t)
        truth, plain = (torch.stack(states) for states in zip(*outputs, strict=True))
        what = f"output at {result.positions} of requests {result.requests}"
        self.ledger.record("output", result.out, plain, truth, dtype=self.dtype, what=what)
        check_untouched(self, result, before)

    def _replay(self, result: StepResult, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        request, t, trace = result.requests[i], result.positions[i], result.trace
        reuse = (trace.reason[i] == Reason.HIT).repeat_interleave(self.case.group)
        if not self.config.recompute_loaded_groups:
            reuse = trace.head_hit[i]
        store, k, v = self.has_ring[request], self.k[request], self.v[request]
        keep = kept_positions(self, result, i).repeat_interleave(self.case.group, 0)
        truth, plain = (
            oracle.step(t, result.q[i], k, v, reuse=reuse, matched_pos=trace.matched_pos[i], keep=keep, store=store)
            for oracle in (self.truth[request], self.plain[request])
        )
        return truth, plain

    def check_row(self, request: int, t: int) -> None:
        """Compare the ring row of position ``t`` with the oracle's; its errors go into ``ledger``."""
        check_row(self, request, t)

    def check_rows(self, request: int) -> int:
        """Compare all rows in the window of a request; returns how many."""
        oldest = self.lengths[request] - self.config.window
        stored = [t for t in sorted(self.truth[request].rows) if t >= oldest]
        for t in stored:
            check_row(self, request, t)
        return len(stored)
