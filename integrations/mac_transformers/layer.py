"""One layer of the cache: preallocated keys and values that the kernels can read as pages."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from mac_kernels import HeadLayout, PagedKV, PageTable

_FIRST_CAPACITY = 256


class MacLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # the library is untyped here
    """Keys and values of one layer, growing geometrically: a step writes its own token and copies nothing else.

    ``keys`` and ``values`` [B, Hkv, L, D] are views of larger buffers. Whatever the library puts in their place
    (reordered, repeated, selected rows) is copied into new buffers when these are needed next.
    """

    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append key_states and value_states [B, Hkv, N, D]; returns all keys and values."""
        if torch.is_grad_enabled() and key_states.requires_grad:
            grown: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states)
            return grown  # autograd keeps what was returned before, which a write into the buffers would change
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        length = old + key_states.shape[-2]
        if old == 0:
            self.keys, self.values = (new[:, :, :0] for new in (key_states, value_states))
        buffers = self._hold(length)
        for buffer, new in zip(buffers, (key_states, value_states), strict=True):
            buffer[:, :, old:length] = new
        self.keys, self.values = (buffer[:, :, :length] for buffer in buffers)
        return self.keys, self.values

    def reset(self) -> None:
        """Drop keys, values and buffers."""
        self.keys = self.values = self._buffers = None
        self.is_initialized = False

    @property
    def capacity(self) -> int:
        """Tokens that fit into the buffers."""
        return self._hold(self.get_seq_length())[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held, not of the room for more."""
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0

    def paged(self, layout: HeadLayout, starts: torch.Tensor, length: int) -> PagedKV:
        """The rows as pages of one token in HND layout, without a copy.

        Token ``t`` of row ``b`` is page ``b * Hkv * capacity + t``; a row has its tokens from ``starts[b]`` [B] up to
        ``length``, so padding on the left is left out and position 0 is the first real token.
        """
        row = torch.arange(len(starts), device=starts.device)
        token = torch.arange(length, device=starts.device)
        page = row[:, None] * (layout.num_kv_heads * self.capacity) + token
        count = length - starts
        table = PageTable(
            indptr=torch.cat((count.new_zeros(1), count.cumsum(0))).int(),
            indices=page[token >= starts[:, None]].int(),
            last_page_len=count.clamp(max=1).int(),
            page_size=1,
        )
        return PagedKV(*self.pages(), table, layout, "HND")

    def pages(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The buffers as pages of one token in HND layout, [num_pages, Hkv, 1, D]."""
        k, v = (_as_pages(buffer) for buffer in self._hold(self.get_seq_length()))
        return k, v

    def _hold(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Buffers that begin with the present keys and values and have room for ``length`` tokens."""
        held = self._buffers
        if held is not None and length <= held[0].shape[2] and self.keys.data_ptr() == held[0].data_ptr():
            return held
        old, capacity = self.keys.shape[2], max(_FIRST_CAPACITY, length + length // 2)
        fresh = []
        for present in (self.keys, self.values):
            with torch.inference_mode(False):  # or a later step outside of inference mode could not write here
                buffer = torch.empty(
                    *present.shape[:2], capacity, present.shape[3], dtype=present.dtype, device=present.device
                )
            buffer[:, :, :old] = present.detach()
            fresh.append(buffer)
        self._buffers = (fresh[0], fresh[1])
        self.keys, self.values = (buffer[:, :, :old] for buffer in fresh)
        return self._buffers


def _as_pages(buffer: torch.Tensor) -> torch.Tensor:
    batch, heads, capacity, dim = buffer.shape
    pages = ((batch - 1) * heads + 1) * capacity
    return buffer.as_strided((pages, heads, 1, dim), (dim, capacity * dim, dim, 1))
