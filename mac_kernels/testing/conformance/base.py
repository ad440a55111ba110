"""What a subclass sets, and how the kit's tests are parametrized from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import pytest
import torch

from ...config import MacConfig
from ...decode import BatchMacDecodeWithPagedKVCacheWrapper
from ...prefill import fill_rings
from .cases import CONFIGS, SMALL_CASES, Case
from .session import Session


class Kit:
    """Overridable attributes and hooks of :class:`DecodeConformance`."""

    backend: ClassVar[str] = "reference"
    device: ClassVar[str] = "cpu"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)
    """Of queries, cache and rings."""
    cases: ClassVar[tuple[Case, ...]] = SMALL_CASES
    """Shapes; tests that need only one take the first."""
    rules: ClassVar[Mapping[str, MacConfig]] = CONFIGS
    """Acceptance rules, by name."""
    steps: ClassVar[int] = 10
    """Decode steps per shape."""
    rule_steps: ClassVar[int] = 40
    """Decode steps per rule beyond the window."""
    chain_steps: ClassVar[int] = 640
    """Steps of the long chain."""
    runs_paper: ClassVar[bool] = False
    """Whether the backend offers ``recompute_loaded_groups=False``."""
    runs_selected: ClassVar[bool] = False
    """Whether the backend offers ``tca``, misses that read selected tokens."""
    sums_rounded: ClassVar[bool] = False
    """Whether the backend sums softmax weights that are already rounded to the dtype of queries (as FlashInfer's FA2
    kernels do, by tensor cores); the yardstick then does so, too."""
    capturable: ClassVar[bool] = False
    """Whether ``run()`` can be captured in a CUDA graph; the replay test then captures, otherwise it calls again."""

    @pytest.fixture(autouse=True)
    def _errors_are_judged(self) -> Iterator[None]:
        """Judge the errors of every session of a test when it ends."""
        self._sessions: list[Session] = []
        yield
        for session in self._sessions:
            session.ledger.verify()

    def make_wrapper(self, kv_layout: str) -> Any:
        """The wrapper under test; override to pass what the backend needs."""
        # a str out of a table of literals
        return BatchMacDecodeWithPagedKVCacheWrapper(kv_layout, backend=self.backend)  # type: ignore[arg-type]

    def fill_rings(self, *args: Any, **kwargs: Any) -> None:
        """The prefill under test; override if the backend has its own."""
        fill_rings(*args, **kwargs)

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Record ``run`` (static tensors only) and return what replays it."""
        if not self.capturable:
            return run
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types for it
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def session(self, case: Case | None = None, *, config: MacConfig | None = None, **options: Any) -> Session:
        """A session of this backend, by default of the first case, the first rule and the first dtype."""
        session = Session(
            self.make_wrapper,
            self.cases[0] if case is None else case,
            next(iter(self.rules.values())) if config is None else config,
            device=self.device,
            fill=self.fill_rings,
            sums_rounded=self.sums_rounded,
            **{"dtype": self.dtypes[0], **options},
        )
        self._sessions.append(session)
        return session

    @classmethod
    def pytest_generate_tests(cls, metafunc: pytest.Metafunc) -> None:
        """Run every test over the class's cases, dtypes and rules that it asks for."""
        for name, values in (("case", cls.cases), ("dtype", cls.dtypes), ("rule", tuple(cls.rules))):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values, ids=lambda value: str(value).removeprefix("torch."))
