"""Speed of a whole server: a Llama-3.1 shape with dummy weights, MAC beside the baseline in one run.

Every request of a batch has a long prompt of its own, or, where the keys and values of so many do not fit the GPUs,
``--own N`` tokens of its own behind a common prefix (case ``latency-shared-but-N``): decode reads the same number of
keys and values either way, at the same addresses for all requests in the second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mac_kernels import MacConfig
from mac_kernels.errors import MacError
from mac_sglang.client import Reply, Server

from . import results
from .serving import (
    EXACT,
    Launch,
    ServerDiedError,
    agreement,
    describe,
    groups,
    hit_rate,
    logged_speed,
    say,
    serve,
    steady_speed,
    three,
)

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
LLAMA_70B = {
    **LLAMA_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
SHAPES = {"llama-8b": LLAMA_8B, "llama-70b": LLAMA_70B}
MAC_CONFIGS: dict[str, tuple[dict[str, Any], float]] = {
    "always-hit": ({"threshold": "-inf", "influence": None, "max_age": None}, 1.0),
    "never-hit": ({"threshold": 1.0, "break_even": None}, 0.0),
    "never-hit-paused": ({"threshold": 1.0}, 0.0),
}
"""Changes of ``careful``, and the hit rate that they force. What never hits is exact: its tokens are the baseline's.

``never-hit`` searches at every step all the same; ``never-hit-paused`` gives that up for a while, as layers without
hits do by default.
"""
_HIT_TOLERANCE = 0.02  # the first steps after an empty ring find no row
_SKIP, _SAMPLES = 24, 8
_SHORT_PROMPTS, _EXACT_PROMPTS = 3, 2
Key = tuple[str, int, int]  # metric, batch, context


@dataclass
class Measured:
    """What one server did: samples by metric, batch and context; by batch, the tokens and the reused share of groups.

    ``prefill_s`` is the part of each time to the first token that the server itself counts as prefill, by the same key.
    """

    samples: dict[Key, list[float]] = field(default_factory=lambda: defaultdict(list))
    prefill_s: dict[Key, list[float]] = field(default_factory=lambda: defaultdict(list))
    tokens: dict[int, list[list[int]]] = field(default_factory=dict)
    hit_rate: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids: a first prompt, short prompts, more of them for exact requests, long ones for the largest batch."""

    warm_up: list[int]
    shorts: list[list[int]]
    exact: list[list[int]]
    longs: list[list[int]]


class WrongResultError(Exception):
    """A server did not do what its config forces; nothing of it is reported."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this suite."""
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-8b")
    parser.add_argument("--model", type=Path, help="folder with config.json, instead of a shape")
    parser.add_argument("--long", type=int, default=122_880, help="tokens of the long prompts")
    parser.add_argument("--short", type=int, default=32_768, help="tokens of the short prompts; 0: none")
    parser.add_argument("--own", type=int, help="tokens that long prompts do not share; default: they share none")
    parser.add_argument("--batches", type=_numbers, default=(1, 3), help="requests at once, e.g. 1,8,32")
    parser.add_argument("--tokens", type=int, default=200, help="tokens decoded per request")
    parser.add_argument("--configs", default="always-hit,never-hit", help=f"comma separated: {', '.join(MAC_CONFIGS)}")
    parser.add_argument("--together", type=int, default=1, help="servers that are started at once, if memory allows it")
    parser.add_argument("--time-limit", type=float, help="seconds; what is complete by then is kept")
    parser.add_argument("--repeat-baseline", action="store_true", help="measure the baseline once more at the end")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def table(args: argparse.Namespace) -> str:
    """Name of the default table."""
    return "sglang_tp.csv" if args.shape == "llama-70b" else "sglang.csv"


