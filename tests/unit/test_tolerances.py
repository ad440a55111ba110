"""The tolerance rule can fail, and says what it measured."""

from __future__ import annotations

import math

import pytest
import torch

from mac_kernels.testing.tolerances import TOLERANCES, Ledger, assert_close, floor_error, max_error

REF = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def off(amount: float) -> torch.Tensor:
    return REF + torch.tensor([0.0, amount, 0.0], dtype=torch.float64)


def test_twice_the_plain_error_and_the_floor_is_the_limit(capsys):
    floor = TOLERANCES["output", torch.float32].ulps * torch.finfo(torch.float32).eps * 2
    allowed = 2 * 1e-3 + floor
    share = assert_close("output", off(0.999 * allowed), off(1e-3), REF, dtype=torch.float32)
    assert share == pytest.approx(0.999)
    assert "1.00 of what is allowed" in capsys.readouterr().out
    with pytest.raises(AssertionError, match=r"here .*sums of a few thousand"):
        assert_close("output", off(1.001 * allowed), off(1e-3), REF, dtype=torch.float32, what="here")


def test_exact_plain_torch_leaves_the_floor():
    floor = floor_error("lse2", torch.float32, REF)
    assert_close("lse2", off(0.99 * floor), REF, REF, dtype=torch.float32)
    with pytest.raises(AssertionError):
        assert_close("lse2", off(1.01 * floor), REF, REF, dtype=torch.float32)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_that_is_not_finite_passes(bad):
    with pytest.raises(AssertionError, match="NaN or infinite"):
        assert_close("state", torch.tensor([1.0, bad, 0.5]), REF, REF, dtype=torch.float32)


def test_infinities_must_agree():
    empty = torch.tensor([-math.inf, 1.0])
    assert max_error(empty, empty) == 0.0
    assert max_error(torch.tensor([0.0, 1.0]), empty) == math.inf
    assert max_error(torch.tensor([math.inf, 1.0]), empty) == math.inf
    assert_close("lse2", empty, empty, empty, dtype=torch.float32)


def test_shapes_must_agree():
    with pytest.raises(AssertionError, match=r"shapes differ: \[2\] and \[3\]"):
        max_error(torch.zeros(2), torch.zeros(3))


def test_a_ledger_judges_the_largest_errors_together():
    ledger = Ledger()
    assert ledger.verify() == 0.0
    ledger.record("output", off(1.9e-3), off(1e-4), REF, dtype=torch.float32, what="early")
    ledger.record("output", off(1e-4), off(1e-3), REF, dtype=torch.float32, what="late")
    assert 0.9 < ledger.verify() < 1
    ledger.record("state", off(1e-2), REF, REF, dtype=torch.bfloat16, what="fine")
    ledger.record("output", off(3e-3), off(1e-3), REF, dtype=torch.float32, what="the worst")
    with pytest.raises(AssertionError, match="worst at the worst") as caught:
        ledger.verify()
    assert "state" not in str(caught.value)


def test_every_row_has_a_reason_and_no_slack_to_hide_in():
    for (stage, dtype), tolerance in TOLERANCES.items():
        assert tolerance.reason
        assert tolerance.ulps * torch.finfo(dtype).eps < 2e-2, (stage, dtype)
