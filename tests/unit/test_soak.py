"""The soak: a tie is no wrong token, load and memory are watched, and the verdict sees what is wrong.

MAC's verdict and rows do not depend on whether the baseline beside it lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import results, soak
from benchmarks.serving import Launch, ServerDiedError
from mac_kernels.errors import MissingError
from mac_sglang.client import Reply

pytest.importorskip("prometheus_client")


def reply(tokens: list[int]) -> Reply:
    return Reply(0.0, tokens, [float(at) for at in range(len(tokens))], "", {"cached_tokens": 0})


class Answers:
    """A server that gives one answer to everything."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.asked = tokens, []

    async def generate(self, prompt: list[int], **fields: Any) -> Reply:
        self.asked.append(fields)
        return reply(self.tokens)


@pytest.mark.parametrize(
    ("tokens", "asked", "outcome", "gaps"),
    [
        ([5, 6, 7, 8], 4, "equal", []),
        ([5, 6], 2, "equal", []),
        ([5, 6, 9, 9], 4, "equal up to a tie", [0.1]),
        ([5, 1, 7, 8], 4, "WRONG", [2.0]),
        ([5, 6, 1, 8], 4, "WRONG", [3.0]),  # two others are tied there
        ([5, 6, 2, 8], 4, "WRONG", [float("inf")]),  # not even among the best
        ([5, 6], 4, "WRONG", []),  # half an answer
        ([1, 1, 1, 1], 4, "WRONG", [3.0]),
    ],
)
def test_the_soak_tells_a_tie_from_a_wrong_token(
    tokens: list[int], asked: int, outcome: str, gaps: list[float]
) -> None:
    behind = [{5: 0.0, 1: 3.0}, {6: 0.0, 1: 2.0}, {7: 0.0, 9: 0.1, 1: 3.0}, {8: 0.0, 1: 4.0}]
    reference = soak.Reference([1, 2, 3], [5, 6, 7, 8], behind)
    tally, server = soak.Tally("mac"), Answers(tokens)
    soak._judge(asyncio.run(soak._exact(server, [1, 2, 3])), reference, asked, tally, 0.5)
    assert tally.outcomes == Counter({outcome: 1})
    assert bool(tally.wrong) == (outcome == "WRONG") and tally.gaps == gaps
    assert server.asked[0]["sampling"] == {"custom_params": {"mac": "exact"}}


class Right:
    """A server that answers every prompt right, after a while, and to unmarked requests nonsense."""

    url = "http://127.0.0.1:4321"

    async def generate(self, prompt: list[int], *, max_new_tokens: int, **fields: Any) -> Reply:
        await asyncio.sleep(0.002)
        tokens = list(range(max_new_tokens)) if fields.get("sampling") else [99] * max_new_tokens
        return reply(tokens)


@pytest.mark.parametrize("preset", ["fast", "exact"])
def test_the_load_of_a_soak(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "_memory", lambda port: (float(port), 10.0, True))
    references = [soak.Reference([1, 2, 3], list(range(200)), [{}] * 200)]
    tally, args = soak.Tally("mac"), SimpleNamespace(minutes=0.02, clients=4, preset=preset, tie=0.5)
    asyncio.run(soak._load(Right(), references, tally, args))
    assert tally.outcomes["equal"] > 10 and tally.outcomes["unmarked"] > 10
    at, gpu, _ = tally.memory[-1]
    assert at >= 60 * args.minutes and gpu == 4321  # the last look comes after the load
    # only under `exact` an unmarked answer has to be the first one
    assert bool(tally.wrong) == (preset == "exact")
    assert tally.outcomes["aborted"] + tally.outcomes["answered before the abort"] > 5


def test_memory_is_that_of_the_server_on_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psutil")
    wait = "import sys; sys.stdin.read()"
    start = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {wait!r}]); print(flush=True); {wait}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with contextlib.ExitStack() as stack:
        commands = ([sys.executable, "-c", start, "--port", port] for port in ("31001", "31002"))
        one, other = (stack.enter_context(subprocess.Popen(command, **pipes)) for command in commands)
        for process in (one, other):
            process.stdout.readline()
        first, second = soak._family("31001")
        assert (first.pid, second.ppid()) == (one.pid, one.pid)
        table = f"{one.pid}, 100\n{second.pid}, 20\n{other.pid}, 3000\n{os.getpid()}, 50000"
        monkeypatch.setattr(results, "output", lambda *command: table)
        gpu, host, own = soak._memory("31001")
        assert (gpu, own) == (120, True) and host > 5
        assert not soak._family("31003")


