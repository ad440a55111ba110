"""Hold the invariant of the ring rows over a long chained decode of a real model: ``python -m benchmarks.chain``.

The model reads a prompt and then a known continuation, token by token, under one preset; at checkpoints, rows drawn at
random from the ring are compared with an fp64 oracle that replays the decisions of all their ancestors on dense keys.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mac_kernels import MacConfig, Reason
from mac_kernels.testing.conformance import ChainOracle, Decision, compare_row, replay
from mac_kernels.testing.tolerances import Ledger
from mac_transformers import MacCache
from mac_transformers.demo import read_text
from mac_transformers.weights import find_weights


@dataclass
class Recorded:
    """What one layer saw: rotated queries [Hq, D] and decisions, by position."""

    queries: dict[int, torch.Tensor] = field(default_factory=dict)
    decisions: dict[int, Decision] = field(default_factory=dict)


class RecordingCache(MacCache):
    """A MacCache that records the queries and decisions of some layers; batch 1, no padding."""

    def __init__(self, model_config: Any, config: MacConfig, layers: list[int]) -> None:
        super().__init__(model_config, config, record=True)
        self.recorded = {layer: Recorded() for layer in layers}
        self.reasons: collections.Counter[str] = collections.Counter()

    def prefill(self, layer_idx: int, query: torch.Tensor) -> None:
        """Record the queries whose rows may be in the ring."""
        super().prefill(layer_idx, query)
        if layer_idx in self.recorded:
            for back in range(1, min(query.shape[2], self.mac_config.window) + 1):
                self.recorded[layer_idx].queries[self.step.length - back] = query[0, :, -back].clone()

    def decode(self, layer_idx: int, query: torch.Tensor) -> torch.Tensor:
        """Record the query and the decision."""
        out = super().decode(layer_idx, query)
        trace = self.traces[layer_idx]
        self.reasons.update(Reason(int(reason)).name for reason in trace.reason.flatten())
        if layer_idx in self.recorded:
            recorded, t = self.recorded[layer_idx], self.step.length - 1
            reuse = trace.hit[0].repeat_interleave(self.layout.group_size)
            recorded.queries[t] = query[0].clone()
            recorded.decisions[t] = Decision(reuse.clone(), trace.matched_pos[0].clone())
        return out


def check(cache: RecordingCache, layer: int, wanted: list[int], ledger: Ledger) -> int:
    """Compare the wanted rows of one layer with both oracles; returns how many rows were replayed."""
    info, recorded, rings = cache.layer_info[layer], cache.recorded[layer], cache.rings
    assert rings is not None  # after the prompt
    kv = cache.paged(layer)
    k, v = (x[0] for x in kv.gather(torch.zeros(1, dtype=torch.int64), int(kv.table.kv_len())))
    oracles = []
    for plain in (True, False):
        oracle = ChainOracle(
            cache.mac_config,
            cache.layout,
            cache.rope(layer),
            sm_scale=info.sm_scale,
            dtype=torch.float32,
            row_dtype=rings.dtype,
            plain=plain,
        )
        count = replay(oracle, wanted, query=recorded.queries.__getitem__, k=k, v=v, decisions=recorded.decisions)
        oracles.append(oracle)
    for t in wanted:
        compare_row(
            ledger,
            rings,
            (info.ring_layer, int(rings.slot_table[0]), t),
            *(oracle.rows[t] for oracle in oracles),
            correction=cache.mac_config.correction,
        )
    return count


@torch.inference_mode()
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Decode, check at the checkpoints and return the report."""
    model, tokenizer = find_weights(arguments.model).load()
    model.set_attn_implementation("mac")
    text, name = read_text(arguments.text)
    tokens = tokenizer(text, return_tensors="pt").input_ids[0, : arguments.prompt_tokens + arguments.tokens]
    config = MacConfig.preset(arguments.preset)
    layers = [int(layer) for layer in arguments.layers.split(",")]
    cache = RecordingCache(model.config, config, layers)
    model(tokens[None, : arguments.prompt_tokens], past_key_values=cache, logits_to_keep=1)

    generator = torch.Generator().manual_seed(0)
    stops = {arguments.tokens * part // arguments.checkpoints for part in range(1, arguments.checkpoints + 1)}
    ledger, checked, replayed = Ledger(), 0, 0
    for step, token in enumerate(tokens[arguments.prompt_tokens :], start=1):
        model(token[None, None], past_key_values=cache)
        if step in stops:
            newest = cache.step.length - 1
            for layer in layers:
                back = torch.randperm(config.window, generator=generator)[: arguments.rows]
                wanted = sorted(newest - int(lag) for lag in back)
                replayed += check(cache, layer, wanted, ledger)
                checked += len(wanted)
            print(f"step {step}: {checked} rows compared, {replayed} replayed", file=sys.stderr)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is the JSON report
        share = ledger.verify()
    total = sum(cache.reasons.values())
    return {
        "text": name,
        "preset": arguments.preset,
        "prompt_tokens": arguments.prompt_tokens,
        "steps": arguments.tokens,
        "layers": layers,
        "rows_compared": checked,
        "rows_replayed": replayed,
        "largest_share_of_allowed_error": share,
        "group_hit": cache.reasons["HIT"] / total,
        "reasons": dict(cache.reasons),
    }


def main() -> None:
    """Parse the command line, run, print JSON; exit status 1 if the invariant does not hold."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chain", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder, .gguf file or hub id; default: the demo's model")
    parser.add_argument("--text", type=Path, help="UTF-8 file; default: the demo's text")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--prompt-tokens", type=int, default=2100)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--layers", default="0,9,19,29", help="layers to check, comma separated")
    parser.add_argument("--rows", type=int, default=8, help="rows per layer and checkpoint")
    parser.add_argument("--checkpoints", type=int, default=4)
    try:
        print(json.dumps(run(parser.parse_args()), indent=1))
    except AssertionError as error:
        sys.exit(f"the invariant does not hold: {error}")


if __name__ == "__main__":
    main()
