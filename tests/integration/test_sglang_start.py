"""What a server decides at its start: which layers MAC serves, with which rotation, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("sglang_cpu", exc_type=ImportError)  # its work-arounds come before SGLang's imports

from mac_kernels import ConfigError, HeadLayout, MacConfig, UnsupportedError
from mac_sglang import compat, status
from mac_sglang.backend import build_backend
from mac_sglang.layers import LayerMap, ServedLayer, map_layers
from mac_sglang.mac_serving import for_rank

pytestmark = pytest.mark.sglang
DIM, CONTEXT = 16, 64


@pytest.fixture(autouse=True, scope="module")
def settings() -> None:
    """SGLang's modules read the settings of their process."""
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy"))


class Owner(nn.Module):
    """An attention module of a model: its rotary embedding and SGLang's attention layer."""

    def __init__(self, number: int, rotary: nn.Module | None, *, heads: int = 4, **changes: Any) -> None:
        from sglang.srt.layers.radix_attention import RadixAttention

        super().__init__()
        if rotary is not None:
            self.rotary_emb = rotary
        options = {"scaling": 0.25, "num_kv_heads": 2, "layer_id": number, **changes}
        self.attn = RadixAttention(heads, DIM, **options)


def rotary(*, rotary_dim: int = DIM, neox: bool = True) -> Any:
    from sglang.srt.layers.rotary_embedding import RotaryEmbedding

    return RotaryEmbedding(DIM, rotary_dim, 128, 10000, neox, torch.float32)


def layer_map(*owners: Owner, rotated: bool = True) -> LayerMap:
    return map_layers(nn.ModuleList(owners), kv_dtype=torch.bfloat16, context_len=CONTEXT, rotated=rotated)


