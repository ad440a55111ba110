"""How a session's batches reach the backend: over pages or over rows of token slots, replanned or changed in place."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ...config import MacConfig
from ...paged import RowTable, Table
from ...rope import Rope
from ..scenario import PagedStore


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Let ``torch.empty`` return NaN, so that an output element that is never written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Batches:
    """Builds tables over a store and plans them.

    Parameters
    ----------
    wrapper
        Under test.
    store : PagedStore
        Its pages hold one token each if ``rows``.
    rope, config, logits_soft_cap
        As for ``plan()``.
    rows : bool
        Rows of token slots (``plan_rows``) instead of pages (``plan``).
    """

    def __init__(
        self, wrapper: Any, store: PagedStore, *, rope: Rope, config: MacConfig, logits_soft_cap: float, rows: bool
    ) -> None:
        self.wrapper, self.store, self.rows = wrapper, store, rows
        self._planned = {"layout": store.layout, "rope": rope, "config": config, "logits_soft_cap": logits_soft_cap}

    def table(self, lengths: Sequence[int], requests: Sequence[int] | None = None) -> Table:
        """The table of some requests (default all) at the given lengths."""
        return (self.store.row_table if self.rows else self.store.table)(lengths, requests)

    def plan(self, table: Table) -> None:
        """Plan a table."""
        if isinstance(table, RowTable):
            self.wrapper.plan_rows(*_in_order(table), max_kv_len=table.req_to_token.shape[1], **self._planned)
        else:
            self.wrapper.plan(*table.pointers, page_size=table.page_size, **self._planned)

    def plan_static(self, lengths: Sequence[int]) -> None:
        """Plan all requests at full capacity, over tensors that :meth:`refill_static` changes in place."""
        self._static = self.table(lengths)
        self.plan(self._static)

    def refill_static(self, lengths: Sequence[int], requests: Sequence[int]) -> None:
        """Put other lengths and pages into the planned tensors; what is left of the pages names the poisoned one."""
        begin, pages, last = self._static.pointers
        new = self.table(lengths, requests).pointers
        begin.copy_(new[0])
        last.copy_(new[2])
        if self.rows:
            pages.copy_(new[1])
        else:
            pages.fill_(self.store.poison_page)
            pages[: len(new[1])].copy_(new[1])


def _in_order(table: RowTable) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return table.req_to_token, table.req_pool_indices, table.seq_lens
