"""The benchmarks of the SGLang surface: what they make of replies, and that a wrong answer cannot pass."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import results, soak
from benchmarks.serving import Launch, agreement, groups, hit_rate, steady_speed, three
from benchmarks.sglang import command_line
from benchmarks.sglang_latency import MAC_CONFIGS, Measured, WrongResultError, _check, _rows
from benchmarks.sglang_smollm2 import make_prompts
from mac_kernels import MacConfig
from mac_kernels.config import parse_config
from mac_kernels.errors import InputError
from mac_sglang.client import Reply

pytest.importorskip("prometheus_client")


def reply(*arrivals_s: float, tokens: list[int] | None = None, cached: int = 0) -> Reply:
    ids = list(range(len(arrivals_s))) if tokens is None else tokens
    return Reply(0.0, ids, list(arrivals_s), "", {"cached_tokens": cached, "prompt_tokens": 10})


def test_speed_counts_only_the_time_in_which_all_decode() -> None:
    early = reply(*(0.1 * at for at in range(101)))  # 10 tokens/s from 0 to 10 s
    late = reply(*(5 + 0.1 * at for at in range(101)))  # from 5 to 15 s
    speeds = steady_speed([early, late], skip=10, samples=4)  # from 6 to 10 s
    assert len(speeds) == 4
    assert speeds == pytest.approx([20] * 4, rel=0.06)


def test_speed_of_one_is_that_of_its_tokens() -> None:
    assert steady_speed([reply(*(0.02 * at for at in range(60)))], skip=20, samples=3) == pytest.approx([50] * 3)


def test_speed_needs_a_common_time() -> None:
    with pytest.raises(ValueError, match="do not decode together"):
        steady_speed([reply(0, 1, 2, 3), reply(10, 11, 12, 13)], skip=1, samples=2)


def test_quantiles_of_samples() -> None:
    assert three([5.0, 1.0, 2.0, 3.0, 4.0]) == {"p20": "2", "p50": "3", "p80": "4", "n": "5"}
    assert three([7.0]) == {"p20": "7", "p50": "7", "p80": "7", "n": "1"}


@pytest.mark.parametrize(
    ("a", "b", "same"), [([1, 2, 3], [1, 2, 3], 3), ([1, 2, 3], [1, 9, 3], 1), ([1, 2], [1, 2, 3], 2), ([], [1], 0)]
)
def test_agreement_is_the_common_beginning(a: list[int], b: list[int], same: int) -> None:
    assert agreement(a, b) == same


def test_groups_are_summed_over_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.serving._PUBLISHED_S", 0)
    text = (
        "# TYPE mac_groups_total counter\n"
        'mac_groups_total{reason="HIT",tp_rank="0"} 30.0\nmac_groups_total{reason="HIT",tp_rank="1"} 10.0\n'
        'mac_groups_total{reason="AGE",tp_rank="0"} 10.0\n# TYPE other counter\nother_total 5.0\n'
    )

    async def metrics() -> str:
        return text

    counts = asyncio.run(groups(SimpleNamespace(metrics=metrics)))
    assert counts == Counter(HIT=40, AGE=10)
    assert hit_rate(counts) == 0.8


def test_the_command_names_no_place() -> None:
    arguments = ["latency", "--tp", "2", "--output", "/x/y.csv", "--server-args", "--a b", "--model=/m", "--logs", "/l"]
    command = command_line("benchmarks.sglang", arguments)
    assert command == "python -m benchmarks.sglang latency --tp 2 --server-args '--a b'"


@pytest.mark.parametrize("name", MAC_CONFIGS)
def test_forced_configs_are_configs(name: str) -> None:
    import json

    preset, fields = parse_config(json.dumps({"schema": 1, "preset": "careful", "mac": MAC_CONFIGS[name][0]}))
    config = MacConfig.from_dict({**MacConfig.preset(preset or "").to_dict(), **fields})
    assert (config.threshold, MAC_CONFIGS[name][1]) in ((-float("inf"), 1.0), (1.0, 0.0))
    assert config.correction and config.sinks == 4


@pytest.mark.parametrize(("name", "rate", "good"), [("always-hit", 0.99, True), ("always-hit", 0.9, False),
                                                    ("never-hit", 0.0, True), ("never-hit", 0.1, False),
                                                    ("always-hit", float("nan"), False)])  # fmt: skip
def test_a_server_that_did_not_do_what_was_forced_is_not_reported(name: str, rate: float, good: bool) -> None:
    if good:
        _check(name, Measured(hit_rate=rate))
    else:
        with pytest.raises(WrongResultError):
            _check(name, Measured(hit_rate=rate))


def test_rows_compare_with_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.sglang_latency.sglang_version", lambda: "sglang 0.5.23")
    full = Measured(hit_rate=float("nan"), tokens=[[1, 2, 3], [4, 5, 6]])
    full.samples["throughput", 1, 1000] += [10.0, 10.0, 10.0]
    full.samples["ttft", 1, 1000] += [2.0]
    mac = Measured(hit_rate=1.0, tokens=[[1, 2, 9], [4, 5, 6]])
    mac.samples["throughput", 1, 1000] += [25.0]
    mac.samples["ttft", 1, 1000] += [2.1]
    shape = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512}
    args = SimpleNamespace(baseline="flashinfer", tp=1, long=1000)
    rows = _rows({"flashinfer": full, "always-hit": mac}, args, shape, {"gpu": "none"})
    by = {(row["provider"], row["metric"]): row for row in rows}
    assert by["mac", "throughput_ratio"]["p50"] == "2.5" and by["mac", "ttft_ratio"]["p50"] == "1.05"
    assert by["mac", "agreement"]["p20"] == "2" and by["mac", "agreement"]["n"] == "2"
    assert ("flashinfer", "throughput_ratio") not in by
    assert by["mac", "throughput"]["head_dim"] == "64"
    assert all(set(row) <= set(results.COLUMNS) for row in rows)


def test_prompts_of_a_text() -> None:
    prompts = make_prompts(range(5000), batch=3, length=700)
    assert [len(prompt) for prompt in (*prompts.distinct, *prompts.shared)] == [700] * 6
    assert not set(prompts.distinct[0]) & set(prompts.distinct[1])
    assert [agreement(a, prompts.shared[0]) for a in prompts.shared[1:]] == [600, 600]
    assert [len(turn) for turn in prompts.turns] == [48] * 3 and prompts.turns[0][-1] == 4999
    with pytest.raises(InputError, match="give a longer --text"):
        make_prompts(range(2000), batch=3, length=700)


def test_a_launch_passes_everything_on() -> None:
    launch = Launch("a", "mac", soak.Path("model"), {}, ("--tp", "2"))
    command = launch.command(1234)
    assert command[1:3] == ["-m", "sglang.launch_server"] and command[-2:] == ["--tp", "2"]
    assert "--enable-metrics" in command and "1234" in command


class Answers:
    """A server that gives one answer to everything."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.asked = tokens, []

    async def generate(self, prompt: list[int], **fields: Any) -> Reply:
        self.asked.append(fields)
        return reply(*range(len(self.tokens)), tokens=self.tokens)


