"""The audit counts the errors of what was served, and only of what was drawn."""

from __future__ import annotations

import pytest
import torch

import mac_kernels as mk
from mac_sglang.audit import BOUNDS, Auditor

LAYERS, ROWS, CONTEXT = 3, 4, 96
LAYOUT = mk.HeadLayout(num_qo_heads=4, num_kv_heads=2, head_dim=16)
ROPE = mk.Rope.from_inv_freq(10000.0 ** -(torch.arange(8) / 8))
UNSCALED = (1.0, 1.0)


class Model:
    """Three layers of random keys and values; two requests, and row 0 for padding."""

    def __init__(self, rate: float, backend: str = "reference", device: str = "cpu") -> None:
        draw = torch.Generator().manual_seed(0)
        slots = torch.randperm(ROWS * CONTEXT, generator=draw).view(ROWS, CONTEXT).int()
        shape = (LAYERS, 2, ROWS * CONTEXT, 1, LAYOUT.num_kv_heads, LAYOUT.head_dim)
        self.slots, self.caches = slots.to(device), torch.randn(shape, generator=draw).to(device)
        self.pool_indices, self.lengths = (torch.tensor(x, device=device) for x in ([2, 1, 0], [90, 51, 1]))
        self.auditor = Auditor(
            rate,
            layout=LAYOUT,
            num_layers=LAYERS,
            rope=ROPE,
            req_to_token=self.slots,
            max_kv_len=CONTEXT,
            dtype=torch.float32,
            backend=backend,
        )

    def exact(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(q)
        for row, (index, length) in enumerate(zip(self.pool_indices, self.lengths, strict=True)):
            k, v = (self.caches[layer, part, self.slots[index, :length].long(), 0] for part in (0, 1))
            k, v = (x.transpose(0, 1).repeat_interleave(LAYOUT.group_size, 0) for x in (k, v))
            out[row] = torch.nn.functional.scaled_dot_product_attention(q[row][:, None], k, v)[:, 0]
        return out

    def step(self, scale: float) -> None:
        """Serve ``scale`` times the right output."""
        self.auditor.begin(self.pool_indices, self.lengths)
        for layer in range(LAYERS):
            q = torch.randn(3, LAYOUT.num_qo_heads, LAYOUT.head_dim)
            cache = (self.caches[layer, 0], self.caches[layer, 1])
            self.auditor.observe(layer, q, cache, self.exact(layer, q) * scale, UNSCALED)

    def totals(self):
        self.auditor.begin(self.pool_indices, self.lengths)  # counts the last step
        return self.auditor.read(self.auditor.totals)


def test_a_planted_error_is_measured() -> None:
    model = Model(rate=1.0)
    for _ in range(40):
        model.step(1.05)
    totals = model.totals()
    assert 0 < totals.groups < 40 * LAYERS * LAYOUT.num_kv_heads  # the padded entry is drawn at times, and not counted
    assert totals.groups % (LAYERS * LAYOUT.num_kv_heads) == 0
    assert totals.error_sum / totals.groups == pytest.approx(0.05, rel=1e-3)
    assert [totals.at_most[f"{bound:g}"] for bound in BOUNDS] == [0, 0, 0, 0, *[totals.groups] * 3]
    assert totals.at_most["+Inf"] == totals.groups


def test_the_right_output_has_no_error() -> None:
    model = Model(rate=1.0)
    model.step(1.0)
    model.step(1.0)
    totals = model.totals()
    assert totals.groups and totals.at_most["0.001"] == totals.groups
    assert totals.error_sum / totals.groups < 1e-5


def test_stored_keys_and_values_are_scaled_as_in_the_step() -> None:
    model, scales = Model(rate=1.0), (0.25, 4.0)
    model.pool_indices[2], model.lengths[2] = 3, 20  # no padding
    model.auditor.begin(model.pool_indices, model.lengths)
    for layer in range(LAYERS):
        q = torch.randn(3, LAYOUT.num_qo_heads, LAYOUT.head_dim)
        stored = (model.caches[layer, 0] / scales[0], model.caches[layer, 1] / scales[1])
        model.auditor.observe(layer, q, stored, model.exact(layer, q), scales)
    totals = model.totals()
    assert totals.groups == LAYERS * LAYOUT.num_kv_heads
    assert totals.error_sum / totals.groups < 1e-5


def test_the_rate_is_the_share_of_steps_and_layers() -> None:
    model = Model(rate=0.25)
    steps = 600
    drawn = 0.0
    for _ in range(steps):
        model.auditor.begin(model.pool_indices[:2], model.lengths[:2])
        drawn += int((model.auditor._lengths > 0).sum()) / (steps * LAYERS)
    assert drawn == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / steps / LAYERS) ** 0.5)


def test_every_request_and_layer_is_drawn() -> None:
    model = Model(rate=0.5)
    seen = set()
    for _ in range(80):
        model.auditor.begin(model.pool_indices, model.lengths)
        lengths = model.auditor._lengths.tolist()
        seen |= {(layer, length) for layer, length in enumerate(lengths)}
    assert seen == {(layer, length) for layer in range(LAYERS) for length in (0, 51, 90)}


def test_nothing_drawn_reads_nothing() -> None:
    model = Model(rate=1e-9)
    model.caches.fill_(torch.nan)
    for _ in range(3):
        model.step(1.0)
    assert model.totals().groups == 0 and torch.isfinite(model.auditor.totals).all()


def test_a_step_is_counted_once() -> None:
    model = Model(rate=1.0)
    model.pool_indices[2], model.lengths[2] = 3, 20  # no padding
    model.step(1.05)
    assert [model.totals().groups for _ in range(3)] == [LAYERS * LAYOUT.num_kv_heads] * 3


def test_a_layer_that_was_not_observed_is_not_counted() -> None:
    model = Model(rate=1.0)
    model.pool_indices[2], model.lengths[2] = 3, 20
    model.auditor.begin(model.pool_indices, model.lengths)
    q = torch.randn(3, LAYOUT.num_qo_heads, LAYOUT.head_dim)
    model.auditor.observe(1, q, (model.caches[1, 0], model.caches[1, 1]), model.exact(1, q), UNSCALED)
    assert model.totals().groups == LAYOUT.num_kv_heads


@pytest.mark.gpu
def test_a_graph_records_it() -> None:
    model = Model(rate=1.0, backend="triton", device="cuda")
    model.pool_indices[2], model.lengths[2] = 3, 20
    q = torch.randn(LAYERS, 3, LAYOUT.num_qo_heads, LAYOUT.head_dim, device="cuda")
    served = torch.stack([model.exact(layer, q[layer]) * 1.05 for layer in range(LAYERS)])

    def step() -> None:
        model.auditor.begin(model.pool_indices, model.lengths)
        for layer in range(LAYERS):
            caches = model.caches[layer, 0], model.caches[layer, 1]
            model.auditor.observe(layer, q[layer], caches, served[layer], UNSCALED)

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    model.auditor.reset()
    for _ in range(20):
        graph.replay()
    totals = model.totals()
    assert totals.groups == 20 * LAYERS * LAYOUT.num_kv_heads
    assert totals.error_sum / totals.groups == pytest.approx(0.05, rel=1e-2)


def test_reset_forgets() -> None:
    model = Model(rate=1.0)
    model.step(1.5)
    model.auditor.reset()
    assert model.totals().groups == 0


@pytest.mark.parametrize("rate", [0.0, -1.0, 1.5, float("nan")])
def test_a_bad_rate_is_refused(rate: float) -> None:
    with pytest.raises(mk.InputError, match="audit_rate"):
        Model(rate)
