"""Small requests for the tests of TCA."""

from __future__ import annotations

import torch

from mac_kernels import HeadLayout, PagedKV, PageTable
from mac_kernels.tca import FarSet, Selection, TcaConfig, compact, select_prompt, sparse_decode, sparse_prefill
from mac_kernels.tca.candidates import NUM_SPARSE, decode_keep
from mac_kernels.tca.select import empty_far_set

LAYOUT = HeadLayout(6, 3, 16)
CONFIG = TcaConfig(block=8, local_window=16, sinks=2)
SCALE = 0.25
CHOICE = [2, 8, NUM_SPARSE]


class Requests:
    """Keys, values and queries of some requests, scattered over pages of four tokens."""

    def __init__(self, lengths: list[int], *, room: int = 0, seed: int = 0, kv_layout: str = "HND") -> None:
        self.lengths, self.total = list(lengths), [length + room for length in lengths]
        make = torch.Generator().manual_seed(seed)
        self.q, self.k, self.v = (
            [torch.randn(count, heads, 16, generator=make) * 2 for count in self.total] for heads in (6, 3, 3)
        )
        pages = [-(-count // 4) for count in self.total]
        self.places = torch.randperm(sum(pages) + 3, generator=make).split([*pages, 3])[:-1]
        shape = (sum(pages) + 3, 3, 4, 16) if kv_layout == "HND" else (sum(pages) + 3, 4, 3, 16)
        self.caches = [torch.full(shape, torch.nan) for _ in "kv"]
        for cache, parts in zip(self.caches, (self.k, self.v), strict=True):
            for place, part in zip(self.places, parts, strict=True):
                for token, row in enumerate(part):
                    page, offset = place[token // 4], token % 4
                    cache[(page, slice(None), offset) if kv_layout == "HND" else (page, offset)] = row
        self.kv_layout = kv_layout

    def kv(self) -> PagedKV:
        """The requests at their present lengths."""
        pages = [-(-length // 4) for length in self.lengths]
        indptr = torch.tensor([0, *pages]).cumsum(0).int()
        indices = torch.cat([place[:count] for place, count in zip(self.places, pages, strict=True)]).int()
        last = torch.tensor([(length - 1) % 4 + 1 if length else 0 for length in self.lengths]).int()
        return PagedKV(*self.caches, PageTable(indptr, indices, last, 4), LAYOUT, self.kv_layout)

    def last(self) -> torch.Tensor:
        """Queries of the last tokens."""
        return torch.stack([q[length - 1] for q, length in zip(self.q, self.lengths, strict=True)])

    def select(self, choice: list[int] = CHOICE, config: TcaConfig = CONFIG) -> Selection:
        return select_prompt(self.last(), self.kv(), self.lengths, choice, config=config, sm_scale=SCALE)

    def prefill(self, selection: Selection, config: TcaConfig = CONFIG) -> list[torch.Tensor]:
        """Outputs of all queries of every request."""
        indptr = torch.tensor([0, *self.lengths]).cumsum(0).int()
        q = torch.cat([q[:length] for q, length in zip(self.q, self.lengths, strict=True)])
        state = sparse_prefill(q, indptr, self.kv(), selection, config=config, sm_scale=SCALE)
        return list(state.out.split(self.lengths))

    def softmax(self, request: int, position: int, head: int, tokens: list[int]) -> torch.Tensor:
        """One query head over a set of tokens, plainly, in double precision."""
        k, v = (x[request][tokens, head // 2].double() for x in (self.k, self.v))
        return ((k @ self.q[request][position, head].double() * SCALE).softmax(0) @ v).float()


def far_ids(selection: Selection, request: int, head: int) -> list[int]:
    far = selection.far
    return far.ids[request, head, : int(far.count[request, head])].tolist()


def decode_loop(requests: Requests, selection: Selection, steps: int) -> tuple[FarSet, list[torch.Tensor]]:
    """Decode with compaction; returns the far set and the outputs."""
    far = empty_far_set(len(requests.lengths), 3, 2 + max(requests.total), config=CONFIG, device=torch.device("cpu"))
    width = selection.far.ids.shape[2]
    far.ids[:, :, :width] = selection.far.ids
    far.count.copy_(selection.far.count)
    far.far_end.copy_(selection.far.far_end)
    keep = torch.tensor([decode_keep(candidate, 8) for candidate in CHOICE])
    outs = []
    for _ in range(steps):
        requests.lengths = [length + 1 for length in requests.lengths]
        q, kv = requests.last(), requests.kv()
        compact(q, kv, far, keep, config=CONFIG, sm_scale=SCALE)
        outs.append(sparse_decode(q, kv, far, sm_scale=SCALE).out)
    return far, outs
