"""Load a server for minutes and check every answer: ``python -m benchmarks.soak --minutes 8``.

Clients send prompts of mixed lengths, some on a common prefix, and hang up on some answers. Before that, every prompt
is answered once, alone; every later exact answer must be the same, up to ties: a token may differ only if it was less
than ``--tie`` behind the best one of the first answer (batches of other sizes round differently). Under the preset
``exact`` all answers are exact, under another one those that ask for it. GPU memory must not grow after the first
quarter, and at the end the server must still give the first answers.

Models are served in fp16, which rounds 8 times finer than bf16 in the same kernels: in bf16 rounding alone turns
answers at tokens that are half a nat behind, and a limit above that lets most errors pass.

Beside it a server of the baseline answers as many clients: how often its answers equal its own first ones only up to
ties, and how far behind those tokens were, says what is to be expected of the other's. ``--server-args`` must leave
room for both; ``--baseline none`` leaves it out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mac_kernels.errors import MacError
from mac_sglang.client import Reply, Server

from . import results
from .serving import (
    EXACT,
    Launch,
    Reference,
    ServerDiedError,
    Started,
    agreement,
    describe,
    groups,
    hit_rate,
    say,
    serve,
    three,
)
from .sglang import add_server_arguments, command_line
from .sglang_smollm2 import prepare

_TOKENS = 160
_NONE = "none"
_SETTLED = 0.25  # share of the time after which memory has to be flat
_GRACE_S = 30.0  # for a baseline that ends later; one that died may never answer
_GROWTH_MIB = 64.0
_EVERY_S = 5.0
Check = tuple[str, bool, str]  # what, whether it holds, figure
Figures = dict[str, tuple[str, float]]  # metric -> unit, value


@dataclass
class Tally:
    """What happened: outcomes by kind, generated tokens, wrong answers in words, memory by time."""

    name: str  # of the server
    outcomes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)  # nats of the first differing token behind the best one
    memory: list[tuple[float, float, float]] = field(default_factory=list)  # time, GPU MiB, host MiB
    own_memory: bool = True  # of the server alone, as far as the driver tells whose it is

    @property
    def checked(self) -> int:
        """Answers that were compared with the first ones."""
        return self.outcomes["equal"] + self.outcomes["equal up to a tie"] + len(self.wrong)

    @property
    def settled(self) -> list[tuple[float, float, float]]:
        """The entries of memory from when it has to be flat."""
        return [entry for entry in self.memory if entry[0] >= _SETTLED * self.memory[-1][0]]

    @property
    def tie_share(self) -> float:
        """Part of them that is equal up to a tie only; NaN without any."""
        return self.outcomes["equal up to a tie"] / self.checked if self.checked else float("nan")


def main(argv: list[str] | None = None) -> int:
    """Run; 0 if everything held, 1 if something did not, else 2 if one of the servers or the input failed."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--model", help="folder, .gguf file or hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path, help="UTF-8 file; default: the demo's text")
    parser.add_argument("--preset", default="exact", help="of the server; checked requests are exact in any case")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16", help="of model and KV cache")
    parser.add_argument("--longest", type=int, default=7_000, help="tokens of the longest prompts")
    tie = "nats within which two tokens count as tied; bfloat16 rounds so that it needs .5 or more"
    parser.add_argument("--tie", type=float, default=0.1, help=tie)
    add_server_arguments(parser)
    args = parser.parse_args(arguments)
    args.command_line = command_line("benchmarks.soak", arguments)
    try:
        return asyncio.run(_run(args, args.output or results.folder() / "sglang.csv"))
    except MacError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


async def _run(args: argparse.Namespace, output: Path) -> int:
    with tempfile.TemporaryDirectory() as folder:
        tokens, shape = prepare(args.model, args.text, Path(folder), tp=args.tp)
        arguments = ("--skip-tokenizer-init", "--dtype", args.dtype, *args.server_args)
        prompts, tally, own = _prompts(tokens, args.longest), Tally(f"mac, {args.preset}"), Tally(args.baseline)
        config = {"preset": args.preset, "serving": args.serving}
        launches = [Launch(args.preset, "mac", Path(folder), config, arguments, tp=args.tp)]
        if args.baseline != _NONE:
            launches.append(Launch(args.baseline, args.baseline, Path(folder), None, arguments, tp=args.tp))
        async with serve(launches, args.logs, "sglang-soak-") as (server, *others):
            beside = asyncio.gather(*(_ask_baseline(baseline, prompts, own, args) for baseline in others))
            try:
                used, alive = await _soak(server, prompts, tally, args)
                checks = _verdict(tally, alive=alive)
                for what, good, figure in checks:
                    say(f"{'ok ' if good else 'BAD'}  {what}: {figure}")
                for text in tally.wrong[:10]:
                    say(f"     {text}")
                figures = {**_figures(tally), "hit_rate": ("1", used)}
                results.upsert(output, _rows(figures, ("mac", args.preset), args, shape))
                failed = await _failure(beside)
            finally:
                beside.cancel()
    for one in (tally, own)[: len(launches)]:
        say(f"     {one.name}: {one.tie_share:.3f} of {one.checked} answers equal up to a tie, {len(one.wrong)} wrong")
        spread = sorted(Counter(round(gap, 2) for gap in one.gaps).items())
        say(f"     {one.name}: nats behind, times: {', '.join(f'{gap:.2f}: {times}' for gap, times in spread)}")
    if failed:
        say(f"{own.name}: FAILED, its rows are left out: {failed}")
    elif others:
        results.upsert(output, _rows(_figures(own), (args.baseline, "full"), args, shape))
    return 1 if not all(good for _, good, _ in checks) else 2 if failed else 0


