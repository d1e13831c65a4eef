"""What an InfiniStore client makes of answers that its server gives only when it is in trouble. The server is made up."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from kvtiers.model.errors import StoreError, StoreFull, StoreTransient
from kvtiers.stores.infinistore import channel
from kvtiers.stores.infinistore.frames import FOUND, STATUS, Status
from kvtiers.stores.infinistore.values import InfiniStoreSettings, InfiniStoreValues
from kvtiers.testing.chaos import wait_until
from kvtiers.testing.servers.process import LOOPBACK

HERE, ABSENT, BROKEN, FULL = (
    FOUND.pack(Status.OK, 0),
    FOUND.pack(Status.OK, 1),
    STATUS.pack(500),
    STATUS.pack(507),
)
PATIENCE_S = 30.0
LONGEST_S = 600.0
"""Nothing below may wait for the time-out of a call."""


class Answering:
    """A server that answers one request after the other with these bytes, to all others with the last of them."""

    def __init__(self) -> None:
        self.answers: list[bytes] = []
        self.ended = 0
        self._connections: list[socket.socket] = []
        self._listener = socket.create_server((LOOPBACK, 0))
        self._start(self._accept)

    @property
    def endpoint(self) -> str:
        return "{}:{}".format(*self._listener.getsockname())

    def hang_up(self) -> None:
        """On all who are connected."""
        while self._connections:
            self._connections.pop().shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            while connection.recv(1 << 16):
                connection.sendall(self.answers.pop(0) if self.answers[1:] else self.answers[0])
        self.ended += 1

    @staticmethod
    def _start(target: Callable[..., None], *args: object) -> None:
        threading.Thread(target=target, args=args, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Answering]:
    server = Answering()
    yield server
    server.close()


@pytest.fixture
def values(server: Answering, monkeypatch: pytest.MonkeyPatch) -> Iterator[InfiniStoreValues]:
    monkeypatch.setattr(channel, "_DRAIN_UNCOUNTED_S", 0.1)
    values = InfiniStoreValues(InfiniStoreSettings(server.endpoint, timeout_s=LONGEST_S))
    values.open()
    yield values
    values.close()


def test_answers_to_several_names_are_told_apart(server: Answering, values: InfiniStoreValues) -> None:
    server.answers = [HERE + ABSENT + HERE]
    for _ in range(3):
        assert values.exists(["a", "b", "c"]) == [True, False, True]
    assert server.ended == 0


@pytest.mark.parametrize(
    ("answers", "call", "raised"),
    [
        ([HERE + BROKEN + HERE], lambda values: values.exists(["a", "b", "c"]), StoreTransient),
        ([BROKEN], lambda values: values.exists(["a", "b", "c"]), StoreTransient),
        ([HERE + HERE, FULL], lambda values: values.remove(["a", "b"]), StoreFull),
    ],
)
def test_a_connection_on_which_an_error_cut_answers_short_is_given_up_at_once(
    server: Answering,
    values: InfiniStoreValues,
    answers: list[bytes],
    call: Callable[[InfiniStoreValues], object],
    raised: type[StoreError],
) -> None:
    """Its rest is waited for no longer than a moment: it never comes, and others must not be held up by it."""
    server.answers = answers
    with pytest.raises(raised):
        call(values)
    assert wait_until(lambda: server.ended == 1 and values.stats()["answers_owed"] == 0, PATIENCE_S)
    server.answers = [HERE]
    assert values.exists(["a"]) == [True]


def test_a_server_that_has_ended_a_connection_may_hold_nothing_any_more(
    server: Answering, values: InfiniStoreValues
) -> None:
    server.answers = [HERE]
    assert values.exists(["a"]) == [True]
    assert values.restarts() == 0
    server.hang_up()
    assert wait_until(lambda: values.exists(["a"]) == [True] and values.restarts() == 1, PATIENCE_S)
