"""TCA's decode through FlashInfer, against the reference; without a GPU with a model of FlashInfer's wrapper."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_tca import BF16, DEVICE, FP16, INTERPRETED, Shape, decoding, queries, small, view

from mac_kernels import HeadLayout, PagedKV, UnsupportedError, tca
from mac_kernels.tca import TcaConfig, flashinfer
from mac_kernels.tca.config import far_end
from mac_kernels.tca.reference import kept_mask
from mac_kernels.testing.conformance.batch import poisoned_empty
from mac_kernels.testing.tolerances import assert_close
from mac_kernels.types import LOG2_E, AttnState

pytestmark = (
    []
    if INTERPRETED
    else [pytest.mark.gpu, pytest.mark.skipif(find_spec("flashinfer") is None, reason="needs FlashInfer")]
)
TINY = (
    Shape(HeadLayout(8, 4, 64), small(16, 32, 4), dtype=BF16),
    Shape(HeadLayout(7, 1, 128), small(16, 16, 0, "literal"), page_size=5, kv_layout="HND", dtype=FP16, cap=2.0),
    Shape(HeadLayout(2, 2, 64), small(32, 32, 3), page_size=1, dtype=BF16, rows=True),
    Shape(HeadLayout(4, 2, 64), small(16, 32, 4), page_size=16, dtype=BF16, kv_dtype=torch.float8_e4m3fn),
)
REAL = (
    Shape(HeadLayout(32, 8, 128), TcaConfig(local_window=512), page_size=16, dtype=BF16),
    Shape(HeadLayout(7, 1, 128), small(64, 128, 4), page_size=5, kv_layout="HND", dtype=BF16),
    Shape(HeadLayout(32, 4, 128), small(128, 256, 0, "literal"), page_size=1, dtype=BF16, rows=True),
    Shape(HeadLayout(16, 1, 256), small(16, 64, 4), page_size=16, kv_layout="HND", dtype=FP16),
    Shape(HeadLayout(4, 4, 64), TcaConfig(local_window=128), dtype=BF16, kv_dtype=torch.float8_e4m3fn),
    Shape(HeadLayout(8, 2, 128), small(32, 64, 4), page_size=16, dtype=BF16, cap=20.0),
)


class ModelWrapper:
    """FlashInfer's decode wrapper in plain torch: plan() keeps the table, run() attends to what it names then."""

    def __init__(self, workspace: torch.Tensor, kv_layout: str, *, use_tensor_cores: bool, backend: str) -> None:
        assert kv_layout == "NHD" and use_tensor_cores and backend == "fa2" and workspace.dtype == torch.uint8

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        *sizes: int,
        **options: Any,
    ) -> None:
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32 and indptr.device.type == "cpu"
        num_qo_heads, num_kv_heads, head_dim, page_size = sizes
        assert bool((last_page_len == 1).all()) and page_size == num_kv_heads == 1
        assert len(indptr) == len(last_page_len) + 1 and int(indptr[-1]) <= len(indices)
        self._indptr, self._indices, self._shape, self._options = indptr, indices, (num_qo_heads, head_dim), options

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
        *,
        k_scale: float,
        v_scale: float,
        out: torch.Tensor,
        lse: torch.Tensor,
        return_lse: bool,
    ) -> None:
        options, (k_cache, v_cache) = self._options, paged_kv_cache
        assert return_lse and q.shape[1:] == self._shape and out.shape == q.shape and lse.shape == q.shape[:2]
        assert q.dtype == options["q_data_type"] and k_cache.dtype == v_cache.dtype == options["kv_data_type"]
        assert k_cache.shape[1:3] == (1, 1) and k_cache.stride() == v_cache.stride()
        cap = options["logits_soft_cap"]
        for row in range(len(q)):
            entries = self._indices[self._indptr[row] : self._indptr[row + 1]].long()
            k, v = (cache[entries, 0, 0].float() for cache in (k_cache, v_cache))
            logits = q[row].float() @ k.T * (options["sm_scale"] * k_scale)
            logits = cap * torch.tanh(logits / cap) if cap > 0 else logits
            # what the releases before 0.7.0 say of nothing
            lse[row] = torch.logsumexp(logits, -1) * LOG2_E if len(entries) else -5e4
            out[row] = (logits.softmax(-1) @ v * v_scale).to(out.dtype)


def assert_decoded(got: AttnState, q: torch.Tensor, kv: PagedKV, far: tca.FarSet, shape: Shape) -> None:
    """As the reference decodes; FlashInfer adds up weights that are rounded to the dtype of the queries."""
    want = tca.sparse_decode(q, kv, far, **shape.options)
    assert_close("output", got.out, want.out.to(shape.dtype), want.out.double(), dtype=shape.dtype)
    kv_len, group = kv.table.kv_len(), shape.layout.group_size
    length = int(kv_len.max())
    k, _ = kv.gather(torch.zeros_like(kv_len), length)
    logits = torch.einsum("bhd,blhd->bhl", q.float(), k.repeat_interleave(group, 2)) * shape.options["sm_scale"]
    logits = shape.cap * torch.tanh(logits / shape.cap) if shape.cap > 0 else logits
    kept = kept_mask(far.of_batch(), kv_len, length).repeat_interleave(group, 1)
    logits = (logits * LOG2_E).masked_fill(~kept, -torch.inf)
    top = logits.amax(-1)
    weights = torch.exp2(logits - top.clamp(min=-1e30)[..., None]).to(shape.dtype).float()
    assert_close("lse2", got.lse2, weights.sum(-1).log2() + top, want.lse2.double(), dtype=torch.float32)


