"""Eviction: a cache that holds nothing but what is read, in pages of its own.

Every (request, kv head) keeps other tokens, so each is a request of one kv head here: decoding is ordinary attention
over ``B * Hkv`` such requests, in any backend. The order of the tokens does not matter: their keys are rotated already.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from ..errors import InputError
from ..paged import PagedKV, PageTable
from ..types import HeadLayout
from .candidates import decode_keep
from .config import TcaConfig, far_blocks
from .select import Selection

_PAGE = 16


class EvictedKV:
    """Keys and values of one layer without the tokens that were not selected.

    A head's tokens are its far tokens followed by its window, in order. All lengths are known on the host.

    Parameters
    ----------
    kv : PagedKV
        The whole cache after the prompt; it is copied from and may be freed.
    kv_len : sequence of int
        Tokens of every request.
    selection : Selection
        What to keep.
    choice : sequence of int
        Candidate of every kv head, as for :func:`mac_kernels.tca.select_far`.
    config : TcaConfig
        The one that selected.
    """

    def __init__(
        self, kv: PagedKV, kv_len: Sequence[int], selection: Selection, choice: Sequence[int], *, config: TcaConfig
    ) -> None:
        self.config, self.layout = config, kv.layout
        self.kv_len = list(kv_len)
        self.keep = [decode_keep(candidate, config.block) for candidate in choice]
        dtype, device = kv.k_cache.dtype, kv.k_cache.device
        self._caches = [torch.empty(0, 1, _PAGE, kv.layout.head_dim, dtype=dtype, device=device) for _ in "kv"]
        self._free: list[int] = []
        count = len(kv_len) * kv.layout.num_kv_heads
        self._pages: list[list[int]] = [[] for _ in range(count)]
        self.lengths = [0] * count
        self.far = selection.far.count.flatten().tolist()
        self._held = [far_blocks(length - 1, config) for length in kv_len]
        ends = selection.far.far_end.flatten().tolist()
        kept_of = (far + kv_len[row // len(choice)] - ends[row] for row, far in enumerate(self.far))
        self._grow(sum(-(-kept // _PAGE) for kept in kept_of))  # all at once: later growth is a quarter more
        for request, length in enumerate(kv_len):
            parts = kv.only(request).gather(torch.zeros(1, dtype=torch.int64, device=device), length)
            for head in range(kv.layout.num_kv_heads):
                row = request * kv.layout.num_kv_heads + head
                kept = selection.far.ids[request, head, : self.far[row]].long()
                window = torch.arange(ends[row], length, device=device)
                token = torch.cat((kept, window))
                self._resize(row, len(token))
                self._write(row, 0, *(part[0, token, head].to(dtype) for part in parts))

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        page = self._caches[0][:1].nbytes + self._caches[1][:1].nbytes
        return page * sum(map(len, self._pages))

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add the keys and values [B, Hkv, D] of one new token of every request."""
        self.kv_len = [length + 1 for length in self.kv_len]
        for row, (one_k, one_v) in enumerate(zip(k.flatten(0, 1), v.flatten(0, 1), strict=True)):
            self._resize(row, self.lengths[row] + 1)
            self._write(row, self.lengths[row] - 1, one_k[None], one_v[None])

    def compact(self, q: torch.Tensor, *, sm_scale: float, logits_soft_cap: float = 0.0) -> None:
        """Drop what :func:`mac_kernels.tca.compact` does not keep; call it before every decode step.

        Raises
        ------
        InputError
            If more than one block is due in a request.
        """
        heads, block = self.layout.num_kv_heads, self.config.block
        for request, length in enumerate(self.kv_len):
            due = far_blocks(length - 1, self.config) - self._held[request]
            if due > 1:
                raise InputError(f"{due} blocks left the window at once; append and decode one token at a time")
            if due <= 0:
                continue
            self._held[request] += 1
            for head, wanted in enumerate(self.keep):
                if wanted:
                    row = request * heads + head
                    begin = max(self.far[row], self.config.sinks)
                    k, v = self._read(row, begin, self.lengths[row])
                    group = q[request].view(heads, -1, q.shape[2])[head].float()
                    logits = group @ k[:block].float().T * sm_scale
                    if logits_soft_cap > 0:
                        logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
                    best = logits.softmax(-1).mean(0).argsort(descending=True, stable=True)[:wanted].sort().values
                    stay = torch.cat((best, torch.arange(block, len(k), device=k.device)))
                    self._write(row, begin, k[stay], v[stay])
                    self._resize(row, begin + len(stay))
                    self.far[row] = begin + wanted

    def paged(self) -> PagedKV:
        """The cache as ``B * Hkv`` requests of one kv head; ask it with ``q.view(B * Hkv, G, D)``."""
        device = self._caches[0].device
        table = PageTable(
            indptr=torch.tensor([0, *itertools.accumulate(map(len, self._pages))], dtype=torch.int32, device=device),
            indices=torch.tensor([page for pages in self._pages for page in pages], dtype=torch.int32, device=device),
            last_page_len=torch.tensor(
                [(length - 1) % _PAGE + 1 if length else 0 for length in self.lengths], dtype=torch.int32, device=device
            ),
            page_size=_PAGE,
        )
        k, v = self._caches
        return PagedKV(k, v, table, HeadLayout(self.layout.group_size, 1, self.layout.head_dim), "HND")

    def _resize(self, row: int, length: int) -> None:
        """Give a head exactly the pages that ``length`` tokens need."""
        pages, needed = self._pages[row], -(-length // _PAGE)
        self._free += pages[needed:]
        del pages[needed:]
        if needed - len(pages) > len(self._free):
            self._grow(needed - len(pages))
        pages += [self._free.pop() for _ in range(needed - len(pages))]
        self.lengths[row] = length

    def _grow(self, least: int) -> None:
        have = len(self._caches[0])
        more = max(least, have // 4, 1)
        self._caches = [torch.cat((cache, cache.new_empty(more, *cache.shape[1:]))) for cache in self._caches]
        self._free += range(have, have + more)

    def _place(self, row: int, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Page and offset of some tokens of a head."""
        token = torch.arange(begin, end)
        return torch.tensor(self._pages[row])[token // _PAGE], token % _PAGE

    def _read(self, row: int, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        page, offset = self._place(row, begin, end)
        k, v = (cache[page, 0, offset] for cache in self._caches)
        return k, v

    def _write(self, row: int, begin: int, k: torch.Tensor, v: torch.Tensor) -> None:
        page, offset = self._place(row, begin, begin + len(k))
        for cache, values in zip(self._caches, (k, v), strict=True):
            cache[page, 0, offset] = values
