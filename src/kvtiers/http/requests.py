"""What every request goes through before the application: how many there are at a time, `HEAD`, and the end of the server."""

from __future__ import annotations

import asyncio
import json
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_AT_ONCE: Final = 64
"""Requests under way; one more is answered 503 at once, unless it is a probe's."""
UNBOUNDED_PATHS: Final = frozenset({"/healthz"})
"""It takes no thread, so those that do can't keep it waiting: who asks it ends the service if it does not answer."""


class BoundedRequests:
    """An application in front of the application. On the server's thread only."""

    def __init__(self, app: ASGIApp, most: int = MOST_AT_ONCE) -> None:
        self._app = app
        self._most = most
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # the server leaves the body out
            scope = {**scope, "method": "GET"}
        counts = scope["path"] not in UNBOUNDED_PATHS
        if counts and self._running >= self._most:
            await _refuse(send, f"{self._most} requests are being answered: ask again")
            return
        self._running += counts
        try:
            await _unless_cut_off(self._app, scope, receive, send)
        finally:
            self._running -= counts


async def _unless_cut_off(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """A server that ends cancels what has not ended in time: that is an answer, and no error of the application's."""
    began = False

    async def note(message: Message) -> None:
        nonlocal began
        began = True
        await send(message)

    try:
        await app(scope, receive, note)
    except asyncio.CancelledError:
        if not began:
            await _refuse(send, "the service ends")


async def _refuse(send: Send, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", b"1"),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})
