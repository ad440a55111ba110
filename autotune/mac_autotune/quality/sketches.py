"""Sketch kinds: small images of a kv group's queries that nominate ring rows, compared before a kernel is built."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from mac_kernels import HeadLayout, InputError, MatchResult
from mac_kernels.config import MacConfig
from mac_kernels.match.sketch import default_sketch_dim, make_sketch
from mac_kernels.ring import RingRows

Basis = Literal["signed", "random", "pca"]
Ballot = Literal["sum", "worst", "each"]


@dataclass(frozen=True, slots=True)
class SketchKind:
    """How queries [..., Hkv, G, D] become images and how images elect rows.

    Parameters
    ----------
    basis : {"signed", "random", "pca"}
        Signed sums over the heads of the group (the library's), a random orthogonal projection, or the principal
        directions of query differences seen in the prompt.
    per_head : bool
        One image per head, or one of the concatenated heads.
    dim : int
        Elements of an image.
    bits : {8, 4}
        Of an element; every image also has an fp16 scale.
    centred : bool
        Subtract the prompt's mean query first.
    ballot : {"sum", "worst", "each"}
        With images per head: elect by the sum of their distances, by the largest, or let each head elect its share.
    """

    basis: Basis
    per_head: bool
    dim: int
    bits: Literal[8, 4]
    centred: bool = False
    ballot: Ballot = "sum"

    @property
    def name(self) -> str:
        """E.g. ``random-head-40-int8-centred-each``."""
        parts = [self.basis, "head" if self.per_head else "group", str(self.dim), f"int{self.bits}"]
        parts += ["centred"] if self.centred else []
        return "-".join([*parts, self.ballot] if self.per_head else parts)

    def nbytes(self, layout: HeadLayout) -> int:
        """Bytes per row and kv head."""
        images = layout.group_size if self.per_head else 1
        scale = 4 if self.basis == "signed" else 2  # the library's own keeps its scale in fp32
        return images * (math.ceil(self.dim * self.bits / 8) + scale)


def default_kinds(layout: HeadLayout, *, budget: int = 128) -> list[SketchKind]:
    """The library's own sketch and every kind within ``budget`` bytes per row and kv head, dims as large as may be."""
    dim, group = layout.head_dim, layout.group_size
    share = budget // group - 2  # bytes of codes per head when each has its own image
    kinds = [
        SketchKind("signed", False, default_sketch_dim(layout), 8),
        SketchKind("signed", False, dim * (252 // dim), 4),
    ]
    for basis in ("random", "pca"):
        for centred in (False, True):
            kinds.append(SketchKind(basis, False, min(group * dim, budget - 4), 8, centred))
            kinds.append(SketchKind(basis, False, min(group * dim, 2 * (budget - 4)), 4, centred))
            for bits in (8, 4):
                size = min(dim, share * 8 // bits)
                kinds += [SketchKind(basis, True, size, bits, centred, ballot) for ballot in ("sum", "worst", "each")]
    return kinds


class FittedSketch:
    """A kind with its projection and mean for one layer.

    Parameters
    ----------
    kind : SketchKind
    layout : HeadLayout
    prompt : torch.Tensor, [N, Hq, D]
        Queries before RoPE that PCA and centring may learn from.
    """

    def __init__(self, kind: SketchKind, layout: HeadLayout, prompt: torch.Tensor) -> None:
        self.kind, self.layout = kind, layout
        parts = self._split(prompt.float())  # [N, Hkv, parts, X]
        self.mean = parts.mean(0) if kind.centred else torch.zeros_like(parts[0])
        self.projection = self._projection(parts)

    def image(self, q_pre: torch.Tensor) -> torch.Tensor:
        """Quantised images of queries [..., Hq, D], as fp32 [..., Hkv, parts, K]."""
        flat = self._split(q_pre.float()) - self.mean
        image = torch.einsum("...hpx,hpxk->...hpk", flat, self.projection)
        top = 2 ** (self.kind.bits - 1) - 1
        scale = (image.abs().amax(-1, keepdim=True) / top).clamp(min=1e-8).half().float()
        rounded: torch.Tensor = (image / scale).round().clamp(-top, top) * scale
        return rounded

    def elect(self, distance: torch.Tensor, count: int) -> torch.Tensor:
        """Rows elected by squared image distances [B, W, Hkv, parts] (``inf`` where not eligible), [B, W, Hkv] bool."""
        if self.kind.ballot == "each" and distance.shape[-1] > 1:
            share = -(-count // distance.shape[-1])
            return _smallest(distance, share).any(-1)
        score = distance.amax(-1) if self.kind.ballot == "worst" else distance.sum(-1)
        return _smallest(score, count)

    def _split(self, q_pre: torch.Tensor) -> torch.Tensor:
        shape = (self.layout.num_kv_heads, self.layout.group_size if self.kind.per_head else 1, -1)
        return q_pre.reshape(*q_pre.shape[:-2], *shape)

    def _projection(self, parts: torch.Tensor) -> torch.Tensor:
        _, kv_heads, count, size = parts.shape
        if self.kind.basis == "signed":
            sketch = make_sketch(self.layout, self.kind.dim)
            matrix = torch.zeros(size, self.kind.dim)
            matrix.scatter_(0, sketch.index.long(), sketch.sign)
            matrix = matrix.to(parts.device)
        elif self.kind.basis == "random":
            generator = torch.Generator().manual_seed(0)
            basis = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
            matrix = basis[:, : self.kind.dim].to(parts.device)
        else:
            step = (parts[1:] - parts[:-1]).permute(1, 2, 0, 3)  # [Hkv, parts, N - 1, X]
            directions: torch.Tensor = torch.linalg.eigh(step.mT @ step).eigenvectors[..., -self.kind.dim :]
            return directions
        return matrix.expand(kv_heads, count, -1, -1)


def _smallest(distance: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the ``count`` smallest finite entries along dim 1."""
    found = distance.topk(min(count, distance.shape[1]), dim=1, largest=False)
    return torch.zeros_like(distance, dtype=torch.bool).scatter_(1, found.indices, True) & torch.isfinite(distance)


class SketchedMatch:
    """:func:`mac_kernels.find_match` with rows nominated by a sketch kind, made anew from the ring at every step."""

    def __init__(self, kind: SketchKind, count: int) -> None:
        if kind.basis == "pca":
            raise InputError(f"{kind.name} learns from a prompt; only kinds without PCA can run in a decode step")
        self.kind, self.count = kind, count
        self._sketch: FittedSketch | None = None

    def __call__(
        self, q_pre: torch.Tensor, rows: RingRows, position: torch.Tensor, *, config: MacConfig
    ) -> MatchResult:
        """Match ``q_pre`` [B, Hq, D]; centring uses the mean of the rows at hand."""
        batch, heads, dim = q_pre.shape
        layout = HeadLayout(heads, rows.anchor.shape[-1], dim)
        fresh = (rows.pos >= 0) & (rows.pos < position[:, None]) & (rows.pos > position[:, None] - config.window)
        eligible = fresh[:, :, None] & torch.isfinite(rows.lse2)
        usable = eligible.view(batch, -1, layout.num_kv_heads, layout.group_size).all(-1)
        if self._sketch is None:
            self._sketch = FittedSketch(self.kind, layout, torch.zeros_like(q_pre[:1]))
        sketch = self._sketch
        if self.kind.centred:
            seen = fresh[..., None, None].float()
            mean = (rows.q_pre * seen).sum(1) / seen.sum(1).clamp(min=1)
            stored, query = rows.q_pre - mean[:, None], q_pre - mean
        else:
            stored, query = rows.q_pre, q_pre
        distance = (sketch.image(stored) - sketch.image(query)[:, None]).square().sum(-1)
        elected = sketch.elect(torch.where(usable[..., None], distance, torch.inf), self.count)
        allowed = eligible & elected.repeat_interleave(layout.group_size, dim=2)
        exact = (rows.q_pre - q_pre[:, None]).square().sum(-1).sqrt()
        best, row = torch.where(allowed, exact, torch.inf).min(1)
        found = torch.isfinite(best)
        return MatchResult(torch.where(found, row, -1), torch.where(found, rows.pos.gather(1, row), -1), best)
