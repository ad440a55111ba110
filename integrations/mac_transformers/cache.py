"""The cache that a MAC generation uses: the library's keys and values, read as pages, and the rings of its rows."""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from mac_kernels import (
    HeadLayout,
    InputError,
    MacConfig,
    PagedKV,
    PageTable,
    RingPool,
    Rope,
    StepTrace,
    resolve_config,
)
from mac_kernels.tca import TcaBudgets, find_budgets, refresh_index

from .fallback import Fallback, note_fallback
from .info import LayerInfo, inspect_layer
from .layer import MacLayer
from .model_key import model_key
from .plan import DecodePlan
from .rings import cut_rings, fill_rows, pick_rings, rings_for_batch
from .step import SeenPass, Step, read_step
from .tca_state import choices_of_layers

NAME = "mac"
"""Of the attention implementation that decodes with a :class:`MacCache`."""
_LONGEST = 131072  # context of a model that does not say
_NOT_IN_USE = Fallback(
    "attention implementation",
    f'call model.set_attn_implementation("{NAME}"); models that do not use the attention interface are not covered',
)


class MacCache(DynamicCache):
    """A ``DynamicCache`` whose full-attention layers decode with MAC under ``attn_implementation="mac"``.

    Layers that MAC does not cover (sliding window, attention sinks, linear attention) keep the library's own cache
    layer and run exactly. Batch rows are ring slots: reordering, repeating or selecting rows moves their rings along,
    cropping forgets the ring rows of the removed tokens.

    Parameters
    ----------
    model_config : PreTrainedConfig
        ``model.config``.
    config : MacConfig or str, optional
        What is reused, and when; a string names a preset. Default: what :func:`mac_kernels.resolve_config` finds for
        this model: the user's files, a tuned policy, or the preset ``careful``.
    ring_dtype : torch.dtype, optional
        Of the stored rows; default fp32 for an fp32 model, otherwise bf16.
    record : bool, default False
        Keep the last :class:`mac_kernels.StepTrace` of every layer in ``traces``.
    budgets : TcaBudgets, optional
        For a config whose misses read selected tokens (``config.tca``). Default: those that
        :func:`mac_kernels.tca.find_budgets` finds for this model.

    Raises
    ------
    ConfigError
        If the preset is unknown, a config file is wrong, or the budgets are missing or of another config.

    Notes
    -----
    The cache has to be passed: ``generate()`` makes its own otherwise, and the attention function sees tensors only.
    Every row takes a ring, :meth:`mac_kernels.RingPool.bytes_per_ring`. To run another policy, override :meth:`decode`
    (one token of every row in one layer) and, where needed, :meth:`prefill`; both find keys and values in
    :meth:`paged`, the rotation in :meth:`rope` and the scale in ``layer_info``.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> import torch, mac_transformers
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    >>> model.set_attn_implementation("mac")
    >>> cache = mac_transformers.MacCache(model.config, "careful")
    >>> prompt = torch.ones(1, 8, dtype=torch.int64)
    >>> model.generate(prompt, past_key_values=cache, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape
    torch.Size([1, 12])
    """

    def __init__(
        self,
        model_config: PreTrainedConfig,
        config: MacConfig | str | None = None,
        *,
        ring_dtype: torch.dtype | None = None,
        record: bool = False,
        budgets: TcaBudgets | None = None,
    ) -> None:
        super().__init__(config=model_config)
        self.layers = [MacLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]
        if config is None:
            config = resolve_config(model=model_key(model_config)).config
        self.mac_config = MacConfig.preset(config) if isinstance(config, str) else config
        self.ring_dtype, self.record = ring_dtype, record
        self._choices: tuple[tuple[int, ...], ...] = ()
        if self.mac_config.tca is not None:
            budgets = find_budgets(model_key(model_config)) if budgets is None else budgets
            self._choices = choices_of_layers(budgets, self.mac_config.tca, len(self.layers))
        self._text_config = model_config.get_text_config(decoder=True)
        self.layer_info: dict[int, LayerInfo] = {}
        self._exact_layers: dict[int, Fallback] = {}
        self.rings: RingPool | None
        self.traces: dict[int, StepTrace]
        self._step: Step | None
        self._seen: SeenPass | None
        self._fallback: Fallback | None
        self._plans: dict[tuple[Any, ...], DecodePlan]
        self._epochs: dict[int, int]
        self._steps: Counter[int]  # by layer, those decoded since tokens were selected for misses
        self._forget()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values; the returned keys know this cache, since the attention function gets no cache."""
        if self._text_config._attn_implementation != NAME:
            note_fallback(_NOT_IN_USE)
        keys: Any
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        keys.mac_origin = weakref.ref(self)
        return keys, values

    @property
    def mac_layers(self) -> list[int]:
        """Layers that MAC may decode, in order; the place in this list is the layer in the ring pool."""
        return [index for index, layer in enumerate(self.layers) if isinstance(layer, MacLayer)]

    @property
    def layout(self) -> HeadLayout:
        """Heads of the MAC layers, known after the first forward pass."""
        if not self.layer_info:
            raise InputError("the cache has met no layer; run the prompt through the model first")
        return next(iter(self.layer_info.values())).layout

    @property
    def step(self) -> Step:
        """The forward pass under way, or the last one."""
        if self._step is None:
            raise InputError("the cache has seen no forward pass; run the prompt through the model first")
        return self._step

    def begin(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        sm_scale: float | None,
        logits_soft_cap: float | None,
    ) -> Fallback | None:
        """Take note of a layer's call with query [B, Hq, N, D] and all keys; returns what speaks against MAC."""
        layer_idx = cast(int, module.layer_idx)
        if layer_idx not in self.layer_info and layer_idx not in self._exact_layers:
            self._meet(layer_idx, module, query, sm_scale, logits_soft_cap)
        if layer_idx in self._exact_layers:
            return self._exact_layers[layer_idx]
        if key is not self._layer(layer_idx).keys:
            return Fallback("other keys", "layers that attend to other keys than the cache returned are not covered")
        call = attention_mask, position_ids, key.shape[2], query.shape[2]
        if self._seen is None or not self._seen.covers(*call):
            self._fallback = self._follow(attention_mask, position_ids, call[2], query)
        if self._fallback is None:
            self._follow_frequencies(layer_idx)
        return self._fallback

    def prefill(self, layer_idx: int, query: torch.Tensor) -> None:
        """Fill the rings from the queries [B, Hq, N, D] after RoPE of a pass of several tokens."""
        info = self.layer_info[layer_idx]
        fill_rows(
            self._rings_for(query.shape[0]),
            self.paged(layer_idx),
            query,
            layer=info.ring_layer,
            rope=self.rope(layer_idx),
            config=self.mac_config,
            sm_scale=info.sm_scale,
            logits_soft_cap=info.logits_soft_cap,
        )
        if self.mac_config.tca is not None:
            self._select(layer_idx, query[:, :, -1])

    def decode(self, layer_idx: int, query: torch.Tensor) -> torch.Tensor:
        """Decode one token of every row: queries [B, Hq, D] after RoPE to outputs [B, Hq, D]."""
        plan, pages = self._planned(layer_idx), self._layer(layer_idx).pages()
        rings, ring_layer = self._rings_for(query.shape[0]), self.layer_info[layer_idx].ring_layer
        if self.mac_config.tca is not None:
            self._steps[layer_idx] += 1
            if self._steps[layer_idx] > (self.mac_config.tca.refresh or 0):
                self._select(layer_idx, query)
        if not self.record:
            return plan.run(query, pages, rings, ring_layer)
        out, self.traces[layer_idx] = plan.run_return_trace(query, pages, rings, ring_layer)
        return out

    def rope(self, layer_idx: int) -> Rope:
        """The rotation of a layer with the frequencies in effect."""
        return self.layer_info[layer_idx].rope.at(self.step.seq_len)

    def paged(self, layer_idx: int) -> PagedKV:
        """Keys and values of a layer as pages of one token; position 0 of a row is its first real token."""
        return self._layer(layer_idx).paged(self.layout, self.step.starts, self.step.length)

    def reset(self) -> None:
        """Forget all tokens and rings."""
        super().reset()  # type: ignore[no-untyped-call]  # the library is untyped here
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens (a negative number of them), and the ring rows that belong to them."""
        super().crop(tokens_to_remove)
        self._cut(self.get_seq_length())

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows for beam search."""
        super().reorder_cache(beam_idx)
        self._pick(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        if self._step is not None:
            self._pick(torch.arange(len(self._step.starts)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows, given by number or as a mask."""
        super().batch_select_indices(indices)
        self._pick(indices)

    def _meet(
        self,
        layer_idx: int,
        module: nn.Module,
        query: torch.Tensor,
        sm_scale: float | None,
        logits_soft_cap: float | None,
    ) -> None:
        """Get to know a layer at its first call."""
        if layer_idx not in self.mac_layers:
            self._exact_layers[layer_idx] = Fallback(
                "cache layer", "layers of another kind than full attention are not covered"
            )
            return
        found = inspect_layer(
            module,
            query,
            num_kv_heads=self._layer(layer_idx).keys.shape[1],
            ring_layer=self.mac_layers.index(layer_idx),
            sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap,
            known=next(iter(self.layer_info.values()), None),
        )
        if isinstance(found, Fallback):
            self._exact_layers[layer_idx] = found
        else:
            self.layer_info[layer_idx] = found

    def _follow(
        self, mask: torch.Tensor | None, position_ids: torch.Tensor | None, length: int, query: torch.Tensor
    ) -> Fallback | None:
        """Take note of a new forward pass; rows whose tokens moved start with an empty ring."""
        self._cut(length - query.shape[2])  # layers can be cropped one by one, without this cache
        self._seen = SeenPass(mask, position_ids, length, query.shape[2])
        step = read_step(
            mask,
            position_ids,
            batch=query.shape[0],
            count=query.shape[2],
            length=length,
            checked=self.mac_config.window,
            device=query.device,
        )
        if isinstance(step, Fallback):
            return step
        before, self._step = self._step, step
        if self.rings is not None and before is not None and len(before.starts) == len(step.starts):
            for slot in step.moved(before):
                self.rings.acquire(slot)
        return None

    def _cut(self, length: int) -> None:
        """Forget what belongs to tokens from ``length`` on."""
        if self._step is not None and length < self._step.length:
            if self.rings is not None:
                cut_rings(self.rings, length - self._step.starts)
            self._step, self._seen = dataclasses.replace(self._step, length=length), None

    def _follow_frequencies(self, layer_idx: int) -> None:
        """Forget a layer's ring rows when the model changes its frequencies: they belong to another rotation."""
        info = self.layer_info[layer_idx]
        epoch = info.rope.epoch(self.step.seq_len)
        if self.rings is not None and self._epochs.get(layer_idx, epoch) != epoch:
            self.rings.fields["pos"][info.ring_layer] = -1
        self._epochs[layer_idx] = epoch

    def _planned(self, layer_idx: int) -> DecodePlan:
        """The plan of the layer, at this step; layers of equal rotation and scale share it."""
        info, step, capacity = self.layer_info[layer_idx], self.step, self._layer(layer_idx).capacity
        key = info.rope.key, info.sm_scale, info.logits_soft_cap
        plan, rope = self._plans.get(key), self.rope(layer_idx)
        if plan is not None and plan.fits(len(step.starts), capacity, rope):
            if not plan.is_at(step):
                plan.follow(step, self._table(layer_idx))
            return plan
        table = self._table(layer_idx)
        self._plans[key] = DecodePlan(step, capacity, info, config=self.mac_config, rope=rope, table=table)
        return self._plans[key]

    def _table(self, layer_idx: int) -> PageTable:
        table = self.paged(layer_idx).table
        assert isinstance(table, PageTable)  # what paged() makes
        return table

    def _select(self, layer_idx: int, query: torch.Tensor) -> None:
        """Select by the newest queries [B, Hq, D] what the misses of the next steps read."""
        info, slots = self.layer_info[layer_idx], torch.arange(len(query), device=query.device)
        refresh_index(
            query.contiguous(),
            self.paged(layer_idx),
            (self.step.length - self.step.starts).tolist(),
            rings=self._rings_for(len(query)),
            layer=info.ring_layer,
            slots=slots,
            generations=torch.zeros_like(slots),
            sm_scale=info.sm_scale,
            logits_soft_cap=info.logits_soft_cap,
        )
        self._steps[layer_idx] = 0

    def _rings_for(self, batch: int) -> RingPool:
        if self.rings is None or self.rings.num_rings != batch:
            self.rings = self._new_rings(batch)
        return self.rings

    def _new_rings(self, batch: int) -> RingPool:
        keys = self._layer(next(iter(self.layer_info))).keys
        default = torch.float32 if keys.dtype == torch.float32 else torch.bfloat16
        return rings_for_batch(
            self.mac_config,
            batch,
            layout=self.layout,
            num_layers=len(self.mac_layers),
            dtype=self.ring_dtype or default,
            device=keys.device,
            choices=[self._choices[layer] for layer in self.mac_layers] if self._choices else (),
            max_context=int(getattr(self._text_config, "max_position_embeddings", _LONGEST)),
        )

    def _pick(self, rows: torch.Tensor) -> None:
        """Make row ``i`` what row ``rows[i]`` was, in everything kept beside keys and values."""
        if self._step is None:
            return
        everyone = torch.arange(len(self._step.starts))
        picked = everyone[rows.cpu()]  # masks and negative numbers become row numbers
        if picked.equal(everyone):
            return
        if self.rings is not None:
            self.rings = pick_rings(self.rings, picked.tolist(), self._new_rings(len(picked)))
        place = picked.to(self._step.starts.device)
        offsets = self._step.offsets
        self._step = dataclasses.replace(
            self._step, starts=self._step.starts[place], offsets=None if offsets is None else offsets[place]
        )
        self._seen = None

    def _forget(self) -> None:
        """Drop everything derived from the tokens."""
        self.rings, self._step, self._seen, self._fallback = None, None, None, None
        self.traces, self._plans, self._epochs = {}, {}, {}
        self._steps = Counter()

    def _layer(self, layer_idx: int) -> MacLayer:
        layer = self.layers[layer_idx]
        assert isinstance(layer, MacLayer), "only layers in layer_info get here"
        return layer
