"""Who holds connections and says nothing keeps nobody else out."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection

import httpx
import pytest

from kvtiers.http.app import make_app
from kvtiers.http.server import HttpServer, listen, stop_all
from kvtiers.testing.operated import OperatedCache

HEAD = b"POST /api/v1/cache/evict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HALF = HEAD + b"Content-Length: 100\r\n\r\n{"


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
    [b"", b"GET /metr", HALF],
    ids=["nothing", "half a head", "half a body"],
)
def test_an_unfinished_request_is_not_waited_for(
    operated: OperatedCache, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr("kvtiers.http.connections._IDLE_S", 0.1)
    monkeypatch.setattr("kvtiers.http.connections._LONGEST_REQUEST_S", 0.3)
    with served(operated) as (_, address), socket.create_connection(address) as one:
        one.sendall(said)
        assert ends(one)


def test_a_body_that_does_not_come_is_waited_for_no_longer_than_a_head(
    operated: OperatedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or 64 of them would keep everybody's requests out for two minutes."""
    monkeypatch.setattr("kvtiers.http.connections._IDLE_S", 0.1)
    with served(operated) as (_, address), socket.create_connection(address) as one:
        one.sendall(HALF)
        assert ends(one)


def test_a_kept_connection_is_good_for_request_after_request(
    operated: OperatedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtiers.http.connections._IDLE_S", 2)
    with served(operated) as (_, (host, port)), closing(HTTPConnection(host, port, timeout=10)) as one:
        used = set()
        for _ in range(3):
            one.request("GET", "/healthz")
            used.add(one.sock)
            assert one.getresponse().read() == b'{"status":"ok"}'
        assert len(used) == 1


def test_silent_connections_make_room_for_new_ones(
    operated: OperatedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtiers.http.connections._MOST_OPEN", 3)
    with served(operated) as (server, address):
        silent = [socket.create_connection(address) for _ in range(3)]
        for _ in range(3):
            assert httpx.get(f"{server.url}/healthz").status_code == 200
        assert ends(silent[0]), "it has been silent for longest"
        for each in silent:
            each.close()


def test_connections_with_a_request_under_way_are_not_closed_for_new_ones(
    operated: OperatedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(operated) as (server, address):
        busy = [socket.create_connection(address) for _ in range(2)]
        for each in busy:
            each.sendall(HALF)
        assert httpx.get(f"{server.url}/healthz").status_code == 200  # what was sent before is being handled
        monkeypatch.setattr("kvtiers.http.connections._MOST_OPEN", 2)
        with socket.create_connection(address) as one:
            assert ends(one)
        for each in busy:
            each.sendall(b"}" * 99)
            each.settimeout(10)
            assert b" 4" in each.recv(4096).partition(b"\r\n")[0]
            each.close()


def test_requests_that_do_not_end_are_cut_off_when_the_servers_do(
    operated: OperatedCache, caplog: pytest.LogCaptureFixture
) -> None:
    listening = [listen("127.0.0.1", 0, has_token=False) for _ in range(2)]
    servers = [HttpServer(make_app(operated), each) for each in listening]
    waiting = []
    for server, each in zip(servers, listening, strict=True):
        server.start()
        one = socket.create_connection(each.getsockname())
        one.sendall(HALF)
        waiting.append(one)
        assert httpx.get(f"{server.url}/healthz").status_code == 200  # what was sent before is being handled
    assert stop_all(servers, 3.0)
    for one in waiting:
        one.settimeout(10)
        assert b" 503 " in one.recv(4096).partition(b"\r\n")[0]
        one.close()
    assert not [record for record in caplog.records if record.exc_info]


def test_servers_with_nothing_to_do_end_though_connections_are_open(operated: OperatedCache) -> None:
    with served(operated) as (server, (host, port)), closing(HTTPConnection(host, port, timeout=10)) as kept:
        kept.request("GET", "/healthz")
        kept.getresponse().read()
        with socket.create_connection((host, port)):
            assert server.stop(3.0)
