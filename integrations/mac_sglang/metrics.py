"""What MAC decides, on the server's own ``/metrics``: device counters copied without a sync, published by a thread.

Each step enqueues one small copy of the counters into pinned host memory. A thread reads that memory now and then and
never calls CUDA, so that neither a step nor the capture of a graph can be disturbed.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from mac_kernels import Reason

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from .audit import Auditor, AuditTotals
    from .serving import Serving
    from .store import SnapshotStats

INTERVAL_S = 1.0
_READ, _TOTAL = len(Reason), len(Reason) + 1
_COUNTERS = {
    "mac_groups": (
        "kv groups of all layers and decode steps by outcome: HIT is reused, the others say why not",
        "reason",
    ),
    "mac_read_kv_bytes": ("bytes of keys and values that decode steps read", None),
    "mac_skipped_kv_bytes": ("bytes of keys and values that decode steps did not have to read", None),
    "mac_fallback": ("what was left to exact attention, by reason", "reason"),
    "mac_snapshot_events": ("what happened to ring snapshots in the prefix cache", "event"),
    "mac_audit_groups": ("kv groups that were also computed exactly", None),
    "mac_audit_relative_error_sum": ("sum of their relative errors", None),
    "mac_audit_relative_error_bucket": ("of them, those whose relative error is at most `le`", "le"),
}
_SNAPSHOT_EVENTS = ("saves", "repeats", "hits", "misses", "evictions", "drops", "rows_restored")
_GAUGES = {
    "mac_hit_ratio": "reused share of the kv groups since the last publication that saw any",
    "mac_rings": "rings in the pool",
    "mac_rings_in_use": "rings that requests hold",
    "mac_ring_bytes": "bytes of the pool of rings",
    "mac_snapshot_bytes": "bytes of ring snapshots",
}


class MacMetrics:
    """Publishes one process's counters through prometheus_client.

    Parameters
    ----------
    serving : Serving
        Whose rings, fallbacks and snapshots are counted.
    labels : mapping of str to str
        Of every metric; ranks must differ in one (``tp_rank``).
    auditor : Auditor, optional
        Whose errors are published, too.
    registry : prometheus_client.CollectorRegistry, optional
        Default: that of the process. SGLang's HTTP server collects from all processes through the folder that it names
        in ``PROMETHEUS_MULTIPROC_DIR`` before it starts them.
    """

    def __init__(
        self,
        serving: Serving,
        labels: Mapping[str, str],
        *,
        auditor: Auditor | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        from prometheus_client import REGISTRY, Counter, Gauge  # picks its kind of storage when it is imported

        registry = REGISTRY if registry is None else registry
        self._serving, self._auditor, self._labels = serving, auditor, dict(labels)
        names = list(labels)
        self._counters = {
            name: Counter(name, text, [*names, *([label] if label else [])], registry=registry)
            for name, (text, label) in _COUNTERS.items()
        }
        self._gauges = {
            name: Gauge(name, text, names, registry=registry, multiprocess_mode="mostrecent").labels(**self._labels)
            for name, text in _GAUGES.items()
        }
        self._last: dict[str, float] = {}
        self._padding = 0.0
        self._mirrors = [_Mirror(serving.rings.counters.values)]
        if auditor is not None:
            self._mirrors.append(_Mirror(auditor.totals))
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
        """Enqueue the copy of the counters on the current stream; call it once per step, no host sync."""
        for mirror in self._mirrors:
            mirror.copy()

    def publish(self) -> None:
        """Bring the published values up to what the last finished copy says."""
        counts = self._mirrors[0].host
        new = {reason.name: self._new(reason.name, int(counts[:, reason].sum())) for reason in Reason}
        # rows that pad a batch to the size of its graph hold no ring; the host counts them a few steps earlier
        self._padding += self._new("padding", self._serving.padded_groups)
        padding = min(self._padding, new[Reason.NO_RING.name])
        self._padding -= padding
        new[Reason.NO_RING.name] -= padding
        for name, count in new.items():
            self._add("mac_groups", count, name)
        if total := sum(new.values()):
            self._gauges["mac_hit_ratio"].set(new[Reason.HIT.name] / total)
        read, whole = (self._new(name, int(counts[:, at].sum())) for name, at in (("read", _READ), ("whole", _TOTAL)))
        token_bytes = self._serving.kv_token_bytes
        self._add("mac_read_kv_bytes", read * token_bytes)
        self._add("mac_skipped_kv_bytes", max(whole - read, 0) * token_bytes)
        for reason, count in dict(self._serving.fallbacks).items():
            self._raise("mac_fallback", count, reason)
        rings = self._serving.rings
        self._gauges["mac_rings"].set(rings.num_rings)
        self._gauges["mac_rings_in_use"].set(rings.num_rings - rings.free_rings)
        self._gauges["mac_ring_bytes"].set(rings.nbytes)
        if self._serving.snapshots is not None:
            self._publish_snapshots(self._serving.snapshots.stats)
        if self._auditor is not None:
            self._publish_audit(self._auditor.read(self._mirrors[1].host))

    def _publish_snapshots(self, stats: SnapshotStats) -> None:
        for event in _SNAPSHOT_EVENTS:
            self._raise("mac_snapshot_events", getattr(stats, event), event)
        self._gauges["mac_snapshot_bytes"].set(stats.bytes)

    def _publish_audit(self, totals: AuditTotals) -> None:
        self._raise("mac_audit_groups", totals.groups)
        self._raise("mac_audit_relative_error_sum", totals.error_sum)
        for bound, count in totals.at_most.items():
            self._raise("mac_audit_relative_error_bucket", count, bound)

    def _raise(self, name: str, value: float, label: str | None = None) -> None:
        self._add(name, self._new(f"{name} {label}", value), label)

    def _new(self, key: str, value: float) -> float:
        """What came since the last call; a value that fell was set back and counts from zero."""
        last = self._last.get(key, 0)
        self._last[key] = value
        return value - last if value >= last else value

    def _add(self, name: str, amount: float, label: str | None = None) -> None:
        kind = _COUNTERS[name][1]
        extra: dict[str, Any] = {} if kind is None else {kind: label}
        self._counters[name].labels(**self._labels, **extra).inc(amount)

    def _publish_often(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self.publish()


class _Mirror:
    """A device tensor and its copy in pinned host memory."""

    def __init__(self, device: torch.Tensor) -> None:
        self.device = device
        self.host = torch.zeros_like(device, device="cpu", pin_memory=device.is_cuda)

    def copy(self) -> None:
        self.host.copy_(self.device, non_blocking=True)
