"""The launch shortcut: the same arguments in the same order as Triton's own path, and only where it holds."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

from mac_kernels.fused import _Launch


class Kernel:
    """Records what it is launched with; like Triton's, the first launch returns the compiled kernel."""

    def __init__(self, *, interpreted: bool = False) -> None:
        self.slow: list[Any] = []
        self.fast: list[Any] = []
        self.interpreted = interpreted

    def __getitem__(self, grid: tuple[int, int, int]):
        def launch(*args: Any, **kwargs: Any) -> Any:
            self.slow.append((grid, args, kwargs))
            return None if self.interpreted else Compiled(self)

        return launch


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]):
        return lambda *args: self.kernel.fast.append((grid, args))


def test_later_launches_take_the_compiled_kernel():
    kernel = Kernel()
    launch = _Launch(kernel, 7, {"ring": "r", "BLOCK": 16}, {"num_warps": 4})
    launch("q1", 3, aligned=True)
    launch("q2", 3, aligned=True)
    assert kernel.slow == [((7, 1, 1), ("q1", 3), {"ring": "r", "BLOCK": 16, "num_warps": 4})]
    assert kernel.fast == [((7, 1, 1), ("q2", 3, "r", 16))]


def test_an_unaligned_pointer_takes_the_long_way_and_is_not_remembered():
    kernel = Kernel()
    launch = _Launch(kernel, 1, {}, {})
    for aligned in (False, False, True, False, True):
        launch("q", aligned=aligned)
    assert len(kernel.slow) == 4 and len(kernel.fast) == 1


def test_the_interpreter_compiles_nothing():
    kernel = Kernel(interpreted=True)
    launch = _Launch(kernel, 1, {}, {})
    launch("q", aligned=True)
    launch("q", aligned=True)
    assert len(kernel.slow) == 2 and not kernel.fast