async def _soak(
    server: Started, prompts: list[list[int]], tally: Tally, args: argparse.Namespace
) -> tuple[float, bool]:
    """Load MAC's server; returns its hit rate and whether it is alive and right at the end."""
    if isinstance(server, ServerDiedError):
        raise server
    references = await _first_answers(server, prompts)
    before = await groups(server)
    await _load(server, references, tally, args)
    used = hit_rate(await groups(server) - before)
    return used, await _answers(server, references, tally, args.tie)


async def _ask_baseline(server: Started, prompts: list[list[int]], tally: Tally, args: argparse.Namespace) -> None:
    if isinstance(server, ServerDiedError):
        raise server
    await _load(server, await _first_answers(server, prompts), tally, args)


async def _failure(beside: asyncio.Future[list[None]]) -> str:
    """Wait for the baseline; returns how it failed, nothing if it did not."""
    try:
        await asyncio.wait_for(beside, _GRACE_S)
    except TimeoutError:
        return "does not answer any more"
    except MacError as error:
        return str(error)
    return ""


async def _first_answers(server: Server, prompts: list[list[int]]) -> list[Reference]:
    return [await Reference.ask(server, prompt, tokens=_TOKENS, sampling=EXACT) for prompt in prompts]


def _prompts(tokens: Sequence[int], longest: int) -> list[list[int]]:
    """Mixed lengths; every other prompt begins like the first one."""
    draw = random.Random(0)
    prompts = []
    for number in range(24):
        length = max(8, int(longest * draw.choice((0.01, 0.1, 0.3, 0.5, 1.0))))
        own = draw.randrange(len(tokens) - longest)
        common = length * 2 // 3 if number % 2 else 0
        prompts.append([*tokens[:common], *tokens[own : own + length - common]])
    return prompts


async def _exact(server: Server, prompt: list[int]) -> Reply:
    return await server.generate(prompt, max_new_tokens=_TOKENS, ignore_eos=True, sampling=EXACT)


async def _unmarked(server: Server, prompt: list[int], tokens: int = _TOKENS) -> Reply:
    return await server.generate(prompt, max_new_tokens=tokens, ignore_eos=True)


async def _load(server: Server, references: list[Reference], tally: Tally, args: argparse.Namespace) -> None:
    say(f"{len(references)} prompts answered once; {args.clients} clients for {args.minutes:g} minutes")
    begin = time.monotonic()
    end = begin + args.minutes * 60
    watch = asyncio.create_task(_watch_memory(server, tally, begin))
    exact = args.preset == "exact"
    clients = [_client(server, references, tally, number, end, args.tie, exact=exact) for number in range(args.clients)]
    try:
        await asyncio.gather(*clients)
        await _look_at_memory(server, tally, begin)
    finally:
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch


async def _client(
    server: Server, references: list[Reference], tally: Tally, number: int, end: float, tie: float, *, exact: bool
) -> None:
    draw = random.Random(number)
    while time.monotonic() < end:
        reference, kind = draw.choice(references), draw.random()
        if kind < 0.2:
            # with and without a ring
            answer = _exact if draw.random() < 0.5 else _unmarked
            call = asyncio.create_task(answer(server, reference.prompt))
            # hang up while it waits, reads the prompt or decodes
            _, pending = await asyncio.wait([call], timeout=draw.uniform(0.01, 1.5))
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await call
            tally.outcomes["aborted" if pending else "answered before the abort"] += 1
        elif kind < 0.5:
            # these use rings; under another preset than exact their tokens are an approximation
            asked = draw.randrange(1, _TOKENS)
            reply = await _unmarked(server, reference.prompt, asked)
            tally.outcomes["unmarked"] += 1
            if exact:
                _judge(reply, reference, asked, tally, tie)
            else:
                tally.tokens += len(reply.output_ids)
        else:
            _judge(await _exact(server, reference.prompt), reference, _TOKENS, tally, tie)


