"""The client's connections: one that was idle is not used again, as the server may close it under the next request."""

from __future__ import annotations

import asyncio

import pytest

from mac_sglang import client

aiohttp = pytest.importorskip("aiohttp")


@pytest.mark.parametrize(("idle_s", "connections"), [(0.0, 1), (0.3, 2)])
def test_an_idle_connection_is_not_used_again(idle_s: float, connections: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client._IDLE_S < 5  # SGLang's own limit, SGLANG_TIMEOUT_KEEP_ALIVE
    monkeypatch.setattr(client, "_IDLE_S", 0.1)

    async def run() -> int:
        from aiohttp import web

        peers = set()

        async def metrics(request: web.Request) -> web.Response:
            peers.add(request.transport.get_extra_info("peername"))
            return web.Response(text="mac")

        app = web.Application()
        app.router.add_get("/metrics/", metrics)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        async with client.open_session() as session:
            server = client.Server(session, f"http://127.0.0.1:{runner.addresses[0][1]}")
            await server.metrics()
            await asyncio.sleep(idle_s)
            await server.metrics()
        await runner.cleanup()
        return len(peers)

    assert asyncio.run(run()) == connections
