"""When the CUDA front is used, and how its sources become kernels; NVRTC is a fake."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mac_kernels import HeadLayout, MacConfig, PagedKV, PageTable, RingPool
from mac_kernels.cuda import compiler, front, kernels
from mac_kernels.launch import LaunchParams
from mac_kernels.planning import Planned
from mac_kernels.rope import Rope

LAYOUT = HeadLayout(4, 2, 64)
CONFIG = MacConfig(window=16, band=6, sinks=2, min_context=12)


def step(
    layout: HeadLayout = LAYOUT, dtype: torch.dtype = torch.bfloat16, **ring: Any
) -> tuple[torch.Tensor, PagedKV, RingPool]:
    table = PageTable(torch.tensor([0, 2]), torch.tensor([0, 1]), torch.tensor([3]), 4)
    cache = torch.zeros(2, 4, layout.num_kv_heads, layout.head_dim, dtype=dtype)
    rings = RingPool(num_rings=1, num_layers=1, layout=layout, window=16, **{"dtype": torch.bfloat16, **ring})
    return (
        torch.zeros(1, layout.num_qo_heads, layout.head_dim, dtype=dtype),
        PagedKV(cache, cache, table, layout),
        rings,
    )


def planned(kv: PagedKV) -> Planned:
    rope = Rope.from_inv_freq(torch.ones(32))
    return Planned(
        table=kv.table, layout=kv.layout, config=CONFIG, rope=rope, sm_scale=0.1, logits_soft_cap=0.0, max_kv_len=8
    )


def reasons(*parts: Any, config: MacConfig = CONFIG) -> str | None:
    q, kv, rings = parts
    return front.unsupported_front(q, kv, rings, config, torch.empty_like(q))


def test_only_the_device_speaks_against_common_shapes() -> None:
    for layout in (HeadLayout(32, 4, 128), HeadLayout(16, 1, 128), HeadLayout(8, 1, 256), HeadLayout(3, 1, 80)):
        assert reasons(*step(layout)) == "device cpu (an NVIDIA GPU)"


@pytest.mark.parametrize(
    "parts, what",
    [
        (step(dtype=torch.float32), "queries in torch.float32"),
        (step(sketch_dim=0), "sketch_dim=0"),
        (step(HeadLayout(2, 2, 36)), "head_dim=36"),
        (step(HeadLayout(17, 1, 64)), "17 query heads per kv head"),
        (step(HeadLayout(16, 1, 256)), "16 heads of 256 dims"),
    ],
)
def test_every_reason_names_the_value(parts: Any, what: str) -> None:
    assert what in str(reasons(*parts))


def test_other_dtypes_of_rows_and_cache_are_named() -> None:
    q, kv, rings = step()
    rows = RingPool(num_rings=1, num_layers=1, layout=kv.layout, window=16, dtype=torch.float32)
    assert "ring rows in torch.float32" in str(reasons(q, kv, rows))
    eight = dataclasses.replace(
        kv, k_cache=kv.k_cache.to(torch.float8_e4m3fn), v_cache=kv.v_cache.to(torch.float8_e4m3fn)
    )
    assert "a cache in torch.float8_e4m3fn beside queries in torch.bfloat16" in str(reasons(q, eight, rings))
    odd = torch.zeros(8 * 64 + 4, dtype=torch.bfloat16)[4:].view(1, 8, 64)[:, :4]
    assert "no multiple of 16" in str(reasons(odd, kv, rings))
    loose = torch.zeros(1, 4, 68, dtype=torch.bfloat16)[:, :, :64]
    assert "multiples of 8" in str(reasons(loose, kv, rings))


def test_a_reason_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_said", set())
    with caplog.at_level(logging.INFO, "mac_kernels.cuda"):
        for reason in ("one", "two", "one"):
            kernels.say_unused(reason)
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["one", "two"]


class FakeNvrtc(types.ModuleType):
    """Compiles by upper-casing, refuses sources that hold ``error``."""

    def __init__(self) -> None:
        super().__init__("cuda.bindings.nvrtc")
        self.compiled: list[tuple[bytes, list[bytes]]] = []
        self._ok, self._bad = types.SimpleNamespace(value=0), types.SimpleNamespace(value=6, name="NVRTC_ERROR")

    def nvrtcVersion(self) -> Any:
        return self._ok, 13, 0

    def nvrtcCreateProgram(self, text: bytes, name: bytes, count: int, headers: Any, names: Any) -> Any:
        assert count == len(headers) == len(names)
        return self._ok, text

    def nvrtcCompileProgram(self, program: bytes, count: int, options: list[bytes]) -> Any:
        assert count == len(options)
        self.compiled.append((program, options))
        return (self._bad if b"-DBROKEN=1" in options else self._ok,)

    def nvrtcGetCUBINSize(self, program: bytes) -> Any:
        return self._ok, len(program)

    def nvrtcGetCUBIN(self, program: bytes, code: bytes) -> Any:
        return (self._ok,)

    def nvrtcGetProgramLogSize(self, program: bytes) -> Any:
        return self._ok, 4

    def nvrtcGetProgramLog(self, program: bytes, log: bytes) -> Any:
        return (self._ok,)


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeNvrtc:
    fake, bindings = FakeNvrtc(), types.ModuleType("cuda.bindings")
    bindings.nvrtc = fake
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr(compiler, "_cache_folder", lambda: tmp_path / "cache")
    compiler.compiled.cache_clear()
    return fake


def test_machine_code_is_kept_on_disk(nvrtc: FakeNvrtc, tmp_path: Path) -> None:
    first = compiler.compiled("front.cu", (("GROUP", 8),), "sm_90")
    assert len(first) == len((Path(compiler.__file__).parent / "front.cu").read_bytes())
    compiler.compiled.cache_clear()  # as in the next process
    assert compiler.compiled("front.cu", (("GROUP", 8),), "sm_90") == first
    assert len(nvrtc.compiled) == 1 and len(list((tmp_path / "cache").iterdir())) == 1
    for definitions, arch in (((("GROUP", 4),), "sm_90"), ((("GROUP", 8),), "sm_100")):
        compiler.compiled("front.cu", definitions, arch)
    assert len(nvrtc.compiled) == 3
    assert b"--gpu-architecture=sm_90" in nvrtc.compiled[0][1] and b"-DGROUP=8" in nvrtc.compiled[0][1]


def test_an_unwritable_cache_is_no_error(nvrtc: FakeNvrtc, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert compiler.compiled("front.cu", (("GROUP", 8),), "sm_90")
    assert len(nvrtc.compiled) == 1


def test_what_does_not_compile_is_told(nvrtc: FakeNvrtc) -> None:
    with pytest.raises(compiler.CudaError, match=r"front\.cu does not compile for sm_90"):
        compiler.compiled("front.cu", (("BROKEN", 1),), "sm_90")


@pytest.fixture
def no_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(front, "unsupported_device", lambda device: None)
    monkeypatch.setattr(kernels, "_said", set())
    cache = compiler.make_kernel
    cache.cache_clear()
    yield
    cache.cache_clear()


def test_triton_serves_where_nothing_can_be_compiled(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, no_device_is_refused: None
) -> None:
    pytest.importorskip("triton")
    from mac_kernels.fused import FusedStep

    asked = []

    def missing() -> str:
        asked.append(None)
        return "no compiler here"

    monkeypatch.setattr(compiler, "missing", missing)
    q, kv, rings = step()
    ids = torch.zeros(1, dtype=torch.int64)
    with caplog.at_level(logging.WARNING, "mac_kernels.cuda"):
        for _ in range(2):  # plans of two layers each
            fused = FusedStep(planned(kv), launch=LaunchParams(cluster_size=2))
            for _layer in range(2):
                assert fused._bind(q, kv, rings, 0, ids, ids, torch.empty_like(q)).cuda is None
    assert len(asked) == 3 and caplog.text.count("no compiler here") == 1  # once a source


@pytest.mark.parametrize("refused", ["front.cu", "rest.cu", "complete.cu"])
def test_triton_serves_where_one_kernel_cannot_be_made(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, no_device_is_refused: None, refused: str
) -> None:
    fused = pytest.importorskip("mac_kernels.fused", reason="needs triton", exc_type=ImportError)
    q, kv, rings = step()
    ids = torch.zeros(1, dtype=torch.int64)
    bind = fused.FusedStep(planned(kv), launch=LaunchParams(cluster_size=2))._bind
    bad: list[str] = []

    def make(source: str, *_: Any) -> Any:
        return compiler.CudaError(f"{source} is too large") if source in bad else types.SimpleNamespace()

    monkeypatch.setattr(compiler, "make_kernel", make)
    assert bind(q, kv, rings, 0, ids, ids, torch.empty_like(q)).cuda.rest is not None
    bad.append(refused)
    with caplog.at_level(logging.WARNING, "mac_kernels.cuda"):
        for _ in range(2):
            assert bind(q, kv, rings, 0, ids, ids, torch.empty_like(q)).cuda is None
    assert caplog.text.count(f"{refused} is too large") == 1


@pytest.mark.parametrize("break_even", [None, 0.1])
@pytest.mark.parametrize(("layout", "served"), [(LAYOUT, True), (HeadLayout(8, 1, 256), False)])
def test_one_kernel_judges_the_hits(
    monkeypatch: pytest.MonkeyPatch,
    no_device_is_refused: None,
    layout: HeadLayout,
    served: bool,
    break_even: float | None,
) -> None:
    """The rest, or complete where the rest is Triton's; nobody without a limit."""
    fused = pytest.importorskip("mac_kernels.fused", reason="needs triton", exc_type=ImportError)
    told: dict[str, dict[str, int]] = {}

    def make(source: str, definitions: Any, *_: Any) -> Any:
        told[source] = dict(definitions)
        return types.SimpleNamespace()

    monkeypatch.setattr(compiler, "make_kernel", make)
    q, kv, rings = step(layout)
    plan = dataclasses.replace(planned(kv), config=dataclasses.replace(CONFIG, break_even=break_even))
    ids = torch.zeros(1, dtype=torch.int64)
    bound = fused.FusedStep(plan, launch=LaunchParams(cluster_size=2))._bind(
        q, kv, rings, 0, ids, ids, torch.empty_like(q)
    )
    assert (bound.cuda.rest is not None) == served == ("rest.cu" in told)
    judge = [
        source for source, name in (("rest.cu", "BYPASS"), ("complete.cu", "JUDGES")) if told.get(source, {}).get(name)
    ]
    assert judge == ([] if break_even is None else ["rest.cu" if served else "complete.cu"])


