"""A paged KV cache as the kernels see it, with FlashInfer's page-table arguments."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from .errors import InputError
from .types import HeadLayout, KVLayout

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class PageTable:
    """Which pages hold which request, in order; the three tensors may change between graph replays.

    ``indptr`` [B + 1] int32, ``indices`` [>= indptr[-1]] int32, ``last_page_len`` [B] int32 in ``[1, page_size]``
    (0 only for a request without pages); ``page_size`` tokens per page.
    """

    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor
    page_size: int

    def __post_init__(self) -> None:
        if self.page_size < 1:
            raise InputError(f"page_size={self.page_size} must be >= 1 token; pass the page size of the KV cache")
        for name in ("indptr", "indices", "last_page_len"):
            tensor = getattr(self, name)
            if tensor.dim() != 1 or tensor.dtype not in (torch.int32, torch.int64):
                raise InputError(
                    f"{name} must be one-dimensional int32, got {list(tensor.shape)} {tensor.dtype}; "
                    "build it as for FlashInfer's plan()"
                )
        if self.indptr.numel() != self.last_page_len.numel() + 1:
            raise InputError(
                f"indptr has {self.indptr.numel()} entries and last_page_len {self.last_page_len.numel()}; "
                "indptr must have exactly one more (B + 1 and B)"
            )

    @property
    def batch_size(self) -> int:
        """Number of requests ``B``."""
        return self.last_page_len.numel()

    def kv_len(self) -> torch.Tensor:
        """Tokens per request, [B] int64, computed on the device."""
        pages = (self.indptr[1:] - self.indptr[:-1]).long()
        return torch.where(pages > 0, (pages - 1) * self.page_size + self.last_page_len.long(), 0)

    def check(self, num_pages: int | None = None) -> None:
        """Check the values (a host sync on a GPU, so only :meth:`plan` and CPU backends call it).

        Raises
        ------
        InputError
            If ``indptr`` does not start at 0 or falls, ``indices`` is too short, a last page is over- or underfull, or
            (given ``num_pages``) a page index is out of range.
        """
        indptr, last = self.indptr.tolist(), self.last_page_len.tolist()
        if indptr[0] != 0 or any(b < a for a, b in itertools.pairwise(indptr)):
            raise InputError(f"indptr must start at 0 and never fall, got {_short(indptr)}; it is a running page count")
        if indptr[-1] > self.indices.numel():
            raise InputError(
                f"indptr ends at {indptr[-1]} but indices has {self.indices.numel()} entries; "
                "lengths disagree: pass every page of every request"
            )
        for request, (first, end, length) in enumerate(zip(indptr, indptr[1:], last, strict=False)):
            low = 1 if end > first else 0
            if not low <= length <= (self.page_size if end > first else 0):
                raise InputError(
                    f"last_page_len[{request}]={length} must be in [{low}, {self.page_size if low else 0}] for a "
                    f"request of {end - first} pages of {self.page_size} tokens"
                )
        if num_pages is not None and indptr[-1]:
            used = self.indices[: indptr[-1]]
            lowest, highest = int(used.min()), int(used.max())
            if lowest < 0 or highest >= num_pages:
                bad = lowest if lowest < 0 else highest
                raise InputError(
                    f"page index {bad} is out of range [0, {num_pages - 1}] of the KV cache; "
                    "check the indices or pass the whole cache"
                )


@dataclass(frozen=True, slots=True)
class PagedKV:
    """Keys, values and the page table of a batch.

    ``k_cache``, ``v_cache``: [num_pages, P, Hkv, D] (``"NHD"``) or [num_pages, Hkv, P, D] (``"HND"``), any stride but
    1 in the last dim, fp32, bf16 or fp16, the same dtype for both.
    """

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    table: PageTable
    layout: HeadLayout
    kv_layout: KVLayout = "NHD"

    def __post_init__(self) -> None:
        if self.kv_layout not in ("NHD", "HND"):
            raise InputError(f"kv_layout={self.kv_layout!r} must be 'NHD' or 'HND'")
        page, heads, dim = self.table.page_size, self.layout.num_kv_heads, self.layout.head_dim
        expected = [page, heads, dim] if self.kv_layout == "NHD" else [heads, page, dim]
        for name in ("k_cache", "v_cache"):
            cache = getattr(self, name)
            if cache.dim() != 4 or list(cache.shape[1:]) != expected:
                raise InputError(
                    f"{name} must be [num_pages, {', '.join(map(str, expected))}] for kv_layout {self.kv_layout}, "
                    f"got {list(cache.shape)}; check page_size, num_kv_heads, head_dim and kv_layout"
                )
            if cache.dtype not in SUPPORTED_DTYPES:
                raise InputError(
                    f"{name} has dtype {cache.dtype}; supported: {', '.join(str(d) for d in SUPPORTED_DTYPES)}; "
                    "convert the cache or use another backend"
                )
            if cache.stride(-1) != 1:
                raise InputError(
                    f"{name} must be contiguous in the head dim, got stride {cache.stride(-1)}; call .contiguous()"
                )
        if self.k_cache.dtype != self.v_cache.dtype or self.k_cache.shape[0] != self.v_cache.shape[0]:
            raise InputError(
                f"k_cache {list(self.k_cache.shape)} {self.k_cache.dtype} and v_cache {list(self.v_cache.shape)} "
                f"{self.v_cache.dtype} must agree; pass both halves of one cache"
            )

    def only(self, request: int) -> PagedKV:
        """The same cache seen by one request of the batch."""
        table = self.table
        begin, end = table.indptr[request : request + 2].tolist()
        alone = PageTable(
            table.indptr.new_tensor([0, end - begin]),
            table.indices[begin:end],
            table.last_page_len[request : request + 1],
            table.page_size,
        )
        return PagedKV(self.k_cache, self.v_cache, alone, self.layout, self.kv_layout)

    def gather(self, first: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Read ``count`` tokens from position ``first`` [B] on, as fp32 ``(k, v)`` [B, count, Hkv, D].

        Positions outside ``[0, kv_len)`` come back as zeros; nothing outside the request's pages is read into the
        result.
        """
        position = first[:, None] + torch.arange(count, device=first.device)
        inside = (position >= 0) & (position < self.table.kv_len()[:, None])
        position = torch.where(inside, position, 0)
        slot = (self.table.indptr[:-1, None] + position // self.table.page_size).long()
        # an empty request has no page to point at: read entry 0 and mask it
        page = self.table.indices[torch.where(inside, slot, 0)].long() if self.table.indices.numel() else slot * 0
        offset = position % self.table.page_size
        mask = inside[:, :, None, None]
        k, v = (
            (cache[page, offset] if self.kv_layout == "NHD" else cache[page, :, offset])
            for cache in (self.k_cache, self.v_cache)
        )
        return torch.where(mask, k.float(), 0.0), torch.where(mask, v.float(), 0.0)


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:6]))}, ... {values[-1]}]"
