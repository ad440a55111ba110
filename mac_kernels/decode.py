"""``plan()`` / ``run()``: one decode step over a paged KV cache, on the backend of your choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from . import ops
from .config import MacConfig
from .errors import InputError, PlanError
from .handles import register
from .paged import PagedKV, PageTable, RowTable, Scale
from .planning import Explanation, Plan, ReferenceStep, make_plan
from .ring import RingPool
from .rope import Rope
from .support import BACKENDS, Backend
from .types import HeadLayout, KVLayout, StepTrace

if TYPE_CHECKING:
    from .launch import LaunchParams

__all__ = ["BatchMacDecodeWithPagedKVCacheWrapper", "Explanation"]


class BatchMacDecodeWithPagedKVCacheWrapper:
    """MAC decode for a batch of requests with a paged KV cache (argument names follow FlashInfer).

    ``plan()`` validates and decides on the host; ``run()`` is called once per layer.

    Parameters
    ----------
    kv_layout : {"NHD", "HND"}, default "NHD"
        ``[num_pages, page_size, Hkv, D]`` or ``[num_pages, Hkv, page_size, D]``.
    backend : {"auto", "triton", "flashinfer", "reference"}, default "auto"
        ``"triton"``: a few fused launches on an NVIDIA GPU, capturable in a CUDA graph. ``"flashinfer"``: FlashInfer
        attends, capturable after the first ``run()`` (which compiles). ``"reference"``: plain torch on any device, the
        specification.

    Raises
    ------
    InputError
        If ``kv_layout`` or ``backend`` is unknown.

    Notes
    -----
    With ``"triton"``, ``run()`` neither syncs nor, given ``out``, allocates, and can be captured once in a CUDA graph;
    with ``"flashinfer"`` this holds from the second ``run()`` of a plan on.
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
        self._plan: Plan | None = None
        self.number = register(self)

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
        q_data_type: torch.dtype | None = None,
        kv_data_type: torch.dtype = torch.bfloat16,
        launch: LaunchParams | None = None,
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
        q_data_type : torch.dtype, optional
            Of the queries that ``run()`` will see; with ``kv_data_type``, a backend may be ruled out by it. Default:
            that of the cache, bf16 beside an fp8 cache.
        kv_data_type : torch.dtype, default torch.bfloat16
            Of the cache that ``run()`` will see; the tuned launch parameters depend on it, too.
        launch : LaunchParams, optional
            Launch parameters of the ``"triton"`` backend, refused where another one is chosen. Default: the tuned ones
            for this GPU and layout, if any.

        Raises
        ------
        InputError
            If a tensor, length or scale is wrong.
        UnsupportedError
            If the chosen backend cannot run the configuration.
        """
        table = PageTable(indptr, indices, last_page_len, page_size)
        table.check()
        longest = max(int(table.kv_len().max()) if table.batch_size else 1, 1)
        if max_kv_len is not None and max_kv_len < longest:
            raise InputError(f"max_kv_len={max_kv_len} must be >= {longest}, the longest request of this plan")
        self._plan = make_plan(
            self._backend,
            table,
            layout=layout,
            rope=rope,
            config=config,
            sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap,
            max_kv_len=longest if max_kv_len is None else max_kv_len,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
            launch=launch,
        )

    def plan_rows(
        self,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        layout: HeadLayout,
        rope: Rope,
        max_kv_len: int,
        config: MacConfig | None = None,
        sm_scale: float | None = None,
        logits_soft_cap: float = 0.0,
        q_data_type: torch.dtype | None = None,
        kv_data_type: torch.dtype = torch.bfloat16,
        launch: LaunchParams | None = None,
    ) -> None:
        """:meth:`plan` over rows of token slots, as SGLang keeps them, without asking the device for anything.

        One plan serves every step and layer of a batch size: the kernels read rows and lengths where they are.

        Parameters
        ----------
        req_to_token : torch.Tensor, [rows, max_context] int32
            Token slots of every request of the pool; the cache has pages of one token.
        req_pool_indices, seq_lens : torch.Tensor, [B] int32 or int64
            Row and length of every request, the current token included. A padded entry may name any row with length 0
            (its output is 0) or 1.
        max_kv_len : int, tokens
            Upper bound of the context over all runs, at most ``max_context``.
        layout, rope, config, sm_scale, logits_soft_cap, q_data_type, kv_data_type, launch
            As for :meth:`plan`.

        Raises
        ------
        InputError
            If a tensor, length or scale is wrong.
        UnsupportedError
            If the chosen backend cannot run the configuration.
        """
        table = RowTable(req_to_token, req_pool_indices, seq_lens)
        if not 1 <= max_kv_len <= req_to_token.shape[1]:
            raise InputError(
                f"max_kv_len={max_kv_len} must be in [1, {req_to_token.shape[1]}], the columns of req_to_token"
            )
        self._plan = make_plan(
            self._backend,
            table,
            layout=layout,
            rope=rope,
            config=config,
            sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap,
            max_kv_len=max_kv_len,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
            launch=launch,
        )

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
        *,
        rings: RingPool,
        layer: int,
        slots: torch.Tensor,
        generations: torch.Tensor,
        k_scale: Scale | None = None,
        v_scale: Scale | None = None,
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
        k_scale, v_scale : float or torch.Tensor, optional
            What the stored keys and values are to be multiplied with (fp8 caches): a number, or one fp32 on the device.
            Default 1.
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
        if torch.compiler.is_compiling():
            return ops.decode(
                q,
                paged_kv_cache,
                self._planned().planned.table,
                wrapper=self.number,
                rings=rings,
                layer=layer,
                slots=slots,
                generations=generations,
                k_scale=k_scale,
                v_scale=v_scale,
                out=out,
            )
        return self.run_in_graph(
            q,
            paged_kv_cache,
            rings=rings,
            layer=layer,
            slots=slots,
            generations=generations,
            k_scale=k_scale,
            v_scale=v_scale,
            out=out,
        )

    def run_return_trace(
        self,
        q: torch.Tensor,
        paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
        *,
        rings: RingPool,
        layer: int,
        slots: torch.Tensor,
        generations: torch.Tensor,
        k_scale: Scale | None = None,
        v_scale: Scale | None = None,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, StepTrace]:
        """:meth:`run`, and what was decided."""
        result = self.run_in_graph(
            q,
            paged_kv_cache,
            rings=rings,
            layer=layer,
            slots=slots,
            generations=generations,
            k_scale=k_scale,
            v_scale=v_scale,
            out=out,
        )
        return result, self._planned().step.trace()

    def run_in_graph(
        self,
        q: torch.Tensor,
        paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
        *,
        rings: RingPool,
        layer: int,
        slots: torch.Tensor,
        generations: torch.Tensor,
        k_scale: Scale | None,
        v_scale: Scale | None,
        out: torch.Tensor | None,
        table: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """:meth:`run`, where a compiled graph may have put the page table into other tensors (``table``)."""
        plan = self._planned()
        planned = plan.planned
        k_cache, v_cache = paged_kv_cache
        kv = PagedKV(
            k_cache,
            v_cache,
            planned.table if table is None else planned.table.over(table),
            planned.layout,
            self._kv_layout,
            1.0 if k_scale is None else k_scale,
            1.0 if v_scale is None else v_scale,
        )
        if kv.table is not planned.table and plan.explanation.backend == "flashinfer":
            raise InputError("backend 'flashinfer' reads the planned page table; do not change it in a compiled graph")
        plan.check(q, kv, rings, layer=layer, slots=slots, generations=generations, out=out)
        out = torch.empty_like(q) if out is None else out
        with torch.cuda.device(q.get_device()):  # where kernels are launched; -1 on a CPU does nothing
            plan.step.run(q, kv, rings, layer=layer, slots=slots, generations=generations, out=out)
        return out

    def explain(self) -> Explanation:
        """Tell what the last ``plan()`` chose and why.

        Raises
        ------
        PlanError
            If ``plan()`` was not called.
        """
        return self._planned().explanation

    def _planned(self) -> Plan:
        if self._plan is None:
            raise PlanError("plan() must be called before run() and explain()")
        return self._plan


def stacked_trace(wrappers: Sequence[BatchMacDecodeWithPagedKVCacheWrapper]) -> StepTrace:
    """What the last run of each wrapper decided, the wrappers (of one batch and config) stacked in front.

    For the layers of a model: asked together, they cost the device what one costs.
    """
    steps = [wrapper._planned().step for wrapper in wrappers]
    if all(isinstance(step, ReferenceStep) for step in steps):
        return StepTrace(*map(torch.stack, zip(*(step.trace() for step in steps), strict=True)))
    from .fused import FusedStep
    from .fused import stacked_trace as stacked

    return stacked([step for step in steps if isinstance(step, FusedStep)])
