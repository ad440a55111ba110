"""The example of docs/compose.md runs as it stands."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

DOC = Path(__file__).parents[2] / "docs" / "compose.md"


def example() -> str:
    blocks: list[str] = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("flashinfer") is None, reason="needs FlashInfer (extra flashinfer)")
def test_example_runs() -> None:
    exec(compile(example(), str(DOC), "exec"), {})


def test_example_is_short() -> None:
    assert sum(bool(line.strip()) for line in example().splitlines()) <= 50
