"""Judges what a step stored: its own row against the oracle, and that nothing else changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...match.sketch import Sketch
from ...ring import RingPool
from ..tolerances import Ledger
from .oracle import OracleRow

if TYPE_CHECKING:
    from .session import Session, StepResult


def check_row(session: Session, request: int, t: int) -> None:
    """Compare the ring row of position ``t`` with the oracle's; its errors go into the session's ledger."""
    ring = int(session.rings.slot_table[session.slots[request]])
    compare_row(
        session.ledger,
        session.rings,
        (session.layer, ring, t),
        session.plain[request].rows[t],
        session.truth[request].rows[t],
        correction=session.config.correction and not session.soft_cap,
        sum_dtype=session.dtype if session.sums_rounded else torch.float32,
    )


def compare_row(
    ledger: Ledger,
    rings: RingPool,
    where: tuple[int, int, int],
    plain: OracleRow,
    truth: OracleRow,
    *,
    correction: bool = True,
    sum_dtype: torch.dtype = torch.float32,
) -> None:
    """Compare one ring row with the plain and the fp64 oracle's.

    Parameters
    ----------
    ledger : Ledger
        Takes the errors of the query, state, lse2 and mean key.
    rings : RingPool
        Holds the row.
    where : tuple of int
        Layer, ring and position.
    plain, truth : OracleRow
        What it should be.
    correction : bool, default True
        Whether the mean key is compared.
    sum_dtype : torch.dtype, default torch.float32
        Dtype of the weights whose sum ``lse2`` is.

    Raises
    ------
    AssertionError
        If the row is another position's, or its anchor or sketch is wrong.
    """
    layer, ring, t = where
    row = {name: field[layer, ring, t % rings.window].cpu() for name, field in rings.fields.items()}
    what = f"row {t} of ring {ring} in layer {layer}"
    if int(row["pos"]) == -1 and bool(torch.isneginf(truth.lse2).all()):
        return  # an empty row may be left untagged: neither is ever matched
    assert int(row["pos"]) == t, f"{what} is tagged {int(row['pos'])}"
    ledger.record("lse2", row["lse2"], plain.lse2, truth.lse2, dtype=sum_dtype, what=what)
    ledger.record("query", row["q_pre"], plain.q_pre, truth.q_pre, dtype=rings.dtype, what=what)
    ledger.record("state", row["out"], plain.out, truth.out, dtype=rings.dtype, what=what)
    if correction:
        ledger.record("kbar", row["kbar"], plain.kbar, truth.kbar, dtype=rings.dtype, what=what)
    if rings.sketch is not None:
        _check_sketch(row["sketch"], row["sketch_scale"], sketch_image(rings.sketch, truth.q_pre), what)
    assert torch.equal(row["anchor"].long(), truth.anchor), f"{what}: anchor {row['anchor']}, not {truth.anchor}"


def check_untouched(session: Session, result: StepResult, before: dict[str, torch.Tensor]) -> None:
    """Only the rows of this step, in this layer, of rings that belong to the batch may have changed."""
    ring_of = session.rings.slot_table.cpu()
    for name, field in session.rings.fields.items():
        same = _same_bits(field, before[name]).cpu()
        same = same.flatten(3).all(-1) if same.dim() > 3 else same
        for request, t in zip(result.requests, result.positions, strict=True):
            if session.has_ring[request]:
                same[session.layer, ring_of[session.slots[request]], t % session.config.window] = True
        changed = (~same).nonzero().tolist()
        assert not changed, f"ring field {name} changed at (layer, ring, row) {changed[:4]}, not a row of this step"


def sketch_image(sketch: Sketch, q_pre: torch.Tensor) -> torch.Tensor:
    """Signed sums [Hkv, K] of the coordinates that the pool's sketch picks from each group's queries [Hq, D], fp64."""
    grouped = q_pre.double().reshape(-1, sketch.group_size * q_pre.shape[-1])
    index, sign = sketch.index.cpu().long(), sketch.sign.cpu().double()
    return torch.stack([(x[index] * sign).sum(0) for x in grouped])


def _check_sketch(codes: torch.Tensor, scale: torch.Tensor, image: torch.Tensor, what: str) -> None:
    """Compare stored codes [Hkv, K] and scales [Hkv] with the image [Hkv, K]: within one code and a 16-bit rounding."""
    largest = image.abs().amax(-1)
    stored = codes.double() * scale.double()[:, None]
    assert bool(((scale.double() * 127 - largest).abs() <= 0.01 * largest).all()), f"{what}: sketch scale {scale}"
    assert bool(((stored - image).abs() <= (0.01 + 1 / 127) * largest[:, None]).all()), f"{what}: sketch codes are off"


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a == b) | ((a != a) & (b != b))
