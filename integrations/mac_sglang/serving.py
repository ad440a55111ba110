"""What MAC holds in one process of a server: rings, their owners, options and counts; set up once at start."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from mac_kernels import ConfigError, HeadLayout, MacConfig, ResolvedConfig, RingPool
from mac_kernels.config import HeadTable
from mac_kernels.ring import ROW_DTYPES
from mac_kernels.support import Backend

from . import compat
from .break_even import describe as break_even_hit_rate
from .layers import LayerMap
from .options import DEFAULT_RING_SHARE, ServingOptions
from .requests import BatchRow, RequestRings

if TYPE_CHECKING:
    from .audit import Auditor
    from .store import SnapshotService

_GIB = 2**30
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Serving:
    """The state of MAC in a scheduler process.

    ``context_len`` longest context in tokens; ``backend`` of the kernels; ``kv_token_bytes`` bytes of keys and values
    of one token and kv head; ``fallbacks`` what ran exactly, by reason (layers once at start, requests once each);
    ``padded_groups`` kv groups that were counted as ``NO_RING`` for entries that only pad a graph; ``on_step`` is
    called before every pass, on its stream, and must not sync; ``fill`` the requests of the pass in progress, by their
    place in the batch, whose last queries are to be stored.
    """

    runner: Any
    config: MacConfig
    options: ServingOptions
    layers: LayerMap
    rings: RingPool
    table: RequestRings
    context_len: int
    backend: Backend
    kv_token_bytes: int
    fallbacks: Counter[str]
    snapshots: SnapshotService | None = None
    auditor: Auditor | None = None
    on_step: list[Callable[[], None]] = field(default_factory=list)
    padded_groups: int = 0
    fill: Sequence[int] = ()
    _stale: str = ""

    def begin(self, slots: list[int], rows: Callable[[], Sequence[BatchRow]], *, extend: bool) -> None:
        """Prepare a forward pass: on its stream, before it.

        ``slots`` are the requests' rows in the pool; ``rows`` tells more, if more is needed; ``extend``: a prefill.
        """
        if self._stale:
            logger.info("mac: rings emptied after %s", self._stale)
            self.table.clear()
            self._stale = ""
        if extend or not self.table.steady(slots):
            restore = None if self.snapshots is None else self.snapshots.restore
            self.fill = self.table.begin(rows(), restore)
        for observe in self.on_step:
            observe()

    def drop_all(self, reason: str) -> None:
        """Forget everything that was stored of requests: snapshots now, rings before the next pass."""
        self._stale = reason
        if self.snapshots is not None:
            self.snapshots.clear()


_current: Serving | None = None


def current() -> Serving | None:
    """What this process serves with MAC; ``None`` before the backend is built, or where no layer can use it."""
    return _current


def start(
    runner: Any,
    layers: LayerMap,
    resolved: ResolvedConfig,
    options: ServingOptions,
    context_len: int,
    backend: Backend,
) -> Serving:
    """Allocate the rings (and snapshots) of this process.

    Raises
    ------
    ConfigError
        If no ring fits the budget, or the budget does not fit the GPU; the message names the setting.
    """
    global _current
    layout = layers.layout
    assert layout is not None  # the caller serves at least one layer
    config = _for_rank(resolved.config, layers, layout, compat.tensor_rank())
    pool = runner.req_to_token_pool
    kv = runner.token_to_kv_pool.get_kv_buffer(min(layers.served))
    kv_bytes = sum(cache.numel() * cache.element_size() for cache in kv) * (len(layers.served) + len(layers.exact))
    shape: dict[str, Any] = {
        "num_layers": len(layers.served),
        "layout": layout,
        "window": config.window,
        "dtype": runner.dtype if runner.dtype in ROW_DTYPES else torch.bfloat16,
        "correction": config.correction,
    }
    each = RingPool.bytes_per_ring(**shape)
    budget = DEFAULT_RING_SHARE * kv_bytes if options.ring_memory_gb is None else options.ring_memory_gb * _GIB
    count = int(budget // each)
    if count < 1:
        raise ConfigError(
            f"no ring fits: one takes {each / _GIB:.3f} GiB, the budget is {budget / _GIB:.3f} GiB; raise "
            "serving.ring_memory_gb in the config, or lower mac.window"
        )
    snapshots = options.snapshot_memory_gb > 0 and count > 1 and not runner.server_args.disable_radix_cache
    count = min(count - snapshots, pool.size)  # the service stages copies in a buffer of one ring
    try:
        rings = RingPool(num_rings=count, num_slots=pool.req_to_token.shape[0], device=runner.device, **shape)
        service = _snapshot_service(rings, config, options) if snapshots else None
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{count} rings of {each / _GIB:.3f} GiB do not fit the GPU ({error}); lower serving.ring_memory_gb in the "
            "config or --mem-fraction-static"
        ) from None
    fallbacks: Counter[str] = Counter({reason: len(where) for reason, where in layers.reasons().items()})
    table = RequestRings(rings, pool, worthwhile=max(config.min_context - config.window, 1), reasons=fallbacks)
    _current = Serving(
        runner,
        config,
        options,
        layers,
        rings,
        table,
        context_len,
        backend,
        kv_token_bytes=2 * layout.head_dim * kv[0].element_size(),
        fallbacks=fallbacks,
        snapshots=service,
    )
    _current.auditor = _auditor(_current)
    if runner.server_args.enable_metrics:
        _export(_current)
    return _current


def _for_rank(config: MacConfig, layers: LayerMap, layout: HeadLayout, rank: int) -> MacConfig:
    """Of tables by layer and head, keep the layers that MAC serves and the heads of this rank."""
    mine = slice(rank * layout.num_qo_heads, (rank + 1) * layout.num_qo_heads)
    changes: dict[str, Any] = {}
    for name in ("thresholds", "influence_scale"):
        table: HeadTable | None = getattr(config, name)
        if table is None:
            continue
        if len(table) < len(layers.served) + len(layers.exact):
            raise ConfigError(f"{name} has {len(table)} rows, the model has more layers; use a policy of this model")
        rows = [table[layer] for layer in sorted(layers.served)]
        changes[name] = tuple(row if len(row) == 1 else row[mine] for row in rows)
    return dataclasses.replace(config, **changes)


def _snapshot_service(rings: RingPool, config: MacConfig, options: ServingOptions) -> SnapshotService:
    from .store import SnapshotService

    return SnapshotService(rings, int(options.snapshot_memory_gb * _GIB), min_tokens=config.min_context)


def _auditor(serving: Serving) -> Auditor | None:
    if not serving.options.audit_rate:
        return None
    kinds = list(dict.fromkeys(layer.kind for layer in serving.layers.served.values()))
    if len({(kind.sm_scale, kind.logits_soft_cap) for kind in kinds}) > 1:
        raise ConfigError("this model's layers scale their logits in several ways; set serving.audit_rate to 0")
    from .audit import Auditor

    return Auditor(
        serving.options.audit_rate,
        layout=serving.rings.layout,
        num_layers=serving.rings.num_layers,
        rope=kinds[0].rope,
        req_to_token=serving.runner.req_to_token_pool.req_to_token,
        max_kv_len=serving.context_len,
        dtype=serving.runner.dtype,
        sm_scale=kinds[0].sm_scale,
        logits_soft_cap=kinds[0].logits_soft_cap,
        backend=serving.backend,
    )


def _export(serving: Serving) -> None:
    from .metrics import MacMetrics

    args = serving.runner.server_args
    labels = {"model_name": args.served_model_name or args.model_path, "tp_rank": str(compat.tensor_rank())}
    metrics = MacMetrics(serving, labels, auditor=serving.auditor)
    serving.on_step.append(metrics.record)
    metrics.start()


def describe(serving: Serving, resolved: ResolvedConfig) -> str:
    """One line for the start-up log: config, source, rings and bytes, break-even hit rate, what runs exactly."""
    sources = ", ".join(dict.fromkeys(source.where for source in resolved.sources.values()))
    rings, layers = serving.rings, serving.layers
    snapshots = "off" if serving.snapshots is None else f"{serving.options.snapshot_memory_gb:g} GiB of host memory"
    break_even = break_even_hit_rate(
        rings.device,
        rings.layout,
        dtype=serving.runner.kv_cache_dtype,
        page_size=1,  # the request pool's rows name token slots, whatever the page size
        context_len=serving.context_len,
    )
    exact = "; ".join(f"{reason}: layers {where}" for reason, where in layers.reasons().items())
    # tables by layer and head would fill pages
    changed = {name: value for name, value in serving.config.to_dict().items() if not isinstance(value, tuple)}
    return (
        f"mac: config {resolved.name} from {sources} {changed}; {rings.num_rings} rings, "
        f"{rings.nbytes / 2**20:.1f} MiB (set by serving.ring_memory_gb); "
        f"snapshots {snapshots}; {break_even}; backend {serving.backend}; {len(layers.served)} layers"
        + (f"; exact attention for {exact}" if exact else "")
    )
