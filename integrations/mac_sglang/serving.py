"""What a method (MAC or TCA) holds in one process of a server, as hooks and backend see it; set up once at start."""

from __future__ import annotations

import contextlib
import logging
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from mac_kernels import ConfigError, HeadLayout
from mac_kernels.support import Backend

from . import compat
from .layers import LayerKind, LayerMap, ServedLayer
from .options import DEFAULT_SHARE, ServingOptions
from .requests import BatchRow, RequestTable, Restore

if TYPE_CHECKING:
    from .metrics import Metrics
    from .store import SnapshotService

GIB = 2**30
Caches = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of a layer as pages of one token, [slots, 1, Hkv, D]."""
Scales = tuple[float, float]
"""What stored keys and values are to be multiplied with."""
logger = logging.getLogger(__name__)


class DecodePlan(Protocol):
    """Decode steps of one batch size over fixed tensors: ``rows`` of the request pool and ``lengths``, [B]."""

    rows: torch.Tensor
    lengths: torch.Tensor

    def begin(self) -> None:
        """Prepare a step, on the device alone; a graph may record it."""
        ...

    def run(self, q: torch.Tensor, caches: Caches, scales: Scales, layer: ServedLayer) -> torch.Tensor:
        """One layer of the step, for ``q`` [B, Hq, D]."""
        ...


class PrefillPass(Protocol):
    """What a method does in a prefill pass; with ``whole``, it computes the outputs of all requests."""

    @property
    def whole(self) -> bool:
        """Whether no exact outputs are needed."""
        ...

    def run(
        self, q: torch.Tensor, exact: torch.Tensor | None, caches: Caches, scales: Scales, layer: ServedLayer
    ) -> torch.Tensor:
        """One layer, for ``q`` [nnz_q, Hq, D]; the outputs [nnz_q, Hq * D], exact ones changed in place."""
        ...


@dataclass(frozen=True, slots=True)
class Site:
    """What a method is started on: SGLang's model runner, the layers to serve, the longest context, the kernels."""

    runner: Any
    layers: LayerMap
    context_len: int
    backend: Backend

    @property
    def layout(self) -> HeadLayout:
        """Heads of the served layers on this rank."""
        assert self.layers.layout is not None  # a method is only started where it serves a layer
        return self.layers.layout

    @property
    def kinds(self) -> list[LayerKind]:
        """What the served layers are, each once."""
        return list(dict.fromkeys(layer.kind for layer in self.layers.served.values()))

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of keys and values of one token and kv head."""
        return 2 * self.layout.head_dim * self._any_caches()[0].element_size()

    def parts_in_budget(self, what: str, each: int, *, asked_gb: float | None, option: str, instead: str) -> int:
        """How many parts of ``each`` bytes a budget holds: ``asked_gb``, or a share of the KV pool and at least one.

        Raises
        ------
        ConfigError
            If what was asked for holds none; the message names the option, and what to change ``instead``.
        """
        if asked_gb is not None and asked_gb * GIB < each:
            raise ConfigError(
                f"no {what} fits: one takes {each / GIB:.3f} GiB, the budget is {asked_gb:.3f} GiB; raise "
                f"serving.{option} in the config, or {instead}"
            )
        if asked_gb is not None:
            return int(asked_gb * GIB // each)
        kv_bytes = sum(cache.numel() * cache.element_size() for cache in self._any_caches())
        kv_bytes *= len(self.layers.served) + len(self.layers.exact)
        return max(1, int(DEFAULT_SHARE * kv_bytes // each))

    def describe(self) -> str:
        """Words for the start-up log."""
        exact = "; ".join(f"{reason}: layers {where}" for reason, where in self.layers.reasons().items())
        words = f"backend {self.backend}; {len(self.layers.served)} layers"
        return words + (f"; exact attention for {exact}" if exact else "")

    def caches(self, number: int) -> Caches:
        """Keys and values of SGLang's layer ``number``."""
        k_cache, v_cache = self.runner.token_to_kv_pool.get_kv_buffer(number)
        return k_cache.unsqueeze(1), v_cache.unsqueeze(1)

    def one_of_each_kind(self) -> list[tuple[ServedLayer, Caches]]:
        """A served layer of every kind: what kernels are compiled for."""
        numbers = {layer.kind: number for number, layer in self.layers.served.items()}
        return [(self.layers.served[number], self.caches(number)) for number in numbers.values()]

    def _any_caches(self) -> Caches:
        return self.caches(min(self.layers.served))


