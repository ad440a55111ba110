"""TCA in a whole server: a Llama-3.1 shape with dummy weights, beside the baseline in one run.

Budgets are set, not calibrated: all layers keep the same share of a long prompt, window and sinks included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mac_kernels import HeadLayout
from mac_kernels.errors import MacError
from mac_kernels.tca import TcaBudgets, TcaConfig
from mac_kernels.tca.budgets import CalibrationRun
from mac_kernels.tca.candidates import NUM_SPARSE
from mac_kernels.tuned import ModelKey
from mac_sglang.client import Server

from . import results
from .serving import (
    EXACT,
    Launch,
    ServerDiedError,
    Started,
    agreement,
    counted,
    describe,
    say,
    serve,
    steady_speed,
    three,
)
from .sglang_latency import LLAMA_8B, WrongResultError
from .tca import TcaCase, budgets

_SHARE_TOLERANCE = 0.02  # blocks leave the window while a reply is written
_EXACT_TOKENS = 32
_SKIP, _SAMPLES = 24, 8
_SHORTS = 3
Key = tuple[str, int]  # metric, context


@dataclass
class Measured:
    """What one server did: samples by metric and context, tokens of the exact answer, share of the cache read."""

    samples: dict[Key, list[float]] = field(default_factory=lambda: defaultdict(list))
    exact: list[int] = field(default_factory=list)
    read: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this suite."""
    parser.add_argument("--model", type=Path, help="folder with config.json, instead of the 8B shape")
    parser.add_argument("--long", type=int, default=122_880, help="tokens of the long prompt")
    parser.add_argument("--short", type=int, default=32_768, help="tokens of the short prompts")
    parser.add_argument("--tokens", type=int, default=200, help="tokens decoded after the long prompt")
    parser.add_argument("--kept", default="0.39,0.15", help="shares of the long prompt that are kept, one server each")
    parser.add_argument("--together", type=int, default=1, help="servers that are started at once, if memory allows it")
    parser.add_argument("--time-limit", type=float, help="seconds; what is complete by then is kept")


def table(args: argparse.Namespace) -> str:
    """Name of the default table."""
    return "sglang.csv"


