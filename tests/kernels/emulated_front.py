"""The CUDA front compiled for the CPU: the same sources over ``emulator.hpp``, launched like a kernel."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import torch

import mac_kernels.cuda
from mac_kernels.cuda.front import FrontArguments

_HERE = Path(__file__).parent
_SOURCES = Path(mac_kernels.cuda.__file__).parent


@functools.cache
def library(definitions: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(prefix="mac-front-"))
    subprocess.run(
        ["g++", "-std=c++20", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC", f"-I{_SOURCES}", f"-I{_HERE}",
         *(f"-D{name}={value}" for name, value in definitions), str(_HERE / "emulator.cpp"),
         "-o", str(folder / "front.so")],
        check=True,
    )  # fmt: skip
    loaded = ctypes.CDLL(str(folder / "front.so"))
    assert loaded.size_of_arguments() == ctypes.sizeof(FrontArguments)
    return loaded


class EmulatedKernel:
    """A kernel whose grid runs on this thread."""

    launches = 0

    def __init__(self, definitions: tuple[tuple[str, int], ...], groups: int, device: torch.device) -> None:
        del device
        self._library, self._blocks = library(definitions), groups * dict(definitions)["CLUSTER"]

    def launch(self, arguments: ctypes.Structure) -> None:
        EmulatedKernel.launches += 1
        self._library.run(ctypes.byref(arguments), self._blocks)
