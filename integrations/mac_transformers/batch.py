"""The rows of a comparison: their keys and values, their rings, and one attention call for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from mac_kernels import (
    BatchMacDecodeWithPagedKVCacheWrapper,
    HeadLayout,
    MacConfig,
    PagedKV,
    PageTable,
    RingPool,
    Rope,
    StepTrace,
    fill_rings,
)
from mac_kernels.step import reference_step
from mac_kernels.support import resolve_backend

from .intercept import AttentionHandler
from .policies import Mac, Policy, Window, config_rows
from .rope import ModelRope


@dataclass(frozen=True, slots=True)
class Seen:
    """One layer's step of the rows of one call, for those who look on.

    ``policies`` by row; ``q`` and ``out`` [rows, Hq, D]; ``k``, ``v`` [rows, Hkv, L, D]; ring ``i`` of ``rings`` is
    that of the i-th row.
    """

    step: int
    layer: int
    position: int
    policies: tuple[str, ...]
    q: torch.Tensor
    out: torch.Tensor
    trace: StepTrace
    rings: RingPool
    k: torch.Tensor
    v: torch.Tensor
    sm_scale: float


Observer = Callable[[Seen], None]
FULL = "full"
RECORDS = ("group_hit", "head_hit", "kv_read", "error")


@dataclass(frozen=True, slots=True)
class _Block:
    """Consecutive rows whose MAC policies share one call of the decode step; ring ``i`` belongs to the i-th row.

    ``names``: the policy of every row.

    ``kernels``: by layer, the wrappers that serve them where the GPU's kernels run the policy (filled as layers are
    met); ``None``: the reference does.
    """

    rows: slice
    names: tuple[str, ...]
    policy: Mac
    config: MacConfig
    rings: RingPool
    table: PageTable
    slots: torch.Tensor
    kernels: dict[int, BatchMacDecodeWithPagedKVCacheWrapper] | None

    def step(
        self, q: torch.Tensor, kv: PagedKV, *, layer: int, rope: Rope, sm_scale: float
    ) -> tuple[torch.Tensor, StepTrace]:
        """One layer's step of all rows: outputs [rows, Hq, D] and what was decided."""
        generations = torch.zeros_like(self.slots)
        if self.kernels is None:
            return reference_step(
                q,
                kv,
                self.rings,
                layer=layer,
                slots=self.slots,
                generations=generations,
                config=self.config,
                rope=rope,
                sm_scale=sm_scale,
                find=self.policy.find,
            )
        if layer not in self.kernels:
            self.kernels[layer] = wrapper = BatchMacDecodeWithPagedKVCacheWrapper("HND")
            table = self.table
            wrapper.plan(
                table.indptr,
                table.indices,
                table.last_page_len,
                layout=kv.layout,
                page_size=table.page_size,
                rope=rope,
                config=self.policy.config,
                sm_scale=sm_scale,
                max_kv_len=table.page_size,
                kv_data_type=kv.k_cache.dtype,
            )
        return self.kernels[layer].run_return_trace(
            q,
            (kv.k_cache, kv.v_cache),
            rings=self.rings,
            layer=layer,
            slots=self.slots,
            generations=generations,
        )


