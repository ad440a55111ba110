"""Speed of a whole server: a Llama-3.1-8B-shaped model with dummy weights, MAC beside the baseline in one run."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mac_kernels import MacConfig
from mac_sglang.client import Reply, Server

from . import results
from .serving import Launch, agreement, groups, hit_rate, say, serve, sglang_version, steady_speed, three

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
MAC_CONFIGS: dict[str, tuple[dict[str, Any], float]] = {
    "always-hit": ({"threshold": "-inf", "influence": None, "max_age": None}, 1.0),
    "never-hit": ({"threshold": 1.0}, 0.0),
}
"""Changes of ``careful``, and the hit rate that they force."""
_HIT_TOLERANCE = 0.02  # the first steps after an empty ring find no row
_BATCHES = (1, 3)
_SKIP, _SAMPLES = 24, 8
Key = tuple[str, int, int]  # metric, batch, context


@dataclass
class Measured:
    """Samples by metric, batch and context; tokens of the long prompts; counted kv groups per part."""

    samples: dict[Key, list[float]] = field(default_factory=lambda: defaultdict(list))
    tokens: list[list[int]] = field(default_factory=list)
    hit_rate: float = float("nan")


class WrongResultError(Exception):
    """A server did not do what its config forces; nothing of it is reported."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this suite."""
    parser.add_argument("--model", type=Path, help="folder with config.json; default: a Llama-3.1-8B shape")
    parser.add_argument("--long", type=int, default=122_880, help="tokens of the long prompts")
    parser.add_argument("--short", type=int, default=32_768, help="tokens of the short prompts")
    parser.add_argument("--tokens", type=int, default=200, help="tokens decoded per request")
    parser.add_argument("--only", choices=list(MAC_CONFIGS), help="this MAC server alone, beside the baseline")
    parser.add_argument("--repeat-baseline", action="store_true", help="measure the baseline once more at the end")