@pytest.mark.parametrize(
    ("tokens", "outcome"),
    [([5, 6, 7, 8], "equal"), ([5, 6, 9, 9], "equal up to a tie"), ([5, 1, 7, 8], "WRONG"), ([1, 1, 1, 1], "WRONG")],
)
def test_the_soak_tells_a_tie_from_a_wrong_token(tokens: list[int], outcome: str) -> None:
    reference = soak.Reference([1, 2, 3], [5, 6, 7, 8], [3.0, 2.0, 0.1, 4.0])
    tally, server = soak.Tally(), Answers(tokens)
    asyncio.run(soak._compare(server, reference, tally, tie=0.5))
    assert tally.outcomes == Counter({outcome: 1})
    assert bool(tally.wrong) == (outcome == "WRONG")
    assert server.asked[0]["sampling"] == {"custom_params": {"mac": "exact"}}


@pytest.mark.parametrize(
    ("change", "bad"),
    [
        ({}, None),
        ({"wrong": ["x"]}, "tokens of exact requests"),
        ({"outcomes": Counter(aborted=3)}, "tokens of exact requests"),  # nothing was compared
        ({"outcomes": Counter(equal=9)}, "aborts"),
        ({"memory": [(0, 100, 1), (30, 500, 1), (60, 500, 1), (100, 900, 1)]}, "GPU memory"),
    ],
)
def test_the_verdict_of_a_soak(change: dict[str, Any], bad: str | None) -> None:
    memory = [(0.0, 100.0, 1.0), (30.0, 500.0, 1.0), (60.0, 500.0, 1.0), (100.0, 510.0, 1.0)]
    tally = soak.Tally(**{"outcomes": Counter(equal=9, aborted=3), "tokens": 10, "memory": memory, **change})
    found = [what for what, good, _ in soak._verdict(tally, alive=True) if not good]
    assert found == ([] if bad is None else [bad])
    assert [what for what, good, _ in soak._verdict(tally, alive=False) if not good][-1] == "alive and right at the end"