@contextlib.contextmanager
def naming(parts: str, option: str) -> Iterator[None]:
    """Where the GPU has no room for these parts, say which option leaves them more."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{parts} do not fit the GPU ({error}); lower serving.{option} in the config or --mem-fraction-static"
        ) from None


@dataclass(kw_only=True)
class Serving(ABC):
    """The state of a method in a scheduler process.

    ``table`` who owns which part of what it stores; ``fallbacks`` what ran exactly, by reason (layers once at start,
    requests once each); ``on_results`` is called when the results of a pass have been processed, and must not sync;
    ``chosen`` the requests of the pass in progress, by their place in the batch, that the method treats in prefill;
    ``padded_entries`` entries of decode steps that only padded the batch of a graph; ``plan_bytes`` what the plans of
    decode steps hold.
    """

    site: Site
    options: ServingOptions
    table: RequestTable
    fallbacks: Counter[str]
    snapshots: SnapshotService | None = None
    on_results: list[Callable[[], None]] = field(default_factory=list)
    chosen: Sequence[int] = ()
    padded_entries: int = 0
    plan_bytes: int = 0
    _stale: str = ""

    @property
    def restore(self) -> Restore | None:
        """What fills a part that a request was just given; ``None``: it stays empty."""
        return None if self.snapshots is None else self.snapshots.restore

    def plan(self, rows: torch.Tensor, lengths: torch.Tensor) -> DecodePlan:
        """:meth:`decode_plan`, whose device memory is counted for as long as the plan lives."""
        before = _allocated(rows.device)
        plan = self.decode_plan(rows, lengths)
        nbytes = _allocated(rows.device) - before
        self.plan_bytes += nbytes
        weakref.finalize(plan, self._plan_ended, nbytes)
        return plan

    @abstractmethod
    def decode_plan(self, rows: torch.Tensor, lengths: torch.Tensor) -> DecodePlan:
        """Plan decode steps over these tensors, whose values may change."""

    @abstractmethod
    def prefill(self, forward_batch: Any) -> PrefillPass | None:
        """What is to be done in a prefill pass; ``None``: nothing."""

    @abstractmethod
    def compile(self) -> None:
        """Run the kernels of prefill once, storing nothing: no request should wait until they are compiled."""

    @abstractmethod
    def describe(self) -> list[str]:
        """Lines for the start-up log; the last one tells what is in force."""

    @abstractmethod
    def metrics(self, labels: dict[str, str]) -> Metrics:
        """What publishes the counts of this process."""

    def reset(self) -> None:
        """Forget what the warm-up of graphs stored and counted."""
        self.drop_all("the warm-up of CUDA graphs")

    def begin(self, slots: list[int], rows: Callable[[], Sequence[BatchRow]], *, extend: bool) -> None:
        """Prepare a forward pass: on its stream, before it.

        ``slots`` are the requests' rows in the pool; ``rows`` tells more, if more is needed; ``extend``: a prefill.
        """
        if self._stale:
            logger.info(
                "everything stored is dropped after %s; plans of decode steps take %.1f MiB",
                self._stale,
                self.plan_bytes / 2**20,
            )
            self.table.clear()
            self._stale = ""
        if extend or not self.table.steady(slots):
            self.chosen = self.table.begin(rows(), self.restore)

    def end(self) -> None:
        """Tell the observers that a forward pass is over: its results were processed."""
        for observe in self.on_results:
            observe()

    def drop_all(self, reason: str) -> None:
        """Forget everything that was stored of requests: snapshots now, the rest before the next pass."""
        self._stale = reason
        if self.snapshots is not None:
            self.snapshots.clear()

    def _plan_ended(self, nbytes: int) -> None:
        self.plan_bytes -= nbytes


_current: Serving | None = None


def current() -> Serving | None:
    """What this process serves with; ``None`` before the backend is built, or where no layer can be served."""
    return _current


def activate(serving: Serving) -> None:
    """Make it what this process serves with, and publish its counts if the server has metrics."""
    global _current
    _current = serving
    args = serving.site.runner.server_args
    if args.enable_metrics:
        labels = {"model_name": args.served_model_name or args.model_path, **compat.rank_labels(serving.site.runner)}
        metrics = serving.metrics(labels)
        serving.on_results.append(metrics.record)
        metrics.start()


def fallbacks_of(layers: LayerMap) -> Counter[str]:
    """The layers that run exactly, counted by reason."""
    return Counter({reason: len(where) for reason, where in layers.reasons().items()})


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy small host values without waiting for the device."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)
