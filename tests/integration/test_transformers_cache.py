"""The rings follow the cache through everything that the library does to it.

Under the preset ``exact`` a ring row depends on the tokens alone, not on how they got into the cache, so after any
operation the rings must equal those of a fresh cache that read the same tokens at once.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, LONG_FACTORS, Family, padded_prompts, small_config
from tiny_models import distinct_tokens as tokens

from mac_kernels import ConfigError, InputError, RingPool
from mac_transformers import MacCache

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Any:
    model = FAMILIES["llama"].build()
    model.set_attn_implementation("mac")
    return model


def feed(model: Any, cache: MacCache, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Run tokens [B, N] through the model; logits of the last one."""
    with torch.no_grad():
        return model(ids, past_key_values=cache, **kwargs).logits[:, -1]


def feed_singly(model: Any, cache: MacCache, ids: torch.Tensor) -> torch.Tensor:
    """Decode tokens [B, N] one by one; logits [B, N, vocab]."""
    return torch.stack([feed(model, cache, ids[:, i : i + 1]) for i in range(ids.shape[1])], dim=1)


def fresh(model: Any, ids: torch.Tensor, preset: str = "exact", **kwargs: Any) -> MacCache:
    cache = MacCache(model.config, small_config(preset), **kwargs)
    feed(model, cache, ids)
    return cache


def rows_by_position(rings: RingPool, slot: int) -> list[dict[int, dict[str, torch.Tensor]]]:
    """Per layer: the fields of every present row of a slot, by position."""
    ring = int(rings.slot_table[slot])
    assert ring >= 0
    layers = []
    for layer in range(rings.num_layers):
        pos = rings.fields["pos"][layer, ring].tolist()
        names = [name for name in ("q_pre", "out", "lse2", "kbar") if name in rings.fields]
        layers.append({p: {n: rings.fields[n][layer, ring, w] for n in names} for w, p in enumerate(pos) if p >= 0})
    return layers


def assert_same_rows(
    rings: RingPool, slot: int, expected: RingPool, expected_slot: int, positions: set[int] | None = None
) -> None:
    """Both slots hold the same rows (or exactly ``positions`` of the expected ones), field by field."""
    pairs = zip(rows_by_position(rings, slot), rows_by_position(expected, expected_slot), strict=True)
    for got, want in pairs:
        assert set(got) == (set(want) if positions is None else positions)
        for position, fields in got.items():
            for name, value in fields.items():
                assert torch.allclose(value, want[position][name], rtol=1e-4, atol=1e-4), (position, name)


@pytest.mark.parametrize("cuts", [(20,), (3, 30), (1, 2, 24)], ids=str)
def test_chunks_fill_the_rings_like_one_prefill(model: Any, cuts: tuple[int, ...]) -> None:
    ids = tokens(2, 40)
    whole = fresh(model, ids)
    cache = MacCache(model.config, small_config())
    for first, end in zip((0, *cuts), (*cuts, 40), strict=True):
        feed(model, cache, ids[:, first:end])
    for slot in (0, 1):
        assert_same_rows(cache.rings, slot, whole.rings, slot)


def test_decoded_rows_equal_prefilled_ones_through_ring_wraps(model: Any) -> None:
    ids = tokens(2, 70)
    cache = fresh(model, ids[:, :20])
    feed_singly(model, cache, ids[:, 20:])
    assert_same_rows(cache.rings, 1, fresh(model, ids).rings, 1)


def test_a_conversation_of_several_turns_keeps_its_rings(model: Any) -> None:
    ids = tokens(1, 80)
    cache = fresh(model, ids[:, :30])
    feed_singly(model, cache, ids[:, 30:37])
    feed(model, cache, ids[:, 37:60])
    feed_singly(model, cache, ids[:, 60:63])
    feed(model, cache, ids[:, 63:80])
    assert_same_rows(cache.rings, 0, fresh(model, ids).rings, 0)


