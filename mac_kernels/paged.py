"""A paged KV cache as the kernels see it, with FlashInfer's page-table arguments."""

from __future__ import annotations

import dataclasses
import itertools
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .errors import InputError, require_contiguous
from .types import HeadLayout, KVLayout

_INDEX_DTYPES = (torch.int32, torch.int64)
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KV_DTYPES = (*SUPPORTED_DTYPES, torch.float8_e4m3fn)
Scale = float | torch.Tensor
"""A number, or one fp32 on the device."""


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
        if not isinstance(self.page_size, numbers.Integral) or self.page_size < 1:
            raise InputError(f"page_size={self.page_size} must be >= 1 token; pass the page size of the KV cache")
        for name in ("indptr", "indices", "last_page_len"):
            tensor = getattr(self, name)
            if tensor.dim() != 1 or tensor.dtype not in _INDEX_DTYPES:
                raise InputError(
                    f"{name} must be one-dimensional int32 or int64, got {list(tensor.shape)} {tensor.dtype}; "
                    "build it as for FlashInfer's plan()"
                )
            require_contiguous(name, tensor)
        if self.indptr.numel() != self.last_page_len.numel() + 1:
            raise InputError(
                f"indptr has {self.indptr.numel()} entries and last_page_len {self.last_page_len.numel()}; "
                "indptr must have exactly one more (B + 1 and B)"
            )

    @property
    def batch_size(self) -> int:
        """Number of requests ``B``."""
        return self.last_page_len.numel()

    @property
    def device(self) -> torch.device:
        """Where the table lives."""
        return self.indptr.device

    @property
    def pointers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the kernels read: where requests begin, pages, lengths."""
        return self.indptr, self.indices, self.last_page_len

    @property
    def row_stride(self) -> int:
        """0: requests lie one after the other in ``indices``."""
        return 0

    def kv_len(self) -> torch.Tensor:
        """Tokens per request, [B] int64, computed on the device."""
        pages = (self.indptr[1:] - self.indptr[:-1]).long()
        return torch.where(pages > 0, (pages - 1) * self.page_size + self.last_page_len.long(), 0)

    def over(self, tensors: Sequence[torch.Tensor]) -> PageTable:
        """The table with other memory for its :attr:`pointers`; itself if it is the same memory."""
        if _same_memory(tensors, self.pointers):
            return self
        indptr, indices, last_page_len = tensors
        return PageTable(indptr, indices, last_page_len, self.page_size)

    def only(self, request: int) -> PageTable:
        """The table of one request of the batch."""
        begin, end = self.indptr[request : request + 2].tolist()
        indptr = self.indptr.new_tensor([0, end - begin])
        return PageTable(indptr, self.indices[begin:end], self.last_page_len[request : request + 1], self.page_size)

    def pages_at(self, position: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """Page of every ``position`` [B, N] where ``inside``, int64; anything that can be read elsewhere."""
        slot = (self.indptr[:-1, None] + position // self.page_size).long()
        # an empty request has no page to point at: read entry 0, the caller masks it
        return self.indices[torch.where(inside, slot, 0)].long() if self.indices.numel() else slot * 0

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
class RowTable:
    """Pages of one token each, as SGLang keeps them: a row of token slots per request, of which a batch names some.

    ``req_to_token`` [rows, max_context] int32, token slots in order; ``req_pool_indices`` [B] int32 or int64, the row
    of every request; ``seq_lens`` [B] int32 or int64, its tokens, the current one included (0: nothing to decode). The
    values of all three may change between graph replays.
    """

    req_to_token: torch.Tensor
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor

    def __post_init__(self) -> None:
        rows = self.req_to_token
        if rows.dim() != 2 or rows.dtype not in _INDEX_DTYPES:
            raise InputError(
                f"req_to_token must be [rows, max_context] int32, got {list(rows.shape)} {rows.dtype}; "
                "pass the request pool's own table"
            )
        for name in ("req_pool_indices", "seq_lens"):
            tensor = getattr(self, name)
            if tensor.dim() != 1 or tensor.dtype not in _INDEX_DTYPES:
                raise InputError(f"{name} must be [B] int32 or int64, got {list(tensor.shape)} {tensor.dtype}")
        for name in ("req_to_token", "req_pool_indices", "seq_lens"):
            require_contiguous(name, getattr(self, name))
        if self.req_pool_indices.numel() != self.seq_lens.numel():
            raise InputError(
                f"req_pool_indices has {self.req_pool_indices.numel()} entries and seq_lens {self.seq_lens.numel()}; "
                "each needs one per request"
            )
        if len({tensor.device for tensor in self.pointers}) > 1:
            raise InputError("req_to_token, req_pool_indices and seq_lens must be on one device; move them")

    @property
    def page_size(self) -> int:
        """1: a page is a token slot."""
        return 1

    @property
    def batch_size(self) -> int:
        """Number of requests ``B``."""
        return self.seq_lens.numel()

    @property
    def device(self) -> torch.device:
        """Where the table lives."""
        return self.req_to_token.device

    @property
    def pointers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the kernels read: rows of the requests, token slots, lengths."""
        return self.req_pool_indices, self.req_to_token, self.seq_lens

    @property
    def row_stride(self) -> int:
        """Entries from one row to the next."""
        return max(self.req_to_token.stride(0), 1)

    def kv_len(self) -> torch.Tensor:
        """Tokens per request, [B] int64, computed on the device."""
        return self.seq_lens.long()

    def over(self, tensors: Sequence[torch.Tensor]) -> RowTable:
        """The table with other memory for its :attr:`pointers`; itself if it is the same memory."""
        if _same_memory(tensors, self.pointers):
            return self
        begin, rows, lengths = tensors
        return RowTable(rows, begin, lengths)

    def only(self, request: int) -> RowTable:
        """The table of one request of the batch."""
        one = slice(request, request + 1)
        return RowTable(self.req_to_token, self.req_pool_indices[one], self.seq_lens[one])

    def pages_at(self, position: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """Token slot of every ``position`` [B, N] where ``inside``, int64; anything that can be read elsewhere."""
        position = torch.where(inside, position, 0)
        return self.req_to_token[self.req_pool_indices.long()[:, None], position].long()

    def check(self, num_pages: int | None = None) -> None:
        """Check the values (a host sync on a GPU, so only CPU backends call it).

        Raises
        ------
        InputError
            If a row or a length is out of range, or (given ``num_pages``) a token slot is.
        """
        num_rows, most = self.req_to_token.shape
        for name, tensor, high in (("req_pool_indices", self.req_pool_indices, num_rows - 1),
                                   ("seq_lens", self.seq_lens, most)):  # fmt: skip
            for request, value in enumerate(tensor.tolist()):
                if not 0 <= value <= high:
                    raise InputError(
                        f"{name}[{request}]={value} is out of range [0, {high}] of req_to_token "
                        f"{list(self.req_to_token.shape)}; pass the whole table"
                    )
        if num_pages is None:
            return
        for request, length in enumerate(self.seq_lens.tolist()):
            used = self.req_to_token[self.req_pool_indices[request], :length]
            if length and not 0 <= int(used.min()) <= int(used.max()) < num_pages:
                raise InputError(
                    f"request {request} names token slots in [{int(used.min())}, {int(used.max())}], the KV cache has "
                    f"[0, {num_pages - 1}]; pass the whole cache"
                )


Table = PageTable | RowTable


@dataclass(frozen=True, slots=True)
class PagedKV:
    """Keys, values and the table of a batch, a :class:`PageTable` or a :class:`RowTable` (pages of one token).

    ``k_cache``, ``v_cache``: [num_pages, P, Hkv, D] (``"NHD"``) or [num_pages, Hkv, P, D] (``"HND"``), any stride but
    1 in the last dim, fp32, bf16, fp16 or fp8 e4m3, the same dtype for both; ``k_scale``, ``v_scale``: what the stored
    numbers are to be multiplied with.
    """

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    table: Table
    layout: HeadLayout
    kv_layout: KVLayout = "NHD"
    k_scale: Scale = 1.0
    v_scale: Scale = 1.0

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
            if cache.dtype not in KV_DTYPES:
                raise InputError(
                    f"{name} has dtype {cache.dtype}; supported: {', '.join(str(d) for d in KV_DTYPES)}; "
                    "convert the cache or use another backend"
                )
            require_contiguous(name, cache)
        if self.k_cache.dtype != self.v_cache.dtype or self.k_cache.shape[0] != self.v_cache.shape[0]:
            raise InputError(
                f"k_cache {list(self.k_cache.shape)} {self.k_cache.dtype} and v_cache {list(self.v_cache.shape)} "
                f"{self.v_cache.dtype} must agree; pass both halves of one cache"
            )

        if isinstance(self.k_scale, torch.Tensor) != isinstance(self.v_scale, torch.Tensor):
            raise InputError(
                f"k_scale={self.k_scale} and v_scale={self.v_scale} must be two numbers or two device scalars; "
                "pass both of one kind"
            )
        for name in ("k_scale", "v_scale"):
            _check_scale(name, scale := getattr(self, name))
            if isinstance(scale, int):  # Triton would compile the integer 1 into the kernel
                object.__setattr__(self, name, float(scale))

    @property
    def itemsize(self) -> int:
        """Bytes of one stored number."""
        return self.k_cache.element_size()

    def only(self, request: int) -> PagedKV:
        """The same cache seen by one request of the batch."""
        return dataclasses.replace(self, table=self.table.only(request))

    def gather(self, first: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Read ``count`` tokens from position ``first`` [B] on, scaled, as fp32 ``(k, v)`` [B, count, Hkv, D].

        Positions outside ``[0, kv_len)`` come back as zeros; nothing outside the request's pages is read into the
        result.
        """
        position = first[:, None] + torch.arange(count, device=first.device)
        inside = (position >= 0) & (position < self.table.kv_len()[:, None])
        position = torch.where(inside, position, 0)
        page = self.table.pages_at(position, inside)
        offset = position % self.table.page_size
        mask = inside[:, :, None, None]
        k, v = (
            (cache[page, offset] if self.kv_layout == "NHD" else cache[page, :, offset]).float() * scale
            for cache, scale in ((self.k_cache, self.k_scale), (self.v_cache, self.v_scale))
        )
        return torch.where(mask, k, 0.0), torch.where(mask, v, 0.0)


def _same_memory(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return all(x.data_ptr() == y.data_ptr() for x, y in zip(a, b, strict=True))


def _check_scale(name: str, scale: Scale) -> None:
    if isinstance(scale, torch.Tensor):
        if scale.numel() != 1 or scale.dtype != torch.float32:
            raise InputError(f"{name} must hold one fp32, got {list(scale.shape)} {scale.dtype}; convert it once")
    elif not (isinstance(scale, numbers.Real) and math.isfinite(scale) and scale > 0):
        raise InputError(f"{name}={scale!r} must be finite and > 0; leave it out for 1")


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:6]))}, ... {values[-1]}]"
