"""What ``plan()`` decides on the host: the backend, its step, and what every ``run()`` must look like."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from . import tuned
from .attend.flashinfer import NEWEST, flashinfer_version, version_text
from .config import MacConfig
from .errors import InputError, require_contiguous
from .paged import SUPPORTED_DTYPES, PagedKV, Table
from .ring import RingPool
from .rope import Rope
from .slots import check_slots
from .step import reference_step
from .support import Backend, resolve_backend
from .types import HeadLayout, StepTrace

if TYPE_CHECKING:
    from .launch import LaunchParams


@dataclass(frozen=True, slots=True)
class Explanation:
    """What ``plan()`` chose and why.

    ``backend``: the backend in use; ``why``: one sentence; ``rejected``: the backends that ``"auto"`` passed over, each
    with its reasons; ``config``: the effective config; ``notes``: what differs from the config that was asked for, and
    where the launch parameters come from.
    """

    backend: Backend
    why: str
    rejected: dict[str, tuple[str, ...]]
    config: MacConfig
    notes: tuple[str, ...]


class Step(Protocol):
    """One decode step of a planned batch; ``trace()`` tells what the last ``run()`` decided."""

    def run(
        self,
        q: torch.Tensor,
        kv: PagedKV,
        rings: RingPool,
        *,
        layer: int,
        slots: torch.Tensor,
        generations: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Decode ``q`` [B, Hq, D] into ``out`` and write the ring rows."""
        ...

    def trace(self) -> StepTrace:
        """See :class:`StepTrace`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A batch as planned: what the steps of all backends are built from."""

    table: Table
    layout: HeadLayout
    config: MacConfig
    rope: Rope
    sm_scale: float
    logits_soft_cap: float
    max_kv_len: int


