"""The published figures are those of the counters, and the dashboard draws nothing that is not published."""

from __future__ import annotations

import collections
import json
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mac_kernels as mk
from mac_kernels import Reason
from mac_kernels.tca import TcaConfig
from mac_kernels.tca.pool import FarPool
from mac_sglang.audit import AuditTotals

prometheus = pytest.importorskip("prometheus_client")
DASHBOARD = Path(__file__).parents[2] / "integrations" / "mac_sglang" / "grafana.json"
LABELS = {"model_name": "m", "tp_rank": "1"}
LAYOUT = mk.HeadLayout(num_qo_heads=4, num_kv_heads=2, head_dim=16)


def snapshot_stats(**values: int) -> SimpleNamespace:
    names = (
        "saves",
        "repeats",
        "hits",
        "misses",
        "evictions",
        "drops",
        "rows_restored",
        "bytes",
        "failures",
        "notice_failures",
    )
    return SimpleNamespace(**{**dict.fromkeys(names, 0), **values})


@dataclass
class Serving:
    rings: mk.RingPool
    site: Any = field(default_factory=lambda: SimpleNamespace(kv_token_bytes=64))
    padded_groups: int = 0
    fallbacks: collections.Counter[str] = field(default_factory=collections.Counter)
    snapshots: Any = None


@dataclass
class Auditor:
    totals: torch.Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))

    @staticmethod
    def read(host: torch.Tensor) -> AuditTotals:
        groups, error = host.tolist()
        return AuditTotals(int(groups), error, {"0.1": int(groups * 0.75), "+Inf": int(groups)})


class Exported:
    """One process's metrics in a registry of its own."""

    def __init__(self, *, snapshots: bool = True) -> None:
        from mac_sglang.metrics import MacMetrics

        rings = mk.RingPool(num_rings=3, num_layers=2, layout=LAYOUT, window=8, dtype=torch.float32)
        self.serving = Serving(rings, snapshots=SimpleNamespace(stats=snapshot_stats()) if snapshots else None)
        self.auditor, self.registry = Auditor(), prometheus.CollectorRegistry()
        self.metrics = MacMetrics(self.serving, LABELS, auditor=self.auditor, registry=self.registry)

    def count(self, layer: int, reason: Reason, groups: int, read: int = 0, total: int = 0) -> None:
        values = self.serving.rings.counters.values
        values[layer, reason] += groups
        values[layer, len(Reason)] += read
        values[layer, len(Reason) + 1] += total

    def publish(self) -> None:
        self.metrics.record()
        self.metrics.publish()

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, {**LABELS, **labels})


def test_groups_bytes_and_the_ratio_follow_the_counters() -> None:
    exported = Exported()
    exported.count(0, Reason.HIT, 30, read=100, total=1000)
    exported.count(1, Reason.DISTANCE, 10, read=700, total=1000)
    exported.publish()
    assert exported("mac_groups_total", reason="HIT") == 30
    assert exported("mac_groups_total", reason="DISTANCE") == 10
    assert exported("mac_read_kv_bytes_total") == 800 * 64
    assert exported("mac_skipped_kv_bytes_total") == 1200 * 64
    assert exported("mac_hit_ratio") == 0.75
    exported.count(1, Reason.AGE, 4)
    exported.publish()
    assert exported("mac_groups_total", reason="HIT") == 30
    assert exported("mac_hit_ratio") == 0  # since the last publication
    exported.publish()
    assert exported("mac_hit_ratio") == 0  # nothing new: the last known ratio stays


def test_a_copy_made_within_a_step_skips_nothing_that_was_read() -> None:
    exported = Exported()
    exported.count(0, Reason.DISTANCE, 1, read=700, total=700)
    exported.count(1, Reason.DISTANCE, 1, read=700)
    exported.publish()
    exported.count(1, Reason.DISTANCE, 0, total=700)
    exported.publish()
    assert (exported("mac_read_kv_bytes_total"), exported("mac_skipped_kv_bytes_total")) == (1400 * 64, 0)
    exported.count(0, Reason.HIT, 1, read=100, total=800)
    exported.publish()
    assert exported("mac_skipped_kv_bytes_total") == 700 * 64


def test_nothing_is_published_before_it_is_recorded() -> None:
    exported = Exported()
    exported.count(0, Reason.HIT, 5)
    exported.metrics.publish()
    assert exported("mac_groups_total", reason="HIT") == 0


def test_counters_that_were_set_back_count_from_zero() -> None:
    exported = Exported()
    exported.count(0, Reason.HIT, 30)
    exported.publish()
    exported.serving.rings.counters.drain()
    exported.count(0, Reason.HIT, 7)
    exported.publish()
    assert exported("mac_groups_total", reason="HIT") == 37


def test_padding_is_not_counted_even_if_the_host_is_ahead() -> None:
    exported = Exported()
    exported.serving.padded_groups = 12  # two steps, of which the device has done one
    exported.count(0, Reason.NO_RING, 6)
    exported.publish()
    assert exported("mac_groups_total", reason="NO_RING") == 0
    exported.count(0, Reason.NO_RING, 6 + 2)  # the second step, with a request that has no ring
    exported.publish()
    assert exported("mac_groups_total", reason="NO_RING") == 2


