"""Redraw the figures of the README from the committed results: ``make figures``."""

from __future__ import annotations

import json
from pathlib import Path

from mac_transformers.demo_figure import draw
from mac_transformers.outdir import OutputFolder

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    for path in sorted(RESULTS.glob("demo*/report.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        print(OutputFolder(path.parent).write("report.png", draw(report)))


if __name__ == "__main__":
    main()
