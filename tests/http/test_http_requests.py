"""What every request goes through before the application."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from kvtiers.http.requests import BoundedRequests


def ask(app: BoundedRequests, path: str, method: str = "GET") -> Any:
    transport = httpx.ASGITransport(app)
    client = httpx.AsyncClient(transport=transport, base_url="http://localhost")
    return client.request(method, path)


def test_so_many_requests_are_answered_at_a_time_and_probes_always() -> None:
    async def story() -> None:
        release = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] == "/slow":
                await release.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"done"})

        bounded = BoundedRequests(app, most=2)
        slow = [asyncio.create_task(ask(bounded, "/slow")) for _ in range(2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        refused = await ask(bounded, "/metrics")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "2 requests" in refused.json()["detail"]
        assert (await ask(bounded, "/healthz")).status_code == 200
        release.set()
        assert [answer.status_code for answer in await asyncio.gather(*slow)] == [200, 200]
        assert (await ask(bounded, "/metrics")).status_code == 200

    asyncio.run(story())


def test_a_request_that_failed_counts_no_more() -> None:
    async def story() -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            raise ZeroDivisionError

        bounded = BoundedRequests(app, most=1)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await ask(bounded, "/metrics")

    asyncio.run(story())


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz", "/api/v1/cache/stats"])
def test_head_is_get_without_the_body(http: httpx.Client, path: str) -> None:
    got, head = http.get(path), http.head(path)
    assert (got.status_code, head.status_code) == (200, 200)
    assert head.content == b""
    assert head.headers["content-type"] == got.headers["content-type"]
    assert int(head.headers["content-length"]) > 0
    assert http.head("/nowhere").status_code == 404
