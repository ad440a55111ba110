"""``plan()`` / ``run()``: one decode step over a paged KV cache, on the backend of your choice."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from .config import MacConfig
from .errors import InputError, PlanError
from .paged import SUPPORTED_DTYPES, PagedKV, PageTable
from .ring import RingPool, check_slots
from .rope import Rope
from .step import reference_step
from .support import BACKENDS, Backend, resolve_backend
from .types import HeadLayout, KVLayout, StepTrace

if TYPE_CHECKING:
    from .fused import FusedStep

__all__ = ["BatchMacDecodeWithPagedKVCacheWrapper", "Explanation"]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What ``plan()`` chose and why.

    ``backend``: the backend in use; ``why``: one sentence; ``rejected``: the backends that ``"auto"`` passed over, each
    with its reasons; ``config``: the effective config; ``notes``: what differs from the config that was asked for.
    """

    backend: str
    why: str
    rejected: dict[str, tuple[str, ...]]
    config: MacConfig
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Plan:
    table: PageTable
    layout: HeadLayout
    config: MacConfig
    rope: Rope
    sm_scale: float
    logits_soft_cap: float
    fused: FusedStep | None


class BatchMacDecodeWithPagedKVCacheWrapper:
    """MAC decode for a batch of requests with a paged KV cache (argument names follow FlashInfer).

    ``plan()`` validates and decides on the host; ``run()`` is called once per layer.

    Parameters
    ----------
    kv_layout : {"NHD", "HND"}, default "NHD"
        ``[num_pages, page_size, Hkv, D]`` or ``[num_pages, Hkv, page_size, D]``.
    backend : {"auto", "triton", "reference"}, default "auto"
        ``"triton"``: two fused launches on an NVIDIA GPU, capturable in a CUDA graph. ``"reference"``: plain torch on
        any device, the specification.

    Raises
    ------
    InputError
        If ``kv_layout`` or ``backend`` is unknown.

    Notes
    -----
    With ``"triton"``, ``run()`` neither syncs nor, given ``out``, allocates, and can be captured once in a CUDA graph.
    Between replays the contents of every tensor may change (queries, caches, page table, slots, generations, rings) as
    long as no request grows beyond ``max_kv_len``; addresses, the batch size and everything else given to ``plan()``
    may not.

    Examples
    --------
    >>> import torch, mac_kernels as mk
    >>> layout = mk.HeadLayout(num_qo_heads=4, num_kv_heads=2, head_dim=8)
    >>> config = mk.MacConfig(window=16, band=4, sinks=2, min_context=8)
    >>> rings = mk.RingPool(num_rings=1, num_layers=1, layout=layout, window=16, dtype=torch.float32)
    >>> _ = rings.acquire(slot=0)
    >>> mac = mk.BatchMacDecodeWithPagedKVCacheWrapper(kv_layout="NHD")
    >>> mac.plan(torch.tensor([0, 3]), torch.tensor([2, 0, 1]), torch.tensor([1]), layout=layout, page_size=4,
    ...          config=config, rope=mk.Rope.from_inv_freq(torch.ones(4)))
    >>> kv = torch.randn(2, 3, 4, 2, 8)
    >>> zero = torch.zeros(1, dtype=torch.int64)
    >>> mac.run(torch.randn(1, 4, 8), (kv[0], kv[1]), rings=rings, layer=0, slots=zero, generations=zero).shape
    torch.Size([1, 4, 8])
    """

    def __init__(self, kv_layout: KVLayout = "NHD", *, backend: Literal["auto"] | Backend = "auto") -> None:
        if kv_layout not in ("NHD", "HND"):
            raise InputError(f"kv_layout={kv_layout!r} must be 'NHD' or 'HND'")
        if backend != "auto" and backend not in BACKENDS:
            raise InputError(f"backend={backend!r} must be one of 'auto', {', '.join(map(repr, BACKENDS))}")
        self._kv_layout: KVLayout = kv_layout
        self._backend = backend
        self._plan: _Plan | None = None
        self._explanation: Explanation | None = None

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        *,
        layout: HeadLayout,
        page_size: int,
        rope: Rope,
        config: MacConfig | None = None,
        sm_scale: float | None = None,
        logits_soft_cap: float = 0.0,
        max_kv_len: int | None = None,
    ) -> None:
        """Validate a batch and choose the backend; nothing is changed if it raises.

        Parameters
        ----------
        indptr, indices, last_page_len : torch.Tensor, int32
            The page table as for FlashInfer: [B + 1], [total pages], [B]. The current token is already in the cache,
            so the current position is ``kv_len - 1``.
        layout : HeadLayout
            Heads of the layers that ``run()`` will see.
        page_size : int, tokens
        rope : Rope
            The model's rotation, to recover the pre-RoPE queries.
        config : MacConfig, optional
            Default: the preset ``careful``.
        sm_scale : float, optional
            Default ``1 / sqrt(D)``.
        logits_soft_cap : float, default 0.0
            ``>= 0``; above 0 the first-order correction is turned off (its derivative is another).
        max_kv_len : int, optional, tokens
            Upper bound of the context when the page table changes between runs (CUDA graphs). Default: the longest
            request of this plan.

        Raises
        ------
        InputError
            If a tensor, length or scale is wrong.
        UnsupportedError
            If the chosen backend cannot run the configuration.
        """
        table = PageTable(indptr, indices, last_page_len, page_size)
        table.check()
        config = MacConfig() if config is None else config
        sm_scale = 1 / math.sqrt(layout.head_dim) if sm_scale is None else sm_scale
        if not (math.isfinite(sm_scale) and sm_scale > 0):
            raise InputError(f"sm_scale={sm_scale} must be finite and > 0; leave it out for 1 / sqrt(head_dim)")
        if not (math.isfinite(logits_soft_cap) and logits_soft_cap >= 0):
            raise InputError(f"logits_soft_cap={logits_soft_cap} must be finite and >= 0; 0 turns it off")
        if rope.rotary_dim > layout.head_dim:
            raise InputError(
                f"rope.rotary_dim={rope.rotary_dim} must be <= head_dim={layout.head_dim}; build Rope from this model"
            )
        notes: tuple[str, ...] = ()
        if logits_soft_cap > 0 and config.correction:
            config = dataclasses.replace(config, correction=False)
            notes = ("correction off: its derivative does not hold under a logits soft-cap",)
        device = indptr.device
        backend, why, rejected = resolve_backend(self._backend, config, layout, device)
        longest = max(int(table.kv_len().max()) if table.batch_size else 1, 1)
        if max_kv_len is not None and max_kv_len < longest:
            raise InputError(f"max_kv_len={max_kv_len} must be >= {longest}, the longest request of this plan")
        max_kv_len = longest if max_kv_len is None else max_kv_len
        if rope.max_position is not None and max_kv_len > rope.max_position:
            raise InputError(
                f"the context may reach {max_kv_len} tokens but rope knows positions below {rope.max_position}; "
                "build Rope from a longer cos_sin_cache"
            )
        fused = None
        if backend == "triton":
            from .fused import FusedStep  # imports triton, which the reference backend does not need

            fused = FusedStep(
                table,
                layout,
                config,
                rope,
                sm_scale=sm_scale,
                logits_soft_cap=logits_soft_cap,
                max_kv_len=max_kv_len,
            )
        self._plan = _Plan(table, layout, config, rope, sm_scale, logits_soft_cap, fused)
        self._explanation = Explanation(backend, why, rejected, config, notes)

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
        *,
        rings: RingPool,
        layer: int,
        slots: torch.Tensor,
        generations: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Decode one token of every request in one layer and update the rings.

        Parameters
        ----------
        q : torch.Tensor, [B, Hq, D], fp32, bf16 or fp16
            Queries after RoPE.
        paged_kv_cache : tuple of torch.Tensor
            ``(k_cache, v_cache)`` in the wrapper's layout, with the current token written.
        rings : RingPool
            Of the same layout, window and device.
        layer : int, in [0, rings.num_layers)
        slots, generations : torch.Tensor, [B] int64
            Request slot and its generation; a slot without a ring, or with another generation, is computed exactly and
            stores nothing.
        out : torch.Tensor, optional, [B, Hq, D], dtype of ``q``
            Written in place and returned.

        Returns
        -------
        torch.Tensor, [B, Hq, D], dtype of ``q``

        Raises
        ------
        PlanError
            If ``plan()`` was not called.
        InputError
            If an input does not fit the plan; no ring is changed then.
        """
        return self._step(q, paged_kv_cache, rings, layer, slots, generations, out)[0]

    def run_return_trace(
        self,
        q: torch.Tensor,
        paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
        *,
        rings: RingPool,
        layer: int,
        slots: torch.Tensor,
        generations: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, StepTrace]:
        """:meth:`run`, and what was decided."""
        result, trace = self._step(q, paged_kv_cache, rings, layer, slots, generations, out)
        if trace is None:
            fused = self._planned().fused
            assert fused is not None  # only the fused step leaves its trace behind
            trace = fused.trace()
        return result, trace

    def _step(
        self,
        q: torch.Tensor,
        paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
        rings: RingPool,
        layer: int,
        slots: torch.Tensor,
        generations: torch.Tensor,
        out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, StepTrace | None]:
        """Run one step; the fused backend leaves its trace on the device until it is asked for."""
        plan = self._planned()
        kv = PagedKV(paged_kv_cache[0], paged_kv_cache[1], plan.table, plan.layout, self._kv_layout)
        _check_step(plan, q, kv, rings, layer, slots, generations, out)
        if plan.fused is not None:
            result = torch.empty_like(q) if out is None else out
            plan.fused.run(q, kv, rings, layer=layer, slots=slots, generations=generations, out=result)
            return result, None
        result, trace = reference_step(
            q,
            kv,
            rings,
            layer=layer,
            slots=slots,
            generations=generations,
            config=plan.config,
            rope=plan.rope,
            sm_scale=plan.sm_scale,
            logits_soft_cap=plan.logits_soft_cap,
        )
        return (result.to(q.dtype) if out is None else out.copy_(result)), trace

    def explain(self) -> Explanation:
        """Tell what the last ``plan()`` chose and why.

        Raises
        ------
        PlanError
            If ``plan()`` was not called.
        """
        self._planned()
        assert self._explanation is not None  # set together with the plan
        return self._explanation

    def _planned(self) -> _Plan:
        if self._plan is None:
            raise PlanError("plan() must be called before run() and explain()")
        return self._plan


def _check_step(
    plan: _Plan,
    q: torch.Tensor,
    kv: PagedKV,
    rings: RingPool,
    layer: int,
    slots: torch.Tensor,
    generations: torch.Tensor,
    out: torch.Tensor | None,
) -> None:
    batch, layout = plan.table.batch_size, plan.layout
    shape = (batch, layout.num_qo_heads, layout.head_dim)
    if q.shape != shape or q.dtype not in SUPPORTED_DTYPES:
        raise InputError(
            f"q must be {list(shape)} in fp32, bf16 or fp16, got {list(q.shape)} {q.dtype}; plan() the batch you run"
        )
    if q.stride(-1) != 1:
        raise InputError(f"q must be contiguous in the head dim, got stride {q.stride(-1)}; call .contiguous()")
    if out is not None and (out.shape != shape or out.dtype != q.dtype):
        raise InputError(
            f"out must be {list(shape)} {q.dtype} like q, got {list(out.shape)} {out.dtype}; allocate empty_like(q)"
        )
    rings.check_fits(layer, layout, plan.config)
    check_slots(slots, generations, batch)
    devices = {t.device for t in (q, kv.k_cache, kv.table.indptr, slots, generations, rings.slot_table)}
    if len(devices) > 1:
        raise InputError(
            f"all tensors and the rings must be on one device, got {', '.join(sorted(map(str, devices)))}; move them"
        )
    if q.device.type == "cpu":  # on a GPU this would sync; there the page table is the caller's to keep right
        kv.table.check(num_pages=kv.k_cache.shape[0])
