"""Who may import whom, read from the source: the direction of the whole project in one table."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {
    "mac_kernels": ROOT / "mac_kernels",
    "mac_transformers": ROOT / "integrations" / "mac_transformers",
    "mac_sglang": ROOT / "integrations" / "mac_sglang",
    "mac_cli": ROOT / "integrations" / "mac_cli",
    "mac_autotune": ROOT / "autotune" / "mac_autotune",
}
MAY_IMPORT = {
    "mac_kernels": set(),
    "mac_transformers": {"mac_kernels"},
    "mac_sglang": {"mac_kernels"},
    "mac_autotune": {"mac_kernels", "mac_transformers"},
    "mac_cli": {"mac_kernels", "mac_transformers", "mac_sglang", "mac_autotune"},
}
# the command shows results; the library and its integrations compute them
MAY_NOT_IMPORT = {
    "mac_kernels": {"sglang", "optuna", "transformers", "typer", "rich", "matplotlib", "huggingface_hub", "gguf"},
    "mac_transformers": {"sglang", "optuna", "typer"},
    "mac_sglang": {"transformers", "optuna", "typer"},
    "mac_autotune": {"sglang"},
    "mac_cli": {"sglang", "optuna", "transformers", "flashinfer"},
}


def imports(tree: ast.AST) -> Iterator[str]:
    """Top-level names of everything that is imported anywhere below a node; relative imports stay inside."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def sources(package: str) -> list[Path]:
    return sorted(OURS[package].rglob("*.py"))


@pytest.mark.parametrize("package", OURS)
def test_package_imports_only_what_lies_below_it(package: str) -> None:
    forbidden = (set(OURS) - {package} - MAY_IMPORT[package]) | MAY_NOT_IMPORT[package]
    found = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imports(ast.parse(path.read_text(encoding="utf-8")))
        if name in forbidden
    }
    assert not found, "\n".join(sorted(found))


@pytest.mark.parametrize("package", ["mac_kernels", "mac_transformers", "mac_cli"])
def test_package_is_where_the_test_looks(package: str) -> None:
    assert sources(package)


def test_relative_imports_stay_in_their_package() -> None:
    for package, folder in OURS.items():
        for path in sources(package):
            depth = len(path.relative_to(folder).parts)
            tree = ast.parse(path.read_text(encoding="utf-8"))
            levels = [node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
            assert max(levels, default=0) <= depth, f"{path.relative_to(ROOT)} climbs out of {package}"
