"""A client of SGLang's native HTTP interface: prompts in, tokens and their times of arrival out."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mac_kernels.errors import InputError, MissingError

if TYPE_CHECKING:
    from aiohttp import ClientSession

_LINE_BYTES = 2**22  # a streamed chunk repeats every token so far, on one line
_SILENCE_S = 600.0  # between two chunks; the first one of a long prompt is the slowest
_IDLE_S = 2.0  # of a connection that is used again; after 5 s SGLang closes it, maybe under a request


@dataclass(slots=True)
class Reply:
    """What a server answered.

    ``output_ids`` the tokens; ``arrivals_s`` when each was there (``time.perf_counter()``; tokens of one chunk share a
    time); ``started_s`` when the request was sent; ``text`` empty without a tokenizer; ``meta`` SGLang's ``meta_info``.
    """

    started_s: float
    output_ids: list[int] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)
    text: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def ttft_s(self) -> float:
        """Time to the first token; NaN if none came."""
        return self.arrivals_s[0] - self.started_s if self.arrivals_s else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token; NaN below two tokens."""
        if len(self.arrivals_s) < 2:
            return float("nan")
        return (len(self.arrivals_s) - 1) / (self.arrivals_s[-1] - self.arrivals_s[0])

    def add(self, chunk: Mapping[str, Any], now_s: float) -> None:
        """Take one chunk; servers send all tokens so far, or (``--incremental-streaming-output``) the new ones."""
        self.meta = chunk["meta_info"]
        ids, total = chunk.get("output_ids", []), self.meta["completion_tokens"]
        self.text = chunk.get("text", "") if len(ids) == total else self.text + chunk.get("text", "")
        self.output_ids[total - len(ids) :] = ids
        self.arrivals_s += [now_s] * (len(self.output_ids) - len(self.arrivals_s))


class Server:
    """One SGLang server.

    Parameters
    ----------
    session : aiohttp.ClientSession
        From :func:`open_session`.
    url : str
        Its address, e.g. ``http://127.0.0.1:30000``.
    """

    def __init__(self, session: ClientSession, url: str) -> None:
        self._session = session
        self.url = url.rstrip("/")

    async def generate(
        self,
        prompt: str | list[int],
        *,
        max_new_tokens: int,
        ignore_eos: bool = False,
        sampling: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Reply:
        """Generate greedily from a text or from token ids; cancelling the call makes the server abort the request.

        Parameters
        ----------
        prompt : str or list of int
        max_new_tokens : int, >= 1
        ignore_eos : bool, default False
        sampling : mapping, optional
            More sampling parameters; they win over ``temperature=0``.
        **fields
            More fields of the request, e.g. ``return_logprob=True``.

        Raises
        ------
        InputError
            If the server refuses the request.
        MissingError
            If it cannot be reached or stops answering.
        """
        params = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos, **(sampling or {})}
        name = "text" if isinstance(prompt, str) else "input_ids"
        body = {name: prompt, "sampling_params": params, "stream": True, **fields}
        reply = Reply(time.perf_counter())
        async with self._request("POST", "/generate", json=body) as response:
            async for line in response.content:
                data = line.removeprefix(b"data:").strip()
                if line.startswith(b"data:") and data != b"[DONE]":
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise InputError(f"{self.url} refuses the request: {_message(chunk)}")
                    reply.add(chunk, time.perf_counter())
        if not reply.meta.get("finish_reason"):
            raise MissingError(f"{self.url} ended its answer early; look into the server's log")
        return reply

    async def info(self) -> dict[str, Any]:
        """Return what the server says about itself (``attention_backend``, ``version`` and its other arguments)."""
        async with self._request("GET", "/server_info") as response:
            info: dict[str, Any] = await response.json()
            return info

    async def metrics(self) -> str:
        """Return the text of ``/metrics`` (``--enable-metrics``)."""
        async with self._request("GET", "/metrics/") as response:
            text: str = await response.text()
            return text

    async def flush(self) -> None:
        """Empty the prefix cache; the server does it only while no request runs."""
        async with self._request("POST", "/flush_cache"):
            pass

    @asynccontextmanager
    async def _request(self, method: str, path: str, **options: Any) -> AsyncIterator[Any]:
        import aiohttp

        try:
            async with self._session.request(method, self.url + path, **options) as response:
                if response.status != 200:
                    raise InputError(f"{self.url}{path} answers {response.status}: {_message(await response.text())}")
                yield response
        except (TimeoutError, aiohttp.ClientError) as error:
            reason = str(error) or type(error).__name__
            raise MissingError(f"{self.url} does not answer ({reason}); start it, or correct the address") from error


@asynccontextmanager
async def open_session() -> AsyncIterator[ClientSession]:
    """Open the HTTP session that servers share.

    Raises
    ------
    MissingError
        If aiohttp is not installed.
    """
    try:
        import aiohttp
    except ImportError:
        raise MissingError("aiohttp is not installed; install it with: pip install 'mac-kernels[sglang]'") from None
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=_SILENCE_S)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, read_bufsize=_LINE_BYTES) as session:
        yield session


def _message(answer: str | dict[str, Any]) -> str:
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except ValueError:
            return str(answer).strip()[:300]
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300]
