"""MAC's state in one process of a server: its budgets, what a change of the weights leaves of it, its decode plans."""

from __future__ import annotations

import json
import re
import weakref
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mac_kernels import ConfigError, HeadLayout, MacConfig, RingPool, UnsupportedError, tuned
from mac_kernels.rope import Rope
from mac_sglang import backend, compat, mac_serving
from mac_sglang.backend import METHODS, ServedAttention
from mac_sglang.chain import TokenChain
from mac_sglang.layers import LayerKind, LayerMap, ServedLayer
from mac_sglang.mac_serving import MacServing
from mac_sglang.requests import BatchRow
from mac_sglang.serving import GIB, Site

LAYOUT = HeadLayout(num_qo_heads=4, num_kv_heads=2, head_dim=8)
ROWS, CONTEXT, WINDOW = 5, 64, 8
RING = RingPool.bytes_per_ring(num_layers=1, layout=LAYOUT, window=WINDOW, dtype=torch.float32, correction=True)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """One served layer of a model on a CPU, and a KV pool of which 4% hold no ring."""
    monkeypatch.setattr(compat, "tensor_rank", lambda: 0)
    slots = torch.arange(ROWS * CONTEXT).view(ROWS, CONTEXT).int()
    cache = torch.zeros(2, 64, LAYOUT.num_kv_heads, LAYOUT.head_dim)
    assert 0.04 * cache.nbytes < RING
    config = SimpleNamespace(
        num_hidden_layers=1, num_attention_heads=4, get_total_num_kv_heads=lambda: 2, head_dim=8, vocab_size=99
    )
    runner = SimpleNamespace(
        server_args=SimpleNamespace(model_path="m", disable_radix_cache=False, enable_metrics=False),
        model_config=config, dtype=torch.float32, kv_cache_dtype=torch.float32, device="cpu",
        req_to_token_pool=SimpleNamespace(
            req_to_token=slots, size=ROWS - 1, free_slots=[], req_generation=torch.ones(ROWS, dtype=torch.int64)
        ),
        token_to_kv_pool=SimpleNamespace(get_kv_buffer=lambda number: tuple(cache)),
    )  # fmt: skip
    rope = Rope.from_inv_freq(100.0 ** -(torch.arange(0, 8, 2) / 8))
    layers = LayerMap({0: ServedLayer(0, LayerKind(rope, 0.3, 0.0))}, {}, LAYOUT)
    monkeypatch.setenv("MAC_KERNELS_CONFIG", str(tmp_path / "config.json"))
    return Site(runner, layers, CONTEXT, "reference")


MAC: dict[str, Any] = {"window": WINDOW, "band": 4, "sinks": 1, "min_context": 16}


def start(site: Site, tmp_path: Path, mac: dict[str, Any] = MAC, **serving: Any) -> MacServing:
    (tmp_path / "config.json").write_text(json.dumps({"schema": 1, "mac": mac, "serving": serving}))
    return mac_serving.start(site)


def prefill(slot: int, rid: str) -> BatchRow:
    return BatchRow(slot, rid, 40, 40, 0, extend=True, exact="")


def test_a_budget_that_holds_no_ring_is_refused_with_the_setting(site: Site, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no ring fits: one takes .* raise serving\.ring_memory_gb .*mac\.window"):
        start(site, tmp_path, ring_memory_gb=0.9 * RING / GIB)


def test_the_policy_of_the_model_serves_without_a_flag(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = tuned.Score(value=0.8, low=0.7, high=0.9, unit="of the preset", n=3)
    facts = tuned.Provenance(
        gpu="g", driver="d", versions={}, study="s", trial=1, basis="measured", date="2026-11-22", command="c"
    )
    file = tuned.PolicyFile(
        key=compat.model_key(site.runner),
        coverage=tuned.Coverage(batch=(1, 96), context=(16, 96)),
        preset="careful",
        config=MacConfig(**MAC),
        scores={"latency_ratio": score},
        provenance=facts,
    )
    path = tuned.save(file, tmp_path)
    monkeypatch.setenv("MAC_KERNELS_CONFIG", str(tmp_path))
    assert mac_serving.start(site).rings.window == WINDOW
    path.write_text(path.read_text().replace('"band"', '"bamd"'))
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))}.*bamd.*did you mean 'band'"):
        mac_serving.start(site)
    path.unlink()
    (tmp_path / "config.json").write_text('{"schema": 1}')
    assert mac_serving.start(site).rings.window == MacConfig().window


