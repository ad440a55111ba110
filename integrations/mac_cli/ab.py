"""``mac-kernels ab``: replay prompts against two running servers; speed, and how far their greedy answers agree."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mac_kernels.errors import InputError

from .output import JsonOption, out, print_json
from .progress import Stages, stages

if TYPE_CHECKING:
    from mac_sglang.client import Reply, Server

UrlOption = Annotated[str, typer.Option("--url", help="The server to look at, e.g. one with --attention-backend mac.")]
BaselineOption = Annotated[str, typer.Option("--baseline", help="The server to compare it with.")]
PromptsOption = Annotated[
    Path,
    typer.Option("--prompts", help='JSON lines, each a string, or an object with "prompt", "text" or "input_ids".'),
]
NewTokensOption = Annotated[int, typer.Option("--max-new-tokens", min=2, help="Longest answer.")]
ConcurrencyOption = Annotated[int, typer.Option("--concurrency", min=1, help="Prompts sent at once to one server.")]
RepeatOption = Annotated[
    bool, typer.Option("--repeat-baseline", help="Ask the baseline twice: what two runs of one server differ by.")
]

_KEYS = ("prompt", "text", "input_ids")
Prompt = str | list[int]


@dataclass(slots=True)
class Side:
    """One server: address, attention backend and version as it says itself, and its answers in the order of prompts."""

    url: str
    backend: str
    version: str
    replies: list[Reply] = field(default_factory=list)
    busy_s: float = 0.0


def ab(
    *,
    url: UrlOption,
    baseline: BaselineOption,
    prompts: PromptsOption,
    max_new_tokens: NewTokensOption = 256,
    concurrency: ConcurrencyOption = 1,
    repeat_baseline: RepeatOption = False,
    as_json: JsonOption = False,
) -> None:
    """Replay prompts against two SGLang servers, greedily, and report speed and agreement.

    Example: mac-kernels ab --url http://gpu1:30000 --baseline http://gpu2:30000 --prompts prompts.jsonl
    """
    asked = read_prompts(prompts)
    with stages() as display:
        one, other, again = asyncio.run(
            _replay(url, baseline, asked, max_new_tokens, concurrency, repeat=repeat_baseline, display=display)
        )
    report = make_report(one, other, again, concurrency=concurrency)
    if as_json:
        print_json(report)
    else:
        _print(report)


def read_prompts(path: Path) -> list[Prompt]:
    """Read one prompt per line.

    Raises
    ------
    InputError
        If the file cannot be read, is empty, or a line is no prompt; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a file of JSON lines") from None
    prompts = [_prompt(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise InputError(f'{path} has no prompts; write one JSON object a line, e.g. {{"prompt": "Hello"}}')
    return prompts


def _prompt(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f'{where}: not valid JSON ({error}); write e.g. {{"prompt": "Hello"}}') from None
    if isinstance(value, dict):
        found = [key for key in _KEYS if key in value]
        if len(found) != 1:
            raise InputError(f"{where}: expected one of the keys {', '.join(_KEYS)}, got {', '.join(value) or 'none'}")
        value = value[found[0]]
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(isinstance(token, int) and token >= 0 for token in value):
        return value
    raise InputError(f"{where}: a prompt must be a text or a list of token ids, and not empty")


async def _replay(
    url: str, baseline: str, prompts: list[Prompt], tokens: int, concurrency: int, *, repeat: bool, display: Stages
) -> tuple[Side, Side, Side | None]:
    from mac_sglang.client import Server, open_session

    async with open_session() as session:
        servers = Server(session, url), Server(session, baseline)
        one, other = [await _meet(server) for server in servers]
        again = Side(other.url, other.backend, other.version) if repeat else None
        parts = [prompts[at : at + concurrency] for at in range(0, len(prompts), concurrency)]
        for number, part in enumerate(parts):
            # never both at once, since they may share a machine, and in turns, since it may slow down
            turn = [(servers[0], one), (servers[1], other)][:: -1 if number % 2 else 1]
            for server, side in turn:
                await _ask(server, side, part, tokens)
            if again is not None:
                await _ask(servers[1], again, part, tokens)
            display("prompts", len(one.replies), len(prompts))
    return one, other, again


async def _meet(server: Server) -> Side:
    """Ask who it is, and for one token, so that nothing is compiled or loaded while it is timed."""
    info = await server.info()
    await server.generate([1, 2, 3], max_new_tokens=2, ignore_eos=True)
    return Side(server.url, str(info.get("attention_backend") or "unknown"), str(info.get("version", "unknown")))


async def _ask(server: Server, side: Side, prompts: Sequence[Prompt], tokens: int) -> None:
    async def one(number: int, prompt: Prompt) -> Reply:
        try:
            return await server.generate(prompt, max_new_tokens=tokens)
        except InputError as error:
            raise InputError(f"prompt {number}: {error}") from None

    begin = time.perf_counter()
    side.replies += await asyncio.gather(*(one(at, text) for at, text in enumerate(prompts, len(side.replies) + 1)))
    side.busy_s += time.perf_counter() - begin


def make_report(one: Side, other: Side, again: Side | None, *, concurrency: int) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    speeds = [_speed(side) for side in (one, other)]
    notes = []
    if one.backend == other.backend:
        notes.append(f"both servers run the attention backend {one.backend}")
    cached = [speed["cached_share"] for speed in speeds]
    if abs(cached[0] - cached[1]) > 0.01:
        notes.append(
            f"{cached[0]:.0%} and {cached[1]:.0%} of the prompt tokens were cached: "
            "the times to the first token do not compare"
        )
    return {
        "server": speeds[0],
        "baseline": speeds[1],
        "speed_ratio": _ratio(speeds, "tokens_per_second_p50"),
        "throughput_ratio": _ratio(speeds, "throughput"),
        "ttft_ratio": _ratio(speeds, "ttft_s_p50"),
        "agreement": _agreement(one, other),
        "baseline_with_itself": None if again is None else _agreement(again, other),
        "prompts": len(one.replies),
        "concurrency": concurrency,
        "notes": notes,
    }


def _speed(side: Side) -> dict[str, Any]:
    ttft = [reply.ttft_s for reply in side.replies]
    speeds = [reply.tokens_per_second for reply in side.replies if len(set(reply.arrivals_s)) > 1]
    prompt_tokens = sum(reply.meta["prompt_tokens"] for reply in side.replies)
    tokens = sum(len(reply.output_ids) for reply in side.replies)
    return {
        "url": side.url,
        "attention_backend": side.backend,
        "version": side.version,
        "prompt_tokens": prompt_tokens,
        "cached_share": sum(reply.meta.get("cached_tokens", 0) for reply in side.replies) / max(prompt_tokens, 1),
        "tokens": tokens,
        "ttft_s_p50": statistics.median(ttft),
        "ttft_s_max": max(ttft),
        "tokens_per_second_p50": statistics.median(speeds) if speeds else None,
        "throughput": tokens / side.busy_s,
    }


def _ratio(speeds: list[dict[str, Any]], name: str) -> float | None:
    one, other = (speed[name] for speed in speeds)
    return one / other if one and other else None


def _agreement(one: Side, other: Side) -> dict[str, Any]:
    pairs = [(a.output_ids, b.output_ids) for a, b in zip(one.replies, other.replies, strict=True)]
    same = [next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            for a, b in pairs]  # fmt: skip
    return {
        "equal_answers": sum(a == b for a, b in pairs) / len(pairs),
        "equal_tokens_p50": statistics.median(same),
        "equal_tokens_min": min(same),
        "equal_share": sum(same) / max(sum(max(len(a), len(b)) for a, b in pairs), 1),
    }


_SPEEDS = (
    ("attention backend", "attention_backend", "", None),
    ("SGLang", "version", "", None),
    ("prompt tokens", "prompt_tokens", ",", None),
    ("of them cached", "cached_share", ".0%", None),
    ("generated tokens", "tokens", ",", None),
    ("time to first token, s, p50", "ttft_s_p50", ".3f", "ttft_ratio"),
    ("time to first token, s, max", "ttft_s_max", ".3f", None),
    ("tokens/s of one answer, p50", "tokens_per_second_p50", ".1f", "speed_ratio"),
    ("tokens/s of all", "throughput", ".1f", "throughput_ratio"),
)
_AGREEMENTS = (
    ("equal answers", "equal_answers", ".1%"),
    ("equal tokens until the first difference, p50", "equal_tokens_p50", "g"),
    ("equal tokens until the first difference, min", "equal_tokens_min", "g"),
    ("share of tokens before the first difference", "equal_share", ".1%"),
)


def _print(report: dict[str, Any]) -> None:
    console = out()
    speed = Table("", report["server"]["url"], report["baseline"]["url"], "ratio")
    for label, name, form, ratio in _SPEEDS:
        values = (_format(report[side][name], form) for side in ("server", "baseline"))
        speed.add_row(label, *values, _format(report[ratio], ".2f") if ratio else "")
    console.print(speed)
    again = report["baseline_with_itself"]
    agreement = Table("greedy answers", "of both servers", *(["of the baseline, twice"] if again else []))
    for label, name, form in _AGREEMENTS:
        agreement.add_row(label, *(_format(side[name], form) for side in (report["agreement"], again) if side))
    console.print(agreement)
    for note in report["notes"]:
        console.print(f"note: {note}", soft_wrap=True, highlight=False)


def _format(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)
