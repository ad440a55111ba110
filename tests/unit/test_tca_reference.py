"""TCA: sparse prefill and decode against softmax over the sets that they should read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tca_requests import CHOICE, CONFIG, SCALE, Requests, decode_loop, far_ids

from mac_kernels import InputError, merge_state, partial_attention
from mac_kernels.tca import TcaConfig, compact, sparse_decode, sparse_prefill
from mac_kernels.tca.candidates import NUM_SPARSE, decode_keep, far_count
from mac_kernels.tca.config import far_blocks, far_end
from mac_kernels.tca.reference import kept_mask


@pytest.mark.parametrize("kv_layout", ["HND", "NHD"])
@pytest.mark.parametrize("sinks", [0, 2])
def test_every_query_reads_the_selected_tokens_before_its_window_and_its_window(kv_layout: str, sinks: int) -> None:
    config = TcaConfig(block=8, local_window=16, sinks=sinks)
    requests = Requests([61, 17, 1], kv_layout=kv_layout)
    selection = requests.select(config=config)
    outs = requests.prefill(selection, config)
    for request, length in enumerate(requests.lengths):
        for i in range(length):
            for head in range(6):
                kept = far_ids(selection, request, head // 2)
                begin = far_end(far_blocks(i, config), config) if kept else 0
                tokens = [t for t in kept if t < begin] + list(range(begin, i + 1))
                assert len(tokens) == len(set(tokens)) and max(tokens) == i
                torch.testing.assert_close(
                    outs[request][i, head], requests.softmax(request, i, head, tokens), atol=2e-5, rtol=2e-5
                )


@given(length=st.integers(1, 90), sinks=st.integers(0, 5), window=st.integers(1, 3), choice=st.integers(0, NUM_SPARSE))
@settings(deadline=None, max_examples=25)
def test_an_untouched_context_is_attended_in_full(length: int, sinks: int, window: int, choice: int) -> None:
    """Dense heads anywhere, and any head that has no far block yet, are plain causal attention."""
    config = TcaConfig(block=8, local_window=8 * window, sinks=sinks)
    requests = Requests([length])
    selection = requests.select([NUM_SPARSE, choice, NUM_SPARSE], config)
    got = requests.prefill(selection, config)[0]
    k, v, q = (x[0].transpose(0, 1) for x in (requests.k, requests.v, requests.q))
    k, v = (x.repeat_interleave(2, 0) for x in (k, v))
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE).transpose(0, 1)
    torch.testing.assert_close(got[:, [0, 1, 4, 5]], full[:, [0, 1, 4, 5]], atol=2e-5, rtol=2e-5)
    early = sum(far_blocks(i, config) == 0 for i in range(length))
    torch.testing.assert_close(got[:early], full[:early], atol=2e-5, rtol=2e-5)
    blocks = far_blocks(length - 1, config)
    if blocks and 0 < far_count(choice, blocks, config) < far_end(blocks, config):
        assert not torch.allclose(got[early:, 2:4], full[early:, 2:4], atol=1e-4)


def test_a_chunk_with_its_prompt_selected_equals_the_whole_prompt() -> None:
    requests = Requests([61, 45])
    selection = requests.select()
    whole = requests.prefill(selection)
    counts = [20, 45]
    q = torch.cat([q[length - n : length] for q, length, n in zip(requests.q, requests.lengths, counts, strict=True)])
    indptr = torch.tensor([0, 20, 65]).int()
    state = sparse_prefill(q, indptr, requests.kv(), selection, config=CONFIG, sm_scale=SCALE)
    for got, out, n in zip(state.out.split(counts), whole, counts, strict=True):
        torch.testing.assert_close(got, out[-n:])


def test_decoding_at_the_prompts_end_is_its_last_query() -> None:
    requests = Requests([61, 17])
    selection = requests.select()
    out = sparse_decode(requests.last(), requests.kv(), selection.far, sm_scale=SCALE).out
    torch.testing.assert_close(out, torch.stack([one[-1] for one in requests.prefill(selection)]))


def test_blocks_that_leave_the_window_keep_their_best_tokens() -> None:
    start, steps = [44, 3], 40
    requests = Requests(start, room=steps)
    selection = requests.select()
    first = [[far_ids(selection, r, h) for h in range(3)] for r in range(2)]
    far, outs = decode_loop(requests, selection, steps)
    for r in range(2):
        for h, candidate in enumerate(CHOICE):
            keep = decode_keep(candidate, 8)
            kept, held = list(first[r][h]), far_blocks(start[r] - 1, CONFIG)
            for step in range(steps):
                i = start[r] + step
                if keep and far_blocks(i, CONFIG) > held:
                    begin = CONFIG.sinks + held * 8
                    logits = requests.q[r][i, 2 * h : 2 * h + 2] @ requests.k[r][begin : begin + 8, h].T * SCALE
                    best = logits.softmax(-1).mean(0).topk(keep).indices.sort().values + begin
                    kept, held = (kept or list(range(CONFIG.sinks))) + best.tolist(), held + 1
                begin = far_end(held, CONFIG) if keep else 0
                tokens = (kept if keep else []) + list(range(begin, i + 1))
                for head in (2 * h, 2 * h + 1):
                    torch.testing.assert_close(
                        outs[step][r, head], requests.softmax(r, i, head, tokens), atol=2e-5, rtol=2e-5
                    )
            count = int(far.count[r, h])
            assert far.ids[r, h, :count].tolist() == (kept if keep else []) == sorted(kept if keep else [])


def test_a_block_that_left_is_not_taken_again_and_two_at_once_are_refused() -> None:
    requests = Requests([44], room=20)
    selection = requests.select()
    keep = torch.tensor([1, 2, 0])
    before = selection.far.ids.clone()
    compact(requests.last(), requests.kv(), selection.far, keep, config=CONFIG, sm_scale=SCALE)
    assert torch.equal(before, selection.far.ids)
    requests.lengths = [64]
    with pytest.raises(InputError, match="2 blocks left the window at once"):
        compact(requests.last(), requests.kv(), selection.far, keep, config=CONFIG, sm_scale=SCALE)
    requests.lengths = [51]
    with pytest.raises(InputError, match="has room for"):
        compact(requests.last(), requests.kv(), selection.far, torch.tensor([1, 99, 0]), config=CONFIG, sm_scale=SCALE)


def test_output_moves_by_the_dropped_mass_between_the_means_of_both_sides() -> None:
    requests = Requests([61])
    selection = requests.select([0, 1, 2])
    kv, q = requests.kv(), requests.last()
    ones = torch.ones(1, 6, dtype=torch.int64)
    full = partial_attention(q, kv, 0 * ones, torch.tensor([61]), sm_scale=SCALE)
    sparse = sparse_decode(q, kv, selection.far, sm_scale=SCALE)
    gamma = 1 - torch.exp2(sparse.lse2 - full.lse2)
    mask = kept_mask(selection.far, torch.tensor([61]), 61)[0].repeat_interleave(2, 0)
    for head in range(6):
        dropped = requests.softmax(0, 60, head, (~mask[head]).nonzero()[:, 0].tolist())
        moved = gamma[0, head] * (sparse.out[0, head] - dropped)
        torch.testing.assert_close(sparse.out[0, head] - full.out[0, head], moved, atol=2e-5, rtol=1e-4)
    assert 0.001 < float(gamma.min()) <= float(gamma.max()) < 1


def test_states_over_the_far_set_and_later_ranges_merge_to_the_union() -> None:
    """What MAC may build upon: the state over far set and window, merged with that over the tokens that follow."""
    requests = Requests([50], room=11)
    selection = requests.select([1, 2, 3])
    before, q = requests.kv(), requests.q[0][60][None]
    stored = sparse_decode(q, before, selection.far, sm_scale=SCALE)
    requests.lengths = [61]
    ones = torch.ones(1, 6, dtype=torch.int64)
    later = partial_attention(q, requests.kv(), 50 * ones, torch.tensor([61]), sm_scale=SCALE)
    merged = merge_state(stored, later)
    for head in range(6):
        kept = far_ids(selection, 0, head // 2)
        tokens = kept + list(range(int(selection.far.far_end[0, head // 2]), 61))
        torch.testing.assert_close(merged.out[0, head], requests.softmax(0, 60, head, tokens), atol=2e-5, rtol=2e-5)


def test_counts_are_known_without_looking_at_the_content() -> None:
    a, b = (Requests([61, 17], seed=seed).select().far.count for seed in (1, 2))
    assert torch.equal(a, b)
    assert a.tolist() == [[far_count(c, far_blocks(n - 1, CONFIG), CONFIG) for c in CHOICE] for n in (61, 17)]