def test_with_a_cluster_size_of_0_nobody_asks_for_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = pytest.importorskip("mac_kernels.fused", reason="needs triton", exc_type=ImportError)
    asked = []
    monkeypatch.setattr(fused, "unsupported_front", lambda *_: asked.append(None) or "no GPU")
    q, kv, rings = step()
    ids = torch.zeros(1, dtype=torch.int64)
    for launch in (LaunchParams(cluster_size=0), None):
        bound = fused.FusedStep(planned(kv), launch=launch)._bind(q, kv, rings, 0, ids, ids, torch.empty_like(q))
        assert bound.cuda is None
    assert len(asked) == 1  # the default does


@pytest.mark.parametrize(("compiles", "what"), [(False, "does not compile for sm_120"), (True, "too small")])
def test_a_refusal_is_remembered(nvrtc: FakeNvrtc, monkeypatch: pytest.MonkeyPatch, compiles: bool, what: str) -> None:
    loaded = []

    def load(code: bytes, name: str, **_: Any) -> compiler.Kernel:
        loaded.append(name)
        raise compiler.CudaError("too small")

    monkeypatch.setattr(compiler, "missing", lambda: None)
    monkeypatch.setattr(compiler, "DriverKernel", load)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    compiler.make_kernel.cache_clear()
    definitions = (("CLUSTER", 1), ("THREADS", 256), ("BROKEN", int(not compiles)))
    refusals = [compiler.make_kernel("front.cu", definitions, 4, torch.device("cuda", 0)) for _ in range(3)]
    compiler.make_kernel.cache_clear()
    assert isinstance(refusals[0], compiler.CudaError) and what in str(refusals[0])
    assert refusals[1] is refusals[2] is refusals[0]
    assert len(nvrtc.compiled) == 1 and len(loaded) == int(compiles)