async def run(args: argparse.Namespace, output: Path) -> int:
    """Measure the servers, write the table; 1 if one was wrong or the time did not suffice."""
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder)
        if args.model is None:
            (model / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
        shape = json.loads((model / "config.json").read_text(encoding="utf-8"))
        prompts, launches = _prompts(args, shape["vocab_size"]), _launches(args, model, shape)
        measured: dict[str, Measured] = {}
        wrong = 0
        try:
            async with asyncio.timeout(args.time_limit):
                for at in range(0, len(launches), args.together):
                    some = launches[at : at + args.together]
                    async with serve(some, args.logs) as servers:
                        for launch, server in zip(some, servers, strict=True):
                            wrong |= await _one(server, launch, measured, prompts, args)
                            results.upsert(output, _rows(measured, args, shape, results.facts(args.command_line)))
        except TimeoutError:
            say(f"cut off after {args.time_limit:g} s; what was complete is kept")
            wrong = 1
    return wrong


def set_budgets(shape: Mapping[str, Any], kept: float, context: int) -> TcaBudgets:
    """Budgets under which every layer keeps about this share of a context."""
    layout = HeadLayout(
        shape["num_attention_heads"],
        shape["num_key_value_heads"],
        shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"],
    )
    choice, _ = budgets(TcaCase(kind="decode", batch=1, context=context, layout=layout, kept=kept))
    layer = tuple(tuple(float(place >= one) for place in range(NUM_SPARSE)) for one in choice)
    key = ModelKey(
        name="shape",
        num_layers=shape["num_hidden_layers"],
        num_qo_heads=layout.num_qo_heads,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        vocab_size=shape["vocab_size"],
    )
    run = CalibrationRun(texts=(), samples=0, tokens=0, versions={}, date="", command="set, not calibrated")
    return TcaBudgets(key=key, config=TcaConfig(), measure="row", retained=(layer,) * key.num_layers, run=run)


def _launches(args: argparse.Namespace, model: Path, shape: Mapping[str, Any]) -> list[Launch]:
    arguments = ("--load-format", "dummy", "--skip-tokenizer-init", *args.server_args)
    budgets = {name: json.loads(set_budgets(shape, float(name), args.long).to_json()) for name in args.kept.split(",")}
    sparse = [Launch(name, "tca", model, config, arguments, tp=args.tp) for name, config in budgets.items()]
    return [Launch(args.baseline, args.baseline, model, None, arguments, tp=args.tp), *sparse]


def _prompts(args: argparse.Namespace, vocab: int) -> list[list[int]]:
    """A warm-up of more than one chunk, the short prompts, the long one; no two share a beginning."""
    draw = random.Random(0)
    lengths = (min(9_000, args.long), *[args.short] * _SHORTS, args.long)
    return [[draw.randrange(10, vocab) for _ in range(length)] for length in lengths]


async def _one(
    server: Started,
    launch: Launch,
    measured: dict[str, Measured],
    prompts: Sequence[list[int]],
    args: argparse.Namespace,
) -> int:
    try:
        if isinstance(server, ServerDiedError):
            raise server
        one = await _measure(server, launch, prompts, args)
    except (WrongResultError, MacError, ValueError) as error:
        say(f"{launch.name}: WRONG, not reported: {error}")
        return 1
    measured[launch.name] = one
    for (metric, context), values in one.samples.items():
        quantiles, ratio = three(values), _ratio(one, measured.get(args.baseline), (metric, context))
        say(f"  {launch.name:10} {metric:11} context {context:6}  p20 {quantiles['p20']:>7} p50 {quantiles['p50']:>7} "
            f"p80 {quantiles['p80']:>7} n {quantiles['n']}" + ("" if ratio is None else f"  {ratio:.3f}x"))  # fmt: skip
    return 0


async def _measure(server: Server, launch: Launch, prompts: Sequence[list[int]], args: argparse.Namespace) -> Measured:
    one, sparse = Measured(), launch.attention_backend == "tca"
    warm_up, *shorts, long = prompts
    await server.generate(warm_up, max_new_tokens=_SKIP, ignore_eos=True)
    options = {"sampling": EXACT} if sparse else {}
    reply = await server.generate(warm_up, max_new_tokens=_EXACT_TOKENS, ignore_eos=True, **options)
    one.exact = reply.output_ids
    for prompt in (*shorts, long):
        reply = await server.generate(prompt, max_new_tokens=1, ignore_eos=True)
        if reply.meta["cached_tokens"]:
            raise WrongResultError(f"{reply.meta['cached_tokens']} tokens of a new prompt were cached")
        one.samples["ttft", len(prompt)].append(reply.ttft_s)
    before = [await _bytes(server, name) for name in _KV]
    reply = await server.generate(long, max_new_tokens=args.tokens, ignore_eos=True)
    if reply.meta["cached_tokens"] < len(long) // 2:
        raise WrongResultError(f"only {reply.meta['cached_tokens']} of {len(long)} tokens were cached")
    one.samples["throughput", args.long] += steady_speed([reply], skip=_SKIP, samples=_SAMPLES)
    one.samples["ttft_cached", args.long].append(reply.ttft_s)
    if sparse:
        read, skipped = [await _bytes(server, name) - was for name, was in zip(_KV, before, strict=True)]
        one.read = read / max(read + skipped, 1)
        if not abs(one.read - float(launch.name)) <= _SHARE_TOLERANCE:
            raise WrongResultError(f"decoding read {one.read:.3f} of the cache, {launch.name} was to be kept")
    return one


_KV = ("mac_read_kv_bytes_total", "mac_skipped_kv_bytes_total")


async def _bytes(server: Server, name: str) -> float:
    return (await counted(server, name))[name]


def _rows(
    measured: Mapping[str, Measured], args: argparse.Namespace, shape: Mapping[str, Any], facts: results.Row
) -> list[results.Row]:
    rows: list[dict[str, Any]] = []
    full = measured.get(args.baseline)
    for name, one in measured.items():
        sparse = name != args.baseline
        common = describe(
            shape,
            tp=args.tp,
            facts=facts,
            case="tca",
            provider="tca" if sparse else name,
            config=f"kept {name}" if sparse else "full, beside tca",
            batch=1,
            window=TcaConfig().local_window if sparse else "",
        )

        def row(metric: str, unit: str, context: int, values: list[float], common=common) -> None:
            rows.append({**common, "metric": metric, "unit": unit, "context": context, **three(values)})

        for key, values in one.samples.items():
            row(key[0], "tokens/s" if key[0] == "throughput" else "s", key[1], values)
            if (ratio := _ratio(one, full, key)) is not None:
                row(f"{key[0]}_ratio", "x", key[1], [ratio])
        if one.read is not None:
            row("kv_read", "1", args.long, [one.read])
        if sparse and full is not None:
            row("exact_agreement", "tokens", min(9_000, args.long), [float(agreement(one.exact, full.exact))])
    return results.as_text(rows)


def _ratio(one: Measured, full: Measured | None, key: Key) -> float | None:
    """What the baseline's figure has to be multiplied with."""
    if full is None or one is full or key not in full.samples:
        return None
    return float(three(one.samples[key])["p50"]) / float(three(full.samples[key])["p50"])
