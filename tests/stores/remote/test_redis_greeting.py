"""Saying who we are to a server: what it answers is never repeated, and it is waited for no longer than for anything else."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from kvtiers.model.errors import StoreError, StoreTransient, StoreUnavailable
from kvtiers.stores.redis.dialling import Dialler, refused
from kvtiers.stores.redis.settings import Address, RedisSettings
from kvtiers.stores.redis.values import RedisValues

Answer = Callable[[socket.socket], None]


@contextmanager
def server_that(answers: Answer) -> Iterator[Address]:
    """Takes one connection, and answers to the first thing it hears."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(30)

    def serve() -> None:
        with listener.accept()[0] as peer:
            peer.recv(1000)
            try:
                answers(peer)
                peer.recv(1000)
            except OSError:
                pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with listener:
        yield Address("127.0.0.1", listener.getsockname()[1])
    thread.join(30)
    assert not thread.is_alive()


def problem_of(answers: Answer, kind: type[StoreError], database: int = 0) -> str:
    with server_that(answers) as address:
        endpoint = f"redis://{address.host}:{address.port}/{database}"
        dialler = Dialler(RedisSettings(endpoint, username="bob", password="s3cret"))
        with pytest.raises(kind) as caught:
            dialler.dial(address, time.monotonic() + 0.5)
    text = str(caught.value)
    assert "s3cret" not in text
    assert "bob" not in text
    return text


def test_a_server_that_does_not_know_auth_gives_no_password_away() -> None:
    said = b"-ERR unknown command 'AUTH', with args beginning with: 'bob' 's3cret' \r\n"
    text = problem_of(lambda peer: peer.sendall(said), StoreUnavailable)
    assert "refuses our user or password (ERR)" in text
    assert "KVTIERS_REMOTE_PASSWORD" in text


def test_a_server_that_crawls_is_given_up_in_time() -> None:
    began = time.monotonic()

    def crawl(peer: socket.socket) -> None:
        for _ in range(200):
            peer.sendall(b"+")
            time.sleep(0.1)

    assert "did not answer in time" in problem_of(crawl, StoreTransient)
    assert time.monotonic() - began < 15  # it would crawl for 20 s


def test_a_server_that_loads_will_have_done_so() -> None:
    text = problem_of(
        lambda peer: peer.sendall(b"-LOADING Redis is loading the dataset in memory\r\n"), StoreTransient
    )
    assert "loading its data" in text


def test_a_database_that_is_not_there_is_named() -> None:
    text = problem_of(
        lambda peer: peer.sendall(b"+OK\r\n-ERR DB index is out of range\r\n"), StoreUnavailable, 99
    )
    assert "has no database 99" in text


def test_a_server_that_does_not_know_a_command_gives_no_value_away() -> None:
    error = refused(
        Address("a", 1), "ERR", "ERR unknown command 'SET', with args beginning with: 'name' 'value'"
    )
    assert str(error) == "a:1 refuses: ERR unknown command 'SET'"


DENIED = b"-DENIED Redis is running in protected mode because protected mode is enabled\r\n"
TOO_MANY = b"-ERR max number of clients reached\r\n"


@contextmanager
def server_that_says(said: bytes) -> Iterator[Address]:
    """To everybody who connects, before it hears anything; then it hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            try:
                while True:
                    with listener.accept()[0] as peer:
                        peer.sendall(said)
            except OSError:
                return

        threading.Thread(target=serve, daemon=True).start()
        yield Address("127.0.0.1", listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("said", [DENIED, TOO_MANY])
@pytest.mark.parametrize("password", ["", "s3cret"])
def test_a_server_that_takes_nobody_says_why(said: bytes, password: str) -> None:
    with server_that_says(said) as address:
        values = RedisValues(RedisSettings(f"redis://{address}", password=password))
        values.open()
        for _ in range(3):
            with pytest.raises(StoreUnavailable) as caught:
                values.exists(["a"])
            assert str(caught.value) == f"{address} refuses: {said[1:-2].decode()}"
        values.close()


@pytest.mark.parametrize(
    "said", ["NOAUTH Authentication required.", "NOPERM no permission", "ERR unknown command 'INFO'"]
)
def test_a_server_that_does_not_say_which_run_it_is_will_do(said: str) -> None:
    with server_that(lambda peer: peer.sendall(f"-{said}\r\n".encode())) as address:
        wire = Dialler(RedisSettings(f"redis://{address}")).dial(address, time.monotonic() + 5)
        assert wire.run == b""
        wire.dispose()