def test_misses_that_would_read_selected_tokens_are_refused(site: Site, tmp_path: Path) -> None:
    tca = {"block": 8, "local_window": 16, "sinks": 1, "refresh": 8}
    with pytest.raises(ConfigError, match=r"mac\.tca: .*leave mac\.tca out.*--attention-backend tca"):
        start(site, tmp_path, {**MAC, "tca": tca})


def test_the_default_budget_holds_at_least_one_ring(site: Site, tmp_path: Path) -> None:
    assert start(site, tmp_path).rings.num_rings == 1


def test_what_the_gpu_has_no_room_for_names_the_setting(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(RingPool):
        def __init__(self, **options: Any) -> None:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(mac_serving, "RingPool", Full)
    with pytest.raises(ConfigError, match=r"3 rings of .* do not fit the GPU \(tried .*lower serving\.ring_memory_gb"):
        start(site, tmp_path, ring_memory_gb=4.5 * RING / GIB)


def test_nothing_is_left_after_a_change_of_the_weights(site: Site, tmp_path: Path) -> None:
    active = start(site, tmp_path, ring_memory_gb=4.5 * RING / GIB, snapshot_memory_gb=4.5 * RING / GIB)
    assert active.snapshots is not None
    chain = TokenChain((None, None, None), range(40))
    active.snapshots.note("a", chain)
    active.begin([1], lambda: [prefill(1, "a")], extend=True)
    active.rings.fields["pos"][0, 0, :] = torch.arange(32, 40)
    assert active.snapshots.save("a", 1, 40)
    active.drop_all("update_weights_from_disk")
    assert active.snapshots.stats.entries == 0
    active.begin([2], lambda: [prefill(2, "b")], extend=True)
    assert active.rings.num_rings - active.rings.free_rings == 1  # that of the new request
    assert active.snapshots.restore("b", 2, 39) == 0 and active.snapshots.stats.hits == 0
    assert bool((active.rings.fields["pos"] < 0).all())


class Attention(ServedAttention):
    """The part of a backend that plans decode steps."""

    method = METHODS["mac"]

    def __init__(self) -> None:
        self._eager = OrderedDict()


class Graphs:
    """What SGLang's backend does for graphs."""

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing that matters here."""


class CapturedAttention(Attention, Graphs):
    """The part of a backend that plans what graphs record."""

    def __init__(self, serving: Any) -> None:
        super().__init__()
        self._serving, self._all_served, self._captured = serving, True, []


class Plan:
    """A plan that holds its tensors."""

    def __init__(self, rows: torch.Tensor, lengths: torch.Tensor) -> None:
        self.rows, self.lengths = rows, lengths


def batch(size: int) -> Any:
    return SimpleNamespace(req_pool_indices=torch.arange(size), seq_lens=torch.full((size,), 9))


def test_plans_without_graphs_are_kept_for_the_last_batch_sizes() -> None:
    attention, made = Attention(), []

    def plan(rows: torch.Tensor, lengths: torch.Tensor) -> Plan:
        made.append(len(rows))
        return Plan(rows, lengths)

    for size in [*range(1, backend.EAGER_PLANS + 1), 1, backend.EAGER_PLANS + 1, 1, 2]:
        found = attention._eager_plan(SimpleNamespace(plan=plan), batch(size))
        assert found.rows.tolist() == list(range(size))
    assert made == [*range(1, backend.EAGER_PLANS + 2), 2]
    assert len(attention._eager) == backend.EAGER_PLANS


def test_plans_of_graphs_live_until_all_graphs_are_captured_anew() -> None:
    made: list[weakref.ref[Plan]] = []

    def plan(rows: torch.Tensor, lengths: torch.Tensor) -> Plan:
        found = Plan(rows, lengths)
        made.append(weakref.ref(found))
        return found

    attention = CapturedAttention(SimpleNamespace(plan=plan))
    mode = SimpleNamespace(is_decode_or_idle=lambda: True)
    for capture in range(1, 4):  # as /update_weights_from_disk does with recapture_cuda_graph
        attention.init_cuda_graph_state(2, 2)
        for size in (2, 1, 1):  # a batch size may have a graph for requests with adapters and one for those without
            forward_batch = SimpleNamespace(forward_mode=mode, **vars(batch(size)))
            attention.init_forward_metadata_out_graph(forward_batch, in_capture=True)
        assert len(made) == 3 * capture
        assert [ref() is not None for ref in made] == [False] * 3 * (capture - 1) + [True] * 3


def test_a_plan_that_the_gpu_has_no_room_for_names_the_setting() -> None:
    def plan(rows: torch.Tensor, lengths: torch.Tensor) -> Plan:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(ConfigError, match=r"decode steps of 3 requests do not fit .*lower serving\.ring_memory_gb"):
        Attention()._eager_plan(SimpleNamespace(plan=plan), batch(3))


def test_what_would_change_a_models_attention_is_never_left_out(site: Site, tmp_path: Path) -> None:
    attention: Any = Attention()
    attention._layers, attention._serving, attention._fp8 = site.layers, start(site, tmp_path), False
    attention._plan = SimpleNamespace(run=lambda q, caches, scales, served: 2 * q)
    layer = SimpleNamespace(layer_id=0, tp_q_head_num=4, head_dim=8)
    q = torch.randn(3, 32)

    def decode(**options: Any) -> torch.Tensor:
        out: torch.Tensor = attention.forward_decode(q, None, None, layer, None, **options)
        return out

    assert torch.equal(decode(sinks=None, return_lse=False), 2 * q)
    with pytest.raises(UnsupportedError, match=r"--attention-backend mac cannot be used: .*attention takes sinks"):
        decode(sinks=torch.zeros(4))
    attention._prefill = SimpleNamespace(whole=True)
    with pytest.raises(UnsupportedError, match="attention takes sinks"):
        attention.forward_extend(q, None, None, layer, None, sinks=torch.zeros(4))


def test_the_memory_of_plans_is_counted_while_they_live(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    active, allocated = start(site, tmp_path), iter([100, 130, 130, 150])
    monkeypatch.setattr("mac_sglang.serving._allocated", lambda device: next(allocated))
    one, other = (active.plan(*torch.ones(2, size, dtype=torch.int32)) for size in (1, 2))
    assert active.plan_bytes == 50
    del one
    assert active.plan_bytes == 20
    assert other.rows.shape == (2,)


def test_the_audit_reads_the_cache_with_the_scales_of_the_step(site: Site, tmp_path: Path) -> None:
    active = start(site, tmp_path, audit_rate=1.0)
    assert active.auditor is not None
    plan = active.plan(torch.tensor([1, 3]), torch.tensor([20, 30]))
    k_cache, v_cache = torch.randn(2, ROWS * CONTEXT, 1, LAYOUT.num_kv_heads, LAYOUT.head_dim)
    plan.begin()
    plan.run(torch.randn(2, 4, 8), (k_cache, v_cache), (0.5, 4.0), site.layers.served[0])
    plan.begin()  # counts the step
    totals = active.auditor.read(active.auditor.totals)
    assert totals.groups == LAYOUT.num_kv_heads and totals.error_sum < 1e-4