def _judge(reply: Reply, reference: Reference, asked: int, tally: Tally, tie: float) -> None:
    """Count an exact answer of ``asked`` tokens."""
    tally.tokens += len(reply.output_ids)
    outcome = reference.judge(reply.output_ids, asked=asked, tie=tie)
    tally.outcomes[outcome] += 1
    same, found = agreement(reply.output_ids, reference.tokens), "is missing"
    if same < len(reply.output_ids):
        tally.gaps.append(reference.gap(same, reply.output_ids[same]))
        tokens = f"{reply.output_ids[same]} for {reference.tokens[same]}"
        found = f"is {tokens}, {tally.gaps[-1]:.2f} nats behind the best"
    if outcome == "WRONG":
        tally.wrong.append(
            f"prompt of {len(reference.prompt)} that ends in {reference.prompt[-1]} "
            f"({reply.meta['cached_tokens']} cached): token {same} of {asked} {found}"
        )


async def _answers(server: Server, references: list[Reference], tally: Tally, tie: float) -> bool:
    """Whether the server, idle again and its cache emptied, still gives the first answers."""
    wrong = len(tally.wrong)
    await server.flush()
    for reference in references[:4]:
        _judge(await _exact(server, reference.prompt), reference, _TOKENS, tally, tie)
    return len(tally.wrong) == wrong


async def _watch_memory(server: Server, tally: Tally, begin: float) -> None:
    while True:
        await _look_at_memory(server, tally, begin)
        await asyncio.sleep(max(_EVERY_S, tally.memory[-1][0] / 20))


async def _look_at_memory(server: Server, tally: Tally, begin: float) -> None:
    gpu, host, own = await asyncio.to_thread(_memory, server.url.rpartition(":")[2])
    tally.memory.append((time.monotonic() - begin, gpu, host))
    tally.own_memory &= own
    say(f"{tally.name}: {tally.memory[-1][0]:6.0f} s  GPU {gpu:.0f} MiB  host {host:.0f} MiB  {dict(tally.outcomes)}")


def _memory(port: str) -> tuple[float, float, bool]:
    """MiB on the GPUs and in host memory of the server on a port, and whether the first is its alone.

    Where the driver does not know the processes by our numbers (containers), it is what is in use on all GPUs.
    """
    import psutil

    host, family = 0, set()
    for process in _family(port):
        with contextlib.suppress(psutil.Error):
            host += process.memory_info().rss
            family.add(process.pid)
    used = [
        float(mebibytes)
        for line in results.output(
            "nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"
        ).splitlines()
        for number, _, mebibytes in [line.partition(",")]
        if number.strip().isdigit() and int(number) in family and mebibytes.strip().isdigit()
    ]
    if used:
        return sum(used), host / 2**20, True
    devices = range(torch.cuda.device_count())
    free_and_total = [torch.cuda.mem_get_info(device) for device in devices]
    return sum(total - free for free, total in free_and_total) / 2**20, host / 2**20, False


def _family(port: str) -> list[Any]:
    """The processes of the server that was started on a port."""
    import psutil

    for started in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if port in started.cmdline():
                return [started, *started.children(recursive=True)]
    return []


def _verdict(tally: Tally, *, alive: bool) -> list[Check]:
    settled = tally.settled
    growth = settled[-1][1] - settled[0][1]
    return [
        (
            "tokens of exact requests",
            tally.checked > 0 and not tally.wrong,
            f"{len(tally.wrong)} of {tally.checked} answers wrong",
        ),
        ("aborts", tally.outcomes["aborted"] > 0, f"{tally.outcomes['aborted']} requests hung up on"),
        (
            "GPU memory",
            growth <= _GROWTH_MIB,
            f"{growth:+.0f} MiB of {settled[-1][1]:.0f} after the first quarter, "
            + ("of the server" if tally.own_memory else "of everything on the GPUs"),
        ),
        ("alive and right at the end", alive, "yes" if alive else "no"),
    ]


def _figures(tally: Tally) -> Figures:
    settled = tally.settled
    return {
        "duration": ("s", tally.memory[-1][0]),
        "answers_equal": ("1", tally.outcomes["equal"]),
        "answers_equal_up_to_a_tie": ("1", tally.outcomes["equal up to a tie"]),
        "answers_wrong": ("1", len(tally.wrong)),
        "tie_share": ("1", tally.tie_share),
        "gap_of_first_difference_most": ("nats", max(tally.gaps, default=0.0)),
        "aborts": ("1", tally.outcomes["aborted"]),
        "tokens": ("1", tally.tokens),
        "gpu_memory": ("MiB", settled[-1][1]),
        "gpu_memory_growth": ("MiB", settled[-1][1] - settled[0][1]),
        "host_memory_growth": ("MiB", settled[-1][2] - settled[0][2]),
    }


def _rows(
    figures: Figures, server: tuple[str, str], args: argparse.Namespace, shape: dict[str, Any]
) -> list[results.Row]:
    """Rows of a server, given by provider and config."""
    common = describe(
        shape,
        tp=args.tp,
        facts=results.facts(args.command_line),
        case="soak",
        provider=server[0],
        config=server[1],
        batch=args.clients,
        context=args.longest,
        dtype=args.dtype,
    )
    return results.as_text(
        {**common, "metric": metric, "unit": unit, **three([value])} for metric, (unit, value) in figures.items()
    )


if __name__ == "__main__":
    sys.exit(main())
