"""A real SGLang server over HTTP on the CPU: metrics, audit, ``mac-kernels ab``, and what else users ask of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sglang_engines import VOCAB, save_adapter, save_model

from mac_sglang.client import Reply, Server, open_session

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

LAYERS, KV_HEADS = 2, 2
CONFIG = {
    "schema": 1,
    "mac": {"window": 32, "band": 8, "sinks": 2, "min_context": 24, "threshold": "-inf", "influence": None},
    "serving": {"ring_memory_gb": 0.01, "snapshot_memory_gb": 0.01, "audit_rate": 1.0},
}
ARGUMENTS = (
    "--served-model-name tiny --skip-tokenizer-init --device cpu --attention-backend mac --sampling-backend pytorch "
    "--disable-cuda-graph --max-total-tokens 4096 --max-running-requests 4 --context-length 512 --dtype float32 "
    "--chunked-prefill-size 64 --random-seed 1 --enable-metrics --sleep-on-idle "
    "--enable-lora --max-lora-rank 4 --lora-target-modules q_proj v_proj --lora-backend torch_native"
)
DRAW = random.Random(0)
PROMPT, OTHER, THIRD, FOURTH, FIFTH = ([DRAW.randrange(3, VOCAB) for _ in range(n)] for n in (100, 120, 80, 90, 95))
T = TypeVar("T")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    save_model(folder)
    (folder / "mac.json").write_text(json.dumps(CONFIG))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).with_name("sglang_cpu_server.py")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(script), "--model-path", str(folder), "--port", str(port), *ARGUMENTS.split()],
            env={**os.environ, "MAC_KERNELS_CONFIG": str(folder / "mac.json"), "OMP_WAIT_POLICY": "PASSIVE"},
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(address, process, folder / "log")
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def wait_until_healthy(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            ask(address, lambda server: server.generate([1, 2, 3], max_new_tokens=1))
            assert "ready to roll" in log.read_text(errors="replace")  # its own first request is done
            return
        except Exception:
            text = log.read_text(errors="replace")[-4000:]
            assert process.poll() is None and time.monotonic() < deadline, text
            time.sleep(0.5)


def ask(address: str, question: Callable[[Server], Awaitable[T]]) -> T:
    async def run() -> T:
        async with open_session() as session:
            return await question(Server(session, address))

    return asyncio.run(run())


def generate(address: str, prompt: list[int], tokens: int = 24, **fields: Any) -> Reply:
    return ask(address, lambda s: s.generate(prompt, max_new_tokens=tokens, ignore_eos=True, **fields))


def metrics(address: str) -> dict[str, float]:
    """Every sample of ours by its name and the label that is not of the server."""
    time.sleep(2.5)  # published once a second
    samples = {}
    for line in ask(address, lambda server: server.metrics()).splitlines():
        if found := re.fullmatch(r"(mac_\w+)(?:\{(.*)\})? (\S+)", line):
            own = re.findall(r'(?:reason|event|le)="([^"]*)"', found[2] or "")
            samples[" ".join((found[1], *own))] = float(found[3])
    return samples


def test_metrics_count_what_was_decoded(url: str) -> None:
    before = metrics(url)
    reply = generate(url, PROMPT, tokens=40)
    after = metrics(url)
    new = {name: after[name] - before.get(name, 0) for name in after}
    assert len(reply.output_ids) == 40
    groups = sum(count for name, count in new.items() if name.startswith("mac_groups_total"))
    # the first token comes from the prompt, so there are 39 steps, or 40: one may begin before the end is seen
    steps = int(groups) // (LAYERS * KV_HEADS)
    assert groups == steps * LAYERS * KV_HEADS and steps in (39, 40)
    assert new["mac_groups_total HIT"] > 0.9 * groups
    assert after["mac_hit_ratio"] > 0.5
    # 16 numbers of 4 bytes for a key and as many for a value
    read, skipped = new["mac_read_kv_bytes_total"], new["mac_skipped_kv_bytes_total"]
    tokens = (read + skipped) / (LAYERS * KV_HEADS * 2 * 16 * 4)
    first = len(PROMPT) + 1
    assert tokens == sum(range(first, first + steps))
    assert skipped > read
    assert after["mac_rings_in_use"] >= 1 and after["mac_ring_bytes"] > 0
    assert after["mac_snapshot_events_total saves"] >= 1
    assert 'model_name="tiny",tp_rank="0"' in ask(url, lambda server: server.metrics())


def test_the_audit_sees_the_error_of_reuse_and_none_without(url: str) -> None:
    def settled() -> dict[str, float]:
        generate(url, [1, 2, 3], tokens=3)  # the errors of a step are counted with the next one
        return metrics(url)

    def audited(**fields: Any) -> float:
        before = settled()
        generate(url, OTHER, tokens=30, **fields)
        after = settled()
        names = "mac_audit_groups_total", "mac_audit_relative_error_sum_total"
        groups, error = (after[name] - before[name] for name in names)
        assert groups >= 29 * LAYERS * KV_HEADS
        return error / groups

    exact, reused = audited(sampling={"custom_params": {"mac": "exact"}}), audited()
    assert exact < 1e-5
    assert reused > 1e-2


def test_a_prefix_hit_starts_with_a_warm_ring(url: str) -> None:
    generate(url, THIRD)
    before = metrics(url)
    reply = generate(url, [*THIRD, 5, 6, 7])
    after = metrics(url)
    assert reply.meta["cached_tokens"] >= len(THIRD) - 1
    assert after["mac_snapshot_events_total hits"] > before["mac_snapshot_events_total hits"]


def test_several_answers_and_logprobs(url: str) -> None:
    alone = generate(url, PROMPT, return_logprob=True)
    probabilities = alone.meta["output_token_logprobs"]
    assert [token for _, token, _ in probabilities] == alone.output_ids
    assert all(value <= 0 for value, _, _ in probabilities)

    async def twice(server: Server) -> Any:
        body = {
            "input_ids": PROMPT,
            "sampling_params": {"n": 2, "temperature": 1.0, "max_new_tokens": 8, "ignore_eos": True},
        }
        async with server._request("POST", "/generate", json=body) as response:
            return await response.json()

    assert [len(answer["output_ids"]) for answer in ask(url, twice)] == [8, 8]


def test_a_client_that_hangs_up_leaves_the_server_right(url: str) -> None:
    exact = {"sampling": {"custom_params": {"mac": "exact"}}}
    want = generate(url, PROMPT, tokens=30, **exact).output_ids

    async def hang_up(server: Server) -> None:
        call = asyncio.create_task(server.generate(OTHER, max_new_tokens=300, ignore_eos=True))
        await asyncio.sleep(0.3)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call

    for _ in range(3):
        ask(url, hang_up)
    assert generate(url, PROMPT, tokens=30, **exact).output_ids == want


def test_new_weights_leave_no_ring_and_no_snapshot(url: str) -> None:
    async def update(server: Server) -> Any:
        async with server._request("GET", "/get_model_info") as response:
            path = (await response.json())["model_path"]
        # the prefix cache is left alone, so that rings and snapshots go for the weights' sake
        body = {"model_path": path, "flush_cache": False}
        async with server._request("POST", "/update_weights_from_disk", json=body) as response:
            return await response.json()

    first = generate(url, FOURTH)
    before = metrics(url)
    assert before["mac_snapshot_bytes"] > 0
    assert ask(url, update)["success"]
    assert metrics(url)["mac_snapshot_bytes"] == 0
    again = generate(url, [*FOURTH, *first.output_ids, 5])
    after = metrics(url)
    assert again.meta["cached_tokens"] >= len(FOURTH)
    assert after["mac_snapshot_events_total hits"] == before["mac_snapshot_events_total hits"]
    assert after["mac_rings_in_use"] == 1


def test_adapters_leave_no_snapshot_and_share_none(url: str, tmp_path: Path) -> None:
    async def post(server: Server, path: str, **body: str) -> None:
        async with server._request("POST", path, json={"lora_name": "adapter", **body}) as response:
            assert (await response.json())["success"]

    save_adapter(tmp_path)
    plain = generate(url, FIFTH)
    assert metrics(url)["mac_snapshot_bytes"] > 0
    ask(url, lambda server: post(server, "/load_lora_adapter", lora_path=str(tmp_path)))
    assert (before := metrics(url))["mac_snapshot_bytes"] == 0
    generate(url, [*FIFTH, 5])  # so that there is a snapshot of these tokens without the adapter
    adapted = generate(url, FIFTH, lora_path="adapter")
    after = metrics(url)
    assert adapted.meta["cached_tokens"] == 0 and adapted.output_ids != plain.output_ids
    assert after["mac_snapshot_events_total hits"] == before["mac_snapshot_events_total hits"]
    generate(url, [*FIFTH, 6], lora_path="adapter")
    assert metrics(url)["mac_snapshot_events_total hits"] == after["mac_snapshot_events_total hits"] + 1
    ask(url, lambda server: post(server, "/unload_lora_adapter"))
    assert metrics(url)["mac_snapshot_bytes"] == 0


def test_sleep_leaves_no_ring_and_no_snapshot(url: str) -> None:
    async def post(server: Server, path: str) -> None:
        async with server._request("POST", path, json={"tags": ["kv_cache"]}):
            pass

    first = generate(url, FOURTH)
    assert (before := metrics(url))["mac_snapshot_bytes"] > 0
    ask(url, lambda server: post(server, "/release_memory_occupation"))
    ask(url, lambda server: post(server, "/resume_memory_occupation"))
    assert metrics(url)["mac_snapshot_bytes"] == 0
    again = generate(url, [*FOURTH, *first.output_ids, 5])
    after = metrics(url)
    assert again.meta["cached_tokens"] == 0
    assert after["mac_snapshot_events_total hits"] == before["mac_snapshot_events_total hits"]
    assert after["mac_rings_in_use"] == 1


def test_ab_speaks_to_a_real_server(url: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"input_ids": tokens}) for tokens in (PROMPT, OTHER)))
    command = ["ab", "--url", url, "--baseline", url, "--prompts", prompts, "--max-new-tokens", "12", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from mac_cli.app import main; main(sys.argv[1:])", *map(str, command)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["server"]["attention_backend"] == "mac"
    assert report["server"]["tokens"] == report["baseline"]["tokens"] == 24
    assert report["notes"][0] == "both servers run the attention backend mac"
    assert report["server"]["ttft_s_p50"] > 0


def test_ab_passes_on_what_the_server_says(url: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"input_ids": PROMPT * 6}))
    command = ["ab", "--url", url, "--baseline", url, "--prompts", str(prompts)]
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from mac_cli.app import main; main(sys.argv[1:])", *command],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "prompt 1:" in done.stderr and "longer than" in done.stderr and "Traceback" not in done.stderr
