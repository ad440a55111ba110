"""A real model on a whole server: agreement with the baseline, hit rates and speed of the presets, prefix cache on.

Where an answer under ``exact`` first differs from the baseline's, the baseline says how far the two tokens are apart: a
gap of ``--tie`` or more is an error. The baseline's own answers in batches of another size are judged beside them, and
with ``--tp`` those of a baseline on one GPU (parts ``...-one-gpu``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from mac_kernels import PRESETS
from mac_kernels.errors import InputError, MacError
from mac_sglang.client import Reply, Server

from . import results
from .serving import Launch, Reference, agreement, describe, groups, hit_rate, say, serve, steady_speed, three

PRESETS_MEASURED = ("exact", "careful", "balanced", "fast")
_PARTS = ("distinct", "shared")
_EARLY = 16  # tokens in which a second request has to reach the steady hit rate
_LATER = 100
_SKIP, _SAMPLES = 24, 8
AddRow = Callable[[str, str, str, Sequence[float]], None]


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids: prompts without and with a common beginning, and what a user says in the second turn."""

    distinct: list[list[int]]
    shared: list[list[int]]
    turns: list[list[int]]


@dataclass
class Measured:
    """What one server did, by part: replies, kv groups by reason, gaps of first differing tokens in nats."""

    replies: dict[str, list[Reply]] = field(default_factory=dict)
    groups: dict[str, Counter[str]] = field(default_factory=dict)
    gaps: dict[str, list[float]] = field(default_factory=dict)

    def tokens(self, part: str) -> list[list[int]]:
        """Tokens of every reply."""
        return [reply.output_ids for reply in self.replies[part]]


@dataclass(frozen=True, slots=True)
class Baseline:
    """A server that others are compared with, what it did, and how parts are called that are compared with it."""

    server: Server
    measured: Measured
    suffix: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this suite."""
    parser.add_argument("--model", help="folder, .gguf file or hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path, help="UTF-8 file; default: the demo's text")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=7_000)
    parser.add_argument("--tokens", type=int, default=1_000)
    parser.add_argument("--presets", default=",".join(PRESETS_MEASURED), help="comma separated")
    parser.add_argument("--tie", type=float, default=0.5, help="nats within which two tokens count as tied")


def table(args: argparse.Namespace) -> str:
    """Name of the default table."""
    del args
    return "sglang.csv"


async def run(args: argparse.Namespace, output: Path) -> int:
    """Start all servers at once, measure one after the other, write the table after each; 1 if one failed or was wrong.

    Servers that only wait use no GPU, so the memory of all of them is what it takes; ``--server-args`` must leave it.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokens, shape = prepare(args.model, args.text, Path(folder), tp=args.tp)
        prompts = make_prompts(tokens, args.batch, args.prompt_tokens)
        # SGLang counts the row of a chunked prompt twice: with no row to spare the last request waits for another's end
        spare = ("--max-running-requests", str(args.batch + 8))
        arguments = ("--skip-tokenizer-init", *args.server_args, *spare)
        launches = [Launch(args.baseline, args.baseline, Path(folder), None, arguments, tp=args.tp)]
        if args.tp > 1:
            launches.append(Launch(f"{args.baseline}-one-gpu", args.baseline, Path(folder), None, arguments))
        for preset in args.presets.split(","):
            config = {"preset": preset, "serving": args.serving}
            launches.append(Launch(preset, "mac", Path(folder), config, arguments, tp=args.tp))
        baselines: list[Baseline] = []
        failed = 0
        async with serve(launches, args.logs, "sglang-smollm2-") as servers:
            for launch, server in zip(launches, servers, strict=True):
                try:
                    if isinstance(server, MacError):
                        raise server
                    measured = await _measure(server, prompts, args.tokens, baseline=launch.config is None)
                    if launch.config is None:
                        suffix = launch.name.removeprefix(args.baseline)
                        baselines.append(Baseline(server, measured, suffix))
                    if launch.config is None or launch.name == "exact":
                        for baseline in baselines:
                            await _ask_gaps(baseline, prompts, measured)
                except MacError as error:
                    say(f"{launch.name}: FAILED, not reported: {error}")
                    failed = 1
                    if not baselines:
                        break  # nothing to compare with
                    continue
                rows = _rows(launch, measured, baselines, args, shape)
                results.upsert(output, rows)
                for row in rows:
                    say(f"{row['config']:9} {row['case']:16} {row['metric']:20} p20 {row['p20']:>7} p50 "
                        f"{row['p50']:>7} p80 {row['p80']:>7} {row['unit']}")  # fmt: skip
                wrong = [gap for gaps in measured.gaps.values() for gap in gaps if gap >= args.tie]
                if wrong and launch.config is not None:
                    say(f"{launch.name}: WRONG: first differing tokens are apart by {wrong} nats")
                    failed = 1
    return failed


