"""torch.compile: one graph with the step and the fill as operators, their writes declared, and the same results."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from mac_kernels import BatchMacDecodeWithPagedKVCacheWrapper, PagedKV, RingPool, fill_rings, ops
from mac_kernels.tca import MissIndex, TcaConfig, refresh_index
from mac_kernels.testing.conformance import Case, variant
from mac_kernels.testing.scenario import PagedStore, poison_rings

CONFIG = variant(break_even=0.2)
CASE = Case(page_size=1)
LENGTHS = (30, 22)


class Model:
    """Two layers over one prompt and some decode steps; everything that changes lies in tensors that stay."""

    def __init__(self, *, rows: bool, scales: tuple[Any, Any] = (None, None), tca: TcaConfig | None = None) -> None:
        self.config = CONFIG if tca is None else dataclasses.replace(CONFIG, tca=tca, max_age=64)
        generator = torch.Generator().manual_seed(3)
        layout = CASE.layout
        self.store = PagedStore(2, 64, layout, page_size=1, generator=generator)
        for request in range(2):
            self.store.write(request, 0, *torch.randn(2, 64, 2, 16, generator=generator))
        self.rows, self.scales = rows, scales
        self.table = self.store.row_table([64, 64]) if rows else self.store.table([64, 64])
        self.set_lengths(LENGTHS)
        index = None if tca is None else MissIndex([[3, 3]] * 2, config=tca, num_rings=2, max_context=64)
        self.rings = RingPool(
            num_rings=2, num_layers=2, layout=layout, window=16, dtype=torch.float32, index=index
        )  # fmt: skip
        poison_rings(self.rings)
        self.slots, self.generations = torch.arange(2), torch.zeros(2, dtype=torch.int64)
        for slot in range(2):
            self.rings.acquire(slot)
        self.rope = CASE.rope("cpu")
        self.mac = BatchMacDecodeWithPagedKVCacheWrapper("NHD", backend="reference")
        if rows:
            self.mac.plan_rows(
                self.table.req_to_token, self.table.req_pool_indices, self.table.seq_lens,
                layout=layout, rope=self.rope, max_kv_len=64, config=self.config,
            )  # fmt: skip
        else:
            self.mac.plan(
                *self.table.pointers, layout=layout, page_size=1, rope=self.rope, config=self.config, max_kv_len=64
            )

    def set_lengths(self, lengths: tuple[int, ...]) -> None:
        new = self.store.row_table(list(lengths)) if self.rows else self.store.table(list(lengths))
        for own, value in zip(self.table.pointers, new.pointers, strict=True):
            own[: len(value)].copy_(value)

    def prefill(self, q: torch.Tensor, qo_indptr: torch.Tensor) -> None:
        k_scale, v_scale = (1.0 if scale is None else scale for scale in self.scales)
        kv = PagedKV(self.store.k_cache, self.store.v_cache, self.table, CASE.layout, "NHD", k_scale, v_scale)
        for layer in range(2):
            fill_rings(
                q, qo_indptr, kv, rings=self.rings, layer=layer, slots=self.slots, generations=self.generations,
                rope=self.rope, config=self.config, max_kv_len=64,
            )  # fmt: skip

    def decode(self, q: torch.Tensor) -> torch.Tensor:
        hidden = q
        for layer in range(2):
            hidden = hidden + 0.1 * self.mac.run(
                hidden, (self.store.k_cache, self.store.v_cache), rings=self.rings, layer=layer, slots=self.slots,
                generations=self.generations, k_scale=self.scales[0], v_scale=self.scales[1],
            )  # fmt: skip
        return hidden


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "pages"])
def test_one_graph_gives_what_eager_gives(backend: str, rows: bool) -> None:
    torch._dynamo.reset()
    scales = (torch.tensor(0.5), torch.tensor(1.5)) if rows else (0.5, 1.5)
    eager, compiled = Model(rows=rows, scales=scales), Model(rows=rows, scales=scales)
    prefill = torch.compile(compiled.prefill, fullgraph=True, backend=backend)
    decode = torch.compile(compiled.decode, fullgraph=True, backend=backend)
    generator = torch.Generator().manual_seed(5)
    prompt = torch.randn(sum(LENGTHS), 4, 16, generator=generator)
    qo_indptr = torch.tensor([0, LENGTHS[0], sum(LENGTHS)], dtype=torch.int32)
    eager.prefill(prompt, qo_indptr)
    prefill(prompt, qo_indptr)
    hits = 0
    for step in range(1, 6):
        lengths = tuple(length + step for length in LENGTHS)
        eager.set_lengths(lengths)
        compiled.set_lengths(lengths)
        # a query of the prompt again, from which the second layer's differs little
        q = prompt[[LENGTHS[0] - 1, sum(LENGTHS) - 1]] + 0.05 * torch.randn(2, 4, 16, generator=generator)
        torch.testing.assert_close(decode(q), eager.decode(q), rtol=1e-5, atol=1e-5)
        for name, field in eager.rings.fields.items():
            torch.testing.assert_close(compiled.rings.fields[name], field, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert torch.equal(compiled.rings.bypass.values, eager.rings.bypass.values)
        hits += int(eager.rings.counters.values[:, 0].sum())
        assert torch.equal(compiled.rings.counters.values, eager.rings.counters.values)
    assert hits > 0, "the steps must reuse"


def test_a_table_that_changes_inside_the_graph_is_seen() -> None:
    """Functionalization puts the changed lengths into another tensor; the step must read that one."""
    torch._dynamo.reset()
    eager, compiled = Model(rows=True), Model(rows=True)
    for model in (eager, compiled):
        model.set_lengths((64, 64))
    q = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(5))

    def step(model: Model, lengths: torch.Tensor) -> torch.Tensor:
        model.table.seq_lens.copy_(lengths)
        return model.decode(q)

    lengths = torch.tensor([40, 33], dtype=torch.int32)
    want = step(eager, lengths)
    got = torch.compile(lambda n: step(compiled, n), fullgraph=True, backend="aot_eager")(lengths)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(compiled.rings.fields["pos"], eager.rings.fields["pos"])
    assert compiled.rings.fields["pos"].amax(-1).tolist() == [[39, 32]] * 2


def test_misses_read_selected_tokens_in_a_graph() -> None:
    """Selection stays outside of the graph, whose step then reads what it wrote."""
    torch._dynamo.reset()
    tca = TcaConfig(block=8, local_window=24, sinks=2, refresh=4, mass_target=0.05)
    generator, lengths = torch.Generator().manual_seed(5), (60, 50)
    prompt, q = torch.randn(110, 4, 16, generator=generator), torch.randn(2, 4, 16, generator=generator)
    outputs = []
    for wrap in (lambda run: run, functools.partial(torch.compile, fullgraph=True, backend="aot_eager")):
        model = Model(rows=False, tca=tca)
        model.set_lengths(lengths)
        wrap(model.prefill)(prompt, torch.tensor([0, 60, 110], dtype=torch.int32))
        kv = PagedKV(model.store.k_cache, model.store.v_cache, model.table, CASE.layout, "NHD")
        for layer in range(2):
            refresh_index(
                q, kv, lengths, rings=model.rings, layer=layer, slots=model.slots, generations=model.generations,
                sm_scale=0.25,
            )  # fmt: skip
        outputs.append((wrap(model.decode)(q), model.rings.fields["seen"], model.rings.counters.values))
    for got, want in zip(*outputs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert set(outputs[0][1].unique().tolist()) == {-1, 49, 59}, "the misses of both requests read selected tokens"


def test_operators_are_what_they_declare() -> None:
    """PyTorch's own checks: schema and writes, fake tensors, ahead-of-time autograd."""
    model = Model(rows=False)
    cache, table = [model.store.k_cache, model.store.v_cache], list(model.table.pointers)
    owners, rows = [model.slots, model.generations], ops._written(model.rings)
    q = torch.randn(2, 4, 16)
    prompt, qo_indptr = torch.randn(sum(LENGTHS), 4, 16), torch.tensor([0, LENGTHS[0], sum(LENGTHS)], dtype=torch.int32)
    for field in rows[:-2]:
        field.nan_to_num_() if field.is_floating_point() else None  # the checks compare with ==
    common = {"scales": [1.0, 1.0], "rings": model.rings.number, "layer": 1}
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        ops.decode_op,
        (q, cache, table, owners, rows, torch.empty_like(q)),
        {**common, "wrapper": model.mac.number},
        test_utils=tests,
    )
    prompt_options = {
        "rope": model.rope.number,
        "page_size": 1,
        "kv_layout": "NHD",
        "ranges": [16, 6, 2],
        "sm_scale": None,
        "logits_soft_cap": 0.0,
        "max_kv_len": 64,
        "backend": "reference",
    }
    torch.library.opcheck(
        ops.fill_op, (prompt, qo_indptr, cache, table, owners, rows), {**common, **prompt_options}, test_utils=tests
    )
