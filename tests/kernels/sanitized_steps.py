"""A few steps of every kernel, small enough for compute-sanitizer: ``sanitized_steps.py DEVICE KERNELS``."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from typing import Any

import test_tca
import test_tca_index
import torch
from emulated import AHEAD

from mac_kernels import BatchMacDecodeWithPagedKVCacheWrapper, fused
from mac_kernels.cuda import kernels as kernels_of_cuda
from mac_kernels.launch import LaunchParams, default_launch
from mac_kernels.testing.conformance import Case, Session, variant

# odd dims, groups and pages, rows of token slots, 8 bits: whatever has a mask or an address of its own
FP8 = {"dtype": torch.bfloat16, "kv_dtype": torch.float8_e4m3fn, "scales": (0.5, 2.0)}
TRITON = (
    (Case(), {"dtype": torch.bfloat16}, {}),
    (Case(head_dim=80, group=12, kv_heads=1, page_size=5, kv_layout="HND"), {"dtype": torch.bfloat16}, {}),
    (Case(head_dim=192, group=7, kv_heads=1, page_size=1), {"dtype": torch.float16, "rows": True}, {}),
    (
        Case(head_dim=128, group=8, page_size=16, rotary="partial"),
        FP8,
        {"break_even": 0.2, "match_scope": "group"},
    ),
)
FLASHINFER = (
    (Case(head_dim=128, group=7, kv_heads=1, page_size=5, kv_layout="HND"), {"dtype": torch.bfloat16}, {}),
    (Case(head_dim=64, group=16, page_size=16), FP8, {"match_scope": "group"}),
    (Case(head_dim=256, group=3, page_size=1), {"dtype": torch.float16, "rows": True}, {"correction": False}),
)
FRONT = (*TRITON[:3], (TRITON[3][0], {"dtype": torch.bfloat16}, TRITON[3][2]))  # 8 bits are not the front's
STEPS = {"triton": TRITON, "front": FRONT, "flashinfer": FLASHINFER}
CLUSTERS = {"triton": (0,), "front": (1, 2, 4, 8), "flashinfer": (0,)}


def wrapper(kv_layout: str, backend: str) -> BatchMacDecodeWithPagedKVCacheWrapper:
    return BatchMacDecodeWithPagedKVCacheWrapper(kv_layout, backend=backend)


def _launch(*batch: Any, cluster_size: int) -> LaunchParams:
    return dataclasses.replace(default_launch(*batch), cluster_size=cluster_size)


class _Ahead(fused.FusedStep):
    """Begins its rest ahead of the decision from the first step on, as after a step in which all groups missed."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._workspace["tickets_ptr"][0] = AHEAD


def _replaced(reason: str, **_: Any) -> None:
    raise RuntimeError(f"the front does not run: {reason}")


def tca_steps() -> None:
    """Selection, prefill, decode and refresh: whole tests, so what is computed is right, too."""
    for shape in (*test_tca.TINY[:2], test_tca.REAL[4]):  # blocks of 16: a decode runs for as many steps
        test_tca.test_selection(shape)
        test_tca.test_prefill(shape, chunk=True)
        test_tca.test_decode_with_compaction(shape)
        test_tca_index.test_refresh(shape)


def decode_steps(device: str, kernels: str) -> None:
    backend = "flashinfer" if kernels == "flashinfer" else "triton"
    if kernels == "front":  # scout and decide in its place would be clean, too
        kernels_of_cuda.say_unused = fused.say_unused = _replaced
    plain = fused.FusedStep
    for (case, options, changes), blocks in zip(STEPS[kernels], itertools.cycle(CLUSTERS[kernels]), strict=False):
        fused.default_launch = functools.partial(_launch, cluster_size=blocks)
        session = Session(
            functools.partial(wrapper, backend=backend),
            case,
            variant(**changes),
            device=device,
            batch=3,
            capacity=48,
            rings_for=(0, 1),
            **options,
        )
        session.prefill_random(33, 3, 20, chunks=2)
        for fused.FusedStep in (plain, _Ahead):  # every step is planned anew
            session.step_random(check=False)
        fused.FusedStep = plain
        if device == "cuda":
            torch.cuda.synchronize()
        session.ledger.verify()


def main(device: str, kernels: str) -> None:
    if kernels == "tca":
        tca_steps()
    else:
        decode_steps(device, kernels)
    print("all steps done")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["cuda", "triton"])