def prepare(model: str | None, text: Path | None, folder: Path, *, tp: int = 1) -> tuple[list[int], dict[str, Any]]:
    """Write the model as bf16 safetensors, which every version of SGLang loads; return the text's tokens and the shape.

    SGLang's own loader of GGUF files needs kernels that not every build has. If the heads cannot be divided among
    ``tp`` GPUs, groups of heads of zeros are added: they change no output.
    """
    from transformers import AutoModelForCausalLM

    from mac_transformers.demo import read_text
    from mac_transformers.weights import find_weights

    loaded, tokenizer = find_weights(model).load()
    weights = loaded.state_dict()
    if hasattr(loaded.config, "quantization_config"):
        # a model that was read from GGUF holds plain weights but refuses to be saved
        del loaded.config.quantization_config
    pad_heads(loaded.config, weights, tp)
    plain = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
    plain.load_state_dict(weights)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokens: list[int] = tokenizer(read_text(text)[0]).input_ids
    return tokens, json.loads((folder / "config.json").read_text(encoding="utf-8"))


def pad_heads(config: Any, weights: dict[str, Any], tp: int) -> None:
    """Add kv groups of zeros, in place, until their number can be divided by ``tp``."""
    kv_heads, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    more = -kv_heads % tp
    if not more:
        return
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    config.head_dim = dim
    config.num_key_value_heads, config.num_attention_heads = kv_heads + more, (kv_heads + more) * group
    rows = {"q_proj": more * group * dim, "k_proj": more * dim, "v_proj": more * dim}
    for name, weight in weights.items():
        kind = name.split(".")[-2] if name.endswith(".weight") else ""
        if kind in rows:
            weights[name] = pad(weight, (0, 0, 0, rows[kind]))
        elif kind == "o_proj":
            weights[name] = pad(weight, (0, rows["q_proj"]))


def make_prompts(tokens: Sequence[int], batch: int, length: int) -> Prompts:
    """Cut prompts out of a text; the shared ones have six of seven parts in common.

    Raises
    ------
    InputError
        If the text is too short.
    """
    common, tail, turn = length * 6 // 7, length - length * 6 // 7, 48
    if len(tokens) < batch * length + turn:
        raise InputError(f"the text has {len(tokens)} tokens, {batch * length + turn} are needed; give a longer --text")
    distinct = [list(tokens[at * length : (at + 1) * length]) for at in range(batch)]
    start = [list(tokens[:common])] * batch
    ends = [list(tokens[common + at * tail : common + (at + 1) * tail]) for at in range(batch)]
    turns = [list(tokens[-(at + 1) * turn : -at * turn or None]) for at in range(batch)]
    return Prompts(distinct, [a + b for a, b in zip(start, ends, strict=True)], turns)


