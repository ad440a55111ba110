"""The way of a ring between the device and host memory, ordered so that no copy meets a later write."""

from __future__ import annotations

import contextlib
import logging
import math
import weakref
from typing import Any

import torch

from mac_kernels import RingPool
from mac_kernels.errors import MacError

logger = logging.getLogger(__name__)

_ALIGN = 256


class Staging:
    """Device memory of one ring that every copy passes through, in the order of the calls.

    A ring is first copied inside the device, on the stream of the forward passes, after which the next pass may
    overwrite it. From there it goes to the host on a stream of its own: PCIe takes more than ten times as long, and
    delays nobody there. Copying to the host straight from the ring would either hold up every running request for that
    time, or tear the rows that decoding overwrites meanwhile.

    The next user of the staging memory waits, on its stream, for the last one. So all copies run in the order in which
    they were asked for: a host buffer is complete before it is read, read before it is written again, and nothing on
    the host ever waits or asks the device.

    Parameters
    ----------
    rings : RingPool
        Whose rings are copied.
    """

    def __init__(self, rings: RingPool) -> None:
        self._rings = rings
        self.nbytes = sum(_padded(_one_ring(tensor)) for tensor in rings.fields.values())
        self._memory = torch.empty(self.nbytes, dtype=torch.uint8, device=rings.device)
        self._fields = self.fields_of(self._memory)
        self._side: torch.cuda.Stream | None = None
        if rings.device.type == "cuda":
            # torch has no types for these constructors
            self._side = torch.cuda.Stream(rings.device)  # type: ignore[no-untyped-call]
            self._free = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types for it

    def fields_of(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """The ring's fields [num_layers, W, ...] in a buffer [nbytes] uint8, as views."""
        fields, start = {}, 0
        for name, tensor in self._rings.fields.items():
            nbytes = _one_ring(tensor)
            fields[name] = memory[start : start + nbytes].view(tensor.dtype).view(tensor[:, 0].shape)
            start += _padded(nbytes)
        return fields

    def current_stream(self) -> torch.cuda.Stream | None:
        """The stream that this thread issues work on now; ``None`` on a CPU."""
        return None if self._side is None else torch.cuda.current_stream(self._rings.device)

    def save(self, slot: int, host: torch.Tensor, up_to: int, stream: torch.cuda.Stream | None) -> None:
        """Copy the slot's ring, as it is on ``stream`` now and without rows ``>= up_to``, into a host buffer."""
        if stream is None or self._side is None:
            self._rings.copy_out(slot, self._fields, up_to=up_to)
            host.copy_(self._memory)
            return
        with torch.cuda.stream(stream):
            stream.wait_event(self._free)
            self._rings.copy_out(slot, self._fields, up_to=up_to)
            staged = stream.record_event()
        with torch.cuda.stream(self._side):
            self._side.wait_event(staged)
            host.copy_(self._memory, non_blocking=True)
            self._free = self._side.record_event()

    def restore(self, slot: int, host: torch.Tensor, up_to: int, stream: torch.cuda.Stream | None) -> None:
        """Fill the slot's ring from a host buffer on ``stream``; rows ``>= up_to`` become empty."""
        if stream is None:
            self._memory.copy_(host)
            self._rings.copy_in(slot, self._fields, up_to=up_to)
            return
        with torch.cuda.stream(stream):
            stream.wait_event(self._free)
            self._memory.copy_(host, non_blocking=True)
            self._rings.copy_in(slot, self._fields, up_to=up_to)
            self._free = stream.record_event()


class HostBuffer:
    """One piece: ``memory`` [nbytes] uint8, pinned for as long as the object lives."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.memory = torch.empty(nbytes, dtype=torch.uint8)
        if device.type == "cuda":
            # not torch's pinned allocator: it rounds every piece up to a power of two, far beyond the budget
            code = int(_cudart().cudaHostRegister(self.memory.data_ptr(), nbytes, 0))
            if code:
                _clear_cuda_error(device)
                raise MacError(
                    f"{nbytes} bytes of host memory cannot be pinned (CUDA error {code}); lower snapshot_memory_gb"
                )
            weakref.finalize(self, _unpin, self.memory, device).atexit = False


class HostBuffers:
    """Host memory in pieces of one size, pinned where a GPU copies from and to it.

    All pieces are made at once: pinning one takes as long as a whole prefill step, which no request should wait for.

    Parameters
    ----------
    nbytes : int
        Bytes of one piece.
    capacity : int
        Pieces; fewer if the system does not give so much.
    device : torch.device
        Decides whether the memory is pinned.
    """

    def __init__(self, nbytes: int, capacity: int, device: torch.device) -> None:
        self._free: list[HostBuffer] = []
        try:
            for _ in range(capacity):
                self._free.append(HostBuffer(nbytes, device))
        except (MacError, RuntimeError) as error:
            logger.warning("%s; ring snapshots go on with %d of %d buffers", error, len(self._free), capacity)
        self.capacity = len(self._free)

    def take(self) -> HostBuffer | None:
        """A piece that is not in use; ``None`` if all are."""
        return self._free.pop() if self._free else None

    def give(self, buffer: HostBuffer) -> None:
        """Take a piece back."""
        self._free.append(buffer)


def _unpin(memory: torch.Tensor, device: torch.device) -> None:
    torch.cuda.synchronize(device)
    _cudart().cudaHostUnregister(memory.data_ptr())


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch has no types for it


def _clear_cuda_error(device: torch.device) -> None:
    # the error would otherwise be raised by whatever kernel is launched next
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)


def _one_ring(tensor: torch.Tensor) -> int:
    return tensor[:, 0].numel() * tensor.element_size()


def _padded(nbytes: int) -> int:
    return math.ceil(nbytes / _ALIGN) * _ALIGN
