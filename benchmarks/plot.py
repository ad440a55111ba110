"""Draw the README's figures from the committed results: ``python -m benchmarks.plot`` or ``make figures``."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from mac_transformers import demo_figure
from mac_transformers.outdir import OutputFolder

from . import results

_DRAWN = ("triton", "careful")
_BESIDE = results.beside(*_DRAWN)
_COLOURS = ("#777777", "#3b7dd8", "#d8573b")


def speedups(rows: list[results.Row], context: str) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Points (hit rate, speedup of p50 latency) by (heads per kv head, batch); scattered misses, lag 64.

    The baseline is that of the row's own run; a row without one is left out.
    """
    wanted = {"metric": "latency", "context": context, "lag": "64", "miss_pattern": "scattered"}
    mac: dict[tuple[str, ...], float] = {}
    full: dict[tuple[str, ...], float] = {}
    for row in rows:
        if not wanted.items() <= row.items():
            continue
        group = str(int(row["hq"]) // int(row["hkv"]))
        shape, p50 = (group, row["batch"], row["hit_rate"], row["commit"]), float(row["p50"])
        if (row["provider"], row["config"]) == ("flashinfer-tc", _BESIDE):
            full[shape] = p50
        elif (row["backend"], row["config"]) == _DRAWN:
            mac[shape] = p50
    points = defaultdict(list)
    for shape, ours in mac.items():
        if shape in full:
            points[shape[:2]].append((float(shape[2]), full[shape] / ours))
    return {key: sorted(values) for key, values in points.items()}


def draw(path: Path, context: str = "126976") -> Figure:
    """One panel per group size, one line per batch; the line at 1 is FlashInfer with tensor cores."""
    points = speedups(results.read(path), context)
    groups = sorted({group for group, _ in points}, key=int)
    rates = sorted({hit for values in points.values() for hit, _ in values})
    figure = Figure(figsize=(4.6 * len(groups), 3.8), layout="constrained")
    for column, group in enumerate(groups):
        axes = figure.add_subplot(1, len(groups), column + 1)
        lines = sorted((int(batch), values) for (of, batch), values in points.items() if of == group)
        for line, (batch, values) in enumerate(lines):
            places = [rates.index(hit) for hit, _ in values]
            colour = _COLOURS[line % len(_COLOURS)]
            axes.plot(places, [y for _, y in values], marker="o", color=colour, label=f"batch {batch}")
            # hit 0 is where this can lose: its figures are written out, one below the other
            for hit, offset, text in ((1.0, (0, 6), "{:.3g}x"), (0.0, (0, -14 - 10 * line), "{:.2f}x")):
                if hit in dict(values):
                    y = dict(values)[hit]
                    axes.annotate(
                        text.format(y), (rates.index(hit), y), offset, textcoords="offset points", ha="center", size=8,
                        color=colour,
                    )  # fmt: skip
        axes.set_xticks(range(len(rates)), [f"{hit:g}" for hit in rates])
        axes.set_ylim(bottom=0.4)
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
        axes.set_yscale("log")
        axes.set_xlabel("hit rate of kv groups (scattered misses)")
        axes.set_ylabel("speedup over FlashInfer (tensor cores)")
        axes.set_title(f"{group} query heads per kv head, {int(context) // 1024}K tokens", size=10)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    return figure


def main() -> None:
    """Draw one figure beside every decode table and every demo report."""
    for path in sorted(results.RESULTS.glob("*/decode.csv")):
        target = path.with_suffix(".png")
        draw(path).savefig(target, dpi=130)
        print(target)
    for path in sorted(results.RESULTS.glob("demo*/report.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        print(OutputFolder(path.parent).write("report.png", demo_figure.draw(report)))


if __name__ == "__main__":
    main()