class DecodeBatch:
    """All rows (policy x text, texts innermost) of a comparison, advanced one token at a time.

    ``names`` are the policies in the caller's order, ``order`` their places among the rows; ``records`` maps each of
    ``RECORDS`` to [steps, layers, rows] fp32.
    """

    def __init__(
        self,
        policies: Mapping[str, Policy],
        *,
        layout: HeadLayout,
        num_layers: int,
        texts: int,
        prompt_length: int,
        steps: int,
        dtype: torch.dtype,
        device: torch.device,
        observe: Observer | None = None,
    ) -> None:
        self.observe = observe
        self.layout, self.texts, self.prompt_length, self.device = layout, texts, prompt_length, device
        self.capacity = prompt_length + steps
        self.names = (FULL, *policies)
        windows = {name: policy for name, policy in policies.items() if isinstance(policy, Window)}
        calls = _calls(policies, merge=device.type == "cpu")
        places = [FULL, *windows, *(name for call in calls for name in call)]
        self.order = [places.index(name) for name in self.names]
        self.num_policies, self.num_dense = len(places), 1 + len(windows)
        self._place = {name: place for place, name in enumerate(places)}
        self._windows = windows
        self.blocks = [self._block(call, num_layers) for call in calls]
        shape = (len(places) * texts, layout.num_kv_heads, self.capacity, layout.head_dim)
        self.kv = [tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in "kv") for _ in range(num_layers)]
        self.records = {name: torch.zeros(steps, num_layers, shape[0], device=device) for name in RECORDS}
        self._ropes: dict[int, Rope] = {}
        self._share = torch.ones(shape[0], device=device)  # of the KV, read by each row in the step before
        self._share_sum, self._shares = torch.zeros_like(self._share), 0

    def prefill(self, text: int) -> AttentionHandler:
        """Handler of the forward pass over the whole prompt of one text."""
        return _Prefill(self, text)

    def decode(self, step: int) -> AttentionHandler:
        """Handler of the forward pass over one token of every row."""
        for block in self.blocks:
            block.table.last_page_len.fill_(self.prompt_length + step + 1)
        if self._shares:
            self._share = self._share_sum / self._shares
            self._share_sum, self._shares = torch.zeros_like(self._share), 0
        return _Decode(self, step)

    def rope(self, module: nn.Module) -> Rope:
        """The layer's rotation as a table on the device, so that a step does not compute or copy it."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if layer not in self._ropes:
            dtype = next(module.parameters()).dtype
            rope = ModelRope(module, dtype).at(self.capacity)
            table = torch.cat(rope.cos_sin(torch.arange(self.capacity)), dim=-1).to(self.device)
            self._ropes[layer] = Rope.from_cos_sin_cache(table, interleaved=rope.interleaved)
        return self._ropes[layer]

    def table(self, rows: int, length: int) -> PageTable:
        """The first ``length`` tokens of each of some rows; a row is one page."""
        index = torch.arange(rows + 1, dtype=torch.int32, device=self.device)
        return PageTable(index, index[:-1], torch.full_like(index[:-1], length), self.capacity)

    def paged(self, layer: int, rows: slice, table: PageTable) -> PagedKV:
        """Keys and values of some rows."""
        k, v = (cache[rows] for cache in self.kv[layer])
        return PagedKV(k, v, table, self.layout, "HND")

    def window_sizes(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sinks and newest tokens of the dense rows, [rows] int64 each; full attention reads all as newest."""
        sinks, newest = [self._fill(0)], [self._fill(length)]
        for window in self._windows.values():
            sinks.append(self._fill(window.sinks))
            if window.tokens is not None:
                newest.append(self._fill(window.tokens))
            else:
                assert window.like is not None
                first = self._place[window.like] * self.texts
                share = self._share[first : first + self.texts]
                newest.append(((share * length).round().long() - window.sinks).clamp(min=1))
        return torch.cat(sinks), torch.cat(newest).clamp(max=length)

    def record(
        self, step: int, layer: int, out: torch.Tensor, share: torch.Tensor, traces: Sequence[StepTrace]
    ) -> None:
        """Note what one layer did: outputs [rows, Hq, D], shares read [rows] and the traces of the blocks."""
        full = out[: self.texts].flatten(1)
        change = (out.view(-1, *full.shape) - full).norm(dim=-1) / full.norm(dim=-1)
        self.records["error"][step, layer] = change.flatten()
        self.records["kv_read"][step, layer] = share
        for block, trace in zip(self.blocks, traces, strict=True):
            self.records["group_hit"][step, layer, block.rows] = trace.hit.float().mean(1)
            self.records["head_hit"][step, layer, block.rows] = trace.head_hit.float().mean(1)

    def add_share(self, share: torch.Tensor) -> None:
        """Add the shares read [rows] in one layer; their mean is what ``Window(like=...)`` reads in the next step."""
        self._share_sum += share
        self._shares += 1

    def _fill(self, value: int) -> torch.Tensor:
        return torch.full((self.texts,), value, device=self.device)

    def _block(self, call: Mapping[str, Mac], num_layers: int) -> _Block:
        policies = list(call.values())
        first, count = self._place[next(iter(call))] * self.texts, len(call) * self.texts
        one = policies[0]
        rings = one.pool(
            num_rings=count,
            num_layers=num_layers,
            layout=self.layout,
            window=one.config.window,
            dtype=one.row_dtype,
            correction=one.config.correction,
            sketch_dim=one.sketch_dim if one.config.nominees is not None else 0,
            device=self.device,
        )
        for row in range(count):
            rings.acquire(row)
        configs = [policy.config for policy in policies for _ in range(self.texts)]
        kernels: dict[int, BatchMacDecodeWithPagedKVCacheWrapper] | None = None
        if one.is_plain and resolve_backend("auto", one.config, self.layout, self.device)[0] != "reference":
            kernels = {}
        table = self.table(count, self.prompt_length)
        slots = torch.arange(count, device=self.device)
        rows = slice(first, first + count)
        names = tuple(name for name in call for _ in range(self.texts))
        return _Block(rows, names, one, config_rows(configs, self.device), rings, table, slots, kernels)


