"""A decode step of a server over tensor-parallel ranks, modelled and measured: ``python -m benchmarks.scaling``.

A step of one rank reads its share of the weights and of the keys and values, at the rate of the GPU's memory; every
layer adds a fixed time for everything else, and with several ranks two all-reduces. MAC adds nothing to what ranks
exchange: rings, matching and decisions belong to the heads of a rank. What a hit costs per layer is what one GPU needs
for the kv groups of a rank (:mod:`mac_sglang.break_even`). Where nothing hits, a step is taken to be as long as the
baseline's: it begins ahead of its decisions, or the batch is so large that deciding is a percent or so of it.

One number is fitted, ``REST_US`` to the baseline on one GPU; ``ALL_REDUCE_US`` is what NCCL takes for some kilobytes
over NVLink. The rest is predicted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mac_sglang.break_even import FULL_US, HIT_GROUP_US, HIT_US

from . import results
from .sglang_latency import LLAMA_70B, SHAPES

BYTES_PER_US = {"NVIDIA H100 80GB HBM3": 3.06e6, "NVIDIA H200": 4.3e6}
"""Read rate that attention and matrix products with few rows reach: about nine tenths of the memory's."""
REST_US = 30.0
"""Per layer: norms, rotation, activation, and the parts of matrix products that do not depend on the bytes read."""
ALL_REDUCE_US = 12.0
_ITEM = 2  # bf16


@dataclass(frozen=True, slots=True)
class Step:
    """Times of one decode step in us: weights, attention by what it does, everything else, all-reduces."""

    weights: float
    full: float
    hit: float
    rest: float
    exchange: float

    def total(self, config: str) -> float:
        """``full`` (the baseline), ``always-hit`` or ``never-hit``."""
        attention = {"full": self.full, "always-hit": self.hit, "never-hit": self.full}[config]
        return self.weights + attention + self.rest + self.exchange


def step(shape: Mapping[str, Any], *, tp: int, batch: int, context: int, bytes_per_us: float) -> Step:
    """Predict a step of a model of one of the benchmark's shapes."""
    layers, hidden, dim = shape["num_hidden_layers"], shape["hidden_size"], shape["head_dim"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    attention = hidden * dim * (2 * heads + 2 * kv_heads)
    numbers = layers * (attention + 3 * hidden * shape["intermediate_size"]) + shape["vocab_size"] * hidden
    groups = batch * kv_heads / tp
    full = FULL_US + groups * context * 2 * dim * _ITEM / bytes_per_us
    return Step(
        weights=numbers * _ITEM / tp / bytes_per_us,
        full=layers * full,
        hit=layers * (HIT_US + HIT_GROUP_US * groups),
        rest=layers * REST_US,
        exchange=2 * layers * ALL_REDUCE_US if tp > 1 else 0.0,
    )


def compare(row: results.Row) -> tuple[float, float] | None:
    """Predicted and measured tokens per second of a row of the server tables, if the model speaks of it."""
    shape = next((one for one in SHAPES.values() if str(one["num_attention_heads"]) == row["hq"]), None)
    known = shape is not None and row["gpu"] in BYTES_PER_US and row["case"].startswith("latency")
    if not known or row["metric"] != "throughput" or row["config"] not in ("full", "always-hit", "never-hit"):
        return None
    batch, context, tp = (int(row[name]) for name in ("batch", "context", "tp"))
    predicted = step(shape, tp=tp, batch=batch, context=context, bytes_per_us=BYTES_PER_US[row["gpu"]])
    return batch / predicted.total(row["config"]) * 1e6, float(row["p50"])


def main(argv: list[str] | None = None) -> int:
    """Print every row of the committed tables that the model speaks of, and eight H200s, which were not measured."""
    argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__).parse_args(argv)
    print(f"{'GPU':22} {'tp':>2} {'hq':>3} {'batch':>5} {'config':11} {'model':>8} {'measured':>8} tokens/s  off by")
    for path in sorted(results.RESULTS.glob("*/sglang*.csv")):
        for row in results.read(path):
            if pair := compare(row):
                print(
                    f"{row['gpu']:22} {row['tp']:>2} {row['hq']:>3} {row['batch']:>5} {row['config']:11} "
                    f"{pair[0]:8.1f} {pair[1]:8.1f}           {pair[0] / pair[1] - 1:+.1%}"
                )
    for batch in (1, 8, 32):
        eight = step(LLAMA_70B, tp=8, batch=batch, context=122_880, bytes_per_us=BYTES_PER_US["NVIDIA H200"])
        for config in ("full", "always-hit", "never-hit"):
            speed = batch / eight.total(config) * 1e6
            print(f"{'NVIDIA H200':22}  8  64 {batch:>5} {config:11} {speed:8.1f}        -")
    return 0


if __name__ == "__main__":
    sys.exit(main())
