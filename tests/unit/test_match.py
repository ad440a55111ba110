"""Match against a plain loop over rows, the acceptance rule as a truth table, and the sketch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mac_kernels import ConfigError, HeadLayout, InputError, MacConfig, accept, find_match
from mac_kernels.match.accept import check_tables, distance_cap, limit_tables
from mac_kernels.match.sketch import default_sketch_dim, dequantize, make_sketch
from mac_kernels.ring import RingRows

LAYOUT = HeadLayout(num_qo_heads=4, num_kv_heads=2, head_dim=4)
W = 7


def config(**changes) -> MacConfig:
    return MacConfig(**{"window": W, "band": 2, "sinks": 1, "min_context": 4, "nominees": None, **changes})


@st.composite
def rings(draw):
    """Few distinct coordinates, so that ties are common; some rows untagged, stale, or empty for a head."""
    coordinate = st.sampled_from([0.0, 1.0, 2.0])
    position = draw(st.integers(0, 30))
    pos = [
        draw(st.sampled_from([-1, position + 1, position, *range(max(0, position - W - 2), position)]))
        for _ in range(W)
    ]
    q_pre = torch.tensor(draw(st.lists(coordinate, min_size=W * 16, max_size=W * 16))).view(1, W, 4, 4)
    lse2 = torch.tensor(
        draw(st.lists(st.sampled_from([0.0, 1.0, -math.inf, math.nan]), min_size=W * 4, max_size=W * 4))
    )
    query = torch.tensor(draw(st.lists(coordinate, min_size=16, max_size=16))).view(1, 4, 4)
    unique = [p if p not in pos[:i] else -1 for i, p in enumerate(pos)]
    q_pre[0, [i for i, p in enumerate(unique) if p < 0]] = math.nan
    return q_pre, lse2.view(1, W, 4), torch.tensor([unique]), query, position


def rows_of(q_pre, lse2, pos) -> RingRows:
    sketch = make_sketch(LAYOUT, 16)
    codes, scale = sketch.of(q_pre[0].nan_to_num())
    return RingRows(q_pre, lse2, pos, pos[..., None].expand(-1, -1, 2), dequantize(codes, scale)[None], sketch)


def nearest(candidates: list[tuple[float, int, int]]) -> tuple[int, int, float]:
    """(row, position, distance) of the smallest distance, of equals the newest."""
    if not candidates:
        return -1, -1, math.inf
    distance, position, row = min(candidates, key=lambda c: (c[0], -c[1]))
    return row, position, distance


@given(rings(), st.sampled_from(["head", "group"]))
def test_nearest_row_by_plain_loops(ring, scope):
    q_pre, lse2, pos, query, position = ring
    lse2 = lse2[..., :1].expand(-1, -1, 4)  # a row is empty for all heads or none
    got = find_match(query, rows_of(q_pre, lse2, pos), torch.tensor([position]), config=config(match_scope=scope))
    for head in range(4):
        heads = [head] if scope == "head" else [head // 2 * 2, head // 2 * 2 + 1]
        candidates = []
        for row in range(W):
            p = int(pos[0, row])
            if position - W < p < position and p >= 0 and math.isfinite(float(lse2[0, row, 0])):
                distances = [float((q_pre[0, row, h] - query[0, h]).norm()) for h in heads]
                candidates.append((max(distances), p, row))
        row, p, _ = nearest(candidates)
        assert int(got.row[0, head]) == row and int(got.pos[0, head]) == p
        want = float((q_pre[0, row, head] - query[0, head]).norm()) if row >= 0 else math.inf
        assert float(got.distance[0, head]) == pytest.approx(want)


@given(rings())
def test_a_row_empty_for_one_head_may_serve_another(ring):
    q_pre, lse2, pos, query, position = ring
    got = find_match(query, rows_of(q_pre, lse2, pos), torch.tensor([position]), config=config())
    for head in range(4):
        row = int(got.row[0, head])
        assert row == -1 or math.isfinite(float(lse2[0, row, head]))
        assert (row == -1) == (not math.isfinite(float(got.distance[0, head])))


@given(rings(), st.integers(1, W + 3))
def test_nomination_takes_the_nearest_by_sketch(ring, count):
    q_pre, lse2, pos, query, position = ring
    lse2 = lse2[..., :1].expand(-1, -1, 4)
    rows = rows_of(q_pre, lse2, pos)
    got = find_match(query, rows, torch.tensor([position]), config=config(nominees=count))
    image = dequantize(*rows.projection.of(query))[0]
    for group in range(2):
        candidates = []
        for row in range(W):
            p = int(pos[0, row])
            if position - W < p < position and p >= 0 and math.isfinite(float(lse2[0, row, 0])):
                candidates.append((float((rows.sketch[0, row, group] - image[group]).square().sum()), -p, row))
        nominated = [row for *_, row in sorted(candidates)[:count]]
        for head in (2 * group, 2 * group + 1):
            exact = [(float((q_pre[0, r, head] - query[0, head]).norm()), int(pos[0, r]), r) for r in nominated]
            assert int(got.row[0, head]) == nearest(exact)[0]


def test_enough_nominees_are_an_exact_scan():
    generator = torch.Generator().manual_seed(3)
    q_pre, query = torch.randn(2, W, 4, 4, generator=generator), torch.randn(2, 4, 4, generator=generator)
    pos = torch.stack([torch.arange(20, 20 + W), torch.arange(31, 31 + W)])
    sketch = make_sketch(LAYOUT, 8)
    codes, scale = sketch.of(q_pre.flatten(0, 1))
    stored = dequantize(codes, scale).view(2, W, 2, 8)
    rows = RingRows(q_pre, torch.zeros(2, W, 4), pos, pos[..., None].expand(-1, -1, 2), stored, sketch)
    position = pos.amax(1) + 1
    scanned = find_match(query, rows, position, config=config(window=W + 1))
    nominated = find_match(query, rows, position, config=config(window=W + 1, nominees=W))
    assert all(torch.equal(a, b) for a, b in zip(scanned, nominated, strict=True))


@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("young", [True, False])
@pytest.mark.parametrize("light", [True, False])
def test_acceptance_truth_table(near, young, light):
    rule = config(threshold=0.5, influence=0.1, max_age=100)
    cap = math.sqrt(2 * 8) * 0.5  # 2
    distance = torch.tensor([cap * (0.999 if near else 1.0)])  # the cap itself is too far
    weight = torch.tensor([(0.099 if light else 0.101) * 4 / float(distance)])
    age = torch.tensor([100 if young else 101])
    assert [bool(x) for x in accept(distance, weight, age, config=rule, head_dim=8)] == [near, young, light]


def test_acceptance_limits_can_be_off():
    free = config(influence=None, max_age=None)
    _, young, light = accept(torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([10**9]), config=free, head_dim=8)
    assert bool(young) and bool(light)


@pytest.mark.parametrize(
    ("threshold", "distances", "accepted"),
    [
        (1.0, [0.0, 1.0], [False, False]),
        (2.0, [0.0, 1.0], [False, False]),
        (math.inf, [0.0, 1.0], [False, False]),
        (-math.inf, [0.0, 1e30, math.inf], [True, True, False]),
        (0.0, [3.999, 4.0], [True, False]),
    ],
)
def test_extreme_thresholds(threshold, distances, accepted):
    rule = config(threshold=threshold, influence=None)
    near, _, _ = accept(torch.tensor(distances), torch.zeros(1), torch.zeros(1), config=rule, head_dim=8)
    assert near.tolist() == accepted
    assert distance_cap(rule, 8) == math.sqrt(16) * (1 - threshold)


def test_tables_set_limits_by_layer_and_head():
    rule = config(
        threshold=0.9,
        influence=0.5,
        thresholds=((0.5,), (0.0,)),
        influence_scale=((1.0, 2.0, 1.0, 1.0), (1.0, 1.0, 1.0, 4.0)),
    )
    distance = torch.tensor([[1.9, 1.9, 2.1, 1.9]])  # caps: 2 in layer 0, 4 in layer 1; bounds: 2 / scale
    weight = torch.full_like(distance, 0.6)
    age = torch.zeros_like(distance)
    near, _, light = accept(distance, weight, age, config=rule, head_dim=8)
    assert near.tolist() == [[True, True, False, True]]
    assert light.tolist() == [[True, False, True, True]]
    near, _, light = accept(distance, weight, age, config=rule, head_dim=8, layer=1)
    assert near.tolist() == [[True] * 4]
    assert light.tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("field", ["thresholds", "influence_scale"])
def test_the_kernels_get_the_reference_limits(field):
    table = tuple(tuple(0.1 + 0.07 * (4 * layer + head) for head in range(4)) for layer in range(3))
    rule = config(threshold=0.4, influence=0.2, **{field: table})
    caps, bounds = limit_tables(rule, LAYOUT, "cpu")
    assert caps.shape == bounds.shape == (3, 4)
    generator = torch.Generator().manual_seed(0)
    distance, weight = (torch.rand(50, 4, generator=generator) * top for top in (6, 1))
    for layer in range(3):
        near, _, light = accept(distance, weight, distance * 0, config=rule, head_dim=LAYOUT.head_dim, layer=layer)
        assert torch.equal(near, distance < caps[layer])
        assert torch.equal(light, weight * distance < bounds[layer])


def test_equal_limits_are_one_row():
    caps, bounds = limit_tables(config(influence=None), LAYOUT, "cpu")
    assert caps.shape == bounds.shape == (1, 4)
    assert bool(bounds.isinf().all())


@pytest.mark.parametrize(("layers", "heads"), [(2, 4), (3, 3)])
def test_a_table_of_another_model_is_refused(layers, heads):
    rule = config(thresholds=((0.5,) * heads,) * layers)
    with pytest.raises(InputError, match=f"thresholds is a table of {layers} layers x {heads} heads.*3 layers and 4"):
        check_tables(rule, LAYOUT, 3)


def test_no_row_is_never_light_enough_by_accident():
    near, _, light = accept(torch.tensor([math.inf]), torch.zeros(1), torch.zeros(1), config=config(), head_dim=8)
    assert not bool(near) and not bool(light)  # 0 x inf is NaN, which passes no bound


@pytest.mark.parametrize(
    "layout", [LAYOUT, HeadLayout(6, 2, 80), HeadLayout(16, 1, 256), HeadLayout(1, 1, 192), HeadLayout(8, 8, 16)]
)
def test_every_coordinate_enters_every_image_once(layout):
    size = default_sketch_dim(layout)
    assert 1 <= size <= 128
    sketch = make_sketch(layout, size)
    images = max(1, size // layout.head_dim)
    counts = torch.bincount(sketch.index.flatten().long(), minlength=layout.group_size * layout.head_dim)
    assert bool((counts == images).all())
    again = make_sketch(layout, size)
    assert torch.equal(sketch.index, again.index) and torch.equal(sketch.sign, again.sign)


def test_sketch_keeps_distances_in_the_mean():
    layout = HeadLayout(8, 2, 64)
    sketch = make_sketch(layout, 128)
    a, b = torch.randn(2, 200, 8, 64, generator=torch.Generator().manual_seed(1)).unbind(0)
    image = [dequantize(*sketch.of(x)) for x in (a, b)]
    ratio = (image[0] - image[1]).square().sum(-1) / (a - b).square().view(200, 2, -1).sum(-1)
    assert float(ratio.mean()) == pytest.approx(2.0, rel=0.05)  # two images of every coordinate
    assert float(ratio.std()) < 0.4


@pytest.mark.parametrize("size", [3, 6, -4])
def test_sketch_size_must_fit_the_head(size):
    with pytest.raises(ConfigError, match=rf"sketch_dim={size} must be a multiple or a divisor of head_dim=4; use 128"):
        make_sketch(LAYOUT, size)