def test_layers_that_share_a_rotation_share_a_kind() -> None:
    one, other = rotary(), rotary()
    found = layer_map(Owner(0, one), Owner(3, other), Owner(5, one), Owner(7, one, logit_cap=30.0))
    kinds = {number: layer.kind for number, layer in found.served.items()}
    assert [layer.index for layer in found.served.values()] == [0, 1, 2, 3]
    assert kinds[0] == kinds[5]
    assert len({kinds[0], kinds[3], kinds[7]}) == 3
    assert kinds[7].logits_soft_cap == 30.0
    assert found.layout == HeadLayout(4, 2, DIM)
    assert found.complete


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sliding_window_size": 127}, "sliding window"),
        ({"is_cross_attention": True}, "cross attention"),
        ({"v_head_dim": 8}, "different head dims"),
        ({"rotary": None}, "no rotary embedding"),
        ({"heads": 8}, "heads differ"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layer_that_mac_cannot_serve_is_exact_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    shared = rotary()
    odd = Owner(2, **{"rotary": shared, **changes})
    found = layer_map(Owner(0, shared), Owner(1, shared), odd)
    assert list(found.served) == [0, 1]
    assert reason in found.exact[2]
    assert not found.complete


@pytest.mark.parametrize(
    ("module", "rotated", "bare"),
    [
        ("AfmoeAttention", {"is_local_attention": True}, {"is_local_attention": False}),
        ("Cohere2MoeAttention", {"is_sliding": False, "force_rope": True}, {"is_sliding": False, "force_rope": False}),
        ("CohereAttention", {"v1": True, "sliding_window_size": -1}, {"v1": False, "sliding_window_size": -1}),
        (
            "Exaone4Attention",
            {"sliding_window_pattern": None, "is_sliding": False},
            {"sliding_window_pattern": "LLLG", "is_sliding": False},
        ),
        (
            "ExaoneMoEAttention",
            {"sliding_window": False, "apply_rope_all_layers": True},
            {"sliding_window": False, "apply_rope_all_layers": False},
        ),
        ("AnyAttention", {}, {"use_rope": False}),
    ],
)
def test_layer_that_does_not_use_its_rotary_embedding_is_exact(
    module: str, rotated: dict[str, Any], bare: dict[str, Any]
) -> None:
    owners = []
    for number, attributes in enumerate((rotated, bare)):
        owner = type(module, (Owner,), {})(number, rotary())
        vars(owner).update(attributes)
        owners.append(owner)
    found = layer_map(*owners)
    assert list(found.served) == [0]
    assert found.exact == {1: "no rotary embedding"}
    assert list(layer_map(*owners, rotated=False).served) == [0, 1]


def test_layers_without_rotation_are_served_where_nobody_has_to_know_it() -> None:
    found = layer_map(Owner(0, rotary()), Owner(1, None), Owner(2, rotary(), logit_cap=30.0), rotated=False)
    assert found.complete
    kinds = [layer.kind for layer in found.served.values()]
    assert kinds[0] == kinds[1] != kinds[2]


def test_cache_of_another_dtype_serves_no_layer() -> None:
    found = map_layers(
        nn.ModuleList([Owner(0, rotary())]), kv_dtype=torch.float8_e5m2, context_len=CONTEXT, rotated=True
    )
    assert found.layout is None
    assert "float8_e5m2" in found.exact[0]


@pytest.mark.parametrize("neox", [True, False], ids=["neox", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [DIM, DIM // 2])
def test_queries_are_unrotated_with_the_models_own_table(neox: bool, rotary_dim: int) -> None:
    module = rotary(rotary_dim=rotary_dim, neox=neox)
    rope = layer_map(Owner(0, module)).served[0].kind.rope
    position = torch.tensor([0, 1, 37, 127])
    before = torch.randn(4, 4 * DIM, generator=torch.Generator().manual_seed(0))
    rotated, _ = module.forward_native(position, before.clone(), before.clone())
    torch.testing.assert_close(rope.unrotate(rotated.view(4, 4, DIM), position), before.view(4, 4, DIM))
    assert not torch.allclose(rotated, before)


def test_tables_by_layer_and_head_are_cut_to_this_rank() -> None:
    kind = layer_map(Owner(0, rotary())).served[0].kind
    layers = LayerMap({1: ServedLayer(0, kind), 2: ServedLayer(1, kind)}, {0: "sliding window"}, HeadLayout(2, 1, DIM))
    table = tuple(tuple(10.0 * layer + head + 1 for head in range(4)) for layer in range(3))
    config = MacConfig(influence_scale=table, thresholds=((0.1,), (0.2,), (0.3,)))
    cut = for_rank(config, layers, HeadLayout(2, 1, DIM), rank=1)
    assert cut.influence_scale == ((13.0, 14.0), (23.0, 24.0))
    assert cut.thresholds == ((0.2,), (0.3,))


@pytest.fixture
def parallel() -> Iterator[None]:
    from sglang.srt.runtime_context import get_parallel

    with get_parallel().override(attn_dp_size=1, pp_size=1, attn_cp_size=1, attn_dcp_size=1):
        yield


def runner(**changes: Any) -> Any:
    settings = {
        "kv_cache_dtype": "auto", "enable_page_major_kv_layout": False, "enable_unified_memory": False,
        "disaggregation_mode": "null", "enable_pdmux": False, "enable_two_batch_overlap": False,
        "enable_streaming_session": False, "hicache_storage_backend": None, "enable_lmcache": False,
        "enable_flexkv": False, "enable_unified_cache_external_linker": False, "radix_cache_backend": None,
    }  # fmt: skip
    arguments = SimpleNamespace(**{**settings, **{k: v for k, v in changes.items() if k in settings}})
    return SimpleNamespace(
        **{
            "server_args": arguments, "use_mla_backend": False, "kv_cache_dtype": torch.bfloat16,
            "spec_algorithm": SimpleNamespace(is_none=lambda: True), "device": "cpu",
            "prefill_attention_backend_str": "mac", "decode_attention_backend_str": "mac",
            "model_config": SimpleNamespace(is_encoder_decoder=False),
            **{k: v for k, v in changes.items() if k not in settings},
        }
    )  # fmt: skip


def test_plain_server_is_accepted(parallel: None) -> None:
    compat.check_runner(runner(), "mac")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_mla_backend": True}, "MLA"),
        ({"spec_algorithm": SimpleNamespace(is_none=lambda: False)}, "leave out --speculative-algorithm"),
        ({"prefill_attention_backend_str": "fa3"}, "--prefill- and --decode-attention-backend"),
        ({"disaggregation_mode": "prefill"}, "--disaggregation-mode null"),
        ({"enable_unified_memory": True}, "page-major"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype auto, bf16 or fp8_e4m3"),
        ({"enable_two_batch_overlap": True}, "--enable-two-batch-overlap"),
        ({"enable_streaming_session": True}, "leave out --enable-streaming-session"),
        ({"hicache_storage_backend": "file"}, "leave out --hicache-storage-backend"),
        ({"enable_lmcache": True}, "--enable-lmcache"),
        ({"radix_cache_backend": "flexkv"}, "--enable-flexkv"),
        ({"enable_unified_cache_external_linker": True}, "--enable-unified-cache-external-linker"),
        ({"model_config": SimpleNamespace(is_encoder_decoder=True)}, "encoder-decoder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_served_is_refused_with_the_setting(
    changes: dict[str, Any], reason: str, parallel: None
) -> None:
    with pytest.raises(UnsupportedError) as error:
        compat.check_runner(runner(**changes), "mac")
    assert reason in str(error.value)
    assert "--attention-backend flashinfer" in str(error.value)


def test_all_reasons_are_given_at_once(parallel: None) -> None:
    with pytest.raises(UnsupportedError) as error:
        compat.check_runner(runner(use_mla_backend=True, enable_pdmux=True), "mac")
    assert len(error.value.reasons) == 2


def test_failed_step_of_the_plugin_ends_the_server_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "_STEPS", {})

    def fail() -> None:
        raise KeyError("register_attention_backend")

    status.attempt("attention backend", fail)
    with pytest.raises(compat.SGLangChanged, match="attention backend: KeyError: 'register_attention_backend'"):
        build_backend("mac", runner())


def small_model() -> Any:
    """A runner of one attention layer, with pools as large as they have to be."""
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

    shape = SimpleNamespace(
        is_encoder_decoder=False, context_len=CONTEXT, num_hidden_layers=1, num_attention_heads=4, head_dim=DIM,
        vocab_size=9, get_total_num_kv_heads=lambda: 2,
    )  # fmt: skip
    found = runner(
        model_config=shape, model=nn.ModuleList([Owner(0, rotary())]), dtype=torch.bfloat16,
        req_to_token_pool=ReqToTokenPool(size=2, max_context_len=CONTEXT, device="cpu", enable_memory_saver=False),
        token_to_kv_pool=SimpleNamespace(get_kv_buffer=lambda number: torch.zeros(2, 64, 2, DIM)),
    )  # fmt: skip
    found.server_args.model_path = "tiny"
    return found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 1, "serving": {"ring_memory_gb": -1}}', r"config.json: .*ring_memory_gb=-1 must be a number > 0"),
        (
            '{"schema": 1, "serving": {"ring_memory": 1}}',
            r"unknown serving option 'ring_memory'; known: ring_memory_gb",
        ),
        ('{"schema": 1, "preset": "quick"}', r"quick.*careful"),
        ('{"schema": 1, ', r"config.json"),
        ('{"schema": 1, "serving": {"ring_memory_gb": 1e-9}}', r"no ring fits"),
    ],
    ids=["value", "name", "preset", "no json", "budget"],
)
def test_wrong_config_ends_the_server_with_its_reason(
    text: str, message: str, tmp_path: Path, parallel: None, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(status, "_STEPS", {})
    monkeypatch.setattr(compat, "tensor_rank", lambda: 0)
    (tmp_path / "config.json").write_text(text)
    monkeypatch.setenv("MAC_KERNELS_CONFIG", str(tmp_path / "config.json"))
    with pytest.raises(ConfigError, match=message):
        build_backend("mac", small_model())
    assert re.search(f"mac: the server cannot start: .*{message}", caplog.text)
