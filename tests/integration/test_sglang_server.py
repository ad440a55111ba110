"""A real SGLang engine on the CPU with a tiny model: MAC changes nothing where it is exact, and nothing leaks."""

from __future__ import annotations

import json
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from sglang_engines import (
    ABORTED,
    ALONE,
    DRAW,
    EXACT,
    LONG,
    MIDDLE,
    SHORT,
    STEPS,
    TORCH,
    VOCAB,
    Engines,
    Run,
    Steps,
    requests,
    save_sliding_model,
    without_aborted,
)

from mac_kernels import HeadLayout, RingPool

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

SMALL = {"window": 16, "band": 8, "sinks": 2, "min_context": 24}
SERVING = {"ring_memory_gb": 0.01, "snapshot_memory_gb": 0.05}


RETRACTING = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}
RING = RingPool.bytes_per_ring(
    num_layers=2, layout=HeadLayout(4, 2, 16), window=SMALL["window"], dtype=torch.float32, correction=True
)


def mac(name: str, steps: Steps, *, engine: dict[str, Any] | None = None, **config: Any) -> Run:
    files = {"config.json": json.dumps({"schema": 1, "serving": SERVING, **config})}
    return Run(name, "mac", steps, files, **(engine or {}))


HITS = {**SMALL, "threshold": "-inf", "influence": None}
ASKS_FOR_EXACT = requests(LONG, MIDDLE, SHORT, custom_params=EXACT)
OLD = find_spec("sglang") is not None and metadata.version("sglang") == "0.5.17"
PAGES = 1 if OLD else 16  # it takes larger pages by a GPU kernel
NEVER = mac("exact", STEPS, engine={"page_size": PAGES, "environment": RETRACTING}, preset="exact", mac=SMALL)
ALWAYS = mac("hit", [*STEPS, ASKS_FOR_EXACT], mac=HITS)
AGAIN = mac("hit again", STEPS[ALONE], mac=HITS)
REPEATING = [[DRAW.randrange(3, VOCAB) for _ in range(6)] * 10 for _ in range(4)]
SCARCE = mac(  # rings for two of four rows and the copies, host memory for two snapshots
    "fast", [*[requests(*REPEATING, tokens=40)] * 2, ASKS_FOR_EXACT], preset="fast", mac=SMALL,
    serving={"ring_memory_gb": 3.5 * RING / 2**30, "snapshot_memory_gb": 2.5 * RING / 2**30},
)  # fmt: skip
TWO_RANKS = mac("hit on two ranks", [*STEPS[ALONE], ASKS_FOR_EXACT], engine={"ranks": 2}, mac=HITS)


def test_tokens_under_exact_equal_those_of_torch(engines: Engines) -> None:
    want, got = engines(TORCH), engines(NEVER)
    assert without_aborted(got["outputs"]) == without_aborted(want["outputs"])
    assert got["counts"]["groups"]["HIT"] == 0
    assert got["counts"]["groups"]["DISTANCE"] > 0, "no step went through a ring: the test proves nothing"


def test_script_has_an_abort_and_retractions(engines: Engines) -> None:
    for run in (TORCH, NEVER):
        assert len(engines(run)["outputs"][ABORTED[0]][ABORTED[1]]) < 100
    assert engines(NEVER)["log"].count("#retracted_reqs") > 5


def test_more_rows_than_rings_and_snapshots_than_memory(engines: Engines) -> None:
    want, got = engines(TORCH), engines(SCARCE)
    counts = got["counts"]
    assert counts["rings"] == 2
    assert counts["fallbacks"]["no free ring"] > 0 and counts["groups"]["NO_RING"] > 0
    assert counts["groups"]["HIT"] > 0 and counts["groups"]["DISTANCE"] + counts["groups"]["INFLUENCE"] > 0
    assert counts["snapshots"]["evictions"] > 0
    assert [len(tokens) for step in got["outputs"][:2] for tokens in step] == [40] * 8
    assert got["outputs"][-1] == want["outputs"][0], "asked for exact"


def test_hits_happen_and_change_tokens(engines: Engines) -> None:
    want, got = engines(TORCH), engines(ALWAYS)
    groups = got["counts"]["groups"]
    assert groups["HIT"] > 0.9 * (sum(groups.values()) - groups["NO_RING"])
    assert got["outputs"][0] != want["outputs"][0], "always reusing must show in a random model"


def test_exact_request_never_reads_what_mac_computed(engines: Engines) -> None:
    want, got = engines(TORCH), engines(ALWAYS)
    assert got["outputs"][-1] == want["outputs"][-1]
    assert got["counts"]["fallbacks"]["asked for exact"] == 3


def test_cached_prefix_restores_rings(engines: Engines) -> None:
    for run in (NEVER, ALWAYS):
        snapshots = engines(run)["counts"]["snapshots"]
        assert snapshots["hits"] > 0
        assert snapshots["rows_restored"] > 0


def test_restart_gives_the_same_tokens(engines: Engines) -> None:
    assert engines(ALWAYS)["outputs"][ALONE] == engines(AGAIN)["outputs"]


def test_two_ranks_give_the_tokens_of_one(engines: Engines) -> None:
    exact, one, two = (engines(run) for run in (TORCH, ALWAYS, TWO_RANKS))
    assert two["outputs"][:-1] == one["outputs"][ALONE]
    assert two["outputs"][-1] == exact["outputs"][0]  # these asked for exact
    assert two["counts"]["groups"]["HIT"] > 0 and two["counts"]["snapshots"]["saves"] > 0


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """Engines with a model of which one layer is not served."""
    model = tmp_path_factory.mktemp("sliding")
    save_sliding_model(model)
    return Engines(model, tmp_path_factory.mktemp("engines"))


@pytest.mark.skipif(OLD, reason="0.5.17 does not load the model")
def test_a_layer_with_a_sliding_window_is_exact_beside_layers_that_hit(sliding: Engines) -> None:
    steps: Steps = [requests(LONG, MIDDLE, SHORT), ASKS_FOR_EXACT]
    want, got = sliding(Run("torch", "torch_native", steps)), sliding(mac("hit", steps, mac=HITS))
    groups = got["counts"]["groups"]
    assert got["counts"]["fallbacks"] == {"sliding window": 1, "asked for exact": 3}
    assert groups["HIT"] > 0.9 * (sum(groups.values()) - groups["NO_RING"])
    assert got["outputs"][0] != want["outputs"][0] and got["outputs"][1] == want["outputs"][1]
    assert "exact attention for sliding window: layers [1]" in got["log"]


def test_start_up_line_tells_config_and_rings(engines: Engines) -> None:
    log = engines(NEVER)["log"]
    line = next(line for line in log.splitlines() if "mac: config" in line)
    assert "preset exact" in line
    assert "serving.ring_memory_gb" in line and "break-even hit rate" in line
    steps = ("supported SGLang", "attention backend", "radix cache backend", "hooks")
    assert "mac-kernels plugin: " + "; ".join(f"{step}: done" for step in steps) in log
