"""The benchmarks of the SGLang surface: what they make of replies, and that a wrong answer cannot pass."""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import results, sglang_latency, sglang_smollm2
from benchmarks.serving import (
    Launch,
    NotPublishedError,
    agreement,
    free_port,
    groups,
    hit_rate,
    logged_speed,
    steady_speed,
    three,
)
from benchmarks.sglang import command_line
from benchmarks.sglang_latency import MAC_CONFIGS, Measured, WrongResultError, _rows
from benchmarks.sglang_smollm2 import make_prompts, pad_heads
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


def test_groups_are_summed_over_the_ranks() -> None:
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


class Late:
    """A server of two ranks, the second of which publishes at every third reading only."""

    url = "http://late"

    def __init__(self) -> None:
        self.readings = 0

    async def metrics(self) -> str:
        self.readings += 1
        late = self.readings // 3
        hits = 40 if late >= 2 else 10  # the first publication had begun before the last pass
        return (
            "# TYPE mac_publications_total counter\n"
            f'mac_publications_total{{tp_rank="0"}} {7 + self.readings}\n'
            f'mac_publications_total{{tp_rank="1"}} {5 + late}\n'
            f'# TYPE mac_groups_total counter\nmac_groups_total{{reason="HIT",tp_rank="1"}} {hits}\n'
        )


def test_counters_are_read_when_every_rank_has_published_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.serving._POLL_S", 0)
    assert asyncio.run(groups(Late())) == Counter(HIT=40)


def test_counters_that_are_never_published_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.serving._PUBLISHED_S", 0)
    with pytest.raises(NotPublishedError, match="http://late has not published"):
        asyncio.run(groups(Late()))


def test_the_servers_own_counts_are_read_from_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    line = (
        "[t TP0] Decode batch, #running-req: {}, #token: 9, cuda graph: True, gen throughput (token/s): {}, #queue: 0\n"
    )
    log.write_text(line.format(3, 5.0))
    begin = log.stat().st_size
    with log.open("a") as file:
        file.write(line.format(1, 0.83) + "Prefill batch, #running-req: 1\n" + line.format(1, 83.31))
        file.write(line.format(3, 26.9) + line.format(1, 83.18) + line.format(3, 132.74))
    assert logged_speed(log, 1, begin=begin) == [83.31, 83.18] and logged_speed(log, 3, begin=begin) == [132.74]
    assert logged_speed(log, 3) == [26.9, 132.74] and logged_speed(tmp_path / "none", 1) == []


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


