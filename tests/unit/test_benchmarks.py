"""The benchmark refuses to time a wrong result, and its table is keyed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import results
from benchmarks.decode import WrongResultError, _check
from benchmarks.registry import DECODE
from benchmarks.tca import TCA, TcaCase, budgets
from mac_kernels import HeadLayout

HIT = torch.tensor([[True, True], [True, False]])
# as small as attention over a long context of random values is
FULL = 0.003 * torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))


def check(*, decided: torch.Tensor = HIT, out: torch.Tensor = FULL) -> None:
    scenario = SimpleNamespace(hit=HIT, rings=SimpleNamespace(layout=HeadLayout(4, 2, 8)))
    _check(scenario, SimpleNamespace(hit=decided), out, FULL, (0, FULL[0]))


def test_a_right_result_passes():
    check(out=FULL.bfloat16())


@pytest.mark.parametrize("request_", [0, 1])
@pytest.mark.parametrize("wrong", [0.0, 1.1, float("nan")])
def test_wrong_heads_are_refused(request_: int, wrong: float):
    out = FULL.clone()
    out[request_] *= wrong  # request 0 is compared with the reference, the missed group of request 1 with FlashInfer
    with pytest.raises(WrongResultError):
        check(out=out)


def test_another_decision_is_refused():
    with pytest.raises(WrongResultError, match="1 of 4"):
        check(decided=torch.ones_like(HIT))


def test_every_case_can_show_its_hit_rate():
    assert all(abs(case.planted_hit_rate - case.hit_rate) <= 0.03 for case in DECODE)
    assert {(case.batch, case.hit_rate) for case in DECODE} >= {(1, 0.0), (1, 1.0), (64, 0.0), (64, 0.95)}


@pytest.mark.parametrize("case", TCA, ids=str)
def test_budgets_keep_what_the_case_says(case: TcaCase):
    choice, kept = budgets(case)
    assert len(choice) == case.layout.num_kv_heads
    assert abs(kept - case.kept) <= 0.01


def test_a_row_of_equal_key_is_replaced(tmp_path: Path):
    row = {name: "1" for name in results.COLUMNS}
    path = tmp_path / "t.csv"
    results.upsert(path, [row, {**row, "hit_rate": "0"}])
    results.upsert(path, [{**row, "p50": "2"}])
    assert [(r["hit_rate"], r["p50"]) for r in results.read(path)] == [("0", "1"), ("1", "2")]
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match="has columns"):
        results.read(path)