async def run(args: argparse.Namespace, output: Path) -> int:
    """Measure all servers one after the other, write the table; 1 if one was wrong."""
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder)
        if args.model is None:
            (model / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
        shape = json.loads((model / "config.json").read_text(encoding="utf-8"))
        arguments = ("--load-format", "dummy", "--skip-tokenizer-init", "--tp", str(args.tp), *args.server_args)
        baseline = Launch(args.baseline, args.baseline, model, None, arguments)
        launches = [
            Launch(name, "mac", model, {"preset": "careful", "mac": changes, "serving": args.serving}, arguments)
            for name, (changes, _) in MAC_CONFIGS.items()
            if args.only in (None, name)
        ]
        measured: dict[str, Measured] = defaultdict(Measured)
        wrong = 0
        for launch in [baseline, *launches, *([baseline] if args.repeat_baseline else [])]:
            try:
                async with serve(launch, args.logs / f"sglang-{launch.name}.log") as server:
                    await _measure(server, measured[launch.name], args, shape["vocab_size"])
                _check(launch.name, measured[launch.name])
            except WrongResultError as error:
                say(f"{launch.name}: WRONG, not reported: {error}")
                del measured[launch.name]
                wrong = 1
            # after every server, so that a run that is cut off leaves what it has
            results.upsert(output, _rows(measured, args, shape, results.facts(args.command_line)))
            _show(launch.name, measured, args.baseline)
    return wrong


async def _measure(server: Server, measured: Measured, args: argparse.Namespace, vocab: int) -> None:
    # the seed is the same for every server: the same prompts, none of which shares a prefix with another
    draw = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [draw.randrange(10, vocab) for _ in range(length)]

    warm_up = prompt(min(9_000, args.short))  # more than one chunk of a prefill
    await server.generate(warm_up, max_new_tokens=_SKIP, ignore_eos=True)
    before = await groups(server)
    shorts, longs = ([prompt(length) for _ in range(max(_BATCHES))] for length in (args.short, args.long))
    for prompts in (shorts, longs):
        for tokens in prompts:
            reply = await server.generate(tokens, max_new_tokens=1, ignore_eos=True)
            if reply.meta["cached_tokens"]:
                raise WrongResultError(f"{reply.meta['cached_tokens']} tokens of a new prompt were cached")
            measured.samples["ttft", 1, len(tokens)].append(reply.ttft_s)
    for batch in _BATCHES:
        replies = await _together(server, longs[:batch], args.tokens)
        speeds = steady_speed(replies, skip=_SKIP, samples=_SAMPLES)
        measured.samples["throughput", batch, args.long] += speeds
        measured.tokens = [reply.output_ids for reply in replies]
    measured.hit_rate = hit_rate(await groups(server) - before)


async def _together(server: Server, prompts: list[list[int]], tokens: int) -> list[Reply]:
    """Decode prompts whose prefixes are cached, all at once."""
    calls = [server.generate(prompt, max_new_tokens=tokens, ignore_eos=True) for prompt in prompts]
    replies = await asyncio.gather(*calls)
    for prompt, reply in zip(prompts, replies, strict=True):
        if reply.meta["cached_tokens"] < len(prompt) // 2:
            raise WrongResultError(f"only {reply.meta['cached_tokens']} of {len(prompt)} tokens were cached")
    return list(replies)


def _check(name: str, measured: Measured) -> None:
    if name in MAC_CONFIGS and not abs(measured.hit_rate - MAC_CONFIGS[name][1]) <= _HIT_TOLERANCE:
        raise WrongResultError(f"hit rate {measured.hit_rate:.3f}, forced {MAC_CONFIGS[name][1]:g}")


def _rows(
    measured: Mapping[str, Measured], args: argparse.Namespace, shape: dict[str, Any], facts: results.Row
) -> list[results.Row]:
    config, version, rows = MacConfig(), sglang_version(), []
    full = measured.get(args.baseline)
    for name, one in measured.items():
        common = {
            "suite": "sglang",
            "case": "latency",
            "provider": "mac" if name in MAC_CONFIGS else name,
            "backend": version,
            "hq": shape["num_attention_heads"],
            "hkv": shape["num_key_value_heads"],
            "head_dim": shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"]),
            "dtype": "bfloat16",
            "page_size": 1,
            "window": config.window,
            "band": config.band,
            "lag": "",
            "config": name if name in MAC_CONFIGS else "full",
            "hit_rate": f"{MAC_CONFIGS[name][1]:g}" if name in MAC_CONFIGS else "",
            "miss_pattern": "",
            "tp": args.tp,
            **facts,
        }

        def row(metric: str, unit: str, batch: int, context: int, values: list[float], common=common) -> None:
            rows.append({**common, "metric": metric, "unit": unit, "batch": batch, "context": context, **three(values)})

        for (metric, batch, context), values in one.samples.items():
            row(metric, "s" if metric == "ttft" else "tokens/s", batch, context, values)
            if full is not None and one is not full:
                row(f"{metric}_ratio", "x", batch, context, [_ratio(one, full, (metric, batch, context))])
        if name in MAC_CONFIGS:
            row("hit_rate", "1", max(_BATCHES), args.long, [one.hit_rate])
            if full is not None:
                pairs = zip(one.tokens, full.tokens, strict=True)
                same = [float(agreement(a, b)) for a, b in pairs]
                row("agreement", "tokens", max(_BATCHES), args.long, same)
    return [{name: str(value) for name, value in row.items()} for row in rows]


def _ratio(one: Measured, full: Measured, key: Key) -> float:
    return float(three(one.samples[key])["p50"]) / float(three(full.samples[key])["p50"])


def _show(name: str, measured: Mapping[str, Measured], baseline: str) -> None:
    one, full = measured.get(name, Measured()), measured.get(baseline)
    say(f"{name}: hit rate {one.hit_rate:.4f}")
    for key, values in one.samples.items():
        quantiles = three(values)
        ratio = f"  {_ratio(one, full, key):.3f}x" if full is not None and one is not full else ""
        metric, batch, context = key
        say(f"  {metric:10} batch {batch} context {context:6}  p20 {quantiles['p20']:>7} p50 {quantiles['p50']:>7} "
            f"p80 {quantiles['p80']:>7} n {quantiles['n']}{ratio}")  # fmt: skip
