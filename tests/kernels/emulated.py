"""The CUDA kernels compiled for the CPU: the same sources over ``emulator.hpp``, launched like a kernel."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch

import mac_kernels.cuda
from mac_kernels.cuda.complete import CompleteArguments
from mac_kernels.cuda.front import FrontArguments
from mac_kernels.cuda.rest import RestArguments

_HERE = Path(__file__).parent
_SOURCES = Path(mac_kernels.cuda.__file__).parent
_ARGUMENTS = {"front.cu": FrontArguments, "rest.cu": RestArguments, "complete.cu": CompleteArguments}
AHEAD = -(2**31)  # rest.cu's bit of its tickets, as int32


@functools.cache
def library(source: str, definitions: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    folder, name = Path(tempfile.mkdtemp(prefix="mac-emulated-")), Path(source).stem
    subprocess.run(
        ["g++", "-std=c++20", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC", f"-I{_SOURCES}", f"-I{_HERE}",
         f'-DSOURCE="{source}"', f"-DKERNEL={name}", *(f"-D{name}={value}" for name, value in definitions),
         str(_HERE / "emulator.cpp"), "-o", str(folder / f"{name}.so")],
        check=True,
    )  # fmt: skip
    loaded = ctypes.CDLL(str(folder / f"{name}.so"))
    assert loaded.size_of_arguments() == ctypes.sizeof(_ARGUMENTS[source])
    return loaded


@contextlib.contextmanager
def known_with_the_wait(code: ctypes.CDLL, shown: torch.Tensor, then: torch.Tensor) -> Iterator[None]:
    """Every block finds ``shown`` as it is now until one of its threads has waited for the launch before."""
    before, size = shown.clone(), ctypes.c_size_t(then.nbytes)
    code.change(*(ctypes.c_void_p(x.data_ptr()) for x in (shown, before, then)), size)
    try:
        yield
    finally:
        code.change(None, None, None, ctypes.c_size_t(0))


class EmulatedKernel:
    """A kernel whose grid runs on this thread."""

    launches: ClassVar[Counter[str]] = Counter()

    def __init__(
        self, source: str, definitions: tuple[tuple[str, int], ...], blocks: int, device: torch.device
    ) -> None:
        del device
        self._source, self._library, self._blocks = source, library(source, definitions), blocks

    def launch(self, arguments: ctypes.Structure, order: Sequence[int] | None = None) -> None:
        """``order``: in which the blocks come, default by their index."""
        EmulatedKernel.launches[self._source] += 1
        blocks = None if order is None else (ctypes.c_int * self._blocks)(*order)
        assert self._library.run(ctypes.byref(arguments), self._blocks, blocks) == 0
