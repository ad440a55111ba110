"""Every kind of server once: fp16, KV in fp8, other page sizes, the audit in graphs, prefill graphs; a real model.

Each server has to give the baseline's tokens to exact requests, up to ties, and with the preset ``fast`` to hit, and to
restore rings from the prefix cache.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mac_kernels.errors import MacError
from mac_sglang.client import Server

from . import results
from .serving import (
    EXACT,
    Launch,
    Reference,
    Started,
    counted,
    describe,
    groups,
    hit_rate,
    say,
    serve,
    three,
)
from .sglang_smollm2 import prepare

_NO_PREFILL_GRAPHS = "--disable-prefill-cuda-graph"
_TURN = 40  # tokens of the second turn
_MOST_ERROR = 0.5  # mean relative error that an audit may find under `fast`; a wrong cache or row gives more than 1


@dataclass(frozen=True, slots=True)
class Combination:
    """Arguments of a server, arguments that it must not have, and more of MAC's section ``serving``.

    ``dtype``: of keys and values, if it is not bf16; a baseline of the same dtype then says what is right.
    """

    arguments: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    serving: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = ""


COMBINATIONS = {
    "plain": Combination(),
    "fp8": Combination(("--kv-cache-dtype", "fp8_e4m3"), dtype="fp8_e4m3"),
    "fp16": Combination(("--dtype", "float16"), dtype="float16"),
    "page-16": Combination(("--page-size", "16")),
    "page-64": Combination(("--page-size", "64")),
    "audit": Combination(serving={"audit_rate": 0.2}),
    "prefill-graphs": Combination(("--cuda-graph-bs-prefill", "512", "2048"), without=(_NO_PREFILL_GRAPHS,)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this suite."""
    parser.add_argument("--model", help="folder, .gguf file or hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path, help="UTF-8 file; default: the demo's text")
    parser.add_argument("--combinations", default=",".join(COMBINATIONS), help="comma separated")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=3_500)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--tie", type=float, default=0.5, help="nats within which two tokens count as tied")


def table(args: argparse.Namespace) -> str:
    """Name of the default table."""
    del args
    return "sglang.csv"


async def run(args: argparse.Namespace, output: Path) -> int:
    """Start all servers at once, examine one after the other; 1 if one was not right."""
    with tempfile.TemporaryDirectory() as folder:
        tokens, shape = prepare(args.model, args.text, Path(folder), tp=args.tp)
        length, step = args.prompt_tokens, len(tokens) // args.prompts
        prompts = [tokens[at * step : at * step + length] for at in range(args.prompts)]
        names = args.combinations.split(",")
        baselines = dict.fromkeys(_baseline_of(name) for name in names)
        launches = [
            Launch(
                f"{args.baseline}-{kind}",
                args.baseline,
                Path(folder),
                None,
                _arguments(args, COMBINATIONS[kind]),
                tp=args.tp,
            )
            for kind in baselines
        ]
        for name in names:
            config = {"preset": "fast", "serving": {**args.serving, **COMBINATIONS[name].serving}}
            launches.append(Launch(name, "mac", Path(folder), config, _arguments(args, COMBINATIONS[name]), tp=args.tp))
        bad = 0
        async with serve(launches, args.logs, "sglang-matrix-") as servers:
            by_name = dict(zip((launch.name for launch in launches), servers, strict=True))
            references = {
                kind: await _references(by_name[f"{args.baseline}-{kind}"], prompts, args) for kind in baselines
            }
            for name in names:
                figures, reasons = await _examine(by_name[name], references[_baseline_of(name)], args)
                say(f"{'BAD' if reasons else 'ok '}  {name:15} {figures}{''.join(f'; {text}' for text in reasons)}")
                bad += bool(reasons)
                results.upsert(output, _rows(name, figures, args, shape))
    return min(bad, 1)


def _baseline_of(name: str) -> str:
    """The combination that the baseline's server of this one runs."""
    return name if COMBINATIONS[name].dtype else "plain"


def _arguments(args: argparse.Namespace, one: Combination) -> tuple[str, ...]:
    common = [text for text in args.server_args if text not in one.without]
    return ("--skip-tokenizer-init", *common, *one.arguments)


async def _references(server: Started, prompts: list[list[int]], args: argparse.Namespace) -> list[Reference]:
    if isinstance(server, MacError):
        raise server
    return [await Reference.ask(server, prompt, tokens=args.tokens) for prompt in prompts]


async def _examine(
    server: Started, references: list[Reference], args: argparse.Namespace
) -> tuple[dict[str, float], list[str]]:
    """Figures of one server, and what is wrong with it."""
    if isinstance(server, MacError):
        return {}, [str(server)]
    try:
        figures = await _figures(server, references, args)
    except MacError as error:
        return {}, [str(error)]
    checks = {
        "wrong tokens under exact": figures["answers_wrong"] > 0,
        "no hits": not figures["hit_rate"] > 0,
        "no ring was restored": not figures["rows_restored"] > 0,
        "the audit's error is out of range": not figures.get("audit_error", 0.0) < _MOST_ERROR,
    }
    return figures, [what for what, holds in checks.items() if holds]


async def _figures(server: Server, references: list[Reference], args: argparse.Namespace) -> dict[str, float]:
    outcomes = []
    for reference in references:
        reply = await server.generate(reference.prompt, max_new_tokens=args.tokens, ignore_eos=True, sampling=EXACT)
        outcomes.append(reference.judge(reply.output_ids, asked=args.tokens, tie=args.tie))
    before = await groups(server)
    calls = [server.generate(one.prompt, max_new_tokens=args.tokens, ignore_eos=True) for one in references]
    heard = await asyncio.gather(*calls)
    turns = [
        [*one.prompt, *reply.output_ids, *one.prompt[:_TURN]] for one, reply in zip(references, heard, strict=True)
    ]
    await asyncio.gather(*(server.generate(turn, max_new_tokens=args.tokens, ignore_eos=True) for turn in turns))
    share = hit_rate(await groups(server) - before)
    figures = {
        "answers_equal": float(outcomes.count("equal")),
        "answers_equal_up_to_a_tie": float(outcomes.count("equal up to a tie")),
        "answers_wrong": float(outcomes.count("WRONG")),
        "hit_rate": round(share, 4),
        "rows_restored": (await counted(server, "mac_snapshot_events_total", "event"))["rows_restored"],
    }
    audited = await counted(server, "mac_audit_groups_total")
    if audited["mac_audit_groups_total"]:
        name = "mac_audit_relative_error_sum_total"
        figures["audited_groups"] = audited["mac_audit_groups_total"]
        figures["audit_error"] = (await counted(server, name))[name] / figures["audited_groups"]
    return figures


def _rows(
    name: str, figures: Mapping[str, float], args: argparse.Namespace, shape: Mapping[str, Any]
) -> list[results.Row]:
    common = describe(
        shape,
        tp=args.tp,
        facts=results.facts(args.command_line),
        case=f"matrix-{name}",
        provider="mac",
        config="fast",
        batch=args.prompts,
        context=args.prompt_tokens,
        dtype=COMBINATIONS[name].dtype or "bfloat16",
        page_size=name.removeprefix("page-") if name.startswith("page-") else 1,
        unit="1",
    )
    return results.as_text({**common, "metric": metric, **three([value])} for metric, value in figures.items())
