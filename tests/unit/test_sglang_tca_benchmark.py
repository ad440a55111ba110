"""The benchmark of TCA in a server: what it asks, that a wrong share cannot pass, and the rows it writes."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter
from typing import Any

import pytest

from benchmarks import results, sglang_tca
from benchmarks.serving import EXACT
from benchmarks.sglang_latency import LLAMA_8B, WrongResultError
from mac_kernels.tca.settings import resolve_tca
from mac_sglang.client import Reply

pytest.importorskip("prometheus_client")


class Speaks:
    """A server that answers at a speed, caches prompts, and says how much of the cache its steps read."""

    def __init__(self, read: float, step_s: float = 0.01) -> None:
        self.read, self.step_s, self.steps = read, step_s, 0
        self.known: set[tuple[int, ...]] = set()
        self.exact: list[bool] = []

    async def generate(self, prompt: list[int], *, max_new_tokens: int, ignore_eos: bool, **fields: Any) -> Reply:
        self.exact.append(fields.get("sampling") == EXACT)
        cached = len(prompt) - 1 if tuple(prompt) in self.known else 0
        self.known.add(tuple(prompt))
        self.steps += max_new_tokens - 1
        arrivals = [self.step_s * (len(prompt) + at) for at in range(max_new_tokens)]
        return Reply(0.0, list(range(max_new_tokens)), arrivals, "", {"cached_tokens": cached})

    async def counted(self, server: Speaks, name: str) -> Counter[str]:
        share = self.read if name == "mac_read_kv_bytes_total" else 1 - self.read
        return Counter({name: 1e6 * self.steps * share})


def arguments(*more: str) -> Any:
    parser = argparse.ArgumentParser()
    sglang_tca.add_arguments(parser)
    args = parser.parse_args(["--long", "6000", "--short", "500", "--tokens", "60", "--kept", "0.8", *more])
    args.baseline, args.tp, args.server_args = "flashinfer", 1, ()
    return args


def measure(
    servers: list[Speaks], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> tuple[dict[str, sglang_tca.Measured], int, Any]:
    args, measured, wrong = arguments(), {}, 0
    prompts = sglang_tca._prompts(args, vocab=1000)
    for launch, server in zip(sglang_tca._launches(args, tmp_path, LLAMA_8B), servers, strict=True):
        monkeypatch.setattr(sglang_tca, "counted", server.counted)
        wrong |= asyncio.run(sglang_tca._one(server, launch, measured, prompts, args))
    return measured, wrong, args


def test_rows_tell_both_servers_and_their_ratios(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("benchmarks.serving.sglang_version", lambda: "sglang 0")
    measured, wrong, args = measure([Speaks(1.0), Speaks(0.81, step_s=0.005)], monkeypatch, tmp_path)
    assert not wrong
    rows = sglang_tca._rows(measured, args, LLAMA_8B, results.facts("x"))
    found = {(row["provider"], row["metric"], row["context"]): float(row["p50"]) for row in rows}
    assert found["tca", "ttft_ratio", "6000"] == found["tca", "ttft_ratio", "500"] == 0.5
    assert found["tca", "throughput_ratio", "6000"] == pytest.approx(2, rel=0.01)
    assert found["tca", "kv_read", "6000"] == pytest.approx(0.81)
    assert found["tca", "exact_agreement", "6000"] == 32
    assert not any(provider == "flashinfer" and "ratio" in metric for provider, metric, _ in found)
    assert all(set(row) <= set(results.COLUMNS) for row in rows)


def test_a_server_that_reads_another_share_is_not_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    measured, wrong, _ = measure([Speaks(1.0), Speaks(1.0)], monkeypatch, tmp_path)
    assert wrong == 1 and list(measured) == ["flashinfer"]


def test_a_prompt_that_was_cached_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    args, server = arguments(), Speaks(1.0)
    prompts = sglang_tca._prompts(args, vocab=1000)
    server.known.add(tuple(prompts[-1]))
    with pytest.raises(WrongResultError, match="were cached"):
        asyncio.run(sglang_tca._measure(server, sglang_tca._launches(args, tmp_path, LLAMA_8B)[0], prompts, args))


def test_only_the_exact_answer_of_a_sparse_server_is_asked_for_exactly(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    servers = [Speaks(1.0), Speaks(0.8)]
    measure(servers, monkeypatch, tmp_path)
    assert not any(servers[0].exact) and sum(servers[1].exact) == 1


def test_a_server_finds_the_budgets_that_are_set(tmp_path: Any) -> None:
    budgets = sglang_tca.set_budgets(LLAMA_8B, 0.39, 122_880)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"schema": 1, **json.loads(budgets.to_json())}), encoding="utf-8")
    found = resolve_tca(budgets.key, environ={"MAC_KERNELS_CONFIG": str(path)})
    assert found.choices == budgets.choices(budgets.config)
    assert budgets.share_read(found.config, 122_880) == pytest.approx(0.39, abs=0.01)
