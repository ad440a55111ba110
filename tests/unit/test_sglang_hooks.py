"""What a request's custom parameters do when SGLang creates it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mac_sglang import hooks


def created(custom, extra_key="tenant", **params) -> SimpleNamespace:
    request = SimpleNamespace(
        extra_key=extra_key, sampling_params=SimpleNamespace(custom_params=custom, **params), origin_input_ids=[]
    )
    hooks._request_created(None, request)
    return request


@pytest.fixture(autouse=True)
def nothing_warned_yet() -> None:
    hooks._warn_of.cache_clear()


def test_exact_gets_a_namespace_of_its_own(caplog):
    request = created({"mac": "exact"})
    assert request.extra_key == "tenant|mac:exact"
    assert hooks.wants_exact(request) == "asked for exact"
    assert not caplog.records


@pytest.mark.parametrize("extra_key", ["mac:exact", "|mac:exact", "tenant|mac:exact"])
@pytest.mark.parametrize("custom", [None, {"mac": "exact"}])
def test_whoever_names_the_namespace_of_exact_requests_is_one(custom, extra_key):
    request = created(custom, extra_key)
    assert hooks.wants_exact(request) == "asked for exact"
    assert request.extra_key == extra_key


@pytest.mark.parametrize("custom", [None, {}, {"other": "exact"}, ["mac"]])
def test_other_parameters_are_left_alone(custom, caplog):
    request = created(custom)
    assert request.extra_key == "tenant"
    assert hooks.wants_exact(request) == ""
    assert not caplog.records


def test_an_unknown_value_is_said_once(caplog):
    for _ in range(3):
        assert created({"mac": "exakt"}).extra_key == "tenant"
    assert len(caplog.records) == 1
    assert "'mac': 'exakt'" in caplog.text and "the only value is 'exact'" in caplog.text


def test_beam_search_runs_exactly():
    assert hooks.wants_exact(created(None, beam_width=4)) == "beam search"
