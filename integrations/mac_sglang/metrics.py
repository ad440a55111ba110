"""What was decided, on the server's own ``/metrics``: device counters copied without a sync, published by a thread.

When the results of a step are processed, one small copy of the counters into pinned host memory is enqueued, on a
stream of its own, so that no step waits for it. A thread reads that memory now and then and never calls CUDA, so that
neither a step nor the capture of a graph can be disturbed.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mac_kernels import Reason

from .tca_serving import READ, TOTAL

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from .audit import Auditor, AuditTotals
    from .mac_serving import MacServing
    from .serving import Serving
    from .store import SnapshotStats
    from .tca_serving import TcaServing

INTERVAL_S = 1.0
Counters = Mapping[str, tuple[str, str | None]]
Gauges = Mapping[str, str]
_READ, _TOTAL = len(Reason), len(Reason) + 1
_SNAPSHOT_EVENTS = (
    "saves", "repeats", "hits", "misses", "evictions", "drops", "rows_restored", "failures", "notice_failures",
)  # fmt: skip


class Metrics(ABC):
    """Publishes one process's counters through prometheus_client.

    A subclass adds its own counters (name: text, and the label besides those of every metric, if there is one) and
    gauges (name: text).

    Parameters
    ----------
    serving : Serving
        Whose state is counted.
    tensors : sequence of torch.Tensor
        What :meth:`record` copies from the device.
    labels : mapping of str to str
        Of every metric; processes of a server must differ in one (``tp_rank``, ``dp_rank``).
    registry : prometheus_client.CollectorRegistry, optional
        Default: that of the process. SGLang's HTTP server collects from all processes through the folder that it names
        in ``PROMETHEUS_MULTIPROC_DIR`` before it starts them.
    """

    COUNTERS: ClassVar[Counters] = {
        "mac_read_kv_bytes": ("bytes of keys and values that decode steps read", None),
        "mac_skipped_kv_bytes": ("bytes of keys and values that decode steps did not have to read", None),
        "mac_fallback": ("what was left to exact attention, by reason", "reason"),
        "mac_publications": ("how often all of these were brought up to date", None),
    }
    GAUGES: ClassVar[Gauges] = {}

    def __init__(
        self,
        serving: Serving,
        tensors: Sequence[torch.Tensor],
        labels: Mapping[str, str],
        *,
        registry: CollectorRegistry | None = None,
    ) -> None:
        from prometheus_client import REGISTRY, Counter, Gauge  # picks its kind of storage when it is imported

        registry = REGISTRY if registry is None else registry
        self._labels, names = dict(labels), list(labels)
        self._fallbacks, self._token_bytes = serving.fallbacks, serving.site.kv_token_bytes
        self._kinds = {**Metrics.COUNTERS, **self.COUNTERS}
        self._counters = {
            name: Counter(name, text, [*names, *([label] if label else [])], registry=registry)
            for name, (text, label) in self._kinds.items()
        }
        self._gauges = {
            name: Gauge(name, text, names, registry=registry, multiprocess_mode="mostrecent").labels(**self._labels)
            for name, text in self.GAUGES.items()
        }
        self._last: dict[str, float] = {}
        self._unread = 0.0
        self._add("mac_publications", 0)  # who waits for the next one needs to know of it before there is one
        self._mirrors = [_Mirror(tensor) for tensor in tensors]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._publish_often, name="mac-metrics", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Publish once more and end the thread."""
        self._stop.set()
        self._thread.join()
        self.publish()

    def record(self) -> None:
        """Enqueue the copy of the counters; call it when the results of a step are there, no host sync."""
        for mirror in self._mirrors:
            mirror.copy()

    def publish(self) -> None:
        """Bring the published values up to what the last finished copy says."""
        self._publish([mirror.host for mirror in self._mirrors])
        for reason, count in dict(self._fallbacks).items():
            self._raise("mac_fallback", count, reason)
        self._add("mac_publications", 1)

    @abstractmethod
    def _publish(self, hosts: list[torch.Tensor]) -> None:
        """Publish from the host copies of the tensors."""

    def _add_kv(self, read: int, total: int) -> None:
        """Publish tokens of one kv head and layer: those that were read, and all that attention would read."""
        new_read, new_total = self._new("read", read), self._new("whole", total)
        self._add("mac_read_kv_bytes", new_read * self._token_bytes)
        # a copy made within a step may have the one number of a layer and not yet the other
        self._unread += new_total - new_read
        skipped = max(self._unread, 0)
        self._unread -= skipped
        self._add("mac_skipped_kv_bytes", skipped * self._token_bytes)

    def _raise(self, name: str, value: float, label: str | None = None) -> None:
        self._add(name, self._new(f"{name} {label}", value), label)

    def _new(self, key: str, value: float) -> float:
        """What came since the last call; a value that fell was set back and counts from zero."""
        last = self._last.get(key, 0)
        self._last[key] = value
        return value - last if value >= last else value

    def _add(self, name: str, amount: float, label: str | None = None) -> None:
        kind = self._kinds[name][1]
        extra: dict[str, Any] = {} if kind is None else {kind: label}
        self._counters[name].labels(**self._labels, **extra).inc(amount)

    def _publish_often(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self.publish()


class MacMetrics(Metrics):
    """The counters of MAC; ``auditor`` is the one whose errors are published, too."""

    COUNTERS: ClassVar[Counters] = {
        "mac_groups": (
            "kv groups of all layers and decode steps by outcome: HIT is reused, the others say why not",
            "reason",
        ),
        "mac_snapshot_events": ("what happened to ring snapshots in the prefix cache", "event"),
        "mac_audit_groups": ("kv groups that were also computed exactly", None),
        "mac_audit_relative_error_sum": ("sum of their relative errors", None),
        "mac_audit_relative_error_bucket": ("of them, those whose relative error is at most `le`", "le"),
    }
    GAUGES: ClassVar[Gauges] = {
        "mac_hit_ratio": "reused share of the kv groups since the last publication that saw any",
        "mac_rings": "rings in the pool",
        "mac_rings_in_use": "rings that requests hold",
        "mac_ring_bytes": "bytes of the pool of rings",
        "mac_snapshot_bytes": "bytes of ring snapshots",
    }

    def __init__(
        self,
        serving: MacServing,
        labels: Mapping[str, str],
        *,
        auditor: Auditor | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        tensors = [serving.rings.counters.values, *([] if auditor is None else [auditor.totals])]
        super().__init__(serving, tensors, labels, registry=registry)
        self._serving, self._auditor, self._padding = serving, auditor, 0.0

    def _publish(self, hosts: list[torch.Tensor]) -> None:
        # tolist keeps the interpreter's lock, which a busy scheduler gives back 5 ms after each call that lets go of it
        counts = [sum(column) for column in zip(*hosts[0].tolist(), strict=True)]
        new = {reason.name: self._new(reason.name, counts[reason]) for reason in Reason}
        # rows that pad a batch to the size of its graph hold no ring; the host counts them a few steps earlier
        self._padding += self._new("padding", self._serving.padded_groups)
        padding = min(self._padding, new[Reason.NO_RING.name])
        self._padding -= padding
        new[Reason.NO_RING.name] -= padding
        for name, count in new.items():
            self._add("mac_groups", count, name)
        if total := sum(new.values()):
            self._gauges["mac_hit_ratio"].set(new[Reason.HIT.name] / total)
        self._add_kv(counts[_READ], counts[_TOTAL])
        rings = self._serving.rings
        self._gauges["mac_rings"].set(rings.num_rings)
        self._gauges["mac_rings_in_use"].set(rings.num_rings - rings.free_rings)
        self._gauges["mac_ring_bytes"].set(rings.nbytes)
        if self._serving.snapshots is not None:
            self._publish_snapshots(self._serving.snapshots.stats)
        if self._auditor is not None:
            self._publish_audit(self._auditor.read(hosts[1]))

    def _publish_snapshots(self, stats: SnapshotStats) -> None:
        for event in _SNAPSHOT_EVENTS:
            self._raise("mac_snapshot_events", getattr(stats, event), event)
        self._gauges["mac_snapshot_bytes"].set(stats.bytes)

    def _publish_audit(self, totals: AuditTotals) -> None:
        self._raise("mac_audit_groups", totals.groups)
        self._raise("mac_audit_relative_error_sum", totals.error_sum)
        for bound, count in totals.at_most.items():
            self._raise("mac_audit_relative_error_bucket", count, bound)


class TcaMetrics(Metrics):
    """The counters of TCA."""

    COUNTERS: ClassVar[Counters] = {"mac_tca_prefill_tokens": ("prompt tokens that were attended sparsely", None)}
    GAUGES: ClassVar[Gauges] = {
        "mac_tca_far_sets": "requests that the pool of far sets has room for",
        "mac_tca_far_sets_in_use": "far sets that requests hold",
        "mac_tca_far_set_bytes": "bytes of the pool of far sets",
    }

    def __init__(
        self, serving: TcaServing, labels: Mapping[str, str], *, registry: CollectorRegistry | None = None
    ) -> None:
        super().__init__(serving, [serving.kv_tokens], labels, registry=registry)
        self._serving = serving

    def _publish(self, hosts: list[torch.Tensor]) -> None:
        counts = hosts[0].tolist()
        self._add_kv(counts[READ], counts[TOTAL])
        self._raise("mac_tca_prefill_tokens", self._serving.prefill_tokens)
        pool = self._serving.pool
        self._gauges["mac_tca_far_sets"].set(pool.num_sets)
        self._gauges["mac_tca_far_sets_in_use"].set(pool.num_sets - pool.slots.free)
        self._gauges["mac_tca_far_set_bytes"].set(pool.nbytes)


class _Mirror:
    """A device tensor and its copy in pinned host memory."""

    def __init__(self, device: torch.Tensor) -> None:
        self.device = device
        self.host = torch.zeros_like(device, device="cpu", pin_memory=device.is_cuda)
        self._stream: torch.cuda.Stream | None = None
        if device.is_cuda:
            self._stream = torch.cuda.Stream(device.device)  # type: ignore[no-untyped-call]  # torch has no types for it

    def copy(self) -> None:
        if self._stream is None:
            self.host.copy_(self.device)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device.device))
        with torch.cuda.stream(self._stream):
            self.host.copy_(self.device, non_blocking=True)
