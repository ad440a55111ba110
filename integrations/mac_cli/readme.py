"""The tables of the README that are generated from code: ``python -m mac_cli.readme README.md`` writes them in."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from mac_kernels.settings import ENVIRONMENT

from .demo import table_of
from .output import ExitCode
from .support import markdown_lines

DEMO_REPORT = Path("benchmarks/results/demo/report.json")


def generated_blocks(root: Path) -> dict[str, list[str]]:
    """Return the Markdown lines of every generated table by its name; ``root`` is the repository."""
    from mac_kernels.support import support_table

    return {
        "demo table": demo_lines(json.loads((root / DEMO_REPORT).read_text(encoding="utf-8"))),
        "support table": markdown_lines(support_table()),
        "environment": [
            "| variable | default | effect |",
            "|---|---|---|",
            *(f"| `{name}` | {variable.default} | {variable.effect} |" for name, variable in ENVIRONMENT.items()),
        ],
        "exit codes": [
            "| exit code | meaning |",
            "|---|---|",
            *(f"| {code.value} | {code.meaning} |" for code in ExitCode),
        ],
    }


def demo_lines(report: dict[str, Any]) -> list[str]:
    """Return the table of a demo report in Markdown, with what was decoded and where."""
    header, *lines = table_of(report)
    text, environment = report["text"], report["environment"]
    return [
        f"| {' | '.join(header)} |",
        f"|---|{'---:|' * (len(header) - 1)}",
        *(f"| {' | '.join(line)} |" for line in lines),
        "",
        f"`mac-kernels demo --output {DEMO_REPORT.parent}`: {report['model']['name']}, {text['decoded_tokens']} tokens "
        f"after a prompt of {text['prompt_tokens']:,}, {text['name']}; {environment['backend']} backend, "
        f"{environment['cpus']} CPU cores, torch {environment['torch']}.",
    ]


def with_generated_blocks(text: str, root: Path) -> str:
    """Return a text whose marked blocks are up to date.

    Raises
    ------
    ValueError
        If a block has no place in the text.
    """
    for name, lines in generated_blocks(root).items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if (count := len(re.findall(f"{begin}.*?{end}", text, flags=re.DOTALL))) != 1:
            raise ValueError(f"expected {begin} ... {end} once, found it {count} times")
        before, _, rest = text.partition(begin)
        text = before + "\n".join((begin, *lines, end)) + rest.partition(end)[2]
    return text


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(
            with_generated_blocks(path.read_text(encoding="utf-8"), path.resolve().parent), encoding="utf-8"
        )
