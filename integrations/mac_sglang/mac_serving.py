"""MAC in one process of a server: rings, their owners, snapshots and the audit."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mac_kernels import ConfigError, HeadLayout, MacConfig, ResolvedConfig, RingPool, UnsupportedError, resolve_config
from mac_kernels.config import HeadTable
from mac_kernels.ring import ROW_DTYPES
from mac_kernels.support import unsupported_reasons

from . import compat
from .break_even import describe as break_even_hit_rate
from .layers import LayerMap
from .mac_plan import MacPlan, RingFill, compile_fill
from .options import ServingOptions, read_options
from .requests import BatchRow, RequestTable
from .serving import GIB, Serving, Site, fallbacks_of, naming

if TYPE_CHECKING:
    from .audit import Auditor
    from .metrics import MacMetrics
    from .store import SnapshotService

_WINDOW_PER_FEWEST = 32
"""See :func:`fewest_rows`."""


@dataclass(kw_only=True)
class MacServing(Serving):
    """The state of MAC."""

    resolved: ResolvedConfig
    config: MacConfig
    rings: RingPool
    auditor: Auditor | None = None

    @property
    def padded_groups(self) -> int:
        """Kv groups that were counted as ``NO_RING`` for entries that are no requests."""
        return self.padded_entries * len(self.site.layers.served) * self.rings.layout.num_kv_heads

    def decode_plan(self, rows: torch.Tensor, lengths: torch.Tensor) -> MacPlan:
        """See :class:`Serving`."""
        return MacPlan(self, rows, lengths)

    def prefill(self, forward_batch: Any) -> RingFill | None:
        """The requests whose last queries are to be stored."""
        return RingFill.of(forward_batch, self) if self.chosen else None

    def compile(self) -> None:
        """See :class:`Serving`."""
        compile_fill(self)

    def reset(self) -> None:
        """Forget what the warm-up of graphs stored and counted."""
        super().reset()
        self.rings.counters.values.zero_()
        if self.auditor is not None:
            self.auditor.reset()

    def metrics(self, labels: dict[str, str]) -> MacMetrics:
        """See :class:`Serving`."""
        from .metrics import MacMetrics

        return MacMetrics(self, labels, auditor=self.auditor)

    def describe(self) -> list[str]:
        """Why this policy; then config, source, rings and bytes, break-even hit rate, what runs exactly."""
        sources = ", ".join(dict.fromkeys(source.where for source in self.resolved.sources.values()))
        snapshots = "off" if self.snapshots is None else f"{self.options.snapshot_memory_gb:g} GiB of host memory"
        break_even = break_even_hit_rate(
            self.rings.device,
            self.rings.layout,
            dtype=self.site.runner.kv_cache_dtype,
            page_size=1,  # the request pool's rows name token slots, whatever the page size
            context_len=self.site.context_len,
        )
        # tables by layer and head would fill pages
        changed = {name: value for name, value in self.config.to_dict().items() if not isinstance(value, tuple)}
        return [
            *self.resolved.why,
            f"config {self.resolved.name} from {sources} {changed}; {self.rings.num_rings} rings, "
            f"{self.rings.nbytes / 2**20:.1f} MiB (set by serving.ring_memory_gb); "
            f"snapshots {snapshots}; {break_even}; {self.site.describe()}",
        ]


def start(site: Site) -> MacServing:
    """Allocate the rings (and snapshots) of this process.

    Raises
    ------
    ConfigError
        If no ring fits the budget, or the budget does not fit the GPU; the message names the setting.
    UnsupportedError
        If the kernels cannot run these layers.
    """
    runner, layers, layout = site.runner, site.layers, site.layout
    resolved = resolve_config(model=compat.model_key(runner))
    options = read_options(resolved.files)
    against = unsupported_reasons(
        site.backend, resolved.config, layout, torch.device(runner.device), dtypes=(runner.dtype, runner.kv_cache_dtype)
    )
    if against:
        raise UnsupportedError("MAC", against, "")
    if resolved.config.tca is not None:
        raise ConfigError(
            "mac.tca: this backend makes no selection that misses could read; leave mac.tca out, or serve TCA alone "
            "with --attention-backend tca"
        )
    config = for_rank(resolved.config, layers, layout, compat.tensor_rank())
    pool = runner.req_to_token_pool
    shape: dict[str, Any] = {
        "num_layers": len(layers.served),
        "layout": layout,
        "window": config.window,
        "dtype": runner.dtype if runner.dtype in ROW_DTYPES else torch.bfloat16,
        "correction": config.correction,
    }
    each = RingPool.bytes_per_ring(**shape)
    count = site.parts_in_budget(
        "ring", each, asked_gb=options.ring_memory_gb, option="ring_memory_gb", instead="lower mac.window"
    )
    snapshots = options.snapshot_memory_gb > 0 and count > 1 and not runner.server_args.disable_radix_cache
    count = min(count - snapshots, pool.size)  # the service stages copies in a buffer of one ring
    with naming(f"{count} rings of {each / GIB:.3f} GiB", "ring_memory_gb"):
        rings = RingPool(num_rings=count, num_slots=pool.req_to_token.shape[0], device=runner.device, **shape)
        service = _snapshot_service(rings, config, options) if snapshots else None
    fallbacks = fallbacks_of(layers)
    table = RequestTable(
        rings,
        pool,
        what="ring",
        worthwhile=max(config.min_context - config.window, 1),
        wanted=functools.partial(worth_storing, window=config.window),
        reasons=fallbacks,
    )
    return MacServing(
        site=site,
        options=options,
        table=table,
        fallbacks=fallbacks,
        snapshots=service,
        resolved=resolved,
        config=config,
        rings=rings,
        auditor=_auditor(site, options, rings),
    )


def worth_storing(row: BatchRow, *, window: int) -> bool:
    """Whether the last queries of a pass are to be stored in the request's ring.

    Those of a chunk that comes within a window of the prompt's end: later rows would replace all others. And not a
    handful of them, as at the end of a prompt that is cached already: they would attend to the whole context with
    hardly any parallelism, for rows that a full ring hardly misses.
    """
    near_end = row.extend and row.end > row.tokens - window
    return near_end and row.end - row.prefix >= fewest_rows(window)


def fewest_rows(window: int) -> int:
    """Rows that are worth the trouble of storing them in a ring, or of saving the ring."""
    return max(1, window // _WINDOW_PER_FEWEST)


def for_rank(config: MacConfig, layers: LayerMap, layout: HeadLayout, rank: int) -> MacConfig:
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

    budget, rows = int(options.snapshot_memory_gb * GIB), fewest_rows(config.window)
    return SnapshotService(rings, budget, min_tokens=config.min_context, min_rows=rows)


def _auditor(site: Site, options: ServingOptions, rings: RingPool) -> Auditor | None:
    if not options.audit_rate:
        return None
    kinds = site.kinds
    if len({(kind.sm_scale, kind.logits_soft_cap) for kind in kinds}) > 1:
        raise ConfigError("this model's layers scale their logits in several ways; set serving.audit_rate to 0")
    from .audit import Auditor

    return Auditor(
        options.audit_rate,
        layout=rings.layout,
        num_layers=rings.num_layers,
        rope=kinds[0].rotation,
        req_to_token=site.runner.req_to_token_pool.req_to_token,
        max_kv_len=site.context_len,
        dtype=site.runner.dtype,
        sm_scale=kinds[0].sm_scale,
        logits_soft_cap=kinds[0].logits_soft_cap,
        backend=site.backend,
    )