class ReferenceStep:
    """:func:`reference_step` of a planned batch."""

    def __init__(self, planned: Planned) -> None:
        self._planned = planned
        self._trace: StepTrace | None = None

    def run(
        self,
        q: torch.Tensor,
        kv: PagedKV,
        rings: RingPool,
        *,
        layer: int,
        slots: torch.Tensor,
        generations: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """See :class:`Step`."""
        planned = self._planned
        result, self._trace = reference_step(
            q,
            kv,
            rings,
            layer=layer,
            slots=slots,
            generations=generations,
            config=planned.config,
            rope=planned.rope,
            sm_scale=planned.sm_scale,
            logits_soft_cap=planned.logits_soft_cap,
        )
        out.copy_(result)

    def trace(self) -> StepTrace:
        """See :class:`Step`."""
        assert self._trace is not None  # asked for after a run
        return self._trace


@dataclass(frozen=True, slots=True)
class Plan:
    """A planned batch, its step and its explanation."""

    planned: Planned
    step: Step
    explanation: Explanation

    def check(
        self,
        q: torch.Tensor,
        kv: PagedKV,
        rings: RingPool,
        *,
        layer: int,
        slots: torch.Tensor,
        generations: torch.Tensor,
        out: torch.Tensor | None,
    ) -> None:
        """Check what ``run()`` is given; values only on a CPU, where asking for them costs no sync.

        Raises
        ------
        InputError
            If an input does not fit the plan.
        """
        batch, layout = self.planned.table.batch_size, self.planned.layout
        shape = (batch, layout.num_qo_heads, layout.head_dim)
        if q.shape != shape or q.dtype not in SUPPORTED_DTYPES:
            raise InputError(
                f"q must be {list(shape)} in fp32, bf16 or fp16, got {list(q.shape)} {q.dtype}; "
                "plan() the batch you run"
            )
        require_contiguous("q", q)
        if out is not None:
            if out.shape != shape or out.dtype != q.dtype:
                raise InputError(
                    f"out must be {list(shape)} {q.dtype} like q, got {list(out.shape)} {out.dtype}; "
                    "allocate empty_like(q)"
                )
            require_contiguous("out", out)
        rings.check_fits(layer, layout, self.planned.config)
        check_slots(slots, generations, batch)
        devices = {t.device for t in (q, kv.k_cache, kv.table, slots, generations, rings.slot_table)}
        if len(devices) > 1:
            raise InputError(
                f"all tensors and the rings must be on one device, got {', '.join(sorted(map(str, devices)))}; "
                "move them"
            )
        if q.device.type == "cpu":
            kv.table.check(num_pages=kv.k_cache.shape[0])


def make_plan(
    backend: Literal["auto"] | Backend,
    table: Table,
    *,
    layout: HeadLayout,
    rope: Rope,
    config: MacConfig | None,
    sm_scale: float | None,
    logits_soft_cap: float,
    max_kv_len: int,
    q_data_type: torch.dtype | None,
    kv_data_type: torch.dtype,
    launch: LaunchParams | None,
) -> Plan:
    """Choose the backend for a batch and build its step; asks the device for nothing.

    Raises
    ------
    InputError
        If a scale or the rotation does not fit, or launch parameters are for another backend than the chosen one.
    UnsupportedError
        If the named backend cannot run the configuration.
    """
    config = MacConfig() if config is None else config
    if not isinstance(config, MacConfig):
        raise InputError(f"config={config!r} must be a MacConfig; MacConfig.preset('careful') makes one")
    sm_scale = 1 / math.sqrt(layout.head_dim) if sm_scale is None else sm_scale
    if not (math.isfinite(sm_scale) and sm_scale > 0):
        raise InputError(f"sm_scale={sm_scale} must be finite and > 0; leave it out for 1 / sqrt(head_dim)")
    if not (math.isfinite(logits_soft_cap) and logits_soft_cap >= 0):
        raise InputError(f"logits_soft_cap={logits_soft_cap} must be finite and >= 0; 0 turns it off")
    if rope.rotary_dim > layout.head_dim:
        raise InputError(
            f"rope.rotary_dim={rope.rotary_dim} must be <= head_dim={layout.head_dim}; build Rope from this model"
        )
    if rope.max_position is not None and max_kv_len > rope.max_position:
        raise InputError(
            f"the context may reach {max_kv_len} tokens but rope knows positions below {rope.max_position}; "
            "build Rope from a longer cos_sin_cache"
        )
    notes = []
    if logits_soft_cap > 0 and config.correction:
        config = dataclasses.replace(config, correction=False)
        notes.append("correction off: its derivative does not hold under a logits soft-cap")
    if q_data_type is None:
        q_data_type = kv_data_type if kv_data_type in SUPPORTED_DTYPES else torch.bfloat16
    chosen, why, rejected = resolve_backend(backend, config, layout, table.device, dtypes=(q_data_type, kv_data_type))
    if launch is not None and chosen != "triton":
        raise InputError(
            f"launch is for backend 'triton' and {chosen!r} was chosen; leave it out, or name backend='triton'"
        )
    planned = Planned(
        table=table,
        layout=layout,
        config=config,
        rope=rope,
        sm_scale=sm_scale,
        logits_soft_cap=logits_soft_cap,
        max_kv_len=max_kv_len,
    )
    step: Step
    if chosen == "triton":
        from .fused import FusedStep  # imports triton, which the reference backend does not need

        choice = tuned.choose_launch(
            table.device,
            layout,
            batch=table.batch_size,
            context=max_kv_len,
            page_size=table.page_size,
            dtype=kv_data_type,
            launch=launch,
        )
        notes.append(choice.why)
        step = FusedStep(planned, launch=choice.launch)
    elif chosen == "flashinfer":
        from .composed import ComposedStep  # imports triton

        if config.correction:
            notes.append(
                "correction on: FlashInfer takes a second call for the mean keys, so a miss reads its keys twice"
            )
        version = flashinfer_version()
        if version is not None and version > NEWEST:
            notes.append(f"flashinfer-python {version_text(version)} is untested: {version_text(NEWEST)} is the newest")
        step = ComposedStep(planned)
    else:
        step = ReferenceStep(planned)
    return Plan(planned, step, Explanation(chosen, why, rejected, config, tuple(notes)))
