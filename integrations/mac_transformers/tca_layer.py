"""One layer of a cache that evicts: whole until its prompt was selected, then only what is kept."""

from __future__ import annotations

from typing import Any

import torch

from mac_kernels import UnsupportedError
from mac_kernels.tca import EvictedKV

from .layer import MacLayer


class EvictingLayer(MacLayer):  # type: ignore[no-untyped-call]  # the library is untyped here
    """Keys and values of one layer; ``evicted`` holds what is left of them once :meth:`evict` was called.

    After that, ``update`` returns the new tokens alone, ``fresh``, and whoever attends appends them.
    """

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.evicted: EvictedKV | None = None
        self.fresh: tuple[torch.Tensor, torch.Tensor] | None = None
        self._total = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append key_states and value_states [B, Hkv, N, D]; returns all of them, or the new ones after eviction."""
        if self.evicted is None:
            return super().update(key_states, value_states, *args, **kwargs)
        self.fresh = key_states, value_states
        self._total += key_states.shape[2]
        return self.fresh

    def evict(self, kept: EvictedKV) -> None:
        """Hold what was kept and free the rest."""
        self._total = self.get_seq_length()
        self.evicted = kept
        self.keys = self.values = self._buffers = None

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        return super().nbytes if self.evicted is None else self.evicted.nbytes

    def get_seq_length(self) -> int:
        """Tokens so far, dropped ones included."""
        return super().get_seq_length() if self.evicted is None else self._total

    def reset(self) -> None:
        """Drop everything."""
        super().reset()
        self.evicted, self.fresh, self._total = None, None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens, before anything was evicted."""
        self._check("tokens are removed")
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows, before anything was evicted."""
        self._check("rows are reordered")
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat the rows, before anything was evicted."""
        self._check("rows are repeated")
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows, before anything was evicted."""
        self._check("rows are selected")
        super().batch_select_indices(indices)

    def _check(self, what: str) -> None:
        if self.evicted is not None:
            raise UnsupportedError("TCA in the mode 'evict'", [what], "Use TcaConfig(mode='index').")