class Speaks:
    """A server whose requests share what they share, and that counts as many hits as it is told to."""

    def __init__(self, hits: float = 1.0) -> None:
        self.hits, self.asked, self.known = hits, [], set()

    async def generate(self, prompt: list[int], *, max_new_tokens: int, **fields: Any) -> Reply:
        self.asked.append((len(prompt), max_new_tokens, fields.get("sampling")))
        begins = tuple(prompt[: len(prompt) // 2])
        cached = len(begins) if begins in self.known else 0
        self.known.add(begins)
        arrivals = [1 + 0.001 * len(self.asked) + 0.01 * at for at in range(max_new_tokens)]
        meta = {"cached_tokens": cached, "forward_entry_time": 5.0, "prefill_finished_time": 5.75}
        return Reply(0.001 * len(self.asked), list(range(max_new_tokens)), arrivals, "", meta)

    async def count(self, server: Speaks) -> Counter[str]:
        done = len(self.asked)
        return Counter(HIT=round(1000 * done * self.hits), AGE=1000 * done - round(1000 * done * self.hits))


def latency(*arguments: str) -> Any:
    parser = argparse.ArgumentParser()
    sglang_latency.add_arguments(parser)
    args = parser.parse_args(["--long", "400", "--short", "100", "--tokens", "60", *arguments])
    args.baseline, args.tp, args.logs = "flashinfer", 1, Path("no logs")
    return args


def measure(name: str, server: Speaks, args: Any, monkeypatch: pytest.MonkeyPatch) -> Measured:
    monkeypatch.setattr("benchmarks.sglang_latency.groups", server.count)
    measured = Measured()
    prompts = sglang_latency.make_prompts(args, vocab=1000)
    asyncio.run(sglang_latency._measure(server, name, measured, prompts, args))
    return measured


@pytest.mark.parametrize(("name", "rate", "good"), [("always-hit", 0.99, True), ("always-hit", 0.9, False),
                                                    ("never-hit", 0.0, True), ("never-hit", 0.1, False)])  # fmt: skip
def test_a_server_that_did_not_do_what_was_forced_is_not_reported(
    name: str, rate: float, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if good:
        assert measure(name, Speaks(rate), latency(), monkeypatch).hit_rate.keys() == {1, 3}
    else:
        with pytest.raises(WrongResultError, match="hit rate"):
            measure(name, Speaks(rate), latency(), monkeypatch)


def test_what_a_server_of_mac_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Speaks()
    measured = measure("always-hit", server, latency(), monkeypatch)
    exact = [length for length, _, sampling in server.asked if sampling == sglang_latency.EXACT]
    assert exact == [100] * 2
    assert [length for length, tokens, _ in server.asked if tokens == 1] == [100] * 3 + exact + [400] * 3
    assert (
        measured.samples["ttft", 1, 400] == pytest.approx([1.0] * 3)
        and measured.prefill_s["ttft", 1, 400] == [0.75] * 3
    )
    assert len(measured.samples["throughput", 3, 400]) == 8
    assert [len(tokens) for tokens in measured.tokens.values()] == [1, 3]
    # batch 1 is measured as soon as its prompt is read, so that a run that is cut has it
    assert [tokens for length, tokens, _ in server.asked if length == 400] == [24, 1, 60, 1, 1, 60, 60, 60]


def test_requests_of_a_batch_may_share_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    args = latency("--own", "40", "--batches", "1,8", "--short", "0")
    prompts = sglang_latency.make_prompts(args, vocab=1000)
    assert {tuple(prompt[:360]) for prompt in prompts.longs} == {tuple(prompts.longs[0][:360])}
    assert len({tuple(prompt[360:]) for prompt in prompts.longs}) == 8 and not prompts.shorts
    server = Speaks()
    measured = measure("flashinfer", server, args, monkeypatch)
    assert [length for length, tokens, _ in server.asked if tokens == 1] == [400]
    assert len(measured.tokens[8]) == 8


def test_rows_compare_with_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.serving.sglang_version", lambda: "sglang 0.5.23")
    full = Measured(tokens={2: [[1, 2, 3], [4, 5, 6]]}, hit_rate={2: float("nan")})
    full.samples["throughput", 2, 1000] += [10.0, 10.0, 10.0]
    full.samples["ttft", 1, 1000] += [2.0]
    mac = Measured(hit_rate={2: 1.0}, tokens={2: [[1, 2, 9], [4, 5, 6]]})
    mac.samples["throughput", 2, 1000] += [25.0]
    mac.samples["ttft", 1, 1000] += [2.1]
    mac.samples["ttft_exact", 1, 1000] += [2.2]
    shape = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512}
    args = latency("--long", "1000")
    rows = _rows({"flashinfer": full, "always-hit": mac}, args, shape, {"gpu": "none"})
    by = {(row["provider"], row["metric"]): row for row in rows}
    assert by["mac", "throughput_ratio"]["p50"] == "2.5" and by["mac", "ttft_ratio"]["p50"] == "1.05"
    assert by["mac", "ttft_exact_ratio"]["p50"] == "1.1"
    assert by["mac", "agreement"]["p20"] == "2" and by["mac", "agreement"]["n"] == "2"
    assert ("flashinfer", "throughput_ratio") not in by and ("flashinfer", "hit_rate") not in by
    assert by["mac", "throughput"]["head_dim"] == "64" and by["mac", "throughput"]["case"] == "latency"
    assert all(set(row) <= set(results.COLUMNS) for row in rows)
    shared = _rows({"flashinfer": full}, latency("--long", "1000", "--own", "30"), shape, {"gpu": "none"})
    assert {row["case"] for row in shared} == {"latency-shared-but-30"}


def test_prompts_of_a_text() -> None:
    prompts = make_prompts(range(5000), batch=3, length=700)
    assert [len(prompt) for prompt in (*prompts.distinct, *prompts.shared)] == [700] * 6
    assert not set(prompts.distinct[0]) & set(prompts.distinct[1])
    assert [agreement(a, prompts.shared[0]) for a in prompts.shared[1:]] == [600, 600]
    assert [len(turn) for turn in prompts.turns] == [48] * 3 and prompts.turns[0][-1] == 4999
    with pytest.raises(InputError, match="give a longer --text"):
        make_prompts(range(2000), batch=3, length=700)


def test_replies_without_a_common_time_cost_the_speed_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.serving.sglang_version", lambda: "sglang 0.5.23")
    together = [reply(*(0.01 * at for at in range(60)), tokens=[1, 2, 3])] * 2
    apart = [together[0], reply(*(9 + 0.01 * at for at in range(60)), tokens=[1, 2, 4])]
    full = sglang_smollm2.Measured({"distinct": together, "shared": together})
    counts = {part: Counter(AGE=1) for part in ("distinct", "shared")}
    hits = {"early": (6, 10), "later": (15, 20), "computed early": (7, 10), "computed later": (17, 20)}
    counts |= {part: Counter(HIT=reused, AGE=all_ - reused) for part, (reused, all_) in hits.items()}
    mac = sglang_smollm2.Measured({"distinct": apart, "shared": together}, counts, {"distinct": [0.7], "shared": []})
    shape = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512}
    args = SimpleNamespace(batch=2, prompt_tokens=10, tokens=60, tp=1, tie=0.5, command_line="")
    launch = Launch("exact", "mac", Path("model"))
    baselines = [sglang_smollm2.Baseline(Judges(), full, suffix) for suffix in ("", "-one-gpu")]
    rows = sglang_smollm2._rows(launch, mac, baselines, args, shape)
    found = {(row["case"], row["metric"]): row["p50"] for row in rows}
    assert ("smollm2-distinct", "throughput") not in found and float(found["smollm2-shared", "throughput"]) > 0
    assert found["smollm2-distinct", "equal_replies"] == "0.5" and found["smollm2-distinct", "hit_rate"] == "0"
    assert found["smollm2-distinct", "answers_wrong"] == "1" and found["smollm2-shared", "answers_wrong"] == "0"
    assert found["smollm2-distinct", "gap_of_first_difference_most"] == "0.7"
    assert found["smollm2-distinct-one-gpu", "equal_replies"] == "0.5"
    second = ("hit_rate_first_16", "hit_rate_after_16", "hit_rate_first_16_computed", "hit_rate_after_16_computed")
    assert [found["smollm2-second", metric] for metric in second] == ["0.6", "0.9", "0.7", "1"]
    assert "exact: no throughput of the part distinct" in capsys.readouterr().out


class Judges(Speaks):
    """A baseline that has tokens 7 and 8 nearly tied, 9 behind and nothing else among its best."""

    async def generate(self, prompt: list[int], *, max_new_tokens: int, **fields: Any) -> Reply:
        self.asked.append(prompt)
        best = [(-0.5, 7, None), (-0.75, 8, None), (-2.5, 9, None)]
        return Reply(0.0, [7], [0.1], "", {"output_top_logprobs": [best] * max_new_tokens})


@pytest.mark.parametrize(("token", "gap"), [(8, 0.25), (9, 2.0), (5, float("inf"))])
def test_the_baseline_judges_the_first_differing_token(token: int, gap: float) -> None:
    prompts = sglang_smollm2.Prompts([[1, 2], [3, 4]], [[1, 2], [1, 3]], [])
    answers = [reply(0, 1, 2, tokens=[6, 7, 1]), reply(0, 1, 2, tokens=[6, 7, 1])]
    others = [answers[0], reply(0, 1, 2, tokens=[6, token, 3])]
    full = sglang_smollm2.Measured({"distinct": answers, "shared": answers, "other order": others})
    exact = sglang_smollm2.Measured({"distinct": others, "shared": answers})
    baseline = sglang_smollm2.Baseline(Judges(), full, "-one-gpu")
    asyncio.run(sglang_smollm2._ask_gaps(baseline, prompts, full))
    assert full.gaps == {"noise": [gap]} and baseline.server.asked == [[3, 4, 6]]
    asyncio.run(sglang_smollm2._ask_gaps(baseline, prompts, exact))
    assert exact.gaps == {"distinct-one-gpu": [gap], "shared-one-gpu": []}


def test_an_answer_that_ends_early_is_no_tie() -> None:
    assert asyncio.run(sglang_smollm2._gap(Judges(), [1], [6, 7], [6, 7, 8])) == float("inf")


def test_heads_of_zeros_change_no_output() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    config = transformers.LlamaConfig(**shape, num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=True)
    plain = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 50, (1, 12))
    want = plain(tokens).logits
    weights = plain.state_dict()
    pad_heads(config, weights, tp=2)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 4)
    padded = transformers.LlamaForCausalLM(config).eval()
    padded.load_state_dict(weights)
    torch.testing.assert_close(padded(tokens).logits, want)
    same = dict(weights)
    pad_heads(config, weights, tp=4)
    assert config.num_key_value_heads == 4 and all(weights[name] is same[name] for name in same)


def test_a_launch_passes_everything_on() -> None:
    launch = Launch("a", "mac", Path("model"), {}, ("--page-size", "2"), tp=4)
    command = launch.command(1234, 5678)
    assert command[1:3] == ["-m", "sglang.launch_server"] and command[-2:] == ["--page-size", "2"]
    assert "--enable-metrics" in command and "1234" in command and "5678" in command


def test_no_port_is_given_twice() -> None:
    assert len({free_port() for _ in range(50)}) == 50
