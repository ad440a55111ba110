"""The cache that a TCA generation uses: the library's keys and values, and which far tokens every head keeps."""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from mac_kernels import HeadLayout, UnsupportedError
from mac_kernels.tca import TcaBudgets, TcaConfig, find_budgets

from .fallback import Fallback
from .layer import MacLayer
from .model_key import model_key
from .step import SeenPass, Step, read_step
from .tca_layer import EvictingLayer
from .tca_state import FarState, choices_of_layers, unsupported_reasons

NAME = "tca"
"""Of the attention implementation that attends with a :class:`TcaCache`."""


class TcaCache(DynamicCache):
    """A ``DynamicCache`` whose full-attention layers attend sparsely under ``attn_implementation="tca"``.

    A prompt is read and selected by its last token, every further one of several tokens anew; single tokens are decoded
    with what was selected last. Other layers (sliding window, attention sinks, linear attention) run exactly.

    Parameters
    ----------
    model_config : PreTrainedConfig
        ``model.config``.
    config : TcaConfig, optional
        Default: that of the budgets, their ``mass_target`` included. In the mode ``"evict"`` a later prompt is read
        token by token with what was kept of the earlier ones, and rows cannot be reordered or cropped.
    budgets : TcaBudgets, optional
        Default: those that :func:`mac_kernels.tca.find_budgets` finds for this model.

    Raises
    ------
    ConfigError
        If there are no budgets for the model, or they were calibrated for another config.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> import mac_transformers
    >>> smollm2 = LlamaConfig(num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, hidden_size=576,
    ...     vocab_size=49152)
    >>> mac_transformers.TcaCache(smollm2).tca_config.local_window
    512
    """

    def __init__(
        self,
        model_config: PreTrainedConfig,
        config: TcaConfig | None = None,
        *,
        budgets: TcaBudgets | None = None,
    ) -> None:
        super().__init__(config=model_config)
        self.budgets = find_budgets(model_key(model_config)) if budgets is None else budgets
        self.tca_config = self.budgets.config if config is None else config
        self.choices = choices_of_layers(self.budgets, self.tca_config, len(self.layers))
        evict = self.tca_config.mode == "evict"
        self.layers = [
            (EvictingLayer() if evict else MacLayer()) if type(layer) is DynamicLayer else layer
            for layer in self.layers
        ]
        self.states: dict[int, FarState] = {}
        self._step: Step | None = None
        self._seen: SeenPass | None = None
        self._fallback: Fallback | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values; the returned keys know this cache, since the attention function gets no cache."""
        keys: Any
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        keys.tca_origin = weakref.ref(self)
        return keys, values

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that are held for the tokens so far (not the room kept for more)."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, MacLayer))

    def begin(
        self,
        module: nn.Module,
        query: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> Fallback | None:
        """Take note of a layer's call with query [B, Hq, N, D]; returns what speaks against TCA."""
        layer_idx = cast(int, module.layer_idx)
        layer, choice = self.layers[layer_idx], self.choices[layer_idx]
        if not isinstance(layer, MacLayer):
            return Fallback("cache layer", "layers of another kind than full attention are not covered")
        layout = HeadLayout(query.shape[1], len(choice), query.shape[3])
        if reasons := unsupported_reasons(layout, self.tca_config, query.dtype, query.device):
            return Fallback("shape", f"{'; '.join(reasons)}: no kernel of TCA covers this layer")
        length, count = layer.get_seq_length(), query.shape[2]
        call = attention_mask, position_ids, length, count
        if self._seen is None or not self._seen.covers(*call):
            self._seen = SeenPass(*call)
            self._fallback = self._follow(attention_mask, position_ids, length, query)
        return self._fallback

    def check_whole(self, layer_idx: int, fallback: Fallback) -> None:
        """Make sure that a call which TCA does not cover finds all keys.

        Raises
        ------
        UnsupportedError
            If they were evicted.
        """
        layer = self.layers[layer_idx]
        if isinstance(layer, EvictingLayer) and layer.evicted is not None:
            raise UnsupportedError(
                "TCA in the mode 'evict'", [fallback.detail], "Use TcaConfig(mode='index') for such calls."
            )

    def attend(self, layer_idx: int, query: torch.Tensor, *, sm_scale: float, logits_soft_cap: float) -> torch.Tensor:
        """Attend queries [B, Hq, N, D] after RoPE, the newest tokens of every row; returns [B, N, Hq, D]."""
        layer, step = cast(MacLayer, self.layers[layer_idx]), self._step
        assert step is not None, "begin() comes first"
        if layer_idx not in self.states:
            self.states[layer_idx] = FarState(
                self.tca_config, self.choices[layer_idx], sm_scale=sm_scale, logits_soft_cap=logits_soft_cap
            )
        state = self.states[layer_idx]
        if isinstance(layer, EvictingLayer) and layer.evicted is not None:
            assert layer.fresh is not None, "update() comes first"
            return state.decode_evicted(query, layer.evicted, layer.fresh)
        layout = HeadLayout(query.shape[1], layer.keys.shape[1], query.shape[3])
        kv = layer.paged(layout, step.starts, step.length)
        if not isinstance(layer, EvictingLayer):
            return state.attend(query, kv, step)
        out, kept = state.evict(query, kv, step)
        layer.evict(kept)
        return out

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()  # type: ignore[no-untyped-call]  # the library is untyped here
        self.states, self._step, self._seen, self._fallback = {}, None, None, None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens (a negative number of them); the next token selects anew."""
        super().crop(tokens_to_remove)
        self._void()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows for beam search; the next token selects anew."""
        super().reorder_cache(beam_idx)
        self._void()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times; the next token selects anew."""
        super().batch_repeat_interleave(repeats)
        self._void()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows, given by number or as a mask; the next token selects anew."""
        super().batch_select_indices(indices)
        self._void()

    def _follow(
        self, mask: torch.Tensor | None, position_ids: torch.Tensor | None, length: int, query: torch.Tensor
    ) -> Fallback | None:
        """Take note of a new forward pass."""
        batch, _, count, _ = query.shape
        step = read_step(
            mask, position_ids, batch=batch, count=count, length=length, checked=count, device=query.device
        )
        if isinstance(step, Fallback):
            return step
        self._step = step
        return None

    def _void(self) -> None:
        """The far sets are those of other rows or tokens now."""
        self._seen = None
        for state in self.states.values():
            state.forget()
