"""``mac-kernels ab`` against two stub servers: what it counts, what it asks, what it says when something is wrong."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mac_cli.app import main
from mac_cli.output import ExitCode

web = pytest.importorskip("aiohttp.web")


class Stub:
    """An SGLang server that answers with counted tokens: 100, 101, ... and another one at ``differs_at``."""

    def __init__(
        self, backend: str, *, differs_at: int | None = None, delay_s: float = 0.001, incremental: bool = False
    ) -> None:
        self.backend, self.differs_at, self.delay_s, self.incremental = backend, differs_at, delay_s, incremental
        self.asked: list[dict[str, Any]] = []
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Stub:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.router.add_get("/server_info", self._info)
        app.router.add_post("/generate", self._generate)
        runner = web.AppRunner(app)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _info(self, request: Any) -> Any:
        return web.json_response({"attention_backend": self.backend, "version": "0.5.23"})

    async def _generate(self, request: Any) -> Any:
        body = await request.json()
        self.asked.append(body)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(document: Any) -> None:
            await response.write(f"data: {json.dumps(document)}\n\n".encode())

        prompt = body.get("text", body.get("input_ids"))
        if prompt == "refuse me":
            await send({"error": {"message": "The input is longer than the model's context length.", "code": 400}})
            return response
        count = 1 if prompt == "hang up" else body["sampling_params"]["max_new_tokens"]
        ids = [100 + at + 1000 * (at == self.differs_at) for at in range(count)]
        for done in range(1, count + 1):
            await asyncio.sleep(self.delay_s)
            last = done == count and prompt != "hang up"
            meta = {
                "prompt_tokens": len(prompt),
                "cached_tokens": 0,
                "completion_tokens": done,
                "finish_reason": {"type": "length"} if last else None,
            }
            await send({"output_ids": ids[done - 1 : done] if self.incremental else ids[:done], "meta_info": meta})
        return response


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "one"}, {"text": "two"}, {"input_ids": [5, 6, 7, 8]}, "three"]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]):
    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["ab", *map(str, args)])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def baseline() -> Iterator[Stub]:
    with Stub("flashinfer") as stub:
        yield stub


def test_equal_servers_agree(command, prompts: Path, baseline: Stub) -> None:
    with Stub("mac", incremental=True) as stub:
        code, out, _ = command(
            "--url", stub.url, "--baseline", baseline.url, "--prompts", prompts, "--max-new-tokens", 12, "--json"
        )
    report = json.loads(out)
    assert code == ExitCode.OK
    assert report["agreement"] == {
        "equal_answers": 1.0, "equal_tokens_p50": 12, "equal_tokens_min": 12, "equal_share": 1.0
    }  # fmt: skip
    assert report["server"]["attention_backend"] == "mac" and report["baseline"]["attention_backend"] == "flashinfer"
    assert report["prompts"] == 4 and report["server"]["tokens"] == 48
    assert report["server"]["prompt_tokens"] == 3 + 3 + 4 + 5
    assert report["baseline_with_itself"] is None and report["notes"] == []


def test_a_difference_is_found_where_it_is(command, prompts: Path, baseline: Stub) -> None:
    with Stub("mac", differs_at=7) as stub:
        code, out, _ = command(
            "--url", stub.url, "--baseline", baseline.url, "--prompts", prompts,
            "--max-new-tokens", 10, "--repeat-baseline", "--json",
        )  # fmt: skip
    report = json.loads(out)
    assert code == ExitCode.OK
    assert report["agreement"] == {
        "equal_answers": 0.0, "equal_tokens_p50": 7, "equal_tokens_min": 7, "equal_share": 0.7
    }  # fmt: skip
    assert report["baseline_with_itself"]["equal_answers"] == 1.0


def test_speed_is_measured_from_the_arrivals(command, prompts: Path) -> None:
    with Stub("mac", delay_s=0.01) as fast, Stub("flashinfer", delay_s=0.04) as slow:
        begin = time.perf_counter()
        _, out, _ = command(
            "--url", fast.url, "--baseline", slow.url, "--prompts", prompts, "--max-new-tokens", 8, "--json"
        )
        wall_s = time.perf_counter() - begin
    report = json.loads(out)
    assert 0.01 <= report["server"]["ttft_s_p50"] < report["baseline"]["ttft_s_p50"] < wall_s
    assert report["server"]["tokens_per_second_p50"] <= 100 and report["baseline"]["tokens_per_second_p50"] <= 25
    assert 1.5 < report["speed_ratio"] < 6 and report["ttft_ratio"] < 1


def test_the_servers_get_the_same_greedy_questions_in_turn(command, prompts: Path, baseline: Stub) -> None:
    baseline.asked.clear()
    with Stub("mac") as stub:
        command("--url", stub.url, "--baseline", baseline.url, "--prompts", prompts, "--concurrency", 3)
        assert stub.asked == baseline.asked
        assert len(stub.asked) == 1 + 4  # the warm-up comes first
        assert {body["sampling_params"]["temperature"] for body in stub.asked} == {0}
        assert [body.get("text", body.get("input_ids")) for body in stub.asked[1:]].count("two") == 1


def test_the_table_shows_both_sides(command, prompts: Path, baseline: Stub) -> None:
    code, out, err = command(
        "--url", baseline.url, "--baseline", baseline.url, "--prompts", prompts, "--max-new-tokens", 3
    )
    assert code == ExitCode.OK
    assert "tokens/s of one answer, p50" in out and "equal answers" in out and "100.0%" in out
    assert "note: both servers run the attention backend flashinfer" in out
    assert "prompts: 4/4" in err


def test_a_refused_prompt_is_named(command, tmp_path: Path, baseline: Stub) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('"fine"\n"refuse me"\n')
    code, out, err = command("--url", baseline.url, "--baseline", baseline.url, "--prompts", path)
    assert code == ExitCode.INPUT and out == ""
    assert f"prompt 2: {baseline.url} refuses the request: The input is longer than" in err
    assert "Traceback" not in err


def test_an_answer_that_ends_early_is_no_answer(command, tmp_path: Path, baseline: Stub) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('"hang up"\n')
    code, _, err = command("--url", baseline.url, "--baseline", baseline.url, "--prompts", path)
    assert code == ExitCode.MISSING and "ended its answer early" in err


def test_a_server_that_is_not_there(command, prompts: Path, baseline: Stub) -> None:
    code, _, err = command("--url", "http://127.0.0.1:9", "--baseline", baseline.url, "--prompts", prompts)
    assert code == ExitCode.MISSING
    assert "http://127.0.0.1:9 does not answer" in err and "start it, or correct the address" in " ".join(err.split())
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no prompts"),
        ("{}", "line 1: expected one of the keys prompt, text, input_ids, got none"),
        ('"a"\n{"messages": []}', "line 2: expected one of the keys prompt, text, input_ids, got messages"),
        ("hello", "line 1: not valid JSON"),
        ('{"input_ids": [1, "a"]}', "a prompt must be a text or a list of token ids, and not empty"),
        ('{"prompt": ""}', "a prompt must be a text or a list of token ids, and not empty"),
    ],
)
def test_a_bad_file_is_named(command, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    code, out, err = command("--url", "http://x", "--baseline", "http://y", "--prompts", path)
    assert code == ExitCode.INPUT and out == ""
    assert message in " ".join(err.split())


def test_a_missing_file_is_named(command) -> None:
    code, _, err = command("--url", "http://x", "--baseline", "http://y", "--prompts", "/nowhere.jsonl")
    assert code == ExitCode.INPUT and "/nowhere.jsonl: cannot be read" in err
