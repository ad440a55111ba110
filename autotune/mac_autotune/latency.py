"""Expected latency of a decode step under a policy: from timings of the target GPU, or from bytes and launches."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mac_kernels import HeadLayout, InputError, MacConfig
from mac_kernels.match.sketch import default_sketch_dim
from mac_kernels.tuned import KernelFile

PLANTED_LAG = 64
"""Tokens between a query and its row wherever hits are planted for timing."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Read bandwidth, and the time of a step that reads next to nothing (launches)."""

    bytes_per_us: float
    launch_us: float


GPUS = {"NVIDIA H100 80GB HBM3": Gpu(bytes_per_us=3.06e6, launch_us=14.0)}
"""What the estimate rests on: measured with a 1 GiB sum, and as an all-hit step at batch 1 (the benchmark table)."""


@dataclass(frozen=True, slots=True)
class Reads:
    """What a policy reads: share of kv groups that hit, and the KV tokens that a hit still reads."""

    hit: float
    tokens_on_hit: float


@dataclass(frozen=True, slots=True)
class Curve:
    """Measured latency in us over the hit rate (rising), at one batch and context, under one window and band."""

    batch: int
    context: int
    window: int
    band: int
    points: tuple[tuple[float, float], ...]

    def at(self, hit: float) -> float:
        """Latency between the measured hit rates."""
        (x0, y0), *rest = self.points
        for x1, y1 in rest:
            if hit <= x1:
                return y0 + (y1 - y0) * (hit - x0) / (x1 - x0)
            x0, y0 = x1, y1
        return y0


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Expected latency of one layer's step by bucket (batch, context).

    With ``curves`` a policy is placed by its hit rate on the one whose window and band are nearest to its own, and what
    it reads more or less than the measured config is added at the GPU's bandwidth. Without, all is bytes over bandwidth
    plus launches.
    """

    layout: HeadLayout
    gpu: Gpu
    buckets: tuple[tuple[int, int], ...]
    curves: tuple[Curve, ...] = ()
    itemsize: int = 2

    @property
    def basis(self) -> str:
        """``"measured"`` or ``"estimated"``."""
        return "measured" if self.curves else "estimated"

    def step_us(self, config: MacConfig, reads: Reads, batch: int, context: int) -> float:
        """Expected latency of one step of one layer."""
        total = self._bytes(config, reads, batch, context)
        curves = [curve for curve in self.curves if (curve.batch, curve.context) == (batch, context)]
        if not curves:
            return self.gpu.launch_us + total / self.gpu.bytes_per_us
        curve = min(curves, key=lambda c: _octaves(c.window, config.window) + _octaves(c.band, config.band))
        measured = MacConfig(window=curve.window, band=curve.band)
        planted = Reads(reads.hit, PLANTED_LAG + curve.band + measured.sinks)
        more = total - self._bytes(measured, planted, batch, context)
        return max(curve.at(reads.hit) + more / self.gpu.bytes_per_us, 1.0)

    def ratio(self, config: MacConfig, reads: Reads, base: MacConfig, base_reads: Reads) -> float:
        """Latency relative to another policy's, geometric mean over the buckets."""
        logs = [
            math.log(self.step_us(config, reads, *bucket) / self.step_us(base, base_reads, *bucket))
            for bucket in self.buckets
        ]
        return math.exp(sum(logs) / len(logs))

    def _bytes(self, config: MacConfig, reads: Reads, batch: int, context: int) -> float:
        """Bytes of one step: KV, ring scan, exact distances, reused state and new row."""
        layout, item = self.layout, self.itemsize
        on_hit = reads.tokens_on_hit if reads.hit > 0 else 0.0
        tokens = reads.hit * min(on_hit, context) + (1 - reads.hit) * context
        row = layout.group_size * layout.head_dim * item
        # a row of the sketch: one byte per code, scale and position; every nominee is read whole
        scan = config.window * (default_sketch_dim(layout) + 8) + (config.nominees or config.window) * row
        return batch * layout.num_kv_heads * (tokens * 2 * layout.head_dim * item + scan + 5 * row)


def _octaves(a: int, b: int) -> float:
    return abs(math.log2(a / b))


def curves_of(file: KernelFile) -> tuple[Curve, ...]:
    """The curves that a tuned kernel file carries."""
    return tuple(
        Curve(bucket.batch, bucket.context, file.window, file.band, bucket.curve(file.key.num_kv_heads))
        for bucket in file.buckets
    )


def curves_in(table: Path, layout: HeadLayout) -> tuple[Curve, ...]:
    """The curves of a layout in a benchmark table (``benchmarks/results/<gpu>/decode.csv`` or ``policy.csv``).

    Rows of the Triton backend under ``careful``, as far as its window and band are not others.

    Raises
    ------
    InputError
        If the file is no such table.
    """
    wanted = {
        "provider": "mac",
        "backend": "triton",
        "config": "careful",
        "metric": "latency",
        "lag": str(PLANTED_LAG),
        "miss_pattern": "scattered",
        "hq": str(layout.num_qo_heads),
        "hkv": str(layout.num_kv_heads),
        "head_dim": str(layout.head_dim),
    }
    try:
        with table.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if wanted.items() <= row.items()]
        points: dict[tuple[int, int, int, int], dict[float, float]] = {}
        for row in rows:
            key = (int(row["batch"]), int(row["context"]), int(row["window"]), int(row["band"]))
            points.setdefault(key, {})[float(row["hit_rate"])] = float(row["p50"])
    except (OSError, KeyError, ValueError, UnicodeDecodeError) as error:
        raise InputError(
            f"--timings {table}: cannot be read ({error!r}); give the decode.csv of `python -m benchmarks.run`"
        ) from None
    return tuple(Curve(*key, tuple(sorted(found.items()))) for key, found in sorted(points.items()))


def latency_model(
    layout: HeadLayout, gpu: str, curves: Sequence[Curve], buckets: Sequence[tuple[int, int]]
) -> LatencyModel:
    """The model for a GPU: measured where curves with hit rates from 0 to 1 are given, otherwise estimated.

    Raises
    ------
    InputError
        If the GPU's bandwidth is not known.
    """
    if gpu not in GPUS:
        raise InputError(f"gpu={gpu!r} has no entry in the latency model; known: {', '.join(GPUS)}")
    whole = tuple(curve for curve in curves if curve.points[0][0] == 0 and curve.points[-1][0] == 1)
    if whole:
        return LatencyModel(layout, GPUS[gpu], tuple(dict.fromkeys((c.batch, c.context) for c in whole)), whole)
    return LatencyModel(layout, GPUS[gpu], tuple(buckets))
