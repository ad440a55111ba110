"""The ring: recent pre-RoPE queries and the states computed for them, tagged so that a stale row never matches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .bypass import Bypass
from .config import MacConfig
from .counters import DecodeCounters
from .errors import ConfigError, InputError, SnapshotError
from .handles import register
from .match.accept import check_tables
from .match.sketch import Sketch, default_sketch_dim, dequantize, make_sketch
from .slots import EMPTY, SlotTable
from .snapshot import SNAPSHOT_VERSION, RingSnapshot, check_fields, row_fields
from .types import AttnState, HeadLayout

if TYPE_CHECKING:
    from .tca.index import MissIndex

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class RingRows:
    """The rows of a batch in one layer, as matching reads them (fp32).

    ``q_pre`` [B, W, Hq, D]; ``lse2`` [B, W, Hq]; ``pos`` [B, W] int64, -1 everywhere for a request without a ring;
    ``anchor`` [B, W, Hkv] int64; ``sketch`` [B, W, Hkv, K] and the ``projection`` that made it, or ``None`` in a pool
    without sketch.
    """

    q_pre: torch.Tensor
    lse2: torch.Tensor
    pos: torch.Tensor
    anchor: torch.Tensor
    sketch: torch.Tensor | None
    projection: Sketch | None


class RingPool:
    """A fixed pool of rings and the device table from request slot to ring.

    A ring belongs to one (slot, generation) at a time. A request without a ring (table entry -1, or another
    generation) is computed exactly and stores nothing.

    Parameters
    ----------
    num_rings, num_layers : int
        Rings in the pool and attention layers, each ``>= 1``.
    layout : HeadLayout
        Heads of this rank.
    window : int, rows
        ``W >= 2``; must equal the config's window.
    num_slots : int, optional
        Request slots, default ``num_rings``.
    dtype : torch.dtype, default torch.bfloat16
        Of the stored query, output and mean key; fp32, bf16 or fp16. Log-sum-exps are fp32.
    correction : bool, default True
        Store the mean key that the first-order correction needs.
    sketch_dim : int, optional
        8-bit numbers of the sketch per row and kv head (plus one fp32 scale), a multiple or a divisor of the head dim.
        Default: the largest of at most 128. 0: no sketch (the config's ``nominees`` must then be ``None``).
    index : MissIndex, optional
        What missed groups read (``MacConfig.tca``). Rows then tell which selection their states were read with.
    device : torch.device or str, default "cpu"

    Raises
    ------
    ConfigError, InputError
        If a count is out of range, the dtype is not supported, or the index is not for such a pool.

    Notes
    -----
    ``slot_table``, ``ring_generation``, the row fields and the counters are device tensors that may change between
    replays of a CUDA graph; their addresses never do.
    """

    def __init__(
        self,
        *,
        num_rings: int,
        num_layers: int,
        layout: HeadLayout,
        window: int,
        num_slots: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        correction: bool = True,
        sketch_dim: int | None = None,
        index: MissIndex | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        num_slots = num_rings if num_slots is None else num_slots
        sketch_dim = default_sketch_dim(layout) if sketch_dim is None else sketch_dim
        for name, value, least in (
            ("num_rings", num_rings, 1),
            ("num_layers", num_layers, 1),
            ("num_slots", num_slots, 1),
            ("window", window, 2),
            ("sketch_dim", sketch_dim, 0),
        ):
            if value < least:
                raise ConfigError(f"{name}={value} must be >= {least}; choose a larger value")
        if dtype not in ROW_DTYPES:
            raise InputError(f"ring dtype {dtype} is not one of {', '.join(map(str, ROW_DTYPES))}; use torch.bfloat16")
        self.num_rings, self.num_layers, self.num_slots = num_rings, num_layers, num_slots
        self.layout, self.window, self.dtype = layout, window, dtype
        self.correction, self.sketch_dim = correction, sketch_dim
        self.device = torch.device(device)
        self.fields = {
            name: torch.zeros(num_layers, num_rings, *shape, dtype=kind, device=self.device)
            for name, (shape, kind) in row_fields(
                layout, window, dtype, correction, sketch_dim, index is not None
            ).items()
        }
        if index is not None:
            index.check_fits(num_layers, num_rings, layout.num_kv_heads, self.fields["pos"].device)
        self.index = index
        self._slots = SlotTable(num_slots, num_rings, self.device)
        self.slot_table = self._slots.table
        self.ring_generation = torch.zeros(num_rings, dtype=torch.int64, device=self.device)
        self.sketch: Sketch | None = make_sketch(layout, sketch_dim, device=self.device) if sketch_dim else None
        self.counters = DecodeCounters(num_layers, self.device)
        self.bypass = Bypass(num_layers, self.device)
        self.number = register(self)
        self.reset()

    @classmethod
    def from_budget(
        cls, budget_bytes: int, *, num_layers: int, layout: HeadLayout, window: int, **options: Any
    ) -> RingPool:
        """Build a pool of as many rings as a budget holds; ``options`` as for the constructor.

        Raises
        ------
        ConfigError
            If the budget holds no ring; the message says what one takes.
        """
        fields = {name: options[name] for name in ("dtype", "correction", "sketch_dim") if name in options}
        each = cls.bytes_per_ring(num_layers=num_layers, layout=layout, window=window, **fields)
        if budget_bytes < each:
            raise ConfigError(
                f"a ring budget of {budget_bytes} bytes holds no ring: one takes {each} bytes; "
                "raise the budget, or lower the window"
            )
        return cls(num_rings=budget_bytes // each, num_layers=num_layers, layout=layout, window=window, **options)

    @staticmethod
    def bytes_per_ring(
        *,
        num_layers: int,
        layout: HeadLayout,
        window: int,
        dtype: torch.dtype = torch.bfloat16,
        correction: bool = True,
        sketch_dim: int | None = None,
    ) -> int:
        """Bytes that one ring takes over all layers; a budget divided by this is the number of rings."""
        sketch_dim = default_sketch_dim(layout) if sketch_dim is None else sketch_dim
        fields = row_fields(layout, window, dtype, correction, sketch_dim).values()
        return num_layers * sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in fields)

    @property
    def nbytes(self) -> int:
        """Bytes of all rings (without the slot table and the counters)."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.fields.values())

    @property
    def free_rings(self) -> int:
        """Rings that no slot holds."""
        return self._slots.free

    def holds(self, slot: int) -> bool:
        """Whether the slot, which must be in range, holds a ring."""
        return self._slots.place_of(slot) != EMPTY

    def acquire(self, slot: int, generation: int = 0) -> int:
        """Give the slot an empty ring (its own again, emptied, if it has one) and return it; -1 if none is free.

        Raises
        ------
        InputError
            If the slot is out of range.
        """
        ring = self._slots.acquire(slot)
        if ring != EMPTY:
            self.fields["pos"][:, ring] = EMPTY
            if self.index is not None:
                self.index.forget(ring)
            self.ring_generation[ring].fill_(generation)  # an item assignment would wait for the device
        return ring

    def release(self, slot: int) -> None:
        """Take the slot's ring back; does nothing if it holds none.

        Raises
        ------
        InputError
            If the slot is out of range.
        """
        self._slots.release(slot)

    def reset(self) -> None:
        """Empty every row and release every slot (after weight updates, LoRA changes, graph warm-up)."""
        self.fields["pos"].fill_(EMPTY)
        self._slots.reset()
        if self.index is not None:
            self.index.selected.fill_(EMPTY)
        self.bypass.values.zero_()

    def lookup(self, slots: torch.Tensor, generations: torch.Tensor) -> torch.Tensor:
        """Ring of every request, [B] int64 on the device; -1 without a ring or with another generation."""
        known = (slots >= 0) & (slots < self.num_slots)
        ring = self.slot_table[torch.where(known, slots, 0).long()].long()
        owned = known & (ring >= 0) & (self.ring_generation[ring.clamp(min=0)] == generations)
        return torch.where(owned, ring, EMPTY)

    def rows(self, layer: int, rings: torch.Tensor) -> RingRows:
        """Read what matching needs of the given rings [B] (-1: none) in one layer."""
        index = rings.clamp(min=0)
        at = {name: tensor[layer, index] for name, tensor in self.fields.items() if name not in ("out", "kbar")}
        present = (rings >= 0)[:, None]
        sketch = dequantize(at["sketch"], at["sketch_scale"]) if self.sketch_dim else None
        return RingRows(
            q_pre=at["q_pre"].float(),
            lse2=at["lse2"],
            pos=torch.where(present, at["pos"].long(), EMPTY),
            anchor=at["anchor"].long(),
            sketch=sketch,
            projection=self.sketch,
        )

    def state(self, layer: int, rings: torch.Tensor, row: torch.Tensor) -> AttnState:
        """Read the stored state of ``row`` [B, Hq] (-1: the empty state), fp32."""
        num_heads = self.layout.num_qo_heads
        index = (layer, rings.clamp(min=0)[:, None], row.clamp(min=0), torch.arange(num_heads, device=row.device))
        found = (row >= 0) & (rings >= 0)[:, None]
        lse2 = torch.where(found, self.fields["lse2"][index], -torch.inf)
        out = torch.where(found[..., None], self.fields["out"][index].float(), 0.0)
        if not self.correction:
            return AttnState(out, lse2)
        return AttnState(out, lse2, torch.where(found[..., None], self.fields["kbar"][index].float(), 0.0))

    def write(
        self,
        layer: int,
        rings: torch.Tensor,
        position: torch.Tensor,
        *,
        q_pre: torch.Tensor,
        state: AttnState,
        anchor: torch.Tensor,
        seen: torch.Tensor | None = None,
    ) -> None:
        """Store one row per entry at ``position % W``; entries with ring -1 are skipped.

        ``rings``, ``position`` [N] int64; ``q_pre`` [N, Hq, D]; ``state`` with leading dim N, its ``kbar`` in the
        pre-RoPE frame of the position; ``anchor`` [N, Hkv] int64; ``seen`` [N, Hq] int64, position of the query that
        selected what the state was read with, -1 (default) for everything.
        """
        keep = rings >= 0
        rings, position = rings[keep], position[keep]
        index = (layer, rings, position % self.window)
        values = {
            "q_pre": q_pre[keep],
            "out": state.out[keep],
            "lse2": state.lse2[keep],
            "pos": position,
            "anchor": anchor[keep],
        }
        if self.correction:
            if state.kbar is None:
                raise InputError("the ring stores mean keys but the state has none; compute it with return_kbar=True")
            values["kbar"] = state.kbar[keep]
        if self.index is not None:
            values["seen"] = torch.full_like(state.lse2[keep], EMPTY) if seen is None else seen[keep]
        if self.sketch is not None:
            values["sketch"], values["sketch_scale"] = self.sketch.of(q_pre[keep])
        for name, value in values.items():
            field = self.fields[name]
            field[index] = value.to(field.dtype)

    def snapshot(self, slot: int, *, up_to: int | None = None) -> RingSnapshot:
        """Copy the slot's ring; rows at positions ``>= up_to`` are left out.

        Raises
        ------
        SnapshotError
            If the slot holds no ring.
        """
        fields = {name: torch.empty_like(tensor[:, 0]) for name, tensor in self.fields.items()}
        self.copy_out(slot, fields, up_to=up_to)
        return RingSnapshot(SNAPSHOT_VERSION, self.layout, self.window, fields)

    def restore(self, slot: int, snapshot: RingSnapshot, *, generation: int = 0, up_to: int | None = None) -> int:
        """Give the slot a ring filled from a snapshot; rows at positions ``>= up_to`` stay empty. -1 if none is free.

        Raises
        ------
        SnapshotError
            If the snapshot has another format version, layout, window, or other row fields; nothing is changed then.
        """
        problems = [
            f"{what} {have!r}, this pool needs {need!r}"
            for what, have, need in (
                ("format version", snapshot.version, SNAPSHOT_VERSION),
                ("layout", snapshot.layout, self.layout),
                ("window", snapshot.window, self.window),
            )
            if have != need
        ]
        check_fields(snapshot.fields, self.fields, problems)
        ring = self.acquire(slot, generation)
        if ring != EMPTY:
            self.copy_in(slot, snapshot.fields, up_to=up_to)
        return ring

    def copy_out(self, slot: int, fields: Mapping[str, torch.Tensor], *, up_to: int | None = None) -> None:
        """Copy the slot's ring into given tensors (see :attr:`RingSnapshot.fields`); rows ``>= up_to`` are left out.

        Raises
        ------
        SnapshotError
            If the slot holds no ring or the tensors have other shapes or dtypes.
        """
        ring = self._held(slot)
        check_fields(fields, self.fields)
        for name, tensor in self.fields.items():
            fields[name].copy_(tensor[:, ring])
        _cut(fields["pos"], up_to)

    def copy_in(self, slot: int, fields: Mapping[str, torch.Tensor], *, up_to: int | None = None) -> None:
        """Fill the slot's ring from tensors that :meth:`copy_out` filled; rows ``>= up_to`` become empty.

        Raises
        ------
        SnapshotError
            As for :meth:`copy_out`.
        """
        ring = self._held(slot)
        check_fields(fields, self.fields)
        for name, tensor in self.fields.items():
            tensor[:, ring].copy_(fields[name])
        _cut(self.fields["pos"][:, ring], up_to)

    def check_fits(self, layer: int, layout: HeadLayout, config: MacConfig) -> None:
        """Check that the pool fits a layer, a head layout and a config.

        Raises
        ------
        InputError
            If the layout, the window, the layer or the stored fields do not fit.
        """
        if self.layout != layout:
            raise InputError(
                f"rings were built for {self.layout}, the plan has {layout}; build a RingPool for this one"
            )
        if self.window != config.window:
            raise InputError(
                f"rings have window {self.window}, the config has window={config.window}; build the RingPool with it"
            )
        if not 0 <= layer < self.num_layers:
            raise InputError(f"layer={layer} is out of range [0, {self.num_layers - 1}] of the rings; check num_layers")
        check_tables(config, layout, self.num_layers)
        if config.correction and not self.correction:
            raise InputError(
                "the config corrects reused states but the rings store no mean key; build RingPool(correction=True)"
            )
        if config.nominees is not None and not self.sketch_dim:
            raise InputError(
                f"the config nominates {config.nominees} rows but the rings have no sketch; "
                "build the RingPool with the default sketch_dim, or set nominees=None"
            )
        if config.tca != (None if self.index is None else self.index.config):
            raise InputError(
                "config.tca and the rings' index disagree; build RingPool(index=MissIndex(..., config=config.tca))"
            )

    def _held(self, slot: int) -> int:
        ring = self._slots.place_of(slot)
        if ring == EMPTY:
            raise SnapshotError(f"slot {slot} holds no ring; acquire one before taking a snapshot")
        return ring


def _cut(pos: torch.Tensor, up_to: int | None) -> None:
    if up_to is not None:
        pos.masked_fill_(pos >= up_to, EMPTY)
