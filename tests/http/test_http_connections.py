"""Who holds connections and says nothing keeps nobody else out."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection

import httpx
import pytest

from kvtiers.http.app import make_app
from kvtiers.http.server import HttpServer, listen
from kvtiers.testing.operated import OperatedCache

HEAD = b"POST /api/v1/cache/evict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@contextmanager
def served(operated: OperatedCache) -> Iterator[tuple[HttpServer, tuple[str, int]]]:
    listening = listen("127.0.0.1", 0, has_token=False)
    with HttpServer(make_app(operated), listening) as server:
        yield server, listening.getsockname()


def ends(one: socket.socket) -> bool:
    """Whether the server closes it, whatever it says before; TimeoutError if it does not."""
    one.settimeout(10)
    try:
        while one.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize(
    "said",
    [b"", b"GET /metr", HEAD + b"Content-Length: 100\r\n\r\n{"],
    ids=["nothing", "half a head", "half a body"],
)
def test_an_unfinished_request_is_not_waited_for(
    operated: OperatedCache, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr("kvtiers.http.server._IDLE_S", 0.1)
    monkeypatch.setattr("kvtiers.http.server._LONGEST_REQUEST_S", 0.3)
    with served(operated) as (_, address), socket.create_connection(address) as one:
        one.sendall(said)
        assert ends(one)


def test_a_kept_connection_is_good_for_request_after_request(
    operated: OperatedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtiers.http.server._IDLE_S", 2)
    with served(operated) as (_, (host, port)), closing(HTTPConnection(host, port, timeout=10)) as one:
        used = set()
        for _ in range(3):
            one.request("GET", "/healthz")
            used.add(one.sock)
            assert one.getresponse().read() == b'{"status":"ok"}'
        assert len(used) == 1


def test_there_are_so_many_connections_and_no_more(
    operated: OperatedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtiers.http.server._MOST_OPEN", 3)
    with served(operated) as (server, address):
        silent = [socket.create_connection(address) for _ in range(3)]
        with socket.create_connection(address) as one:
            assert ends(one)
        for each in silent:
            each.close()
        with httpx.Client(transport=httpx.HTTPTransport(retries=5), base_url=server.url) as client:
            assert client.get("/healthz").status_code == 200
