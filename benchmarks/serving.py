"""Start SGLang servers, wait until they answer, end them; and what the benchmarks of the SGLang surface share."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mac_kernels.errors import MacError, MissingError
from mac_sglang.client import Reply, Server, open_session

from . import results

EXACT = {"custom_params": {"mac": "exact"}}
"""Sampling parameters of a request that asks for exact attention."""
_START_S = 480.0
_STOP_S = 20.0
_CANDIDATES = 5  # tokens that a tie is looked for among
_PUBLISHED_S = 30.0  # at most, for two publications: mac_sglang makes one a second, fewer if its scheduler is busy
_POLL_S = 0.2
_LOGGED = re.compile(r"Decode batch, #running-req: (\d+),.*gen throughput \(token/s\): ([\d.]+)")


class ServerDiedError(MacError, RuntimeError):
    """The server ended, or did not answer in eight minutes; the message has the end of its log."""


class NotPublishedError(MacError, RuntimeError):
    """The server did not bring its counters up to date in half a minute."""


Started = Server | ServerDiedError


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a server: name for the table, attention backend, MAC's config (if it is one), arguments, ranks."""

    name: str
    attention_backend: str
    model: Path
    config: Mapping[str, Any] | None = None
    arguments: tuple[str, ...] = ()
    tp: int = 1

    def command(self, port: int, nccl_port: int) -> list[str]:
        """Return the command line."""
        ports = ("--port", str(port), "--nccl-port", str(nccl_port))
        chosen = ("--model-path", str(self.model), "--attention-backend", self.attention_backend, "--tp", str(self.tp))
        return [sys.executable, "-m", "sglang.launch_server", *chosen, *ports, "--enable-metrics", *self.arguments]


@contextlib.asynccontextmanager
async def serve(launches: Sequence[Launch], logs: Path, prefix: str = "sglang-") -> AsyncIterator[list[Started]]:
    """Start servers at once, yield them when each is healthy or has failed, end all their processes.

    Logs are written to ``logs/<prefix><name>.log``.
    """
    task = asyncio.current_task()
    assert task is not None  # this is a coroutine
    # a run that is cut off must not leave a server behind, which would keep the GPU
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    logs.mkdir(parents=True, exist_ok=True)
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(open_session())
        starts = []
        for launch in launches:
            server, log = Server(session, f"http://127.0.0.1:{free_port()}"), logs / f"{prefix}{launch.name}.log"
            process = await stack.enter_async_context(_process(launch, server, log))
            starts.append(_until_healthy(launch.name, server, process, log))
        yield await asyncio.gather(*starts)


@contextlib.asynccontextmanager
async def _process(launch: Launch, server: Server, log: Path) -> AsyncIterator[subprocess.Popen[bytes]]:
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ)
        if launch.config is not None:
            path = Path(folder) / "config.json"
            path.write_text(json.dumps({"schema": 1, **launch.config}), encoding="utf-8")
            environment["MAC_KERNELS_CONFIG"] = str(path)
        command = launch.command(int(server.url.rsplit(":", 1)[1]), free_port())
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            yield process
        finally:
            await _stop(process)


async def _until_healthy(name: str, server: Server, process: subprocess.Popen[bytes], log: Path) -> Started:
    begun = time.monotonic()
    while time.monotonic() < begun + _START_S and process.poll() is None:
        with contextlib.suppress(MacError):
            # /health answers before the scheduler can: a first token says that everything is there
            await server.generate([1, 2, 3, 4], max_new_tokens=1, ignore_eos=True)
            say(f"{name}: healthy after {time.monotonic() - begun:.0f} s")
            return server
        await asyncio.sleep(0.5)
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:]
    what = "does not answer" if process.poll() is None else f"ended with status {process.returncode}"
    return ServerDiedError("\n".join((f"the server {name} {what}; the end of {log}:", *tail)))


async def _stop(process: subprocess.Popen[bytes]) -> None:
    """Kill the server at once: on a polite signal it would diagnose its dying schedulers for many seconds."""
    import psutil

    family = []
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # they hold the GPU's memory until they are gone; what nobody reaps stays a zombie
    deadline = time.monotonic() + _STOP_S
    while time.monotonic() < deadline and any(map(_lives, family)):
        await asyncio.sleep(0.1)


def _lives(process: Any) -> bool:
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def free_port() -> int:
    """Return a port that nothing listens on, another one at every call: servers that start bind theirs late."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _PORTS_GIVEN:
            _PORTS_GIVEN.add(port)
            return port


_PORTS_GIVEN: set[int] = set()


async def groups(server: Server) -> Counter[str]:
    """Return the kv groups by reason that all ranks have counted; empty if the server is not MAC's."""
    return await counted(server, "mac_groups_total", "reason")


async def counted(server: Server, name: str, label: str | None = None) -> Counter[str]:
    """Return one of the server's counters, summed over all ranks, by one of its labels.

    All passes whose answers came before the call are counted.

    Raises
    ------
    NotPublishedError
        If the server does not publish its counters.
    """
    counts: Counter[str] = Counter()
    for sample in await _up_to_date(server):
        if sample.name == name:
            counts[sample.labels[label] if label else name] += sample.value
    return counts


async def _up_to_date(server: Server) -> list[Any]:
    """The server's samples after two more publications of each rank; at once if they are not MAC's.

    The first of them may have read its numbers before the call.
    """
    samples = await _samples(server)
    before, deadline = _publications(samples), time.monotonic() + _PUBLISHED_S
    while any(count < before[rank] + 2 for rank, count in _publications(samples).items()):
        if time.monotonic() > deadline:
            raise NotPublishedError(
                f"{server.url} has not published its counters twice in {_PUBLISHED_S:.0f} s; look into its log, or "
                "leave its scheduler a CPU core of its own"
            )
        await asyncio.sleep(_POLL_S)
        samples = await _samples(server)
    return samples