async def run(args: argparse.Namespace, output: Path) -> int:
    """Measure one server after the other, write the table; 1 if one was wrong or the time did not suffice."""
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder)
        if args.model is None:
            (model / "config.json").write_text(json.dumps(SHAPES[args.shape]), encoding="utf-8")
        shape = json.loads((model / "config.json").read_text(encoding="utf-8"))
        prompts = make_prompts(args, shape["vocab_size"])
        measured: dict[str, Measured] = defaultdict(Measured)
        wrong = 0
        try:
            async with asyncio.timeout(args.time_limit):
                for launches in _batched(_launches(args, model), args.together):
                    async with serve(launches, args.logs) as servers:
                        for launch, server in zip(launches, servers, strict=True):
                            try:
                                await _measure(server, launch.name, measured[launch.name], prompts, args)
                            except (WrongResultError, MacError, ValueError) as error:
                                say(f"{launch.name}: WRONG, not reported: {error}")
                                del measured[launch.name]
                                wrong = 1
                            _show(launch.name, measured, args.baseline)
                            results.upsert(output, _rows(measured, args, shape, results.facts(args.command_line)))
        except TimeoutError:
            say(f"cut off after {args.time_limit:g} s; what was complete is kept")
            wrong = 1
        finally:
            results.upsert(output, _rows(measured, args, shape, results.facts(args.command_line)))
    return wrong


def _launches(args: argparse.Namespace, model: Path) -> list[Launch]:
    arguments = ("--load-format", "dummy", "--skip-tokenizer-init", *args.server_args)
    baseline = Launch(args.baseline, args.baseline, model, None, arguments, tp=args.tp)
    configs = {
        name: {"preset": "careful", "mac": MAC_CONFIGS[name][0], "serving": args.serving}
        for name in args.configs.split(",")
    }
    mac = [Launch(name, "mac", model, config, arguments, tp=args.tp) for name, config in configs.items()]
    return [baseline, *mac, *([baseline] if args.repeat_baseline else [])]


def _batched(launches: list[Launch], size: int) -> Iterator[list[Launch]]:
    for at in range(0, len(launches), size):
        yield launches[at : at + size]


def make_prompts(args: argparse.Namespace, vocab: int) -> Prompts:
    """Draw the prompts, the same for every server; none shares more with another than ``--own`` says."""
    draw = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [draw.randrange(10, vocab) for _ in range(length)]

    counts = (_SHORT_PROMPTS, _EXACT_PROMPTS) if args.short else (0, 0)
    common = [] if args.own is None else prompt(args.long - args.own)
    longs = [[*common, *prompt(args.long - len(common))] for _ in range(max(args.batches))]
    shorts, exact = ([prompt(args.short) for _ in range(count)] for count in counts)
    return Prompts(prompt(min(9_000, args.long)), shorts, exact, longs)  # 9,000: more than one chunk of a prefill


async def _measure(
    server: Server | ServerDiedError, name: str, measured: Measured, prompts: Prompts, args: argparse.Namespace
) -> None:
    if isinstance(server, ServerDiedError):
        raise server
    await server.generate(prompts.warm_up, max_new_tokens=_SKIP, ignore_eos=True)
    for tokens in prompts.shorts:
        await _first_token(server, tokens, measured, "ttft")
    if name in MAC_CONFIGS:
        for tokens in prompts.exact:  # neither rings nor snapshots: what remains beyond the baseline is the rest
            await _first_token(server, tokens, measured, "ttft_exact", sampling=EXACT)
    # last, because they have to stay in the cache; of prompts with a common prefix only one is new
    known, log = 0, args.logs / f"sglang-{name}.log"
    for batch in args.batches:
        new = prompts.longs[known : batch if args.own is None else 1]
        for tokens in new:
            await _first_token(server, tokens, measured, "ttft")
        known += len(new)
        before, begin = await _counted(server, name), log.stat().st_size if log.exists() else 0
        replies = await _together(server, prompts.longs[:batch], args)
        share = hit_rate(await _counted(server, name) - before)
        if name in MAC_CONFIGS and not abs(share - MAC_CONFIGS[name][1]) <= _HIT_TOLERANCE:
            raise WrongResultError(f"batch {batch}: hit rate {share:.3f}, forced {MAC_CONFIGS[name][1]:g}")
        measured.samples["throughput", batch, args.long] += steady_speed(replies, skip=_SKIP, samples=_SAMPLES)
        if logged := logged_speed(log, batch, begin=begin):
            measured.samples["throughput_logged", batch, args.long] += logged
        measured.samples["ttft_cached", batch, args.long] += [reply.ttft_s for reply in replies]
        measured.tokens[batch], measured.hit_rate[batch] = [reply.output_ids for reply in replies], share


