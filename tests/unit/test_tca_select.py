"""TCA: settings, budgets and the selection against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mac_kernels import ConfigError, HeadLayout, InputError, PagedKV, PageTable
from mac_kernels.tca import TcaConfig, importance, select_far
from mac_kernels.tca.candidates import (
    NUM_SPARSE,
    block_counts,
    block_shares,
    decode_keep,
    far_capacity,
    far_count,
    keep_by_rank,
    keep_counts,
    mean_keep,
)
from mac_kernels.tca.config import far_blocks, far_end

SMALL = TcaConfig(block=8, local_window=16, sinks=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block": 100}, "power of two in [8, 1024]"),
        ({"block": True}, "an integer"),
        ({"local_window": 200}, "multiple of block = 128"),
        ({"local_window": 0}, "at least one"),
        ({"mass_target": 0.0}, "in (0, 1]"),
        ({"mass_target": math.nan}, "a finite number"),
        ({"alpha": 1.5}, "in [0, 1]"),
        ({"sinks": -1}, ">= 0 tokens"),
        ({"rule": "mine"}, "'literal' or 'ours'"),
        ({"mode": "drop"}, "'index' or 'evict'"),
        ({"refresh": 0}, ">= 1 decode step"),
        ({"refresh": 16, "mode": "evict"}, "null in the mode 'evict'"),
    ],
)
def test_a_wrong_value_is_named_with_its_range(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TcaConfig(**changes)
    assert words in str(caught.value) and next(iter(changes)) in str(caught.value)


def test_a_config_survives_its_dictionary_and_an_unknown_key_is_explained() -> None:
    config = TcaConfig(block=64, local_window=512, rule="literal", mode="evict")
    assert TcaConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="did you mean 'local_window'"):
        TcaConfig.from_dict({"local_windw": 512})


def test_candidates_keep_what_a_log_gaussian_of_deviation_one_keeps() -> None:
    # mean tokens per block of 128, centres 0.5 to 7, worked out apart from this code
    expected = [2.0, 2.7, 3.7, 5.1, 7.2, 10.2, 14.4, 20.3, 28.6, 39.7, 53.6, 69.2, 84.5, 97.7, 128.0]
    found = [mean_keep(candidate, 128) for candidate in range(NUM_SPARSE + 1)]
    assert found == pytest.approx(expected, abs=0.051)
    assert keep_counts(128) == (1, 2, 4, 8, 16, 32, 64, 128)


@given(candidate=st.integers(0, NUM_SPARSE), blocks=st.integers(0, 1100), power=st.integers(3, 10))
@settings(deadline=None)
def test_budgets_use_up_the_blocks_and_differ_from_the_shares_by_less_than_one(
    candidate: int, blocks: int, power: int
) -> None:
    block = 1 << power
    counts = block_counts(candidate, blocks, block)
    assert sum(counts) == blocks and min(counts) >= 0
    shares = block_shares(candidate, block)
    assert all(abs(count - blocks * share) < 1 for count, share in zip(counts, shares, strict=True))
    ranked = keep_by_rank(candidate, blocks, block)
    assert len(ranked) == blocks and ranked == sorted(ranked, reverse=True)
    assert not ranked or 1 <= ranked[-1] <= ranked[0] <= block


def test_equal_remainders_go_to_the_smaller_budget() -> None:
    # centre 3.5 of 0..7 is symmetric: one block is left for 8 and 16, which have the same share
    counts = dict(zip(keep_counts(128), block_counts(6, 1, 128), strict=True))
    assert counts[8] == 1 and counts[16] == 0


def test_what_decoding_keeps_of_a_block() -> None:
    assert [decode_keep(candidate, 128) for candidate in (0, 6, 13, NUM_SPARSE)] == [2, 14, 97, 0]


@given(start=st.integers(1, 4000), more=st.integers(0, 4000), candidate=st.integers(0, NUM_SPARSE))
@settings(deadline=None)
def test_capacity_holds_wherever_decoding_begins(start: int, more: int, candidate: int) -> None:
    config = TcaConfig(block=64, local_window=128)
    first, last = (far_blocks(length - 1, config) for length in (start, start + more))
    have = far_count(candidate, first, config) or config.sinks
    have += (last - first) * decode_keep(candidate, 64)
    assert have <= far_capacity([0, candidate], start + more, config) <= config.sinks + last * 64


@given(position=st.integers(0, 300), sinks=st.integers(0, 9), blocks=st.integers(1, 4))
@settings(deadline=None)
def test_far_region_and_window_leave_no_gap(position: int, sinks: int, blocks: int) -> None:
    config = TcaConfig(block=8, local_window=8 * blocks, sinks=sinks)
    far = far_blocks(position, config)
    begin = far_end(far, config)
    if far == 0:
        assert begin == 0 and position < sinks + config.local_window + config.block
    else:
        assert begin == sinks + far * config.block
        assert config.local_window <= position - begin < config.local_window + config.block


def loop_select(s: list[float], length: int, candidate: int, config: TcaConfig) -> list[int]:
    """The far ids of one head, written down as plainly as possible."""
    far = far_blocks(length - 1, config)
    if far == 0 or candidate == NUM_SPARSE:
        return []
    blocks = [range(config.sinks + j * config.block, config.sinks + (j + 1) * config.block) for j in range(far)]
    scores = []
    for block in blocks:
        mass = sum(s[i] for i in block)
        hhi = sum(s[i] ** 2 for i in block) / max(mass, 1e-30) ** 2
        literal = (1 - config.alpha) * mass + config.alpha * (1 - hhi)
        scores.append(literal if config.rule == "literal" else mass * (1 - hhi))
    order = sorted(range(far), key=lambda j: -scores[j])
    kept = list(range(config.sinks))
    for j, budget in zip(order, keep_by_rank(candidate, far, config.block), strict=True):
        kept += sorted(blocks[j], key=lambda i: -s[i])[:budget]
    return sorted(kept)


@pytest.mark.parametrize("rule", ["literal", "ours"])
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 24, 25, 27, 64, 101])
def test_selection_is_that_of_plain_loops(length: int, sinks: int, rule: str) -> None:
    config = TcaConfig(block=8, local_window=16, sinks=sinks, rule=rule)
    torch.manual_seed(length)
    s = (torch.randn(2, 3, 110) * 3).softmax(-1).double()
    choice, lengths = [0, 9, NUM_SPARSE], [length, 110]
    found = select_far(s, lengths, choice, config=config)
    for request, tokens in enumerate(lengths):
        blocks = far_blocks(tokens - 1, config)
        for head, candidate in enumerate(choice):
            count = int(found.far.count[request, head])
            assert count == far_count(candidate, blocks, config)
            ids = found.far.ids[request, head, :count].tolist()
            assert ids == loop_select(s[request, head].tolist(), tokens, candidate, config)
            begin = int(found.far.far_end[request, head])
            assert begin == (far_end(blocks, config) if candidate != NUM_SPARSE else 0)
            for m in range(blocks + 1):
                below = sum(i < config.sinks + m * config.block for i in ids) if m else 0
                assert int(found.prefix[request, head, m]) == below


@given(
    length=st.integers(1, 200),
    sinks=st.integers(0, 9),
    window=st.integers(1, 4),
    candidate=st.integers(0, NUM_SPARSE),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_every_block_keeps_a_token_and_none_twice(
    length: int, sinks: int, window: int, candidate: int, seed: int
) -> None:
    config = TcaConfig(block=8, local_window=8 * window, sinks=sinks)
    s = torch.randn(1, 1, length, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    far = select_far(s, [length], [candidate], config=config).far
    ids = far.ids[0, 0, : int(far.count[0, 0])].tolist()
    assert ids == sorted(set(ids))
    if ids:
        begin = int(far.far_end[0, 0])
        assert ids[:sinks] == list(range(sinks)) and ids[-1] < begin <= length - 1 - config.local_window
        assert {(i - sinks) // 8 for i in ids[sinks:]} == set(range((begin - sinks) // 8))
        assert bool((far.ids[0, 0, len(ids) :] == -1).all())


def test_blocks_without_mass_and_ties_are_decided_by_place() -> None:
    s = torch.zeros(1, 1, 64)
    found = select_far(s, [64], [4], config=SMALL)
    again = loop_select([0.0] * 64, 64, 4, SMALL)
    assert found.far.ids[0, 0, : len(again)].tolist() == again


def test_the_rules_differ_where_junk_is_flat() -> None:
    # the block [10, 18) holds what mass the sinks leave, on a few tokens; the others have next to none, evenly
    s = torch.full((1, 1, 66), 1e-6)
    s[0, 0, 10:14] = torch.tensor([0.008, 0.006, 0.004, 0.002])
    kept = {}
    for rule in ("literal", "ours"):
        ids = select_far(s, [66], [5], config=TcaConfig(block=8, local_window=8, sinks=2, rule=rule)).far.ids
        kept[rule] = int(((ids >= 10) & (ids < 18)).sum())
    ranked = keep_by_rank(5, 7, 8)
    assert kept == {"literal": ranked[-1], "ours": ranked[0]} and ranked[-1] < ranked[0]


def paged(k: torch.Tensor, lengths: list[int], layout: HeadLayout) -> PagedKV:
    """Keys [B, L, Hkv, D] as one page a request, NHD; values are the keys."""
    count = len(lengths)
    table = PageTable(
        torch.arange(count + 1, dtype=torch.int32),
        torch.arange(count, dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
        k.shape[1],
    )
    return PagedKV(k, k, table, layout)


def test_importance_is_the_mean_attention_of_a_group() -> None:
    torch.manual_seed(0)
    layout = HeadLayout(4, 2, 8)
    k, q = torch.randn(2, 20, 2, 8), torch.randn(2, 4, 8)
    s = importance(q, paged(k, [20, 13], layout), sm_scale=0.3)
    for request, length in enumerate([20, 13]):
        for head in range(2):
            rows = [(q[request, 2 * head + g] @ k[request, :length, head].T * 0.3).softmax(-1) for g in range(2)]
            torch.testing.assert_close(s[request, head, :length], torch.stack(rows).mean(0))
    assert not s[1, :, 13:].any()
    torch.testing.assert_close(s.sum(-1), torch.ones(2, 2))


def test_wrong_inputs_are_named() -> None:
    s = torch.rand(1, 2, 40)
    for lengths, choice, words in (([41], [0, 0], "lengths"), ([40], [0, 15], "candidates"), ([40], [0], "one candid")):
        with pytest.raises(InputError, match=words):
            select_far(s, lengths, choice, config=SMALL)
