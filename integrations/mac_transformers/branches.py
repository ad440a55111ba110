"""Independent calls as branches of a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_MOST = 8  # streams: a call of a few rows fills a part of the GPU


class Branches:
    """Streams on which calls that do not depend on each other are recorded, so that their kernels share the GPU.

    Outside a recording, and on the CPU, the calls follow each other on the current stream: what they allocate then need
    not be told to an allocator that knows one stream.

    Parameters
    ----------
    device : torch.device
    count : int
        Calls of a pass.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        streams = min(count, _MOST) if device.type == "cuda" and count > 1 else 0
        # torch does not type the constructor
        self._streams = [torch.cuda.Stream(device) for _ in range(streams)]  # type: ignore[no-untyped-call]

    @contextmanager
    def forked(self) -> Iterator[list[AbstractContextManager[object]]]:
        """Contexts to run the calls in, the first call in the first, the next in the next, and so on around.

        They begin after what the current stream has been given; what it is given afterwards waits for all of them.
        """
        if not self._streams or not torch.cuda.is_current_stream_capturing():
            yield [nullcontext()]
            return
        home = torch.cuda.current_stream()
        for stream in self._streams:
            stream.wait_stream(home)
        yield [torch.cuda.stream(stream) for stream in self._streams]
        for stream in self._streams:
            home.wait_stream(stream)
