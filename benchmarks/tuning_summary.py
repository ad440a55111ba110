"""Gains of tuned launch parameters by layout and hit rate: ``python -m benchmarks.tuning_summary TABLE``."""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import results

HIT_RATES = (1.0, 0.9, 0.5, 0.0)
HEAD = (
    "| heads x dims | tuned buckets | hit 1 | .9 | .5 | 0 | all | worst hit rate | to the best drawn |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)
_LAYOUT = ("hq", "hkv", "head_dim")
_BUCKET = ("batch", "context")


@dataclass(frozen=True, slots=True)
class Measured:
    """A bucket: what ships relative to the default, by hit rate and in all, and to the best of the random search."""

    layout: tuple[int, int, int]
    batch: int
    context: int
    ratios: dict[float, float]
    ratio: float
    to_random: float


def measured(rows: Sequence[results.Row]) -> list[Measured]:
    """The buckets of a table, layouts in the order of their heads."""
    cases: dict[tuple[int, ...], dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["metric"] == "ratio":
            key = tuple(int(row[name]) for name in (*_LAYOUT, *_BUCKET))
            cases.setdefault(key, {}).setdefault(row["case"], {})[row["hit_rate"]] = float(row["p50"])
    found = []
    for (hq, hkv, dim, batch, context), by_case in sorted(cases.items()):
        shipped, best = by_case["tuned"], next(one for name, one in by_case.items() if re.match(r"random \d+$", name))
        ratios = {float(hit): ratio for hit, ratio in shipped.items() if hit != "all"}
        found.append(Measured((hq, hkv, dim), batch, context, ratios, shipped["all"], shipped["all"] / best["all"]))
    return found


def table(buckets: Sequence[Measured]) -> str:
    """One line per layout: geometric means over its buckets, then the worst hit rate and bucket."""
    lines = [HEAD]
    for layout in dict.fromkeys(one.layout for one in buckets):
        own = [one for one in buckets if one.layout == layout]
        by_hit = [_mean([_nearest(one.ratios, hit) for one in own]) for hit in HIT_RATES]
        cells = [*by_hit, _mean([one.ratio for one in own]), max(r for one in own for r in one.ratios.values())]
        cells.append(max(one.to_random for one in own))
        tuned = sum(one.ratio != 1 for one in own)
        numbers = " | ".join(f"{cell:.3f}".removeprefix("0") for cell in cells)
        lines.append("| {}/{} x {} | {} of {} | {} |".format(*layout, tuned, len(own), numbers))
    return "\n".join(lines)


def _mean(ratios: Sequence[float]) -> float:
    return statistics.geometric_mean(ratios)


def _nearest(ratios: dict[float, float], hit: float) -> float:
    """Of one or two kv groups not every share can hit."""
    return ratios[min(ratios, key=lambda one: abs(one - hit))]


if __name__ == "__main__":
    print(table(measured(results.read(Path(sys.argv[1])))))