@pytest.fixture(autouse=True)
def wrapper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if INTERPRETED:
        monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=ModelWrapper))
        monkeypatch.setattr(flashinfer, "flashinfer_version", lambda: (0, 7, 0))
    flashinfer._wrapper.cache_clear()
    yield
    flashinfer._wrapper.cache_clear()


@pytest.mark.parametrize("shape", TINY if INTERPRETED else REAL, ids=str)
def test_decode_with_compaction(shape: Shape) -> None:
    """Every step attends to what the reference attends to, while far sets and windows grow."""
    config = shape.config
    lengths, store, keep, (far, _) = decoding(shape, capacity=config.sinks + 4 * config.block)
    for step in range(4):
        q, kv = queries(shape, len(lengths), seed=step), view(shape, store, [length + step for length in lengths])
        tca.compact(q, kv, far, keep, config=config, **shape.options)
        with poisoned_empty():
            got = flashinfer.sparse_decode(q, kv, far, **shape.options)
        assert_decoded(got, q, kv, far, shape)
    assert far.far_end[:2, 0].tolist() == [far_end(3, config), far_end(1, config)]


def test_a_request_without_tokens_has_no_weight() -> None:
    shape = TINY[0] if INTERPRETED else REAL[0]
    lengths, store, _, (far, _) = decoding(shape, capacity=512)
    far.count[3], far.far_end[3] = 0, 0
    lengths[3] = 0
    q, kv = queries(shape, len(lengths)), view(shape, store, lengths)
    got = flashinfer.sparse_decode(q, kv, far, **shape.options)
    assert not got.out[3].any() and bool((got.lse2[3] == -torch.inf).all())
    assert_decoded(got, q, kv, far, shape)


def test_far_sets_of_a_pool() -> None:
    """Requests name their far sets, in any order; one has none and reads everything."""
    shape = TINY[0] if INTERPRETED else REAL[0]
    lengths, store, _, (far, _) = decoding(shape, capacity=1024)
    sets = torch.tensor([2, -1, 0, 3], dtype=torch.int32, device=DEVICE)
    q, kv = queries(shape, len(lengths)), view(shape, store, lengths)
    pooled = tca.FarSet(*(part[[2, 1, 0, 3]].contiguous() for part in (far.ids, far.count, far.far_end)), sets)
    assert_decoded(flashinfer.sparse_decode(q, kv, pooled, **shape.options), q, kv, pooled, shape)
    assert int(far.count[0, 0]) > 0 and torch.equal(pooled.of_batch().count[0], far.count[0])


def test_caches_that_share_memory() -> None:
    """Keys and values side by side in one buffer, with room between the pages."""
    shape = dataclasses.replace(TINY[0], page_size=4) if INTERPRETED else dataclasses.replace(REAL[0], page_size=4)
    lengths, store, _, (far, _) = decoding(shape, capacity=1024)
    kv = view(shape, store, lengths)
    both = torch.full((len(kv.k_cache), 3, *kv.k_cache.shape[1:]), torch.nan, dtype=shape.dtype, device=DEVICE)
    both[:, 0], both[:, 1] = kv.k_cache, kv.v_cache
    shared = PagedKV(both[:, 0], both[:, 1], kv.table, kv.layout, kv.kv_layout)
    q = queries(shape, len(lengths))
    want, got = (flashinfer.sparse_decode(q, one, far, **shape.options) for one in (kv, shared))
    assert torch.equal(got.out, want.out) and torch.equal(got.lse2, want.lse2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layout": HeadLayout(4, 2, 80)}, r"head_dim=80 \(kernels for 64, 128, 256\)"),
        ({"dtype": torch.float32}, r"torch\.float32 queries \(bf16 or fp16\)"),
        ({"kv_dtype": torch.float32}, r"a torch\.float32 cache \(the dtype of the queries, or fp8\)"),
    ],
    ids=["head_dim", "queries", "cache"],
)
def test_what_flashinfer_cannot_do_is_refused(change: dict[str, Any], reason: str) -> None:
    shape = dataclasses.replace(TINY[0], **change)
    lengths, store, _, (far, _) = decoding(shape, capacity=128)
    with pytest.raises(UnsupportedError, match=reason):
        flashinfer.sparse_decode(queries(shape, len(lengths)), view(shape, store, lengths), far, **shape.options)


def test_without_flashinfer_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = TINY[0]
    lengths, store, _, (far, _) = decoding(shape, capacity=128)
    monkeypatch.setattr(flashinfer, "flashinfer_version", lambda: None)
    with pytest.raises(UnsupportedError, match=r"missing \(pip install 'mac-kernels\[flashinfer\]'\)"):
        flashinfer.sparse_decode(queries(shape, len(lengths)), view(shape, store, lengths), far, **shape.options)


def test_caches_that_flashinfer_cannot_address_are_refused() -> None:
    shape = TINY[0]
    lengths, store, _, (far, _) = decoding(shape, capacity=128)
    kv, q = view(shape, store, lengths), queries(shape, len(lengths))
    apart = dataclasses.replace(kv, v_cache=kv.v_cache.repeat(1, 1, 1, 2)[..., : shape.layout.head_dim])
    scale = torch.ones(1, device=DEVICE)
    for wrong, reason in (
        (apart, "of different strides"),
        (dataclasses.replace(kv, k_scale=scale, v_scale=scale), "on the device"),
    ):
        with pytest.raises(UnsupportedError, match=reason):
            flashinfer.sparse_decode(q, wrong, far, **shape.options)