async def _first_token(server: Server, tokens: list[int], measured: Measured, metric: str, **options: Any) -> None:
    reply = await server.generate(tokens, max_new_tokens=1, ignore_eos=True, **options)
    if reply.meta["cached_tokens"]:
        raise WrongResultError(f"{reply.meta['cached_tokens']} tokens of a new prompt were cached")
    measured.samples[metric, 1, len(tokens)].append(reply.ttft_s)
    begin, end = (reply.meta.get(name, float("nan")) for name in ("forward_entry_time", "prefill_finished_time"))
    measured.prefill_s[metric, 1, len(tokens)].append(end - begin)


async def _counted(server: Server, name: str) -> Counter[str]:
    return await groups(server) if name in MAC_CONFIGS else Counter()


async def _together(server: Server, prompts: list[list[int]], args: argparse.Namespace) -> list[Reply]:
    """Decode prompts that are cached, but for what they do not share, all at once."""
    calls = [server.generate(prompt, max_new_tokens=args.tokens, ignore_eos=True) for prompt in prompts]
    replies = await asyncio.gather(*calls)
    for prompt, reply in zip(prompts, replies, strict=True):
        if reply.meta["cached_tokens"] < len(prompt) // 2:
            raise WrongResultError(f"only {reply.meta['cached_tokens']} of {len(prompt)} tokens were cached")
    return list(replies)


def _rows(
    measured: Mapping[str, Measured], args: argparse.Namespace, shape: dict[str, Any], facts: results.Row
) -> list[results.Row]:
    config = MacConfig()
    rows: list[dict[str, Any]] = []
    full = measured.get(args.baseline)
    for name, one in measured.items():
        forced = f"{MAC_CONFIGS[name][1]:g}" if name in MAC_CONFIGS else ""
        common = describe(
            shape,
            tp=args.tp,
            facts=facts,
            case="latency" if args.own is None else f"latency-shared-but-{args.own}",
            provider="mac" if forced else name,
            config=name if forced else "full",
            window=config.window,
            band=config.band,
            hit_rate=forced,
        )

        def row(metric: str, unit: str, batch: int, context: int, values: list[float], common=common) -> None:
            rows.append({**common, "metric": metric, "unit": unit, "batch": batch, "context": context, **three(values)})

        for (metric, batch, context), values in one.samples.items():
            row(metric, "tokens/s" if metric.startswith("throughput") else "s", batch, context, values)
            ratio = _ratio(one, full, (metric, batch, context))
            if ratio is not None:
                row(f"{metric}_ratio", "x", batch, context, [ratio])
        for batch, share in one.hit_rate.items() if forced else ():
            row("hit_rate", "1", batch, args.long, [share])
            if full is not None and batch in full.tokens:
                pairs = zip(one.tokens[batch], full.tokens[batch], strict=True)
                row("agreement", "tokens", batch, args.long, [float(agreement(a, b)) for a, b in pairs])
    return results.as_text(rows)


def _ratio(one: Measured, full: Measured | None, key: Key) -> float | None:
    """What the baseline's figure has to be multiplied with; an exact request's is compared with its plain one."""
    metric, batch, context = key
    other = ("ttft" if metric == "ttft_exact" else metric, batch, context)
    if full is None or one is full or other not in full.samples:
        return None
    return float(three(one.samples[key])["p50"]) / float(three(full.samples[other])["p50"])


def _show(name: str, measured: Mapping[str, Measured], baseline: str) -> None:
    one, full = measured.get(name, Measured()), measured.get(baseline)
    for key, values in one.samples.items():
        quantiles, ratio = three(values), _ratio(one, full, key)
        metric, batch, context = key
        say(f"  {metric:17} batch {batch:2} context {context:6}  p20 {quantiles['p20']:>7} p50 {quantiles['p50']:>7} "
            f"p80 {quantiles['p80']:>7} n {quantiles['n']}" + ("" if ratio is None else f"  {ratio:.3f}x"))  # fmt: skip
        if key in one.prefill_s:
            pairs = zip(values, one.prefill_s[key], strict=True)
            say("    in order, prefill + rest: " + ", ".join(f"{own:.3f} + {all_ - own:.3f}" for all_, own in pairs))
    rates = ", ".join(f"{share:.4f} (batch {batch})" for batch, share in one.hit_rate.items())
    say(f"{name}: " + (f"hit rate {rates}" if name in MAC_CONFIGS else "measured"))
