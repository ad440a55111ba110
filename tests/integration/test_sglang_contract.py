"""What this package relies on in SGLang: a test that fails here names what changed."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang_cpu", exc_type=ImportError)  # its work-arounds come before SGLang's imports

from mac_sglang import compat, plugin, status

pytestmark = pytest.mark.sglang
PARAMETERS = {
    "sglang.srt.layers.attention.attention_registry.register_attention_backend": ["name"],
    "sglang.srt.mem_cache.registry.register_radix_cache_backend": ["name", "factory"],
    "sglang.srt.mem_cache.registry.create_tree_cache": ["ctx"],
    "sglang.srt.mem_cache.registry.default_radix_cache_factory": ["ctx"],
    "sglang.srt.plugins.hook_registry.HookRegistry._apply_target": ["target", "hooks"],
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new": ["batch", "model_runner"],
    "sglang.srt.mem_cache.memory_pool.KVWriteLoc": ["loc", "swa_loc"],
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.set_kv_buffer": [
        "self", "layer", "loc_info", "cache_k", "cache_v", "k_scale", "v_scale",
    ],
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.get_kv_buffer": ["self", "layer_id"],
    "sglang.srt.layers.attention.flashinfer_backend.FlashInferAttnBackend._kv_write_scales": ["self", "layer"],
    "sglang.srt.configs.model_config.ModelConfig.get_total_num_kv_heads": ["self"],
    "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.execute": [
        "self", "forward_batch",
    ],
    "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.__init__": ["self", "model_runner"],
    "sglang.srt.layers.attention.base_attn_backend.AttentionBackend.init_forward_metadata": ["self", "forward_batch"],
    "sglang.srt.layers.attention.base_attn_backend.AttentionBackend.init_forward_metadata_out_graph": [
        "self", "forward_batch", "in_capture",
    ],
    "sglang.srt.layers.attention.base_attn_backend.AttentionBackend.init_forward_metadata_in_graph": [
        "self", "forward_batch",
    ],
    "sglang.srt.layers.attention.base_attn_backend.AttentionBackend.init_cuda_graph_state": [
        "self", "max_bs", "max_num_tokens",
    ],
    "sglang.srt.layers.attention.base_attn_backend.AttentionBackend.on_after_cuda_graph_warmup": ["self"],
    "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.forward_decode": [
        "self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache",
    ],
    "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.forward_extend": [
        "self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache",
    ],
}  # fmt: skip


@pytest.mark.parametrize("target", PARAMETERS)
def test_parameters(target: str) -> None:
    found = list(inspect.signature(pkgutil.resolve_name(target)).parameters)
    want = PARAMETERS[target]
    assert found[: len(want)] == want, f"{target}{tuple(found)}: MAC calls or overrides it as {tuple(want)}"


def test_version_is_supported() -> None:
    compat.check_version()


def test_every_hooked_function_exists() -> None:
    targets = [compat.REQUEST_CREATED, compat.BATCH_BEGINS, compat.RADIX_CACHE_BUILT, compat.RESULTS_PROCESSED]
    for target in [*targets, *compat.state_changes()]:
        assert callable(pkgutil.resolve_name(target)), f"{target} is gone"


def test_scheduler_builds_its_cache_through_the_hooked_function() -> None:
    module = importlib.import_module("sglang.srt.mem_cache.kv_cache_builder")
    assert "create_tree_cache" in inspect.getsource(module)


@pytest.mark.parametrize(
    ("owner", "attributes"),
    [
        ("sglang.srt.model_executor.forward_batch_info.ForwardBatch", [
            "forward_mode", "batch_size", "req_pool_indices", "seq_lens", "out_cache_loc",
            "extend_prefix_lens_cpu", "extend_seq_lens_cpu",
        ]),
    ],
)  # fmt: skip
def test_dataclass_fields(owner: str, attributes: list[str]) -> None:
    found = {field.name for field in dataclasses.fields(pkgutil.resolve_name(owner))}
    assert not set(attributes) - found, f"{owner} has no {sorted(set(attributes) - found)}"


@pytest.mark.parametrize(
    ("owner", "attributes"),
    [
        ("sglang.srt.mem_cache.memory_pool.ReqToTokenPool", ["req_to_token", "free_slots", "req_generation", "size"]),
        ("sglang.srt.managers.schedule_batch.Req", [
            "rid", "origin_input_ids", "output_ids", "extra_key", "sampling_params",
        ]),
        ("sglang.srt.layers.radix_attention.RadixAttention", [
            "tp_q_head_num", "tp_k_head_num", "head_dim", "qk_head_dim", "v_head_dim", "scaling", "layer_id",
            "logit_cap", "sliding_window_size", "is_cross_attention", "attn_type", "xai_temperature_len",
            "k_scale", "v_scale", "k_scale_float", "v_scale_float",
        ]),
        ("sglang.srt.layers.rotary_embedding.RotaryEmbedding", ["rotary_dim", "is_neox_style"]),
    ],
)  # fmt: skip
def test_attributes_are_set_at_construction(owner: str, attributes: list[str]) -> None:
    source = inspect.getsource(pkgutil.resolve_name(owner).__init__)
    missing = [name for name in attributes if f"self.{name}" not in source]
    assert not missing, f"{owner}.__init__ does not set {missing}"


def test_settings_that_are_asked_for_exist() -> None:
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(model_path="dummy")
    names = (
        "kv_cache_dtype", "enable_page_major_kv_layout", "enable_unified_memory", "disaggregation_mode", "enable_pdmux",
        "enable_two_batch_overlap", "enable_streaming_session", "hicache_storage_backend", "radix_cache_backend",
        "enable_lmcache", "enable_flexkv", "disable_radix_cache", "enable_metrics", "served_model_name", "model_path",
    )  # fmt: skip
    assert not [name for name in names if not hasattr(args, name)]


def test_request_row_is_where_compat_looks() -> None:
    module: Any = importlib.import_module("sglang.srt.managers.schedule_batch")
    source = inspect.getsource(module)
    assert "req_pool_idx: Optional[int]" in source, "the row of a request has moved: see compat.row_of"


def test_pool_row_zero_is_scratch_and_generations_rise() -> None:
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

    pool = ReqToTokenPool(size=2, max_context_len=8, device="cpu", enable_memory_saver=False)
    assert pool.req_to_token.shape == (3, 8)
    assert 0 not in pool.free_slots
    assert pool.req_generation.tolist() == [0, 0, 0]


def test_registering_twice_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.mem_cache.registry import registered_radix_cache_backends
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES

    monkeypatch.setattr(status, "_STEPS", {})
    found = []
    for _ in range(2):
        monkeypatch.setattr(plugin, "_registered", False)
        plugin.register()
        assert not status.problems() and len(status.steps()) == 3
        found.append(
            (list(ATTENTION_BACKEND_CHOICES), dict(ATTENTION_BACKENDS), list(registered_radix_cache_backends()))
        )
    assert found[0] == found[1]
    assert {"mac", "tca"} <= found[0][1].keys() and "mac" in found[0][2]


def test_unknown_version_is_refused_with_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda: (0, 6, 0))
    with pytest.raises(compat.SGLangChanged, match=r"0\.6\.0.*0\.5\.17 to 0\.5\.23"):
        compat.check_version()


def test_reads_are_fenced_where_the_backend_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

    hooked: dict[str, Any] = {}
    monkeypatch.setattr(compat, "after", hooked.__setitem__)
    compat.fence_reads_after_replay()
    if hasattr(AttentionBackend, "shared_read_ends"):
        assert not hooked
        return
    assert list(hooked) == [compat.GRAPH_REPLAYED]
    recorded: list[Any] = []
    event = type("Event", (), {"record": lambda self: recorded.append(self)})
    before = object()  # SGLang's, from before the replay
    model_runner = SimpleNamespace(war_fastpath_read_done_event=before)
    hooked[compat.GRAPH_REPLAYED](
        None, SimpleNamespace(device_module=SimpleNamespace(Event=event), model_runner=model_runner)
    )
    assert recorded == [model_runner.war_fastpath_read_done_event] != [before]
    for module, names in (
        ("sglang.srt.model_executor.runner.decode_cuda_graph_runner", ["model_runner.war_fastpath_read_done_event = "]),
        ("sglang.srt.managers.scheduler", ["war_fastpath_read_done_event", "wait_event(ev)"]),
    ):
        source = inspect.getsource(importlib.import_module(module))
        assert all(name in source for name in names)


def test_fp8_cache_that_would_be_written_unscaled_is_refused() -> None:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    with pytest.raises(compat.SGLangChanged, match=r"TorchNativeAttnBackend has no _kv_write_scales"):
        compat.check_fp8_writes(TorchNativeAttnBackend.__new__(TorchNativeAttnBackend))


CONDITIONS = {
    "AfmoeAttention": "self.is_local_attention",
    "Cohere2MoeAttention": "self.is_sliding or self.force_rope",
    "CohereAttention": "self.v1 or self.sliding_window_size > 0",
    "Exaone4Attention": "not self.sliding_window_pattern or self.is_sliding",
    "ExaoneMoEAttention": "self.sliding_window or self.apply_rope_all_layers",
}
BY_LAYER = "sliding|local|layer|pattern|force_rope"


def _rotates(node: ast.AST) -> bool:
    return any(isinstance(call, ast.Call) and ast.unparse(call.func) == "self.rotary_emb" for call in ast.walk(node))


def test_layers_that_do_not_use_their_rotary_embedding_are_those_that_compat_knows() -> None:
    found: dict[str, str] = {}
    folder = Path(next(iter(importlib.import_module("sglang.srt.models").__path__)))
    for path in folder.glob("*.py"):
        text = path.read_text(encoding="utf-8-sig")
        if "RadixAttention(" not in text:
            continue
        for module in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)):
            branches = (node for node in ast.walk(module) if isinstance(node, ast.If) and _rotates(node))
            # what tells layers of one model apart; others ask for the device, a fused kernel, or whether there is one
            for condition in (ast.unparse(branch.test) for branch in branches):
                if re.search(BY_LAYER, condition):
                    found[module.name] = condition
    assert found == CONDITIONS, "queries are rotated in some layers only: see compat._ROTATED_WHERE"
    assert set(found) == set(compat._ROTATED_WHERE)


@pytest.mark.parametrize(("replica", "label"), [(None, {}), (0, {"dp_rank": "0"}), (3, {"dp_rank": "3"})])
def test_replicas_of_a_server_have_metrics_of_their_own(replica: int | None, label: dict[str, str]) -> None:
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.runtime_context import get_parallel

    if "self.ps = ps" in inspect.getsource(ModelRunner.__init__):
        runner, ranks = SimpleNamespace(ps=SimpleNamespace(dp_rank=replica)), {"tp_rank": 1}
    else:
        runner, ranks = SimpleNamespace(), {"tp_rank": 1, "dp_rank": replica}
    with get_parallel().override(**ranks):
        assert compat.rank_labels(runner) == {"tp_rank": "1", **label}


def test_hook_is_applied_on_top_of_another_plugins_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.mem_cache import registry
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target, calls = "sglang.srt.mem_cache.registry.get_radix_cache_factory", []
    monkeypatch.setattr(registry, "get_radix_cache_factory", registry.get_radix_cache_factory)
    HookRegistry.register(target, lambda *args: calls.append("theirs"), HookType.AFTER)
    HookRegistry.apply_hooks()
    compat.after(target, lambda *args: calls.append("ours"))
    registry.get_radix_cache_factory("none of them")
    assert calls == ["theirs", "ours"]


def test_hook_on_something_that_is_gone_says_so() -> None:
    with pytest.raises(compat.SGLangChanged, match=r"registry\.no_such_function cannot be hooked"):
        compat.after("sglang.srt.mem_cache.registry.no_such_function", lambda *args: None)
