"""CUDA C++ of this package to kernels: NVRTC at first use, the result kept on disk, launches by the driver API."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from ..files import write_whole

_FOLDER = Path(__file__).parent
_SHARED_UNIT = 16  # bytes; the sources tell their shared memory as the size of an array, one entry a unit


class CudaError(RuntimeError):
    """NVRTC or the driver refused; the message holds what it said."""


class Kernel(Protocol):
    """A compiled kernel with its launch configuration."""

    def launch(self, arguments: ctypes.Structure) -> None:
        """Launch on the current stream with the one struct that the kernel takes, copied by the driver."""
        ...


@functools.cache
def missing() -> str | None:
    """Why nothing can be compiled here, ``None`` if it can."""
    try:
        from cuda.bindings import nvrtc

        checked(nvrtc.nvrtcVersion())
    except ImportError as error:
        return f"cuda.bindings cannot be imported ({error}; pip install cuda-bindings)"
    except RuntimeError as error:
        return f"NVRTC cannot be loaded ({error})"
    return None


def checked(result: tuple[Any, ...]) -> Any:
    """What a call of ``cuda.bindings`` returns beside its status.

    Raises
    ------
    CudaError
        If the status is not success.
    """
    status, *values = result
    if status.value != 0:
        raise CudaError(f"CUDA: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


@functools.lru_cache(maxsize=256)
def compiled(source: str, definitions: tuple[tuple[str, int], ...], arch: str) -> bytes:
    """Machine code of ``source`` with constants defined, from the cache or by NVRTC.

    Raises
    ------
    CudaError
        If it does not compile; the message holds NVRTC's log.
    """
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture={arch}", "-std=c++17", *(f"-D{name}={value}" for name, value in definitions)]
    texts = {path.name: path.read_bytes() for path in sorted(_FOLDER.iterdir()) if path.suffix in (".cu", ".cuh")}
    version = checked(nvrtc.nvrtcVersion())
    key = hashlib.sha256(repr((source, sorted(texts.items()), options, version)).encode()).hexdigest()
    kept = _cache_folder() / f"{Path(source).stem}-{key[:32]}.cubin"
    if kept.exists():
        return kept.read_bytes()
    headers = [name for name in texts if name != source]
    program = checked(
        nvrtc.nvrtcCreateProgram(
            texts[source], source.encode(), len(headers), [texts[n] for n in headers], [n.encode() for n in headers]
        )
    )
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if status.value != 0:
        log = bytes(checked(nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise CudaError(f"{source} does not compile for {arch}:\n{log.decode(errors='replace')}")
    code = bytes(checked(nvrtc.nvrtcGetCUBINSize(program)))
    checked(nvrtc.nvrtcGetCUBIN(program, code))
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, code)
    except OSError:
        pass  # an unwritable cache costs the next process a second
    return code


class DriverKernel:
    """A kernel of a compiled source, launched in clusters by the CUDA driver.

    Parameters
    ----------
    code : bytes
        Machine code.
    name : str
        Of the kernel; the array ``<name>_shared`` has one byte for every 16 bytes of shared memory that it needs.
    blocks, threads, cluster : int
        Blocks of the grid, threads of a block, blocks of a cluster.
    overlaps : bool
        Whether it may start before the previous kernel of the stream has ended (it waits for it by itself).
    device : torch.device
        Where it runs.

    Raises
    ------
    CudaError
        If it cannot be loaded, or needs more shared memory than a block of this device can have.
    """

    def __init__(
        self, code: bytes, name: str, *, blocks: int, threads: int, cluster: int, overlaps: bool, device: torch.device
    ) -> None:
        from cuda.bindings import driver

        self._driver, self._stream = driver, functools.partial(torch._C._cuda_getCurrentRawStream, device.index)
        self._library = checked(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
        kernel = checked(driver.cuLibraryGetKernel(self._library, name.encode()))
        self._function = checked(driver.cuKernelGetFunction(kernel))
        shared = checked(driver.cuLibraryGetGlobal(self._library, f"{name}_shared".encode()))[1] * _SHARED_UNIT
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        try:
            checked(driver.cuFuncSetAttribute(self._function, limit, shared))
        except CudaError as error:
            raise CudaError(f"{name} needs {shared} bytes of shared memory a block ({error})") from None
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared
        attributes = []
        if cluster > 1:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = cluster, 1, 1
            attributes.append(attribute)
        if overlaps:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        config.attrs, config.numAttrs = attributes, len(attributes)
        self._config = config

    def launch(self, arguments: ctypes.Structure) -> None:
        """See :class:`Kernel`."""
        self._config.hStream = self._stream()
        pointer = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        (status,) = self._driver.cuLaunchKernelEx(self._config, self._function, ctypes.addressof(pointer), 0)
        if status.value != 0:
            raise CudaError(f"CUDA: {status.name} at a launch")


def fill(arguments: ctypes.Structure, values: Mapping[str, torch.Tensor | float]) -> None:
    """Set fields by name: a tensor's address, or a number."""
    for name, value in values.items():
        setattr(arguments, name, value.data_ptr() if isinstance(value, torch.Tensor) else value)


@functools.lru_cache(maxsize=256)
def make_kernel(
    source: str, definitions: tuple[tuple[str, int], ...], blocks: int, device: torch.device
) -> Kernel | CudaError:
    """Compile and load the kernel of a source, which has its name, or tell why it cannot be.

    ``definitions`` hold ``THREADS`` and ``CLUSTER``, the shape of its launch. The layers of a model share either. A
    refusal is returned, not raised, because only what is returned is remembered: it would be tried again for every
    layer of every plan.
    """
    if reason := missing():
        return CudaError(reason)
    major, minor = torch.cuda.get_device_capability(device)
    constants = dict(definitions)
    try:
        code = compiled(source, definitions, f"sm_{major}{minor}")
        with torch.cuda.device(device):  # whose context the driver takes
            return DriverKernel(
                code,
                Path(source).stem,
                blocks=blocks,
                threads=constants["THREADS"],
                cluster=constants["CLUSTER"],
                overlaps=True,
                device=device,
            )
    except CudaError as error:
        return error.with_traceback(None)  # which would keep the frames


def _cache_folder() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("mac-kernels", appauthor=False) / "cuda"