def test_fallbacks_rings_snapshots_and_audit() -> None:
    exported = Exported()
    serving = exported.serving
    serving.rings.acquire(0)
    serving.fallbacks.update({"sliding window": 3})
    serving.snapshots.stats = snapshot_stats(hits=2, rows_restored=900, bytes=4096, failures=3, notice_failures=4)
    exported.auditor.totals += torch.tensor([4.0, 0.5])
    exported.publish()
    assert exported("mac_fallback_total", reason="sliding window") == 3
    assert (exported("mac_rings"), exported("mac_rings_in_use")) == (3, 1)
    assert exported("mac_ring_bytes") == serving.rings.nbytes
    assert exported("mac_snapshot_events_total", event="hits") == 2
    assert exported("mac_snapshot_events_total", event="rows_restored") == 900
    assert exported("mac_snapshot_events_total", event="failures") == 3
    assert exported("mac_snapshot_events_total", event="notice_failures") == 4
    assert exported("mac_snapshot_bytes") == 4096
    assert exported("mac_audit_groups_total") == 4
    assert exported("mac_audit_relative_error_sum_total") == 0.5
    assert exported("mac_audit_relative_error_bucket_total", le="0.1") == 3
    assert exported("mac_audit_relative_error_bucket_total", le="+Inf") == 4


def test_the_last_pass_is_published_though_none_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    from mac_sglang import hooks, serving

    exported = Exported()
    active = SimpleNamespace(on_results=[exported.metrics.record])
    active.end = lambda: serving.Serving.end(active)
    monkeypatch.setattr(serving, "_current", active)
    scheduler = SimpleNamespace(tree_cache=None)
    assert hooks._results_processed(lambda _: exported.count(0, Reason.HIT, 5) or "done", scheduler) == "done"
    exported.metrics.publish()
    assert exported("mac_groups_total", reason="HIT") == 5


def test_publications_are_counted() -> None:
    exported = Exported()
    assert exported("mac_publications_total") == 0
    exported.publish()
    exported.publish()
    assert exported("mac_publications_total") == 2


def test_a_busy_scheduler_does_not_hold_up_a_publication() -> None:
    exported, took = Exported(), []
    exported.publish()

    def publish() -> None:
        begun = time.perf_counter()
        exported.metrics.publish()
        took.append(time.perf_counter() - begun)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.25)  # what a thread waits for at each call that gives the interpreter's lock away
    try:
        thread = threading.Thread(target=publish)
        thread.start()
        while thread.is_alive():
            sum(range(1000))
    finally:
        sys.setswitchinterval(interval)
    assert took[0] < 2


def test_the_thread_publishes_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mac_sglang.metrics.INTERVAL_S", 0.01)
    exported = Exported(snapshots=False)
    exported.metrics.start()
    exported.count(0, Reason.HIT, 5)
    exported.metrics.record()
    exported.metrics.stop()
    assert exported("mac_groups_total", reason="HIT") == 5


def exported_by_tca(**counts: int) -> tuple[Any, Any, Any]:
    from mac_sglang.metrics import TcaMetrics

    config = TcaConfig(block=8, local_window=16)
    pool = FarPool(num_sets=2, num_slots=4, choices=[[1, 2]], max_len=64, config=config)
    serving = SimpleNamespace(
        site=SimpleNamespace(kv_token_bytes=64), fallbacks=collections.Counter({"no free far set": 1}), pool=pool,
        kv_tokens=torch.zeros(2, dtype=torch.int64), **counts,
    )  # fmt: skip
    registry = prometheus.CollectorRegistry()
    metrics = TcaMetrics(serving, LABELS, registry=registry)
    metrics.record()
    metrics.publish()
    return metrics, registry, serving


def names_in(registry: Any) -> set[str]:
    names = {sample.name for metric in registry.collect() for sample in metric.samples}
    return {name for name in names if not name.endswith("_created")}


def test_tca_publishes_what_it_read_and_who_has_far_sets() -> None:
    metrics, registry, serving = exported_by_tca(prefill_tokens=70)
    serving.kv_tokens += torch.tensor([300, 1000])
    serving.prefill_tokens += 30
    serving.pool.acquire(1)
    metrics.record()
    metrics.publish()
    found = {name: registry.get_sample_value(name, LABELS) for name in names_in(registry)}
    assert found["mac_read_kv_bytes_total"] == 300 * 64
    assert found["mac_skipped_kv_bytes_total"] == 700 * 64
    assert found["mac_tca_prefill_tokens_total"] == 100
    assert (found["mac_tca_far_sets"], found["mac_tca_far_sets_in_use"]) == (2, 1)
    assert found["mac_tca_far_set_bytes"] == serving.pool.nbytes
    assert registry.get_sample_value("mac_fallback_total", {**LABELS, "reason": "no free far set"}) == 1


def test_the_dashboard_draws_only_what_is_published() -> None:
    exported = Exported()
    exported.count(0, Reason.HIT, 1)
    exported.serving.fallbacks.update({"sliding window": 1})
    exported.publish()
    published = names_in(exported.registry) | names_in(exported_by_tca(prefill_tokens=1)[1])
    panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if "targets" in panel]
    drawn = {name for panel in panels for t in panel["targets"] for name in re.findall(r"\bmac_\w+", t["expr"])}
    assert drawn - published == set()
    assert published - drawn == set(), "published, but nobody can see it"
