"""Un-rotation against the model's own queries before RoPE, for every RoPE kind of the library."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, LONG_FACTORS, VOCAB, Family
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mac_kernels import UnsupportedError
from mac_transformers.rope import ModelRope, rope_of_layer

pytestmark = pytest.mark.usefixtures("one_thread")
THETA = {"rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **THETA}
LONG = {"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 64, **LONG_FACTORS, **THETA}
PARTIAL = {"rope_type": "default", "partial_rotary_factor": 0.5, **THETA}


def llama(**rope_parameters: Any) -> Family:
    return Family("LlamaConfig", {"rope_parameters": {**THETA, **rope_parameters}})


MODELS = {
    "default": llama(rope_type="default"),
    "linear": llama(rope_type="linear", factor=4.0),
    "dynamic": Family(
        "LlamaConfig",
        {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, **THETA}},
    ),
    "llama3": llama(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    "yarn": llama(**YARN),
    "yarn-mscale": llama(**YARN, mscale=0.7, mscale_all_dim=1.3),
    "yarn-attention-factor": llama(**YARN, attention_factor=2.5),
    "longrope": llama(**LONG),
    "longrope-phi3": FAMILIES["phi3-longrope"],
    "proportional": llama(rope_type="proportional", partial_rotary_factor=0.5),
    "partial-phi3": FAMILIES["phi3-partial"],
    "partial-phi": Family("PhiConfig", {"rope_parameters": PARTIAL}),
    "partial-stablelm": Family("StableLmConfig", {"rope_parameters": {**PARTIAL, "partial_rotary_factor": 0.25}}),
    "interleaved-cohere": FAMILIES["cohere-interleaved"],
    "interleaved-partial-glm": FAMILIES["glm-interleaved-partial"],
    "qk-norm-qwen3": FAMILIES["qwen3"],
    "halves-gpt-oss": FAMILIES["gpt-oss"],
    "per-layer-type-gemma3": Family(
        "Gemma3TextConfig",
        {
            **FAMILIES["gemma3"].changes,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", **THETA},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            },
        },
    ),
}


def test_every_kind_of_the_library_has_a_model_here() -> None:
    kinds = set()
    for family in MODELS.values():
        parameters = family.build().config.rope_parameters
        kinds |= {p["rope_type"] for p in ([parameters] if "rope_type" in parameters else parameters.values())}
    assert kinds >= set(ROPE_INIT_FUNCTIONS)


class Recorder:
    """Queries of every layer before and after RoPE, in the order of the layers."""

    def __init__(self) -> None:
        self.before: list[torch.Tensor] = []
        self.after: list[tuple[Any, torch.Tensor, torch.Tensor]] = []

    def attend(self, module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.after.append((module, query.transpose(1, 2), kwargs["position_ids"]))
        kwargs.pop("s_aux", None)
        return sdpa_attention_forward(module, query, *args, **kwargs)


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    seen = Recorder()
    AttentionInterface.register("recorder", seen.attend)
    AttentionMaskInterface.register("recorder", sdpa_mask)
    yield seen
    del AttentionInterface._global_mapping["recorder"], AttentionMaskInterface._global_mapping["recorder"]


def run_recorded(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, model: Any, position_ids: torch.Tensor, cache: Any = None
) -> None:
    """One forward pass, with the model's own rotation wrapped to see its queries."""
    modeling = sys.modules[type(model).__module__]
    rotate = modeling.apply_rotary_pos_emb

    def seeing(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        recorder.before.append(q.transpose(1, 2))
        return rotate(q, k, *args, **kwargs)

    model.set_attn_implementation("recorder")
    ids = torch.randint(2, VOCAB, position_ids.shape, generator=torch.Generator().manual_seed(1))
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(modeling, "apply_rotary_pos_emb", seeing)
        model(ids, position_ids=position_ids, past_key_values=cache, use_cache=cache is not None)


def worst_error(recorder: Recorder, ropes: dict[int, ModelRope], seq_len: int, dtype: torch.dtype) -> float:
    """Largest relative error of an un-rotated query over layers, tokens and heads."""
    assert len(recorder.before) == len(recorder.after) == 2
    errors = []
    for before, (module, after, position_ids) in zip(recorder.before, recorder.after, strict=True):
        rope = ropes.setdefault(module.layer_idx, ModelRope(module, dtype))
        back = rope.at(seq_len).unrotate(after, position_ids)[..., : before.shape[-1]]
        errors.append(float(((back - before.float()).norm(dim=-1) / before.float().norm(dim=-1)).max()))
    recorder.before.clear()
    recorder.after.clear()
    return max(errors)


# rounding of the rotated query and of the two products of the rotation, each half an ulp of the dtype
TOLERANCE = {torch.float32: 4e-7, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", MODELS)
def test_unrotated_queries_equal_the_models_own(
    kind: str, dtype: torch.dtype, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[kind].build(dtype=dtype)
    ropes: dict[int, ModelRope] = {}
    # a prompt, one on both sides of the original length of 64 positions, and a shorter one again
    for first, count in ((0, 40), (50, 30), (80, 1), (3, 20)):
        positions = torch.arange(first, first + count)[None]
        run_recorded(recorder, monkeypatch, model, positions)
        assert worst_error(recorder, ropes, first + count, dtype) < TOLERANCE[dtype]


def test_rows_of_a_left_padded_batch_are_unrotated_at_their_own_positions(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS["yarn"].build()
    positions = torch.stack([torch.arange(30), (torch.arange(30) - 11).clamp(min=0)])
    run_recorded(recorder, monkeypatch, model, positions)
    assert worst_error(recorder, {}, 30, torch.float32) < TOLERANCE[torch.float32]


def test_a_wrong_rotation_is_told_apart(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["yarn"].build()
    run_recorded(recorder, monkeypatch, model, torch.arange(40)[None])
    other = ModelRope(MODELS["default"].build().model.layers[0].self_attn, torch.float32)
    assert worst_error(recorder, {0: other, 1: other}, 40, torch.float32) > 0.1


@pytest.mark.parametrize("kind", MODELS)
def test_every_layer_confirms_its_rotation_when_asked(kind: str) -> None:
    model = MODELS[kind].build()
    model.set_attn_implementation("mac")
    for layer in model.model.layers:
        rope = rope_of_layer(layer.self_attn, torch.zeros(1, 4, 1, 16))
        assert rope.key[2], "rotated"


def test_a_layer_that_does_not_rotate_is_found_out() -> None:
    model = FAMILIES["smollm3-nope"].build()
    model.set_attn_implementation("mac")
    rotates = [rope_of_layer(layer.self_attn, torch.zeros(1, 4, 1, 16)).key[2] for layer in model.model.layers]
    assert rotates == [True, False]
    rope = rope_of_layer(model.model.layers[1].self_attn, torch.zeros(1, 4, 1, 16)).at(100)
    q = torch.randn(5, 4, 16)
    assert rope.unrotate(q, torch.arange(5)).equal(q)


def test_a_layer_that_rotates_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"].build()
    model.set_attn_implementation("mac")
    layer = model.model.layers[0].self_attn
    modeling = sys.modules[type(layer).__module__]
    rotate = modeling.apply_rotary_pos_emb
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", lambda q, k, cos, sin: rotate(q, k, cos, 0.5 * sin))
    with pytest.raises(UnsupportedError, match="not rotated as its rotary class says"):
        rope_of_layer(layer, torch.zeros(1, 4, 1, 16))


@pytest.mark.parametrize(("kind", "below", "above"), [("longrope", 64, 65), ("dynamic", 63, 64), ("default", 10, 500)])
def test_frequencies_have_another_epoch_only_where_they_change(kind: str, below: int, above: int) -> None:
    rope = ModelRope(MODELS[kind].build().model.layers[0].self_attn, torch.float32)
    assert rope.epoch(1) == rope.epoch(below)
    assert (rope.epoch(below) == rope.epoch(above)) == (kind == "default")
    positions = torch.arange(60)
    same = rope.at(below).cos_sin(positions)[0].equal(rope.at(above + 10).cos_sin(positions)[0])
    assert same == (kind == "default")