def positions_of(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Positions as ``generate`` makes them: padding does not count."""
    return (mask.cumsum(1) - 1).clamp(min=0)[:, -count:]


class Padded:
    """A left-padded batch that is continued token by token."""

    def __init__(self, model: Any, cache: MacCache, lengths: tuple[int, ...]) -> None:
        self.model, self.cache = model, cache
        inputs = padded_prompts(lengths)
        self.ids, self.mask = inputs["input_ids"], inputs["attention_mask"]
        self._feed(self.ids)

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        logits = []
        for token in ids.split(1, dim=1):
            self.mask = torch.cat((self.mask, torch.ones(len(ids), 1, dtype=torch.int64)), dim=1)
            logits.append(self._feed(token))
        return torch.stack(logits, dim=1)

    def _feed(self, ids: torch.Tensor) -> torch.Tensor:
        positions = positions_of(self.mask, ids.shape[1])
        return feed(self.model, self.cache, ids, attention_mask=self.mask, position_ids=positions)


@pytest.mark.parametrize("preset", ["exact", "fast", "paper"])
def test_a_padded_row_decodes_as_if_it_were_alone(model: Any, preset: str) -> None:
    lengths, more = (40, 27, 5), tokens(3, 30, seed=5)
    cache = MacCache(model.config, small_config(preset))
    batch = Padded(model, cache, lengths)
    logits = batch.decode(more)
    for row, length in enumerate(lengths):
        alone = fresh(model, batch.ids[row : row + 1, 40 - length :], preset)
        assert torch.allclose(logits[row], feed_singly(model, alone, more[row : row + 1])[0], rtol=1e-3, atol=1e-3)
        assert_same_rows(cache.rings, row, alone.rings, 0)
        assert (sum(alone.rings.counters.drain().groups["HIT"]) > 0) == (preset != "exact")


def test_pages_show_the_librarys_own_keys_without_padding(model: Any) -> None:
    cache = MacCache(model.config, small_config())
    Padded(model, cache, (40, 27)).decode(tokens(2, 3))
    for layer_idx, layer in enumerate(cache.layers):
        kv = cache.paged(layer_idx)
        assert kv.table.kv_len().tolist() == [43, 30]
        assert kv.k_cache.untyped_storage().data_ptr() == layer.keys.untyped_storage().data_ptr()
        k, v = kv.gather(torch.zeros(2, dtype=torch.int64), 43)
        for row, start in ((0, 0), (1, 13)):
            assert k[row, : 43 - start].equal(layer.keys[row, :, start:].transpose(0, 1))
            assert v[row, : 43 - start].equal(layer.values[row, :, start:].transpose(0, 1))


def test_a_step_copies_no_token_but_its_own(model: Any) -> None:
    cache = fresh(model, tokens(1, 30))
    places = [layer.keys.data_ptr() for layer in cache.layers]
    feed_singly(model, cache, tokens(1, 20))
    assert [layer.keys.data_ptr() for layer in cache.layers] == places
    assert cache.get_seq_length() == 50


def test_the_buffers_grow_and_keep_what_they_hold(model: Any) -> None:
    ids = tokens(1, 400)
    cache = fresh(model, ids[:, :250])
    logits = feed_singly(model, cache, ids[:, 250:270])
    assert cache.layers[0].capacity > 256
    whole = fresh(model, ids[:, :269])
    assert torch.allclose(logits[:, -1], feed_singly(model, whole, ids[:, 269:270])[:, 0], rtol=1e-3, atol=1e-3)
    assert_same_rows(cache.rings, 0, whole.rings, 0)


def test_crop_forgets_the_rows_of_removed_tokens_only(model: Any) -> None:
    ids, other = tokens(2, 40), tokens(2, 20, seed=9)
    cache = fresh(model, ids)
    cache.crop(-9)
    whole = fresh(model, ids)
    assert_same_rows(cache.rings, 0, whole.rings, 0, positions=set(range(24, 31)))
    feed_singly(model, cache, other)
    joined = torch.cat((ids[:, :31], other), dim=1)
    assert_same_rows(cache.rings, 1, fresh(model, joined).rings, 1)


def test_layers_cropped_one_by_one_are_noticed(model: Any) -> None:
    ids = tokens(1, 40)
    cache = fresh(model, ids)
    for layer in cache.layers:
        layer.crop(-9)
    feed(model, cache, ids[:, 31:33])
    assert_same_rows(cache.rings, 0, fresh(model, ids).rings, 0, positions=set(range(24, 33)))


def test_crop_of_a_padded_batch_counts_from_the_first_real_token(model: Any) -> None:
    cache = MacCache(model.config, small_config())
    Padded(model, cache, (40, 27))
    cache.crop(-9)
    assert set(rows_by_position(cache.rings, 0)[0]) == set(range(24, 31))
    assert set(rows_by_position(cache.rings, 1)[0]) == set(range(11, 18))


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.reorder_cache(torch.tensor([0, 1, 2])), [0, 1, 2]),
    ],
    ids=["reorder", "select", "mask", "repeat", "identity"],
)
def test_rows_take_their_rings_along(model: Any, change: Any, rows: list[int]) -> None:
    lengths, more = (40, 27, 33), tokens(len(rows), 12, seed=3)
    cache = MacCache(model.config, small_config("fast"))
    batch = Padded(model, cache, lengths)
    before = sum(batch.cache.rings.counters.values[:, 0].tolist())
    change(cache)
    batch.mask = batch.mask[rows]
    logits = batch.decode(more)
    assert cache.rings.num_rings == len(rows)
    for slot, row in enumerate(rows):
        alone = fresh(model, batch.ids[row : row + 1, 40 - lengths[row] :], "fast")
        expected = feed_singly(model, alone, more[slot : slot + 1])[0]
        assert torch.allclose(logits[slot], expected, rtol=1e-3, atol=1e-3)
        assert_same_rows(cache.rings, slot, alone.rings, 0)
    assert sum(cache.rings.counters.values[:, 0].tolist()) > before


def test_reset_forgets_everything(model: Any) -> None:
    cache = fresh(model, tokens(2, 40))
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.rings is None
    feed(model, cache, tokens(1, 30, seed=4))
    assert_same_rows(cache.rings, 0, fresh(model, tokens(1, 30, seed=4)).rings, 0)


def test_a_deep_copy_goes_its_own_way(model: Any) -> None:
    ids, other = tokens(1, 40), tokens(1, 10, seed=7)
    cache = fresh(model, ids)
    twin = copy.deepcopy(cache)
    feed_singly(model, twin, other)
    assert_same_rows(cache.rings, 0, fresh(model, ids).rings, 0)
    assert_same_rows(twin.rings, 0, fresh(model, torch.cat((ids, other), dim=1)).rings, 0)


def test_interleaved_generations_never_mix(model: Any) -> None:
    ids, more = tokens(2, 40), tokens(2, 12, seed=3)
    caches = [fresh(model, ids[row : row + 1], "fast") for row in (0, 1)]
    logits = [[], []]
    for i in range(12):
        for row in (0, 1):
            logits[row].append(feed(model, caches[row], more[row : row + 1, i : i + 1]))
    for row in (0, 1):
        alone = fresh(model, ids[row : row + 1], "fast")
        assert torch.stack(logits[row], 1).equal(feed_singly(model, alone, more[row : row + 1]))


def test_inference_mode_and_no_grad_may_alternate(model: Any) -> None:
    ids = tokens(1, 40)
    cache = MacCache(model.config, small_config())
    with torch.inference_mode():
        model(ids[:, :30], past_key_values=cache)
    feed_singly(model, cache, ids[:, 30:])
    assert_same_rows(cache.rings, 0, fresh(model, ids).rings, 0)


def test_rows_whose_positions_jump_start_with_an_empty_ring(model: Any) -> None:
    ids = tokens(2, 40)
    cache = fresh(model, ids)
    positions = torch.tensor([[40], [45]])
    feed(model, cache, tokens(2, 1), position_ids=positions)
    assert set(rows_by_position(cache.rings, 0)[0]) == set(range(25, 41))
    assert set(rows_by_position(cache.rings, 1)[0]) == {40}


@pytest.mark.parametrize(("kind", "epochs"), [("longrope", {64}), ("dynamic", set(range(63, 80)))])
def test_rows_of_other_frequencies_are_forgotten(kind: str, epochs: set[int]) -> None:
    parameters = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
    if kind == "longrope":
        parameters |= {"original_max_position_embeddings": 64, **LONG_FACTORS}
    trained = {"dynamic": 64, "longrope": 512}[kind]
    model = Family("LlamaConfig", {"max_position_embeddings": trained, "rope_parameters": parameters}).build()
    model.set_attn_implementation("mac")
    cache = fresh(model, tokens(1, 60))
    since = None
    for position in range(60, 75):
        feed(model, cache, tokens(1, 1, seed=position))
        if position in epochs:
            since = position
        first = position - 15 if since is None else max(since, position - 15)
        assert set(rows_by_position(cache.rings, 0)[1]) == set(range(first, position + 1))


def test_the_last_trace_of_every_layer_is_recorded_on_request(model: Any) -> None:
    cache = fresh(model, tokens(2, 40), "fast", record=True)
    feed_singly(model, cache, tokens(2, 2))
    assert set(cache.traces) == {0, 1}
    assert cache.traces[1].kv_len.tolist() == [42, 42]


def test_a_subclass_may_decode_its_own_way(model: Any) -> None:
    class Zeros(MacCache):
        def decode(self, layer_idx: int, query: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(query)

    ids = tokens(1, 30)
    cache = Zeros(model.config, small_config())
    feed(model, cache, ids[:, :-1])
    with torch.no_grad():
        hidden = model.model.embed_tokens(ids[:, -1:])
        for layer in model.model.layers:
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        expected = model.lm_head(model.model.norm(hidden))[:, -1]
    assert torch.allclose(feed(model, cache, ids[:, -1:]), expected, rtol=1e-4, atol=1e-4)


def test_wrong_arguments_are_named(model: Any) -> None:
    with pytest.raises(ConfigError, match="unknown preset 'carefull'"):
        MacCache(model.config, "carefull")
    with pytest.raises(InputError, match="run the prompt through the model first"):
        MacCache(model.config).paged(0)