def _calls(policies: Mapping[str, Policy], *, merge: bool) -> list[dict[str, Mac]]:
    """Gather the MAC policies that can share a call of the decode step; kernels take one config a call."""
    calls: list[dict[str, Mac]] = []
    for name, policy in policies.items():
        if isinstance(policy, Mac):
            shared = calls if merge or not policy.is_plain else []
            home = next((call for call in shared if policy.shares_step_with(next(iter(call.values())))), None)
            if home is None:
                calls.append({name: policy})
            else:
                home[name] = policy
    return calls


# `layer_idx` is an int; torch types every attribute of a module as Tensor | Module.
class _Prefill:
    def __init__(self, batch: DecodeBatch, text: int) -> None:
        self._batch, self._text = batch, text

    def attend(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float
    ) -> torch.Tensor:
        batch, text, layer, length = self._batch, self._text, int(module.layer_idx), q.shape[2]  # type: ignore[arg-type]
        for cache, new in zip(batch.kv[layer], (k, v), strict=True):
            cache[text :: batch.texts, :, :length] = new
        kv = batch.paged(layer, slice(text, text + 1), batch.table(1, length))
        for block in batch.blocks:
            newest = q[0, :, -block.rings.window :].transpose(0, 1)
            slot = torch.full((1,), text, device=q.device)
            fill_rings(
                newest,
                torch.tensor([0, len(newest)]),
                kv,
                rings=block.rings,
                layer=layer,
                slots=slot,
                generations=0 * slot,
                rope=batch.rope(module),
                config=block.policy.config,
                sm_scale=sm_scale,
                max_kv_len=length,
                backend="reference" if block.kernels is None else "auto",
            )
            for values in block.rings.fields.values():
                values[layer, text :: batch.texts] = values[layer, text].clone()
        group = batch.layout.group_size
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=sm_scale).transpose(1, 2)


class _Decode:
    def __init__(self, batch: DecodeBatch, step: int) -> None:
        self._batch, self._step = batch, step
        self._position = batch.prompt_length + step

    def attend(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float
    ) -> torch.Tensor:
        batch, layer, length = self._batch, int(module.layer_idx), self._position + 1  # type: ignore[arg-type]
        for cache, new in zip(batch.kv[layer], (k, v), strict=True):
            cache[:, :, self._position] = new[:, :, 0]
        q = q[:, :, 0].contiguous()
        out = torch.empty(q.shape, device=q.device)
        share = torch.ones(len(q), device=q.device)
        traces = []
        for block in batch.blocks:
            kv = batch.paged(layer, block.rows, block.table)
            out[block.rows], trace = block.step(
                q[block.rows], kv, layer=layer, rope=batch.rope(module), sm_scale=sm_scale
            )
            share[block.rows] = (trace.kv_read / length).mean(1)
            traces.append(trace)
            if batch.observe is not None:
                k, v = (cache[:, :, :length] for cache in (kv.k_cache, kv.v_cache))
                seen = Seen(
                    self._step,
                    layer,
                    self._position,
                    block.names,
                    q[block.rows],
                    out[block.rows],
                    trace,
                    block.rings,
                    k,
                    v,
                    sm_scale,
                )
                batch.observe(seen)
        dense = slice(0, batch.num_dense * batch.texts)
        out[dense], share[dense] = self._dense(q[dense], layer, length, sm_scale)
        batch.add_share(share)
        batch.record(self._step, layer, out, share, traces)
        return out.to(q.dtype)[:, None]

    def _dense(self, q: torch.Tensor, layer: int, length: int, sm_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Full attention and windows: one masked call over the whole cache."""
        sinks, newest = self._batch.window_sizes(length)
        token = torch.arange(length, device=q.device)
        keep = (token < sinks[:, None]) | (token >= length - newest[:, None])
        k, v = (cache[: len(q), :, :length] for cache in self._batch.kv[layer])
        out = functional.scaled_dot_product_attention(
            q[:, :, None], k, v, attn_mask=keep[:, None, None], scale=sm_scale, enable_gqa=True
        )
        return out[:, :, 0], keep.float().mean(1)
