"""What TCA does in a server's passes: the requests that it reads, and no other, as if each were alone."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mac_kernels import ConfigError, HeadLayout, PagedKV, RowTable, tca
from mac_kernels.tca import TcaConfig
from mac_kernels.tca.candidates import NUM_SPARSE, decode_keep
from mac_kernels.tca.config import far_blocks
from mac_kernels.tca.pool import FarPool
from mac_sglang import compat, tca_serving
from mac_sglang.layers import LayerKind, LayerMap, ServedLayer
from mac_sglang.options import ServingOptions
from mac_sglang.requests import BatchRow, RequestTable
from mac_sglang.serving import GIB, Site
from mac_sglang.tca_plan import TcaPlan, TcaPrefill, _batches
from mac_sglang.tca_serving import TcaServing, choices_for_rank

LAYOUT = HeadLayout(num_qo_heads=4, num_kv_heads=2, head_dim=8)
CONFIG = TcaConfig(block=8, local_window=16, sinks=2)
CHOICES = [[3, NUM_SPARSE], [6, 1]]
ROWS, CONTEXT, SCALE = 6, 96, 0.4
OPTIONS: dict[str, Any] = {"config": CONFIG, "sm_scale": SCALE, "logits_soft_cap": 0.0}
# row of the pool, tokens before the pass, tokens of the pass
BATCH = [(3, 0, 60), (1, 40, 5), (5, 0, 12), (2, 0, 33)]


class Server:
    """A serving with two layers over a cache of random keys and values; rows 1, 2 and 3 own far sets."""

    def __init__(self) -> None:
        make = torch.Generator().manual_seed(0)
        self.slots = torch.randperm(ROWS * CONTEXT, generator=make).view(ROWS, CONTEXT).int()
        cache = torch.randn(2, ROWS * CONTEXT, 2, 8, generator=make) * 2
        self.caches = cache[0].unsqueeze(1), cache[1].unsqueeze(1)
        kind = LayerKind(None, SCALE, 0.0)
        layers = LayerMap({4: ServedLayer(0, kind), 7: ServedLayer(1, kind)}, {}, LAYOUT)
        runner = SimpleNamespace(
            req_to_token_pool=SimpleNamespace(req_to_token=self.slots),
            token_to_kv_pool=SimpleNamespace(get_kv_buffer=lambda number: tuple(cache)),
            dtype=torch.float32,
        )
        pool = FarPool(num_sets=3, num_slots=ROWS, choices=CHOICES, max_len=CONTEXT, config=CONFIG)
        for row in (1, 2, 3):
            pool.acquire(row)
        keep = torch.tensor([[decode_keep(one, CONFIG.block) for one in choice] for choice in CHOICES]).int()
        self.serving = TcaServing(
            site=Site(runner, layers, CONTEXT, "reference"), options=ServingOptions(), table=Any, fallbacks=Counter(),
            resolved=Any, config=CONFIG, choices=CHOICES, pool=pool, keep=keep, kernels=tca,
            kv_tokens=torch.zeros(2, dtype=torch.int64),
        )  # fmt: skip
        self.layers = list(layers.served.values())

    def kv(self, rows: list[int], lengths: list[int]) -> PagedKV:
        return PagedKV(*self.caches, RowTable(self.slots, torch.tensor(rows), torch.tensor(lengths)), LAYOUT)

    def prefill(self, chosen: list[int]) -> TcaPrefill:
        self.serving.chosen = chosen
        found = self.serving.prefill(
            SimpleNamespace(
                req_pool_indices=torch.tensor([row for row, _, _ in BATCH]),
                seq_lens=torch.tensor([before + count for _, before, count in BATCH]),
                extend_seq_lens_cpu=[count for _, _, count in BATCH],
                extend_prefix_lens_cpu=[before for _, before, _ in BATCH],
            )
        )
        assert found is not None
        return found


def queries(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 4, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chosen", [[0], [1, 3], [3, 1, 0]], ids=str)
def test_the_named_requests_are_read_as_if_each_were_alone(chosen: list[int]) -> None:
    server = Server()
    q = queries(sum(count for _, _, count in BATCH))
    for layer, choice in zip(server.layers, CHOICES, strict=True):
        prefill, exact = server.prefill(chosen), torch.full((len(q), 32), 7.0)
        assert not prefill.whole
        out, first = prefill.run(q, exact, server.caches, (1.0, 1.0), layer), 0
        for index, (row, before, count) in enumerate(BATCH):
            got = out[first : first + count].view(-1, 4, 8)
            if index in chosen:
                kv, length, own = server.kv([row], [before + count]), before + count, q[first : first + count]
                selection = tca.select_prompt(own[-1:], kv, [length], choice, **OPTIONS)
                indptr = torch.tensor([0, count], dtype=torch.int32)
                torch.testing.assert_close(got, tca.sparse_prefill(own, indptr, kv, selection, **OPTIONS).out)
                sets = server.serving.pool.sets_of(torch.tensor([row]))
                stored = server.serving.pool.far(layer.index, sets).of_batch()
                assert torch.equal(stored.count, selection.far.count) and torch.equal(
                    stored.far_end, selection.far.far_end
                )
                for head, kept in enumerate(selection.far.count[0].tolist()):
                    assert torch.equal(stored.ids[0, head, :kept], selection.far.ids[0, head, :kept])
            else:
                assert bool((got == 7.0).all())
            first += count
    assert server.serving.prefill_tokens == 2 * sum(BATCH[at][2] for at in chosen)


def test_a_pass_of_named_requests_alone_needs_no_exact_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    monkeypatch.setitem(globals(), "BATCH", [BATCH[0], BATCH[3]])
    q = queries(93)
    want = server.prefill([0, 1]).run(q, torch.zeros(93, 32), server.caches, (1.0, 1.0), server.layers[0])
    for context in (CONTEXT, 60):  # both at once, or one after the other
        object.__setattr__(server.serving.site, "context_len", context)
        prefill = server.prefill([0, 1])
        assert prefill.whole
        torch.testing.assert_close(prefill.run(q, None, server.caches, (1.0, 1.0), server.layers[0]), want)


def test_no_batch_is_larger_than_the_longest_context() -> None:
    lengths = [100, 30, 5, 60, 90, 31, 2]
    batches = list(_batches(range(7), lengths, 100))
    assert sorted(at for batch in batches for at in batch) == list(range(7))
    assert all(len(batch) * max(lengths[at] for at in batch) <= 100 for batch in batches)
    assert len(batches) == 5


def test_decode_goes_on_from_the_prompts_selection_and_counts_what_it_reads() -> None:
    """Row 5 owns nothing and is read whole; row 0 only pads."""
    server = Server()
    pool = server.serving.pool
    server.prefill([0, 1]).run(queries(110), torch.zeros(110, 32), server.caches, (1.0, 1.0), server.layers[0])
    server.prefill([0, 1]).run(queries(110), torch.zeros(110, 32), server.caches, (1.0, 1.0), server.layers[1])
    rows, start = [3, 5, 1, 0], [60, 12, 45, 0]
    rows_of, lengths_of = torch.tensor(rows), torch.tensor(start)
    plan = TcaPlan(server.serving, rows_of, lengths_of)
    alone = [pool.far(index, pool.sets_of(rows_of)).of_batch() for index in range(2)]
    read = total = 0
    for step in range(1, 21):
        lengths = [length + step for length in start[:3]]
        lengths_of.copy_(torch.tensor([*lengths, 1]))
        plan.begin()
        for layer, far, choice in zip(server.layers, alone, CHOICES, strict=True):
            q = queries(4, seed=step)
            got = plan.run(q, server.caches, (1.0, 1.0), layer)
            kv, keep = server.kv(rows, [*lengths, 1]), torch.tensor([decode_keep(one, 8) for one in choice])
            has = torch.tensor([True, False, True, False])
            tca.compact(q, kv, far, keep, config=CONFIG, sm_scale=SCALE)
            far.count[~has], far.far_end[~has] = 0, 0  # what has no sets keeps all
            torch.testing.assert_close(got, tca.sparse_decode(q, kv, far, sm_scale=SCALE).out)
            read += int((far.count + torch.tensor([*lengths, 1])[:, None] - far.far_end)[:3].sum())
            total += 2 * sum(lengths)
    assert server.serving.kv_tokens.tolist() == [read, total]
    assert read < total


def test_an_emptied_set_belongs_to_nobody_any_more() -> None:
    server = Server()
    pool = server.serving.pool
    server.prefill([0]).run(queries(110), torch.zeros(110, 32), server.caches, (1.0, 1.0), server.layers[0])
    assert int(pool.far(0, pool.sets_of(torch.tensor([3]))).of_batch().count[0, 0]) > 0
    assert pool.acquire(4) == -1
    pool.release(3)
    assert pool.sets_of(torch.tensor([3])).tolist() == [-1]
    place = pool.acquire(4)
    assert place >= 0 and pool.sets_of(torch.tensor([4])).tolist() == [place]
    fresh = pool.far(0, pool.sets_of(torch.tensor([4]))).of_batch()
    assert not fresh.count.any() and not fresh.far_end.any()


def test_a_request_that_decodes_gets_sets_before_its_first_block_is_far_or_never() -> None:
    reasons: Counter[str] = Counter()
    rows = SimpleNamespace(free_slots=[], req_generation=torch.zeros(ROWS, dtype=torch.int64))
    pool = FarPool(num_sets=1, num_slots=ROWS, choices=CHOICES, max_len=CONTEXT, config=CONFIG)
    table = RequestTable(
        pool, rows, what="far set", worthwhile=18, latest=26, reasons=reasons,
        wanted=lambda row: row.extend and far_blocks(row.end - 1, CONFIG) > 0,
    )  # fmt: skip

    def decode(slot: int, tokens: int) -> BatchRow:
        return BatchRow(slot, str(slot), tokens, tokens, tokens - 1, extend=False, exact="")

    table.begin([decode(1, 17), decode(2, 27)], None)
    assert pool.slots.free == 1 and reasons == {"no far set in time": 1}
    table.begin([decode(1, 18), decode(2, 28)], None)
    assert pool.slots.free == 0
    table.begin([decode(1, 26), decode(2, 36), decode(3, 20)], None)
    assert reasons == {"no far set in time": 1, "no free far set": 1}
    prompt = BatchRow(4, "4", 60, 26, 0, extend=True, exact="")
    assert table.begin([decode(1, 27), prompt], None) == []
    rows.free_slots = [1]
    assert table.begin([prompt._replace(end=27, prefix=26)], None) == [0]


def test_each_rank_takes_the_heads_that_it_holds() -> None:
    kind = LayerKind(None, SCALE, 0.0)
    layers = LayerMap({0: ServedLayer(0, kind), 2: ServedLayer(1, kind)}, {1: "sliding window"}, LAYOUT)
    choices = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    two = HeadLayout(4, 2, 8)
    assert choices_for_rank(choices, layers, two, rank=1, ranks=2) == ((3, 4), (11, 12))
    one = HeadLayout(1, 1, 8)
    assert [choices_for_rank(choices, layers, one, rank=rank, ranks=8)[0] for rank in range(8)] == [
        (1,), (1,), (2,), (2,), (3,), (3,), (4,), (4,),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="for 2 layers"):
        choices_for_rank(choices[:2], layers, two, rank=0, ranks=1)


def test_ranks_whose_heads_keep_different_amounts_have_as_many_far_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = [NUM_SPARSE] * 2, [NUM_SPARSE - 1] * 2  # dense heads need no room
    small, large = (FarPool.bytes_per_set([one] * 2, CONTEXT, CONFIG) for one in (few, many))
    assert 2 * small < large
    options = ServingOptions(index_memory_gb=3.5 * large / GIB)
    found = SimpleNamespace(config=CONFIG, choices=[[*few, *many]] * 8, files=(), budgets=None)
    monkeypatch.setattr(tca_serving, "resolve_tca", lambda key: found)
    monkeypatch.setattr(tca_serving, "read_options", lambda files: options)
    monkeypatch.setattr(compat, "model_key", lambda runner: None)
    monkeypatch.setattr(compat, "tensor_ranks", lambda: 2)
    site = Server().serving.site
    site.runner.device = "cpu"
    vars(site.runner.req_to_token_pool).update(size=ROWS - 1, free_slots=[], req_generation=torch.zeros(ROWS))
    for rank, choice in enumerate((few, many)):
        monkeypatch.setattr(compat, "tensor_rank", lambda rank=rank: rank)
        started = tca_serving.start(site)
        assert [list(one) for one in started.choices] == [choice] * 2
        assert started.pool.num_sets == 3


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"mode": "evict"}, {}, "one token slot to all layers"),
        ({"refresh": 8}, {}, "cannot select anew"),
        ({}, {"audit_rate": 0.5}, "serving.audit_rate"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(changes: Any, options: Any, words: str) -> None:
    config = TcaConfig(**{**CONFIG.to_dict(), **changes})
    with pytest.raises(ConfigError, match=f"--attention-backend tca cannot serve .*{words}"):
        tca_serving._refuse(config, ServingOptions(**options))
