"""Files and functions stay small enough to be read at one sitting."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("mac_kernels", "integrations", "autotune", "tests", "benchmarks")
MAX_FILE, MAX_FUNCTION, MAX_KERNEL, MAX_POSITIONAL = 400, 80, 150, 6

# "path" or "path::function" -> why it is longer; an entry that is no longer needed fails the test
ALLOWED: dict[str, str] = {
    "integrations/mac_sglang/backend.py::forward_decode": "SGLang's signature",
    "integrations/mac_sglang/backend.py::forward_extend": "SGLang's signature",
}


def files() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring: documentation is not what makes it hard to read."""
    docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
    return node.end_lineno - node.lineno + 1 - docstring


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def too_large() -> dict[str, str]:
    found = {}
    for path in files():
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
        lines = text.count("\n")
        if lines > MAX_FILE:
            found[name] = f"{lines} lines, at most {MAX_FILE}"
        for node in functions(ast.parse(text)):
            kernel = is_kernel(node)
            limit = MAX_KERNEL if kernel else MAX_FUNCTION
            if code_lines(node) > limit:
                found[f"{name}::{node.name}"] = f"{code_lines(node)} lines of code, at most {limit}"
            positional = len(node.args.posonlyargs) + len(node.args.args)
            if not kernel and not node.name.startswith("_") and positional > MAX_POSITIONAL:
                found[f"{name}::{node.name}"] = (
                    f"{positional} positional parameters, at most {MAX_POSITIONAL}; make some keyword-only"
                )
    return found


def test_sizes_are_within_the_limits() -> None:
    found = too_large()
    unexplained = [f"{where}: {what}" for where, what in found.items() if where not in ALLOWED]
    assert not unexplained, "\n".join(unexplained)
    assert set(ALLOWED) <= set(found), f"no longer needed: {sorted(set(ALLOWED) - set(found))}"
