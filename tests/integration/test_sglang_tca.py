"""``--attention-backend tca`` on a real SGLang engine on the CPU: exact where it must be, else as the library."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from sglang_engines import (
    CHUNK,
    EXACT,
    LONG,
    MIDDLE,
    REUSED,
    SHORT,
    STEPS,
    TORCH,
    Engines,
    Run,
    Steps,
    requests,
)
from tca_budgets import budgets_for

from mac_kernels.tca import TcaBudgets
from mac_transformers import TcaCache

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

TARGET, ALL = 0.9, 1.0
BEGIN = REUSED[0][:12]  # shorter than a window: its far region begins while it is decoded
GONE = requests([*SHORT, 6], tokens=40, rid="gone", abort_after=3)
SPARSE_STEPS: Steps = [
    requests(LONG),  # chunked prefill
    requests([*LONG, 7, 8, 9]),  # continues a cached prefix
    requests(MIDDLE, tokens=90),  # many blocks leave the window
    requests(BEGIN, tokens=60),
    [*requests(REUSED[1]), *GONE],
    requests(LONG, MIDDLE, BEGIN),  # cached but for their last token; decoded together, in rows that others had
    requests(LONG, MIDDLE, SHORT, custom_params=EXACT),
]


def tca(name: str, target: float, steps: Steps) -> Run:
    shape = transformers.LlamaConfig(
        vocab_size=499, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    budgets = budgets_for(SimpleNamespace(config=shape), [[2, 5], [0, 8]])
    # nothing but a dense head reaches a target of 1
    retained = tuple(tuple(tuple(0.95 * mass for mass in head) for head in layer) for layer in budgets.retained)
    budgets = dataclasses.replace(budgets, retained=retained)
    config = {"schema": 1, "tca": {"mass_target": target}, "serving": {"index_memory_gb": 0.01}}
    return Run(name, "tca", steps, {"config.json": json.dumps(config), budgets.file_name: budgets.to_json()})


MIXED = 3  # first steps of STEPS: chunks, passes of several requests, prefix hits
SPARSE, DENSE = tca("sparse", TARGET, SPARSE_STEPS), tca("dense", ALL, STEPS[:MIXED])


class Library:
    """The same model through transformers, which reads a prompt in the engine's chunks."""

    def __init__(self, engines: Engines) -> None:
        self._model = transformers.LlamaForCausalLM.from_pretrained(engines.model, attn_implementation="tca")
        self._budgets = TcaBudgets.from_json(SPARSE.files["tca,model=tiny.json"], source="budgets")

    def answer(self, prompt: list[int], *, tokens: int = 24, cached: list[int] | None = None) -> list[int]:
        """Greedy tokens after a prompt; ``cached``: an earlier prompt, whose keys and values the common prefix has."""
        config = dataclasses.replace(self._budgets.config, mass_target=TARGET)
        cache = TcaCache(self._model.config, config, budgets=self._budgets)
        known = 0
        if cached is not None:
            self._read(cache, cached)
            pairs = zip(prompt[:-1], cached, strict=False)
            known = next(
                (at for at, (one, other) in enumerate(pairs) if one != other), min(len(prompt) - 1, len(cached))
            )
            if known < len(cached):
                cache.crop(known - len(cached))
        found = [self._read(cache, prompt[known:])]
        while len(found) < tokens:
            found.append(self._read(cache, found[-1:]))
        return found

    @torch.inference_mode()
    def _read(self, cache: TcaCache, tokens: list[int]) -> int:
        for first in range(0, len(tokens), CHUNK):
            result = self._model(input_ids=torch.tensor([tokens[first : first + CHUNK]]), past_key_values=cache)
        return int(result.logits[0, -1].argmax())


@pytest.fixture(scope="module")
def library(engines: Engines) -> Library:
    return Library(engines)


def test_dense_budgets_give_the_tokens_of_torch(engines: Engines) -> None:
    want, got = engines(TORCH), engines(DENSE)
    assert got["outputs"] == want["outputs"][:MIXED]
    assert got["counts"]["read"] == got["counts"]["total"] > 0
    assert got["counts"]["prefill_tokens"] > 0, "no prompt went through the sparse path: the test proves nothing"


def test_a_prompt_is_read_and_decoded_as_the_library_does(engines: Engines, library: Library) -> None:
    outputs = engines(SPARSE)["outputs"]
    assert outputs[0] == [library.answer(LONG)]
    assert outputs[2] == [library.answer(MIDDLE, tokens=90)]
    assert outputs[3] == [library.answer(BEGIN, tokens=60)]


def test_a_sparse_budget_changes_tokens_and_reads_less(engines: Engines) -> None:
    got, want = engines(SPARSE), engines(TORCH)
    assert got["outputs"][0][0] != want["outputs"][0][0], "a random model should notice what it does not see"
    counts = got["counts"]
    assert 0 < counts["read"] < 0.8 * counts["total"]
    assert counts["prefill_tokens"] > len(LONG) + len(MIDDLE) - 2 * CHUNK


def test_a_prefix_hit_selects_from_what_is_cached(engines: Engines, library: Library) -> None:
    assert engines(SPARSE)["outputs"][1] == [library.answer([*LONG, 7, 8, 9], cached=LONG)]


def test_requests_that_are_cached_and_decoded_together_keep_their_own_sets(engines: Engines, library: Library) -> None:
    got = engines(SPARSE)
    assert len(got["outputs"][4][1]) < 40, "nothing was aborted: the test proves nothing"
    assert got["outputs"][5] == [library.answer(prompt, cached=prompt) for prompt in (LONG, MIDDLE, BEGIN)]


def test_an_exact_request_reads_everything_and_nothing_that_was_read_sparsely(engines: Engines) -> None:
    got, want = engines(SPARSE), engines(TORCH)
    assert got["outputs"][6] == want["outputs"][0]
    assert got["counts"]["fallbacks"] == {"asked for exact": 3}


def test_start_up_line_tells_budgets_config_and_memory(engines: Engines) -> None:
    log = engines(SPARSE)["log"]
    line = next(line for line in log.splitlines() if "tca: budgets" in line)
    assert "tca,model=tiny.json" in line and "mass_target from" in line and "'mass_target': 0.9" in line
    assert "serving.index_memory_gb" in line and "all up to 26 tokens" in line
