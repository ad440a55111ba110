"""A real SGLang engine on the CPU with a tiny model: MAC changes nothing where it is exact, and nothing leaks."""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

VOCAB, KV_TOKENS = 499, 512
SMALL = {"window": 16, "band": 8, "sinks": 2, "min_context": 24}
SERVING = {"ring_memory_gb": 0.01, "snapshot_memory_gb": 0.05}
CONFIGS = {
    "exact": {"schema": 1, "preset": "exact", "mac": SMALL, "serving": SERVING},
    "hit": {"schema": 1, "mac": {**SMALL, "threshold": "-inf", "influence": None}, "serving": SERVING},
}
EXACT = {"mac": "exact"}
DRAW = random.Random(0)
SHARED, LONG, MIDDLE, SHORT = ([DRAW.randrange(3, VOCAB) for _ in range(n)] for n in (90, 100, 61, 33))
GREEDY = [[DRAW.randrange(3, VOCAB) for _ in range(60)] for _ in range(4)]
REUSED = [[DRAW.randrange(3, VOCAB) for _ in range(30 + 3 * i)] for i in range(6)]


def requests(*prompts: list[int], tokens: int = 24, **extra: Any) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "tokens": tokens, **extra} for prompt in prompts]


STEPS: list[list[dict[str, Any]] | str] = [
    requests(LONG, MIDDLE, SHORT),  # chunked prefill, several requests at once
    requests([*LONG, 7, 8, 9], [*SHARED, 11]),  # the first one continues a cached prefix
    requests([*SHARED, 12], [*SHARED, 13, 14]),
    *(requests(prompt) for prompt in REUSED),  # one after the other, in rows that others had
    [*requests([*MIDDLE, 5]), *requests([*SHORT, 6], tokens=100, rid="gone", abort_after=3)],
    requests([*SHORT, 6], [*MIDDLE, 5]),
    requests(*GREEDY, tokens=90),  # more than the pool holds, so that some are retracted
    "flush",
    requests(LONG, MIDDLE, SHORT),
]
ALONE = slice(3, 3 + len(REUSED))  # steps of one request each: their batches do not depend on when requests arrive
ABORTED = (9, 1)  # step and place of the request whose output has no fixed length


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, tie_word_embeddings=False,
        # the usual 0.02 makes attention almost uniform, which would hide most mistakes
        initializer_range=0.25,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Engines:
    """Runs a script once per name and keeps the results."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model, self._folder = model, folder
        self.run = functools.cache(self._run)

    def _run(self, name: str) -> dict[str, Any]:
        base = name.removesuffix(" again").removesuffix(" on two ranks")
        steps = {
            "hit": [*STEPS, requests(LONG, MIDDLE, SHORT, custom_params=EXACT)],
            "hit again": STEPS[ALONE],
            "hit on two ranks": [*STEPS[ALONE], requests(LONG, MIDDLE, SHORT, custom_params=EXACT)],
        }.get(name, STEPS)
        engine = {
            "model_path": str(self._model), "skip_tokenizer_init": True, "device": "cpu", "dtype": "float32",
            "attention_backend": "mac" if base in CONFIGS else base, "sampling_backend": "pytorch",
            "disable_cuda_graph": True, "max_total_tokens": KV_TOKENS, "max_running_requests": 4,
            "context_length": 256, "chunked_prefill_size": 32, "random_seed": 1, "log_level": "info",
            "schedule_conservativeness": 0.1, "tp_size": 2 if name.endswith(" on two ranks") else 1,
        }  # fmt: skip
        script, result = self._folder / f"{name}.json", self._folder / f"{name}.result"
        script.write_text(json.dumps({"engine": engine, "steps": steps}))
        config = self._folder / f"{name}.config"
        config.write_text(json.dumps(CONFIGS.get(base, {"schema": 1})))
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("sglang_cpu.py")), str(script), str(result)],
            env={
                **os.environ,
                "MAC_KERNELS_CONFIG": str(config),
                "OMP_WAIT_POLICY": "PASSIVE",
                **({"SGLANG_CPU_OMP_THREADS_BIND": "0|0"} if engine["tp_size"] == 2 else {}),
            },
            capture_output=True,
            text=True,
            timeout=900,  # alone about 30 s; a busy machine needs many times that
            check=False,
        )
        log = done.stdout + done.stderr
        assert done.returncode == 0, log[-4000:]
        found: dict[str, Any] = json.loads(result.read_text())
        return {**found, "log": log}


@pytest.fixture(scope="session")
def engines(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(model, tmp_path_factory.mktemp("engines"))


def without_aborted(outputs: list[list[list[int]]]) -> list[list[list[int]]]:
    step, place = ABORTED
    return [
        [tokens for j, tokens in enumerate(outputs_of) if (i, j) != (step, place)]
        for i, outputs_of in enumerate(outputs)
    ]


def test_tokens_under_exact_equal_those_of_torch(engines: Engines) -> None:
    want, got = engines.run("torch_native"), engines.run("exact")
    assert without_aborted(got["outputs"]) == without_aborted(want["outputs"])
    assert got["counts"]["groups"]["HIT"] == 0
    assert got["counts"]["groups"]["DISTANCE"] > 0, "no step went through a ring: the test proves nothing"


def test_script_has_an_abort_and_a_retraction(engines: Engines) -> None:
    for name in ("torch_native", "exact"):
        found = engines.run(name)
        assert len(found["outputs"][ABORTED[0]][ABORTED[1]]) < 100
        assert "retract" in found["log"].lower()


def test_hits_happen_and_change_tokens(engines: Engines) -> None:
    want, got = engines.run("torch_native"), engines.run("hit")
    groups = got["counts"]["groups"]
    assert groups["HIT"] > 0.9 * (sum(groups.values()) - groups["NO_RING"])
    assert got["outputs"][0] != want["outputs"][0], "always reusing must show in a random model"


def test_exact_request_never_reads_what_mac_computed(engines: Engines) -> None:
    want, got = engines.run("torch_native"), engines.run("hit")
    assert got["outputs"][-1] == want["outputs"][-1]
    assert got["counts"]["fallbacks"]["asked for exact"] == 3


def test_cached_prefix_restores_rings(engines: Engines) -> None:
    for name in ("exact", "hit"):
        snapshots = engines.run(name)["counts"]["snapshots"]
        assert snapshots["hits"] > 0
        assert snapshots["rows_restored"] > 0


def test_restart_gives_the_same_tokens(engines: Engines) -> None:
    assert engines.run("hit")["outputs"][ALONE] == engines.run("hit again")["outputs"]


def test_two_ranks_give_the_tokens_of_one(engines: Engines) -> None:
    exact, one, two = (engines.run(name) for name in ("torch_native", "hit", "hit on two ranks"))
    assert two["outputs"][:-1] == one["outputs"][ALONE]
    assert two["outputs"][-1] == exact["outputs"][0]  # these asked for exact
    assert two["counts"]["groups"]["HIT"] > 0 and two["counts"]["snapshots"]["saves"] > 0


def test_start_up_line_tells_config_and_rings(engines: Engines) -> None:
    log = engines.run("exact")["log"]
    line = next(line for line in log.splitlines() if "mac: config" in line)
    assert "preset exact" in line
    assert "serving.ring_memory_gb" in line and "break-even hit rate" in line
    steps = ("supported SGLang", "attention backend", "radix cache backend", "hooks")
    assert "mac-kernels plugin: " + "; ".join(f"{step}: done" for step in steps) in log