Others = dict[str, Any]
LIVES: Others = {"flashinfer": None}
FIRST = [{5: 0.0}, {6: 0.0}, {7: 0.0, 9: 0.05, 8: 0.2}]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run a soak of servers that answer at once; returns status, launches and rows."""

    def run(others: Others, *more: str, last: int = 9) -> tuple[int, list[Launch], list[results.Row]]:
        launched: list[Launch] = []

        @contextlib.asynccontextmanager
        async def serve(launches: list[Launch], logs: Path, prefix: str) -> AsyncIterator[list[Any]]:
            launched.extend(launches)
            own = Answers([5, 6, last])
            yield [
                own,
                *(died if isinstance(died, ServerDiedError) else Answers([5, 6, 7]) for died in others.values()),
            ]

        async def first(server: Answers, prompts: list[list[int]]) -> list[soak.Reference]:
            return [soak.Reference(prompt, [5, 6, 7], FIRST) for prompt in prompts]

        async def none(server: Answers) -> Counter[str]:
            return Counter()

        async def right(*arguments: Any) -> bool:
            return True

        async def load(server: Answers, references: list[soak.Reference], tally: soak.Tally, args: Any) -> None:
            assert args.minutes == 8
            tally.memory.append((60.0, 100.0, 10.0))
            tally.outcomes["aborted"] += 1
            for reference in references[:4]:
                soak._judge(await soak._unmarked(server, reference.prompt, 3), reference, 3, tally, args.tie)
            if others.get(tally.name):
                await others[tally.name]()

        shape = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512}
        for name, value in (("serve", serve), ("_first_answers", first), ("groups", none), ("_answers", right),
                            ("_load", load), ("prepare", lambda *a, **b: (list(range(9000)), shape)),
                            ("_GRACE_S", 0.2)):  # fmt: skip
            monkeypatch.setattr(soak, name, value)
        monkeypatch.setattr("benchmarks.serving.sglang_version", lambda: "sglang 0.5.23")
        path = tmp_path / "sglang.csv"
        status = soak.main(["--baseline", *(others or ["none"]), "--output", str(path), *more])
        return status, launched, results.read(path)

    return run


@pytest.mark.parametrize("others", [LIVES, {}])
def test_a_soak_reports_the_ties_of_the_baseline_beside_its_own(
    others: Others, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    status, launched, rows = run(others)
    assert status == 0
    assert [launch.attention_backend for launch in launched] == ["mac", *others]
    out = capsys.readouterr().out
    assert "mac, exact: 1.000 of 4 answers equal up to a tie" in out
    assert ("flashinfer: 0.000 of 4 answers equal up to a tie" in out) == bool(others)
    shares = {row["provider"]: row["p50"] for row in rows if row["metric"] == "tie_share"}
    assert shares == {"mac": "1", **dict.fromkeys(others, "0")}
    figures = {row["metric"]: row["p50"] for row in rows if row["provider"] == "mac"}
    assert (figures["duration"], figures["gpu_memory"], figures["gpu_memory_growth"]) == ("60", "100", "0")


@pytest.mark.parametrize(("more", "dtype"), [((), "float16"), (("--dtype", "bfloat16"), "bfloat16")])
def test_servers_and_rows_of_a_soak_have_its_dtype(more: tuple[str, ...], dtype: str, run: Any) -> None:
    _, launched, rows = run(LIVES, *more)
    for launch in launched:
        command = launch.command(1, 2)
        assert command[command.index("--dtype") + 1] == dtype
    assert {row["dtype"] for row in rows} == {dtype} and {row["provider"] for row in rows} == {"mac", "flashinfer"}


async def _dies() -> None:
    raise MissingError("http://127.0.0.1:1 does not answer")


async def _hangs() -> None:
    await asyncio.sleep(3600)


@pytest.mark.parametrize("failure", [ServerDiedError("the server flashinfer ended"), _dies, _hangs])
@pytest.mark.parametrize(("last", "status", "verdict"), [(9, 2, "ok "), (8, 1, "BAD")])
def test_a_baseline_that_fails_does_not_hide_the_verdict(
    failure: Any, last: int, status: int, verdict: str, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found, _, rows = run({"flashinfer": failure}, last=last)
    out = capsys.readouterr().out
    assert found == status
    assert f"{verdict}  tokens of exact requests: {0 if status == 2 else 4} of 4" in out
    assert "flashinfer: FAILED, its rows are left out: " in out
    wrong = {row["provider"]: row["p50"] for row in rows if row["metric"] == "answers_wrong"}
    assert wrong == {"mac": "0" if status == 2 else "4"}


@pytest.mark.parametrize(
    ("change", "bad"),
    [
        ({}, None),
        ({"wrong": ["x"]}, "tokens of exact requests"),
        ({"outcomes": Counter(aborted=3)}, "tokens of exact requests"),  # nothing was compared
        ({"outcomes": Counter(equal=9)}, "aborts"),
        ({"memory": [(0, 100, 1), (30, 500, 1), (60, 500, 1), (100, 900, 1)]}, "GPU memory"),
    ],
)
def test_the_verdict_of_a_soak(change: dict[str, Any], bad: str | None) -> None:
    memory = [(0.0, 100.0, 1.0), (30.0, 500.0, 1.0), (60.0, 500.0, 1.0), (100.0, 510.0, 1.0)]
    tally = soak.Tally("mac", **{"outcomes": Counter(equal=9, aborted=3), "tokens": 10, "memory": memory, **change})
    found = [what for what, good, _ in soak._verdict(tally, alive=True) if not good]
    assert found == ([] if bad is None else [bad])
    assert [what for what, good, _ in soak._verdict(tally, alive=False) if not good][-1] == "alive and right at the end"
