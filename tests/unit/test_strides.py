"""Strided arguments, which the kernels would read as if they were not: refused by name, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from misused_step import CONFIG, LAYOUT, LENGTHS, Setup, check_refused, ready_setup

from mac_kernels import InputError


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every other entry of the last dim."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def plan(name: str) -> Callable[[Setup], Any]:
    return lambda s: s.plan(**{name: strided(s.plan_arguments[name])})


def plan_rows(name: str) -> Callable[[Setup], Any]:
    rows = {
        "req_to_token": torch.arange(32, dtype=torch.int32).view(2, 16),
        "req_pool_indices": torch.tensor([0, 1]),
        "seq_lens": torch.tensor(LENGTHS),
    }
    rows[name] = strided(rows[name])
    return lambda s: s.wrapper.plan_rows(
        **rows, layout=LAYOUT, rope=s.plan_arguments["rope"], config=CONFIG, max_kv_len=16
    )


def run(name: str) -> Callable[[Setup], Any]:
    return lambda s: s.run(**{name: strided(s.run_arguments.get(name, s.run_arguments["q"]))})


def run_cache(which: int) -> Callable[[Setup], Any]:
    def misuse(s: Setup) -> Any:
        caches = list(s.run_arguments["paged_kv_cache"])
        caches[which] = strided(caches[which])
        return s.run(paged_kv_cache=tuple(caches))

    return misuse


def fill(name: str, value: torch.Tensor) -> Callable[[Setup], Any]:
    return lambda s: s.fill(**{name: strided(value)})


CASES = {
    **{f"plan {name}": (name, plan(name)) for name in ("indptr", "indices", "last_page_len")},
    **{f"plan_rows {name}": (name, plan_rows(name)) for name in ("req_to_token", "req_pool_indices", "seq_lens")},
    **{f"run {name}": (name, run(name)) for name in ("q", "out", "slots", "generations")},
    **{f"run {name}": (name, run_cache(which)) for which, name in enumerate(("k_cache", "v_cache"))},
    "fill q": ("q", fill("q", torch.zeros(5, 4, 8))),
    "fill qo_indptr": ("qo_indptr", fill("qo_indptr", torch.tensor([0, 2, 5]))),
    "fill slots": ("slots", fill("slots", torch.tensor([0, 1]))),
    "fill generations": ("generations", fill("generations", torch.tensor([0, 0]))),
}


@pytest.mark.parametrize("case", CASES)
def test_a_strided_argument_is_refused(case: str) -> None:
    name, misuse = CASES[case]
    check_refused(ready_setup(), misuse, InputError, (f"{name} must be contiguous", "stride 2", f"{name}.contiguous()"))


def test_one_entry_has_no_stride() -> None:
    """A slice of one entry keeps the stride of what it was taken from, which nothing steps over."""
    setup = ready_setup()
    one = torch.zeros(4, dtype=torch.int64)[::4]
    assert one.stride() == (4,)
    table = setup.store.table(LENGTHS[:1])
    setup.plan(indptr=table.indptr, indices=table.indices, last_page_len=table.last_page_len.repeat(2)[::2])
    out = setup.run(q=setup.run_arguments["q"][:1], slots=one, generations=one)
    assert bool(out.isfinite().all())