async def _measure(server: Server, prompts: Prompts, tokens: int, *, baseline: bool) -> Measured:
    measured, counted = Measured(), Counter[str]()

    async def part(name: str, inputs: list[list[int]], count: int, *, at_once: int | None = None) -> None:
        nonlocal counted
        size = at_once or len(inputs)
        replies: list[Reply] = []
        for at in range(0, len(inputs), size):
            calls = [server.generate(ids, max_new_tokens=count, ignore_eos=True) for ids in inputs[at : at + size]]
            replies += await asyncio.gather(*calls)
        measured.replies[name] = replies
        if not baseline:
            before, counted = counted, await groups(server)
            measured.groups[name] = counted - before

    await part("distinct", prompts.distinct, tokens)
    if baseline:
        # the same prompts in other batches: what two correct servers may differ by
        await server.flush()
        await part("other order", prompts.distinct[::-1], tokens, at_once=max(1, len(prompts.distinct) // 2))
        measured.replies["other order"].reverse()
    else:
        heard = zip(prompts.distinct, measured.tokens("distinct"), prompts.turns, strict=True)
        second = [prompt + answer + turn for prompt, answer, turn in heard]
        await part("early", second, _EARLY)
        await part("later", second, _EARLY + _LATER)
        for name, count in (("computed early", _EARLY), ("computed later", _EARLY + _LATER)):
            await server.flush()
            await part(name, second, count)
    await server.flush()
    await server.generate(prompts.shared[0], max_new_tokens=1, ignore_eos=True)
    await part("shared", prompts.shared, tokens)
    return measured


async def _ask_gaps(baseline: Baseline, prompts: Prompts, measured: Measured) -> None:
    """Let a baseline say how far two servers' tokens are apart where their answers begin to differ."""
    own = measured is baseline.measured
    for part, one, other in [("noise", "other order", "distinct")] if own else [(part, part, part) for part in _PARTS]:
        inputs = prompts.shared if part == "shared" else prompts.distinct
        answers = zip(inputs, measured.tokens(one), baseline.measured.tokens(other), strict=True)
        calls = [_gap(baseline.server, prompt, a, b) for prompt, a, b in answers if a != b]
        measured.gaps[part if own else part + baseline.suffix] = list(await asyncio.gather(*calls))


async def _gap(server: Server, prompt: list[int], a: list[int], b: list[int]) -> float:
    """How many nats the worse of two answers' first differing tokens is behind the server's best there."""
    same = agreement(a, b)
    reference = await Reference.ask(server, [*prompt, *a[:same]], tokens=1)
    ended = same == min(len(a), len(b))
    return float("inf") if ended else max(reference.gap(0, answer[same]) for answer in (a, b))


def _rows(
    launch: Launch, measured: Measured, baselines: list[Baseline], args: argparse.Namespace, shape: dict[str, Any]
) -> list[results.Row]:
    config = PRESETS.get(launch.name)
    common = describe(
        shape,
        tp=launch.tp,
        facts=results.facts(args.command_line),
        provider=launch.attention_backend,
        config=launch.name if config else "full",
        batch=args.batch,
        context=args.prompt_tokens + args.tokens,
        window=config.window if config else "",
        band=config.band if config else "",
    )
    rows: list[dict[str, Any]] = []

    def row(part: str, metric: str, unit: str, values: Sequence[float]) -> None:
        rows.append({**common, "case": f"smollm2-{part}", "metric": metric, "unit": unit, **three(values)})

    for part in _PARTS:
        try:
            row(part, "throughput", "tokens/s", steady_speed(measured.replies[part], skip=_SKIP, samples=_SAMPLES))
        except ValueError as error:
            say(f"{launch.name}: no throughput of the part {part}: {error}")
        if config:
            row(part, "hit_rate", "1", [hit_rate(measured.groups[part])])
        for baseline in baselines:
            if measured is not baseline.measured:
                _agree(row, part + baseline.suffix, measured.tokens(part), baseline.measured.tokens(part))
    if "other order" in measured.replies:
        _agree(row, "noise", measured.tokens("other order"), measured.tokens("distinct"))
    for part, gaps in measured.gaps.items():
        row(part, "answers_wrong", "1", [sum(gap >= args.tie for gap in gaps)])
        if gaps:
            row(part, "gap_of_first_difference", "nats", gaps)
            row(part, "gap_of_first_difference_most", "nats", [max(gaps)])
    if config:
        # and the same requests with nothing cached: their rings are filled from the whole prompt
        for before, suffix in (("", ""), ("computed ", "_computed")):
            early, later = measured.groups[f"{before}early"], Counter(measured.groups[f"{before}later"])
            later.subtract(early)  # the same beginning, so what remains are the tokens after it
            row("second", f"hit_rate_first_16{suffix}", "1", [hit_rate(early)])
            row("second", f"hit_rate_after_16{suffix}", "1", [hit_rate(later)])
    return results.as_text(rows)


def _agree(row: AddRow, part: str, a: list[list[int]], b: list[list[int]]) -> None:
    same = [agreement(x, y) for x, y in zip(a, b, strict=True)]
    row(part, "agreement", "tokens", same)
    row(part, "equal_replies", "1", [sum(n == len(y) for n, y in zip(same, b, strict=True)) / len(b)])
