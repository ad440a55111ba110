"""Real SGLang engines on the CPU with a tiny model: what they are asked, and what came of it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VOCAB, KV_TOKENS, CHUNK = 499, 512, 32
EXACT = {"mac": "exact"}
DRAW = random.Random(0)
SHARED, LONG, MIDDLE, SHORT = ([DRAW.randrange(3, VOCAB) for _ in range(n)] for n in (90, 100, 61, 33))
GREEDY = [[DRAW.randrange(3, VOCAB) for _ in range(60)] for _ in range(4)]
REUSED = [[DRAW.randrange(3, VOCAB) for _ in range(30 + 3 * i)] for i in range(6)]
Steps = list[list[dict[str, Any]] | str]


def requests(*prompts: list[int], tokens: int = 24, **extra: Any) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "tokens": tokens, **extra} for prompt in prompts]


STEPS: Steps = [
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


def without_aborted(outputs: list[list[list[int]]]) -> list[list[list[int]]]:
    step, place = ABORTED
    return [
        [tokens for j, tokens in enumerate(outputs_of) if (i, j) != (step, place)]
        for i, outputs_of in enumerate(outputs)
    ]


@dataclass(frozen=True, eq=False)
class Run:
    """An engine with an attention backend, the files of its config folder, its steps, and what else is its own."""

    name: str
    backend: str
    steps: Steps = field(default_factory=lambda: STEPS)
    files: Mapping[str, str] = field(default_factory=lambda: {"config.json": '{"schema": 1}'})
    ranks: int = 1
    page_size: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)


TORCH = Run("torch", "torch_native")


SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
    # the usual 0.02 makes attention almost uniform, which would hide most mistakes
    "initializer_range": 0.25,
}  # fmt: skip


def save_model(folder: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_hidden_layers=2, head_dim=16, **SHAPE)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def save_sliding_model(folder: Path) -> None:
    """A model whose middle layer has a sliding window."""
    import transformers

    torch.manual_seed(0)
    full, sliding = "full_attention", "sliding_attention"
    config = transformers.Olmo3Config(
        num_hidden_layers=3, layer_types=[full, sliding, full], sliding_window=24, pad_token_id=0, **SHAPE
    )
    transformers.Olmo3ForCausalLM(config).save_pretrained(folder)
    path = folder / "config.json"
    # the name by which SGLang has both generations
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["Olmo2ForCausalLM"]}))


def save_adapter(folder: Path) -> None:
    """A LoRA adapter of that model which changes its tokens."""
    from safetensors.torch import save_file

    torch.manual_seed(1)
    weights = {}
    for layer in range(2):
        for name, width in (("q_proj", 64), ("v_proj", 32)):
            part = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{part}.lora_A.weight"] = 0.2 * torch.randn(4, 64)
            weights[f"{part}.lora_B.weight"] = 0.2 * torch.randn(width, 4)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


class Engines:
    """Runs each of them once and keeps the results; ``model`` is the folder of the model."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self._folder = model, folder
        self._done: dict[str, dict[str, Any]] = {}

    def __call__(self, run: Run) -> dict[str, Any]:
        if run.name not in self._done:
            self._done[run.name] = self._run(run)
        return self._done[run.name]

    def _run(self, run: Run) -> dict[str, Any]:
        engine = {
            "model_path": str(self.model), "skip_tokenizer_init": True, "device": "cpu", "dtype": "float32",
            "attention_backend": run.backend, "sampling_backend": "pytorch",
            "disable_cuda_graph": True, "max_total_tokens": KV_TOKENS, "max_running_requests": 4,
            "context_length": 256, "chunked_prefill_size": CHUNK, "random_seed": 1, "log_level": "info",
            "schedule_conservativeness": 0.1, "tp_size": run.ranks, "page_size": run.page_size,
        }  # fmt: skip
        folder = self._folder / run.name
        config = folder / "config"
        config.mkdir(parents=True)
        for name, text in run.files.items():
            (config / name).write_text(text)
        script, result = folder / "script.json", folder / "result.json"
        script.write_text(json.dumps({"engine": engine, "steps": run.steps}))
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("sglang_cpu.py")), str(script), str(result)],
            env={
                **os.environ,
                "MAC_KERNELS_CONFIG": str(config),
                "OMP_WAIT_POLICY": "PASSIVE",
                **({"SGLANG_CPU_OMP_THREADS_BIND": "|".join("0" * run.ranks)} if run.ranks > 1 else {}),
                **run.environment,
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
