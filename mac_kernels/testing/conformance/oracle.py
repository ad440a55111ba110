"""An independent account of one request in one layer: dense keys, one position at a time, nothing shared with the core.

Rotations are explicit matrices, states are plain softmaxes over dense contiguous keys, and a row is composed from the
decisions that a backend reported, so that a backend is judged by what it decided. In fp64 it is the truth; with
``plain=True`` it is textbook torch with the same roundings as a kernel has, the yardstick of ``tolerances.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...config import MacConfig
from ...match.accept import HANDOVER
from ...rope import Rope
from ...types import HeadLayout


@dataclass(frozen=True, slots=True)
class OracleRow:
    """What the ring holds for one position: ``q_pre``, ``out``, ``kbar`` [Hq, D], ``lse2`` [Hq], ``anchor`` [Hkv]."""

    q_pre: torch.Tensor
    out: torch.Tensor
    lse2: torch.Tensor
    kbar: torch.Tensor
    anchor: torch.Tensor


@dataclass(frozen=True, slots=True)
class RangeState:
    """Softmax state per head over a set of keys: ``out``, ``kbar`` [Hq, D], ``lse2`` [Hq]; empty: 0 and ``-inf``."""

    out: torch.Tensor
    lse2: torch.Tensor
    kbar: torch.Tensor


class ChainOracle:
    """Replays the recurrence of one request in one layer.

    Parameters
    ----------
    config, layout, rope, sm_scale, logits_soft_cap
        As planned; only ``rope.cos_sin`` is used, the rotation is our own.
    dtype : torch.dtype
        Of queries and cache; softmax weights and outputs are rounded to it when ``plain``.
    row_dtype : torch.dtype
        Of the ring rows; rounded to when ``plain``.
    plain : bool, default False
        fp32 with the roundings above instead of fp64 without any.
    sums_rounded : bool, default False
        If ``plain``: weights are rounded before they are summed, too, as tensor cores sum them.
    """

    def __init__(
        self,
        config: MacConfig,
        layout: HeadLayout,
        rope: Rope,
        *,
        sm_scale: float | None = None,
        logits_soft_cap: float = 0.0,
        dtype: torch.dtype,
        row_dtype: torch.dtype,
        plain: bool = False,
        sums_rounded: bool = False,
    ) -> None:
        self.config, self.layout, self.rope = config, layout, rope
        self.sm_scale = layout.head_dim**-0.5 if sm_scale is None else sm_scale
        self.soft_cap = logits_soft_cap
        self.work = torch.float32 if plain else torch.float64
        self.dtype, self.row_dtype, self.plain, self.sums_rounded = dtype, row_dtype, plain, plain and sums_rounded
        self.rows: dict[int, OracleRow] = {}
        self._rotation: tuple[int, torch.Tensor] | None = None  # of the position asked for last

    def covered_end(self, t: int) -> int:
        """``E(t)``: where the row of ``t`` ends."""
        return max(self.config.sinks, t + 1 - self.config.band)

    def rotation(self, t: int) -> torch.Tensor:
        """``R_t`` as a matrix [D, D] in fp64, magnitude included."""
        if self._rotation is None or self._rotation[0] != t:
            cos, sin = (x[0].double() for x in self.rope.cos_sin(torch.tensor([t])))
            plane = torch.arange(self.rope.rotary_dim // 2)
            a, b = (2 * plane, 2 * plane + 1) if self.rope.interleaved else (plane, plane + len(plane))
            matrix = torch.eye(self.layout.head_dim, dtype=torch.float64)
            matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = cos, -sin, sin, cos
            self._rotation = t, matrix
        return self._rotation[1]

    def q_pre(self, q: torch.Tensor, t: int) -> torch.Tensor:
        """The query [Hq, D] before its rotation."""
        solved: torch.Tensor = torch.linalg.solve(self.rotation(t), q.double().T)
        return solved.T.to(self.work)

    def range_state(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> RangeState:
        """Softmax over the keys where ``keep`` [Hq, L], of ``q`` [Hq, D] over dense ``k``, ``v`` [L, Hkv, D]."""
        group, used = self.layout.group_size, keep.any(0).nonzero().flatten()
        if len(used):  # keys that no head keeps need no work
            first, stop = int(used[0]), int(used[-1]) + 1
            k, v, keep = k[first:stop], v[first:stop], keep[:, first:stop]
        k, v = (x.to(self.work).repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))  # [Hq, L, D]
        logits = (k @ q.to(self.work)[..., None])[..., 0] * self.sm_scale
        if self.soft_cap:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        logits = logits.masked_fill(~keep, -math.inf)
        lse = torch.logsumexp(logits, -1)
        empty = torch.isneginf(lse)
        weight = torch.softmax(logits.masked_fill(empty[:, None], 0.0), -1).masked_fill(empty[:, None], 0.0)
        if self.sums_rounded:
            top = logits.amax(-1, keepdim=True).masked_fill(empty[:, None], 0.0)
            weight = torch.exp(logits - top).to(self.dtype).to(self.work)
            total = weight.sum(-1, keepdim=True)
            weight, lse = weight / total.masked_fill(empty[:, None], 1.0), (total.log() + top)[:, 0]
        elif self.plain:
            weight = weight.to(self.dtype).to(self.work)
        out, kbar = ((weight[:, None] @ x)[:, 0] for x in (v, k))
        return RangeState(out, lse / math.log(2), kbar)

    def fill(self, t: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Record the exact prefill row of position ``t``."""
        state = self.range_state(q, k, v, self._between(k.shape[0], self.config.sinks, self.covered_end(t)))
        anchor = torch.full((self.layout.num_kv_heads,), t)
        self._store(t, self.q_pre(q, t), state, anchor)

    def step(
        self,
        t: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        reuse: torch.Tensor,
        matched_pos: torch.Tensor,
        keep: torch.Tensor | None = None,
        store: bool = True,
    ) -> torch.Tensor:
        """Compose the row of ``t`` from the decisions and return the output [Hq, D].

        Parameters
        ----------
        t : int
            Position; the keys ``[0, t]`` are used.
        q, k, v : torch.Tensor
            Rotated query [Hq, D], dense keys and values [>= t + 1, Hkv, D].
        reuse : torch.Tensor, [Hq] bool
            Heads that reuse a row.
        matched_pos : torch.Tensor, [Hq]
            Position of that row; ignored elsewhere.
        keep : torch.Tensor, optional, [Hq, t + 1] bool
            Positions between sinks and band that each head may read. Default: all.
        store : bool, default True
            False for a request without a ring.

        Raises
        ------
        AssertionError
            If a matched row is outside the window, was never stored, or is empty.
        """
        k, v = k[: t + 1], v[: t + 1]
        sinks, stop, q_pre = self.config.sinks, self.covered_end(t), self.q_pre(q, t)
        start = torch.full((self.layout.num_qo_heads,), sinks)
        reused = self._empty()
        anchor = torch.full((self.layout.num_qo_heads,), t)
        for head in reuse.nonzero().flatten().tolist():
            p = int(matched_pos[head])
            assert t - self.config.window < p < t, f"head {head} matched {p} outside ({t - self.config.window}, {t})"
            row = self._matched_row(head, p)
            start[head] = self.covered_end(p)
            anchor[head] = row.anchor[head // self.layout.group_size] - HANDOVER
            self._reuse(reused, head, row, q_pre)
        between = self._between(t + 1, start, stop)
        fresh = self.range_state(q, k, v, between if keep is None else between & keep)
        rest = self._merge(reused, self._pulled_back(fresh, t))
        if store:
            self._store(t, q_pre, rest, anchor.view(-1, self.layout.group_size).amin(1), pull_back=False)
        sink = self.range_state(q, k, v, self._between(t + 1, 0, sinks))
        band = self.range_state(q, k, v, self._between(t + 1, stop, t + 1))
        return self._round(self._merge(rest, self._merge(sink, band)).out, self.dtype)

    def full_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of ``q`` [Hq, D] over all of ``k``, ``v`` [L, Hkv, D]."""
        keep = self._between(k.shape[0], 0, k.shape[0])
        return self._round(self.range_state(q, k, v, keep).out, self.dtype)

    def weight_bound(
        self, t: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row_pos: torch.Tensor
    ) -> torch.Tensor:
        """Weight [Hq] of the corrected row at ``row_pos`` [Hq] (-1: 0) beside band and sinks, the rest left out."""
        k, v, reused, q_pre = k[: t + 1], v[: t + 1], self._empty(), self.q_pre(q, t)
        for head, p in enumerate(row_pos.tolist()):
            if p >= 0:
                self._reuse(reused, head, self._matched_row(head, p), q_pre)
        sink = self.range_state(q, k, v, self._between(t + 1, 0, self.config.sinks))
        band = self.range_state(q, k, v, self._between(t + 1, self.covered_end(t), t + 1))
        always = torch.logaddexp2(sink.lse2, band.lse2)
        bound = torch.exp2(reused.lse2 - torch.logaddexp2(reused.lse2, always))
        return torch.where(row_pos >= 0, bound, 0.0)

    def _matched_row(self, head: int, p: int) -> OracleRow:
        assert p in self.rows, f"head {head} matched {p}, whose row was never stored"
        assert math.isfinite(float(self.rows[p].lse2[head])), f"head {head} matched {p}, whose row is empty"
        return self.rows[p]

    def _reuse(self, into: RangeState, head: int, row: OracleRow, q_pre: torch.Tensor) -> None:
        into.out[head], into.lse2[head] = row.out[head].to(self.work), row.lse2[head].to(self.work)
        if self.config.correction and not self.soft_cap:
            move = q_pre[head] - row.q_pre[head].to(self.work)
            slope = (move @ row.kbar[head].to(self.work)) * self.sm_scale / math.log(2)
            into.lse2[head] += slope
        into.kbar[head] = row.kbar[head].to(self.work)

    def _pulled_back(self, state: RangeState, t: int) -> RangeState:
        return RangeState(state.out, state.lse2, state.kbar @ self.rotation(t).to(self.work))  # row vectors: R^T k

    def _store(
        self, t: int, q_pre: torch.Tensor, state: RangeState, anchor: torch.Tensor, *, pull_back: bool = True
    ) -> None:
        state = self._pulled_back(state, t) if pull_back else state
        out, kbar, q_pre = (self._round(x, self.row_dtype) for x in (state.out, state.kbar, q_pre))
        self.rows[t] = OracleRow(q_pre, out, state.lse2, kbar, anchor)

    def _round(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x.to(dtype).to(self.work) if self.plain else x

    def _empty(self) -> RangeState:
        heads, dim = self.layout.num_qo_heads, self.layout.head_dim
        zero = torch.zeros(heads, dim, dtype=self.work)
        return RangeState(zero, torch.full((heads,), -math.inf, dtype=self.work), zero.clone())

    def _between(self, length: int, first: int | torch.Tensor, stop: int) -> torch.Tensor:
        key = torch.arange(length)
        first = torch.as_tensor(first).expand(self.layout.num_qo_heads)
        return (key >= first[:, None]) & (key < stop)

    @staticmethod
    def _merge(a: RangeState, b: RangeState) -> RangeState:
        lse2 = torch.logaddexp2(a.lse2, b.lse2)
        finite = lse2.masked_fill(torch.isneginf(lse2), 0.0)
        wa, wb = (torch.exp2(x.lse2 - finite)[:, None] for x in (a, b))
        return RangeState(wa * a.out + wb * b.out, lse2, wa * a.kbar + wb * b.kbar)
