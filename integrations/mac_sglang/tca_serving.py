"""TCA in one process of a server: calibrated budgets, the far sets of requests, and what was read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from mac_kernels import ConfigError, HeadLayout, UnsupportedError, tca
from mac_kernels.tca import TcaConfig
from mac_kernels.tca.candidates import decode_keep
from mac_kernels.tca.config import far_blocks
from mac_kernels.tca.pool import FarPool
from mac_kernels.tca.settings import ResolvedTca, resolve_tca

from . import compat
from .layers import LayerMap
from .options import ServingOptions, read_options
from .requests import BatchRow, RequestTable
from .serving import GIB, Serving, Site, fallbacks_of, naming
from .tca_plan import TcaPlan, TcaPrefill, compile_prefill

if TYPE_CHECKING:
    from .metrics import TcaMetrics

READ, TOTAL = range(2)


@dataclass(kw_only=True)
class TcaServing(Serving):
    """The state of TCA.

    ``choices`` candidate of every served layer and kv head of this rank; ``keep`` [layers, Hkv] int32, tokens that a
    block keeps when it leaves the window; ``kernels`` the functions of a backend; ``kv_tokens`` [2] int64, tokens of
    one kv head and layer that decode steps read, and that full attention would have read; ``prefill_tokens`` prompt
    tokens that were attended sparsely.
    """

    resolved: ResolvedTca
    config: TcaConfig
    choices: Sequence[Sequence[int]]
    pool: FarPool
    keep: torch.Tensor
    kernels: ModuleType
    kv_tokens: torch.Tensor
    prefill_tokens: int = 0

    @property
    def shortest(self) -> int:
        """Tokens of the shortest request that has a far region."""
        return self.config.sinks + self.config.local_window + self.config.block + 1

    def decode_plan(self, rows: torch.Tensor, lengths: torch.Tensor) -> TcaPlan:
        """See :class:`Serving`."""
        return TcaPlan(self, rows, lengths)

    def prefill(self, forward_batch: Any) -> TcaPrefill | None:
        """The requests that have a far region."""
        if not self.chosen:
            return None
        found = TcaPrefill(self, forward_batch)
        self.prefill_tokens += found.num_queries
        return found

    def compile(self) -> None:
        """See :class:`Serving`; the reference has nothing to compile."""
        if self.site.backend != "reference":
            compile_prefill(self)

    def reset(self) -> None:
        """Forget what the warm-up of graphs stored and counted."""
        super().reset()
        self.kv_tokens.zero_()

    def count(self, rows: torch.Tensor, lengths: torch.Tensor, sets: torch.Tensor) -> None:
        """Count one decode step, on the device; row 0 only pads a graph."""
        total = (lengths * (rows > 0)).sum(dtype=torch.int64) * self.keep.numel()
        self.kv_tokens += torch.stack((total - self.pool.skipped(sets), total))

    def metrics(self, labels: dict[str, str]) -> TcaMetrics:
        """See :class:`Serving`."""
        from .metrics import TcaMetrics

        return TcaMetrics(self, labels)

    def describe(self) -> list[str]:
        """Budgets, config and where they come from, far sets and bytes, what runs exactly."""
        resolved, config, pool = self.resolved, self.config, self.pool
        changed = "".join(f", {name} from {path}" for name, path in resolved.changed.items())
        return [
            f"budgets of {resolved.budgets.key.short_name} from {resolved.budgets_path} (measure "
            f"{resolved.budgets.measure}){changed}; {config.to_dict()}; "
            f"{resolved.budgets.far_share(config):.3f} of the far region kept, all up to {self.shortest - 1} tokens; "
            f"far sets for {pool.num_sets} requests, {pool.nbytes / 2**20:.1f} MiB (set by serving.index_memory_gb); "
            f"{self.site.describe()}"
        ]


def start(site: Site) -> TcaServing:
    """Find the budgets of the model and allocate the far sets of this process.

    Raises
    ------
    ConfigError
        If the model was not calibrated (the message names the command), an option cannot be served, or no far sets fit
        the budget or the GPU.
    UnsupportedError
        If the kernels cannot run these layers, or no request can be long enough to have a far region.
    """
    runner, layout = site.runner, site.layout
    resolved = resolve_tca(compat.model_key(runner))
    config, options = resolved.config, read_options(resolved.files)
    _refuse(config, options)
    kernels = _kernels(site, config)
    ranks = compat.tensor_ranks()
    of_ranks = [choices_for_rank(resolved.choices, site.layers, layout, rank=at, ranks=ranks) for at in range(ranks)]
    choices, pool = of_ranks[compat.tensor_rank()], runner.req_to_token_pool
    # heads keep different amounts, but a request has to find far sets on every rank or on none
    each = max(FarPool.bytes_per_set(one, site.context_len, config) for one in of_ranks)
    count = site.parts_in_budget(
        "far set", each, asked_gb=options.index_memory_gb, option="index_memory_gb", instead="lower --context-length"
    )
    count = min(count, pool.size)
    with naming(f"far sets of {count} requests, {each / GIB:.3f} GiB each,", "index_memory_gb"):
        sets = FarPool(
            num_sets=count,
            num_slots=pool.req_to_token.shape[0],
            choices=choices,
            max_len=site.context_len,
            config=config,
            device=runner.device,
        )

    def wanted(row: BatchRow) -> bool:
        return row.extend and far_blocks(row.end - 1, config) > 0

    fallbacks = fallbacks_of(site.layers)
    begins = config.sinks + config.local_window
    table = RequestTable(
        sets,
        pool,
        what="far set",
        worthwhile=begins,
        wanted=wanted,
        reasons=fallbacks,
        latest=begins + config.block,  # from then on a block would have to be there that nobody selected from
    )
    keep = [[decode_keep(one, config.block) for one in choice] for choice in choices]
    return TcaServing(
        site=site,
        options=options,
        table=table,
        fallbacks=fallbacks,
        resolved=resolved,
        config=config,
        choices=choices,
        pool=sets,
        keep=torch.tensor(keep, dtype=torch.int32, device=runner.device),
        kernels=kernels,
        kv_tokens=torch.zeros(2, dtype=torch.int64, device=runner.device),
    )


def choices_for_rank(
    choices: Sequence[Sequence[int]], layers: LayerMap, layout: HeadLayout, *, rank: int, ranks: int
) -> tuple[tuple[int, ...], ...]:
    """Candidates of the layers that are served and the kv heads of this rank, which may share one with others."""
    if len(choices) < len(layers.served) + len(layers.exact):
        raise ConfigError(f"the TCA budgets are for {len(choices)} layers, the model has more; use those of this model")
    first = rank * len(choices[0]) // ranks
    return tuple(tuple(choices[layer][first : first + layout.num_kv_heads]) for layer in sorted(layers.served))


def _refuse(config: TcaConfig, options: ServingOptions) -> None:
    refused = (
        (
            config.mode == "evict",
            "tca.mode='evict': SGLang's pool gives one token slot to all layers and kv heads of a token; set 'index'",
        ),
        (config.refresh is not None, "tca.refresh: a CUDA graph cannot select anew; set null"),
        (options.audit_rate > 0, "serving.audit_rate: the audit belongs to --attention-backend mac; set 0"),
    )
    reasons = [reason for holds, reason in refused if holds]
    if reasons:
        raise ConfigError("--attention-backend tca cannot serve " + "; ".join(reasons))


def _kernels(site: Site, config: TcaConfig) -> ModuleType:
    least = config.sinks + config.local_window + config.block
    against: tuple[str, ...] = ()
    if site.context_len <= least:
        against = (f"contexts of up to {site.context_len} tokens have no far region, which begins after {least}",)
    kernels: ModuleType = tca
    if site.backend == "triton":
        from mac_kernels.tca import fused  # imports triton

        kernels, against = fused, (*against, *fused.unsupported_reasons(site.layout, config))
    if against:
        raise UnsupportedError("TCA", against, "")
    return kernels