async def _samples(server: Server) -> list[Any]:
    from prometheus_client.parser import text_string_to_metric_families

    return [sample for family in text_string_to_metric_families(await server.metrics()) for sample in family.samples]


def _publications(samples: Sequence[Any]) -> Counter[str]:
    """How often each rank has published."""
    return Counter({str(one.labels): int(one.value) for one in samples if one.name == "mac_publications_total"})


def hit_rate(counts: Counter[str]) -> float:
    """Reused share of all kv groups; NaN without any."""
    total = sum(counts.values())
    return counts["HIT"] / total if total else float("nan")


@dataclass(frozen=True, slots=True)
class Reference:
    """An exact answer to a prompt, and at every step how far the best few tokens were behind the best one, in nats."""

    prompt: list[int]
    tokens: list[int]
    behind: list[dict[int, float]]

    @staticmethod
    async def ask(server: Server, prompt: list[int], *, tokens: int, **fields: Any) -> Reference:
        """Take the server's answer of so many tokens."""
        wanted = {"return_logprob": True, "top_logprobs_num": _CANDIDATES, "logprob_start_len": -1}
        reply = await server.generate(prompt, max_new_tokens=tokens, ignore_eos=True, **wanted, **fields)
        behind = [
            {int(token): float(top[0][0]) - float(logprob) for logprob, token, *_ in top}
            for top in reply.meta["output_top_logprobs"]
        ]
        return Reference(prompt, reply.output_ids, behind)

    def gap(self, step: int, token: int) -> float:
        """How far a token was behind the best one at a step, in nats; infinite beyond the best few."""
        return self.behind[step].get(token, float("inf"))

    def judge(self, tokens: Sequence[int], *, asked: int, tie: float) -> str:
        """Compare another answer of ``asked`` tokens: ``equal``, ``equal up to a tie`` or ``WRONG``.

        A token may differ only if it was less than ``tie`` nats behind the best one: batches of other sizes round
        differently. What follows it is another text.
        """
        same = agreement(tokens, self.tokens)
        if same == asked:
            return "equal"
        tied = len(tokens) == asked and self.gap(same, tokens[same]) < tie
        return "equal up to a tie" if tied else "WRONG"


def steady_speed(replies: Sequence[Reply], *, skip: int, samples: int) -> list[float]:
    """Tokens per second of all replies together, in equal parts of the time in which all of them decode.

    ``skip`` tokens at the start of every reply are left out.

    Raises
    ------
    ValueError
        If there is no such time.
    """
    begin = max(reply.arrivals_s[skip] for reply in replies)
    end = min(reply.arrivals_s[-1] for reply in replies)
    if end <= begin:
        raise ValueError(
            f"the replies do not decode together for more than {skip} tokens: one got so far {begin - end:.2f} s after "
            "another had ended; ask for more tokens, or give the server more room (KV pool, --max-running-requests)"
        )
    arrivals = sorted(at for reply in replies for at in reply.arrivals_s if begin < at <= end)
    # parts of equal counts, measured from arrival to arrival: parts of equal time would cut tokens in two
    cuts = [begin, *(arrivals[len(arrivals) * part // samples - 1] for part in range(1, samples + 1))]
    counts = [len(arrivals) * (part + 1) // samples - len(arrivals) * part // samples for part in range(samples)]
    return [count / (b - a) for count, a, b in zip(counts, cuts, cuts[1:], strict=False) if b > a]


def logged_speed(log: Path, batch: int, *, begin: int = 0) -> list[float]:
    """Tokens per second of so many requests as SGLang counts them itself, every 40 steps, in its log from a byte on.

    They do not depend on when tokens reach a client. The first count is left out, as it began before the batch; without
    a log there are none.
    """
    if not log.exists():
        return []
    text = log.read_bytes()[begin:].decode("utf-8", "replace")
    return [float(speed) for size, speed in _LOGGED.findall(text) if int(size) == batch][1:]


def agreement(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def three(values: Sequence[float]) -> dict[str, str]:
    """p20, p50 and p80 and the number of samples, as the table writes them."""
    ordered = sorted(values)
    at = {"p20": 0.2, "p50": 0.5, "p80": 0.8}
    quantiles = {
        name: statistics.median(ordered) if share == 0.5 else ordered[round(share * (len(ordered) - 1))]
        for name, share in at.items()
    }
    return {**{name: f"{value:.4g}" for name, value in quantiles.items()}, "n": str(len(ordered))}


def describe(shape: Mapping[str, Any], *, tp: int, facts: results.Row, **own: Any) -> dict[str, Any]:
    """What the rows of one server have in common: the shape of its model, SGLang, the run, and ``own`` columns."""
    return {
        "suite": "sglang",
        "backend": sglang_version(),
        "hq": shape["num_attention_heads"],
        "hkv": shape["num_key_value_heads"],
        "head_dim": shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"],
        "dtype": "bfloat16",
        "page_size": 1,
        **dict.fromkeys(("window", "band", "lag", "hit_rate", "miss_pattern"), ""),
        "tp": tp,
        **facts,
        **own,
    }


def sglang_version() -> str:
    """The installed SGLang, as the column ``backend`` names it.

    Raises
    ------
    MissingError
        If it is not installed.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"sglang {version('sglang')}"
    except PackageNotFoundError:
        raise MissingError("sglang is not installed; install it with: pip install 'mac-kernels[sglang]'") from None


def say(text: str) -> None:
    """Print at once: the runs are long."""
    print(text, flush=True)
