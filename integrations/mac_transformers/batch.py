"""The rows of a comparison: their keys and values, their rings, and one attention call for all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional

from mac_kernels import HeadLayout, PagedKV, PageTable, Rope, StepTrace, fill_rings
from mac_kernels.support import resolve_backend

from .block import Block, Seen
from .branches import Branches
from .intercept import AttentionHandler
from .policies import Dense, Mac, Policy, Stored, Tca, config_rows
from .rope import ModelRope
from .tca_rows import TcaRows

Observer = Callable[[Seen], None]
FULL = "full"
_ROUND = 512
RECORDS = ("group_hit", "head_hit", "kv_read", "error")


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
        self.length = prompt_length + steps
        # kernels are compiled for the page size, here the capacity: lengths that are nearly alike share it
        self.capacity = -(-self.length // _ROUND) * _ROUND
        self.names = (FULL, *policies)
        dense = {name: policy for name, policy in policies.items() if isinstance(policy, Dense)}
        calls = self._calls(policies)
        tca = {name: policy for name, policy in policies.items() if isinstance(policy, Tca)}
        places = [FULL, *dense, *tca, *(name for call in calls for name in call)]
        self.order = [places.index(name) for name in self.names]
        self.num_policies, self.num_dense = len(places), 1 + len(dense)
        self._place = {name: place for place, name in enumerate(places)}
        self._dense = dense
        self.stored = [(policy, self._rows(name)) for name, policy in dense.items() if isinstance(policy, Stored)]
        self.blocks = [self._block(call, num_layers) for call in calls]
        self.branches = Branches(device, len(self.blocks))
        self.tca = [
            TcaRows(policy, self._rows(name), layout=layout, num_layers=num_layers, length=self.length, device=device)
            for name, policy in tca.items()
        ]
        shape = (len(places) * texts, layout.num_kv_heads, self.capacity, layout.head_dim)
        self.kv = [tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in "kv") for _ in range(num_layers)]
        self.records = {name: torch.zeros(steps, num_layers, shape[0], device=device) for name in RECORDS}
        self._ropes: dict[int, Rope] = {}
        self._share = torch.ones(shape[0], device=device)  # of the KV, read by each row in the step before
        # a recorded pass is replayed as it is: what changes from step to step is told by the contents of tensors
        self.step, self.position = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        self.keep = torch.zeros(self.num_dense * texts, self.capacity, dtype=torch.bool, device=device)
        self.sparse_table = self.table(texts, prompt_length)
        self._traces: list[StepTrace] = []
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # queries and outputs by layer
        self._sm_scale = 0.0

    @property
    def can_be_recorded(self) -> bool:
        """Whether a CUDA graph can replay a pass: kernels serve all rows, and the host decides nothing."""
        on_kernels = all(block.kernels is not None and block.rings.index is None for block in self.blocks)
        return self.device.type == "cuda" and on_kernels and not self.tca

    def prefill(self, text: int) -> AttentionHandler:
        """Handler of the forward pass over the whole prompt of one text."""
        return _Prefill(self, text)

    def prefill_tca(self, text: int, rows: TcaRows) -> AttentionHandler:
        """Handler of the forward pass over the whole prompt of one text, read sparsely under one TCA policy."""
        return _TcaPrefill(self, text, rows)

    def begin(self, step: int) -> None:
        """Tell the tensors that a pass reads which step it is."""
        position = self.prompt_length + step
        self.step.fill_(step)
        self.position.fill_(position)
        for table in (self.sparse_table, *(block.table for block in self.blocks)):
            table.last_page_len.fill_(position + 1)
        sinks, newest = self._window_sizes(position + 1)
        token = torch.arange(self.capacity, device=self.device)
        self.keep.copy_(((token < sinks[:, None]) | (token > position - newest[:, None])) & (token <= position))

    def decode(self) -> AttentionHandler:
        """Handler of the forward pass over one token of every row: :meth:`begin` comes before, :meth:`tally` after."""
        return _Decode(self)

    def tally(self) -> None:
        """Note what all layers did in the pass."""
        length = self.position + 1
        dense = slice(0, self.num_dense * self.texts)
        read = torch.empty_like(self.records["kv_read"][0])
        read[:, dense] = self.keep.sum(1) / length
        for sparse in self.tca:
            read[:, sparse.rows] = sparse.share
        self._traces = [block.trace() for block in self.blocks]
        for block, trace in zip(self.blocks, self._traces, strict=True):
            for name, values in (("group_hit", trace.hit), ("head_hit", trace.head_hit)):
                self._record(self.records[name][:, :, block.rows], values.float().mean(-1))
            read[:, block.rows] = trace.kv_read.float().mean(-1) / length + block.read_to_select()
        self._record(self.records["kv_read"], read)
        self._share.copy_(read.mean(0))

    def show(self, step: int) -> None:
        """Let the observer see the pass of a step."""
        if self.observe is not None:
            for block, trace in zip(self.blocks, self._traces, strict=True):
                self.observe(self._seen_of(block, step, trace))

    def rope(self, module: nn.Module) -> Rope:
        """The layer's rotation as a table on the device, so that a step does not compute or copy it."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]  # an int; torch types it Tensor | Module
        if layer not in self._ropes:
            dtype = next(module.parameters()).dtype
            rope = ModelRope(module, dtype).at(self.length)
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

    def note(self, layer: int, q: torch.Tensor, out: torch.Tensor, sm_scale: float) -> None:
        """Note the outputs [rows, Hq, D] of one layer."""
        flat = out.float().view(-1, self.texts, out[0].numel())
        error = ((flat - flat[0]).norm(dim=-1) / flat[0].norm(dim=-1)).flatten()
        self._record(self.records["error"][:, layer], error)
        if self.observe is not None:
            self._seen[layer] = q, out
            self._sm_scale = sm_scale

    def attend_dense(self, q: torch.Tensor, layer: int, sm_scale: float) -> torch.Tensor:
        """Full attention and windows of the first rows: ``q`` [rows, Hq, D]."""
        k, v = (cache[: len(q)] for cache in self.kv[layer])
        # the heads of a group as queries of one head: their keys are read once. Plain products, since a fused kernel
        # gives every head one block, which reads its keys alone; in fp32, since all rows are compared with these
        heads = q.float().view(len(q), self.layout.num_kv_heads, -1, q.shape[-1])
        logits = (heads * sm_scale @ k.float().transpose(-1, -2)).masked_fill(~self.keep[:, None, None], -math.inf)
        return (logits.softmax(-1) @ v.float()).view(q.shape).to(q.dtype)

    def _record(self, record: torch.Tensor, values: torch.Tensor) -> None:
        """Write the values of this step, whose number the device knows, into a record of all steps."""
        record.index_copy_(0, self.step, values[None])

    def _window_sizes(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sinks and newest tokens of the dense rows, [rows] int64 each; full attention reads all as newest."""
        sinks, newest = [self._fill(0)], [self._fill(length)]
        for policy in self._dense.values():
            sinks.append(self._fill(0 if isinstance(policy, Stored) else policy.sinks))
            if isinstance(policy, Stored):
                newest.append(self._fill(length))
            elif policy.tokens is not None:
                newest.append(self._fill(policy.tokens))
            else:
                assert policy.like is not None
                share = self._share[self._rows(policy.like)]
                newest.append(((share * length).round().long() - policy.sinks).clamp(min=1))
        return torch.cat(sinks), torch.cat(newest).clamp(max=length)

    def _seen_of(self, block: Block, step: int, trace: StepTrace) -> Seen:
        length = self.prompt_length + step + 1
        q, out = ([self._seen[layer][i][block.rows] for layer in range(len(self.kv))] for i in range(2))
        k, v = ([layer[i][block.rows, :, :length] for layer in self.kv] for i in range(2))
        return Seen(step, length - 1, block.names, q, out, trace, block.rings, k, v, self._sm_scale)

    def _rows(self, name: str) -> slice:
        first = self._place[name] * self.texts
        return slice(first, first + self.texts)

    def _fill(self, value: int) -> torch.Tensor:
        return torch.full((self.texts,), value, device=self.device)

    def _calls(self, policies: Mapping[str, Policy]) -> list[dict[str, Mac]]:
        """Gather the MAC policies that can share a call of the decode step; kernels take one config a call."""
        calls: list[dict[str, Mac]] = []
        for name, policy in policies.items():
            if isinstance(policy, Mac):
                shared = [] if self._on_kernels(policy) else calls
                home = next((call for call in shared if policy.shares_step_with(next(iter(call.values())))), None)
                if home is None:
                    calls.append({name: policy})
                else:
                    home[name] = policy
        return calls

    def _on_kernels(self, policy: Mac) -> bool:
        backend = resolve_backend("auto", policy.config, self.layout, self.device)[0]
        return policy.is_plain and backend != "reference"

    def _block(self, call: Mapping[str, Mac], num_layers: int) -> Block:
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
            index=one.index(
                num_layers=num_layers,
                num_kv_heads=self.layout.num_kv_heads,
                num_rings=count,
                max_context=self.capacity,
                device=self.device,
            ),
            device=self.device,
        )
        for row in range(count):
            rings.acquire(row)
        configs = [policy.config for policy in policies for _ in range(self.texts)]
        table = self.table(count, self.prompt_length)
        slots = torch.arange(count, device=self.device)
        rows = slice(first, first + count)
        names = tuple(name for name in call for _ in range(self.texts))
        return Block(
            rows,
            names,
            one,
            config_rows(configs, self.device),
            rings,
            table,
            slots,
            torch.zeros_like(slots),
            {},
            {} if self._on_kernels(one) else None,
            {},
        )


# `layer_idx` is an int; torch types every attribute of a module as Tensor | Module.
class _Prefill:
    def __init__(self, batch: DecodeBatch, text: int) -> None:
        self._batch, self._text = batch, text

    def attend(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float
    ) -> torch.Tensor:
        # an int; torch types every attribute as Tensor | Module
        batch, text, layer, length = self._batch, self._text, int(module.layer_idx), q.shape[2]  # type: ignore[arg-type]
        for cache, new in zip(batch.kv[layer], (k, v), strict=True):
            cache[text :: batch.texts, :, :length] = new
            for policy, rows in batch.stored:
                cache[rows.start + text, :, :length] = policy.round(new[0])
        kv = batch.paged(layer, slice(text, text + 1), batch.table(1, length))
        filled: list[Block] = []
        for block in batch.blocks:
            source = next((one for one in filled if one.fills_like(block)), None)
            if source is None:
                self._fill(block, q, kv, layer, batch.rope(module), sm_scale)
                filled.append(block)
            block.copy_rings(source or block, layer, text, batch.texts)
            newest = q[0, :, -1][None]
            block.select_prompt(newest, kv, layer=layer, text=text, texts=batch.texts, sm_scale=sm_scale)
        for sparse in batch.tca:
            if sparse.policy.prefill == "dense":
                sparse.fill(q[0].transpose(0, 1), kv, text, layer=layer, sm_scale=sm_scale)
        group = batch.layout.group_size
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=sm_scale).transpose(1, 2)

    def _fill(self, block: Block, q: torch.Tensor, kv: PagedKV, layer: int, rope: Rope, sm_scale: float) -> None:
        newest = q[0, :, -block.rings.window :].transpose(0, 1)
        slot = torch.full((1,), self._text, device=q.device)
        fill_rings(
            newest,
            torch.tensor([0, len(newest)]),
            kv,
            rings=block.rings,
            layer=layer,
            slots=slot,
            generations=0 * slot,
            rope=rope,
            config=block.policy.config,
            sm_scale=sm_scale,
            max_kv_len=q.shape[2],
            backend="reference" if block.kernels is None else "auto",
        )


class _TcaPrefill:
    def __init__(self, batch: DecodeBatch, text: int, rows: TcaRows) -> None:
        self._batch, self._text, self._rows = batch, text, rows

    def attend(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float
    ) -> torch.Tensor:
        # an int; torch types every attribute as Tensor | Module
        batch, layer, length = self._batch, int(module.layer_idx), q.shape[2]  # type: ignore[arg-type]
        row = self._rows.rows.start + self._text
        for cache, new in zip(batch.kv[layer], (k, v), strict=True):
            cache[row, :, :length] = new[0]
        kv = batch.paged(layer, slice(row, row + 1), batch.table(1, length))
        out = self._rows.fill(q[0].transpose(0, 1), kv, self._text, layer=layer, sm_scale=sm_scale)
        assert out is not None, "only policies that prefill sparsely have a pass of their own"
        return out[None]


class _Decode:
    def __init__(self, batch: DecodeBatch) -> None:
        self._batch = batch

    def attend(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float
    ) -> torch.Tensor:
        # an int; torch types every attribute as Tensor | Module
        batch, layer = self._batch, int(module.layer_idx)  # type: ignore[arg-type]
        for cache, new in zip(batch.kv[layer], (k, v), strict=True):
            cache.index_copy_(2, batch.position, new)
            for policy, rows in batch.stored:
                cache[rows].index_copy_(2, batch.position, policy.round(new[rows]))
        q = q[:, :, 0].contiguous()
        out, rope = torch.empty_like(q), batch.rope(module)
        dense = slice(0, len(batch.keep))
        with batch.branches.forked() as contexts:
            for block, context in zip(batch.blocks, itertools.cycle(contexts)):
                kv = batch.paged(layer, block.rows, block.table)
                with context:
                    block.step(q[block.rows], out[block.rows], kv, layer=layer, rope=rope, sm_scale=sm_scale)
            out[dense] = batch.attend_dense(q[dense], layer, sm_scale)
        for sparse in batch.tca:
            kv = batch.paged(layer, sparse.rows, batch.sparse_table)
            sparse.step(q[sparse.rows], out[sparse.rows], kv, layer=layer, sm_scale=sm_scale)
        batch.note(layer, q, out, sm_scale)
        return out[:, None]
