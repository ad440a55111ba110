"""A few steps of every kernel, small enough for compute-sanitizer: ``compute-sanitizer python sanitized_steps.py``."""

from __future__ import annotations

import sys

import torch

from mac_kernels import BatchMacDecodeWithPagedKVCacheWrapper
from mac_kernels.testing.conformance import Case, Session, variant

# odd dims, groups and pages, rows of token slots, 8 bits: whatever has a mask or an address of its own
STEPS = (
    (Case(), {"dtype": torch.bfloat16}, {}),
    (Case(head_dim=80, group=12, kv_heads=1, page_size=5, kv_layout="HND"), {"dtype": torch.bfloat16}, {}),
    (Case(head_dim=192, group=7, kv_heads=1, page_size=1), {"dtype": torch.float16, "rows": True}, {}),
    (
        Case(head_dim=128, group=8, page_size=16, rotary="partial"),
        {"dtype": torch.bfloat16, "kv_dtype": torch.float8_e4m3fn, "scales": (0.5, 2.0)},
        {"break_even": 0.2, "match_scope": "group"},
    ),
)


def wrapper(kv_layout: str) -> BatchMacDecodeWithPagedKVCacheWrapper:
    return BatchMacDecodeWithPagedKVCacheWrapper(kv_layout, backend="triton")  # type: ignore[arg-type]


def main(device: str) -> None:
    for case, options, changes in STEPS:
        session = Session(
            wrapper, case, variant(**changes), device=device, batch=3, capacity=48, rings_for=(0, 1), **options
        )
        session.prefill_random(33, 3, 20, chunks=2)
        for _ in range(2):
            session.step_random(check=False)
        if device == "cuda":
            torch.cuda.synchronize()
        session.ledger.verify()
    print("all steps done")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["cuda"])
