"""Hand every attention call of a model to one object, for measuring: the model itself stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from mac_kernels import HeadLayout, UnsupportedError

_NAME = "mac_intercept"


class AttentionHandler(Protocol):
    """Computes the attention of one layer."""

    def attend(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float
    ) -> torch.Tensor:
        """``q`` [B, Hq, N, D], ``k`` and ``v`` [B, Hkv, N, D] after RoPE, of the new tokens; returns [B, N, Hq, D]."""


@contextmanager
def intercepted(model: PreTrainedModel) -> Iterator[None]:
    """Send the attention calls of ``model(..., attention_handler=...)`` to the handler while the context is open."""
    AttentionInterface.register(_NAME, _forward)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def last_logits(
    model: PreTrainedModel, tokens: torch.Tensor, position: torch.Tensor, handler: AttentionHandler
) -> torch.Tensor:
    """Logits after the last of the tokens [B, N] at some positions [B, N], under the handler; [B, V] fp32."""
    result = model(
        input_ids=tokens, position_ids=position, use_cache=False, logits_to_keep=1, attention_handler=handler
    )
    logits: torch.Tensor = result.logits[:, -1].float()
    return logits


@contextmanager
def residual_norms(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Keep the norm of the residual stream that enters some layers, [L] each of the last pass, while the context lasts.

    Raises
    ------
    UnsupportedError
        If the model is not built of decoder layers whose attention ends in ``o_proj``.
    """
    # the library has no types for get_decoder()
    stack: Any = getattr(model.get_decoder(), "layers", None)  # type: ignore[no-untyped-call]
    if stack is None or not isinstance(getattr(getattr(stack[0], "self_attn", None), "o_proj", None), nn.Linear):
        raise UnsupportedError(
            f"following the residual stream of {type(model).__name__}",
            ["its decoder has no `layers` with a linear `self_attn.o_proj`"],
            "Use a model of the Llama kind.",
        )
    seen: dict[int, torch.Tensor] = {}

    def hook(layer: int) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            seen[layer] = hidden[0].float().norm(dim=-1)

        return note

    handles = [stack[layer].register_forward_pre_hook(hook(layer), with_kwargs=True) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def layout_of(model: PreTrainedModel) -> HeadLayout:
    """Head counts and head dim of the model's attention layers."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return HeadLayout(
        num_qo_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def num_layers_of(model: PreTrainedModel) -> int:
    """Number of decoder layers."""
    return int(model.config.get_text_config().num_hidden_layers)


def _forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    attention_handler: AttentionHandler,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    special = [name for name in ("sliding_window", "softcap", "s_aux") if kwargs.get(name) is not None]
    if special:
        raise UnsupportedError(
            f"comparing policies on {type(module).__name__}",
            [f"layer {module.layer_idx} uses {name}" for name in special],
            "Compare on a model whose layers are all plain full attention.",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention_handler.attend(module, query, key, value, scale), None
