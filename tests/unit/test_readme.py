"""The README says what the code does: generated tables, runnable examples, messages that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mac_cli.readme import with_generated_blocks

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_generated_tables_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert with_generated_blocks(README, ROOT) == README, "run: python -m mac_cli.readme README.md"


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_the_kernel_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = [block for block in PYTHON if "import mac_kernels" in block]
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["out"].shape == (1, 8, 64)
    printed = capsys.readouterr().out
    assert "backend" in printed and "'HIT'" in printed


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert links and not missing


def test_troubleshooting_quotes_messages_that_exist() -> None:
    sources = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("mac_kernels", "integrations")
        for path in (ROOT / folder).rglob("*.py")
    )
    table = README.partition("## Troubleshooting")[2].partition("\n\nAnything")[0]
    messages = re.findall(r"^\| `(.+?)` \|", table, flags=re.MULTILINE)
    fragments = [part.strip() for message in messages for part in message.split("…") if part.strip(" ()")]
    assert len(messages) >= 6
    assert [part for part in fragments if part not in sources] == []


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    documents = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", documents, flags=re.MULTILINE))
    assert {"demo", "test", "lint", "types"} <= named
    assert [name for name in sorted(named) if not re.search(rf"^{name}:", makefile, flags=re.MULTILINE)] == []
