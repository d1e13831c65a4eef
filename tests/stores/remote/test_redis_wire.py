"""The wire against a peer that says what the test lets it say: odd replies, slow ones, ones that end too early."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvtiers.stores.redis.settings import Address
from kvtiers.stores.redis.wire import ErrorReply, Wire, WireBroken, WrongLength


class Connected:
    """What redis-py gives: something with a socket."""

    def __init__(self, one: socket.socket) -> None:
        self._sock = one

    def disconnect(self) -> None:
        self._sock.close()


@pytest.fixture
def pair() -> Iterator[tuple[Wire, socket.socket]]:
    ours, peer = socket.socketpair()
    wire = Wire(Connected(ours), Address("peer", 1))
    yield wire, peer
    wire.dispose()
    peer.close()


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


def test_replies_of_every_kind_are_read_however_they_are_cut(pair: tuple[Wire, socket.socket]) -> None:
    wire, peer = pair
    data = b"+OK\r\n:42\r\n$5\r\na\r\nbc\r\n$-1\r\n*3\r\n:1\r\n$0\r\n\r\n*1\r\n+x\r\n*-1\r\n-OOM no room\r\n"
    expected = [b"OK", 42, b"a\r\nbc", None, [1, b"", [b"x"]], None, ErrorReply("OOM no room")]

    def say() -> None:
        for place in range(len(data)):
            peer.sendall(data[place : place + 1])

    thread = threading.Thread(target=say)
    thread.start()
    assert [wire.reply(soon()) for _ in expected] == expected
    thread.join()
    assert ErrorReply("OOM no room").code == "OOM"


def test_values_go_into_the_memory_given_and_nowhere_else(pair: tuple[Wire, socket.socket]) -> None:
    wire, peer = pair
    values = [bytes([number]) * (50_000 + number) for number in range(4)]
    memory = bytearray(b"\xa5" * 400_000)
    places = [memoryview(memory)[90_000 * n : 90_000 * n + len(value)] for n, value in enumerate(values)]
    wire.send([(b"GET", b"%d" % number) for number in range(4)], soon())
    thread = threading.Thread(
        target=peer.sendall, args=(b"".join(b"$%d\r\n%b\r\n" % (len(value), value) for value in values),)
    )
    thread.start()
    assert [wire.value_into(place, soon()) for place in places] == [True] * 4
    thread.join()
    assert wire.is_idle()
    for number, value in enumerate(values):
        assert memory[90_000 * number : 90_000 * (number + 1)] == value.ljust(90_000, b"\xa5")


def test_large_arguments_arrive_as_they_are(pair: tuple[Wire, socket.socket]) -> None:
    wire, peer = pair
    value = bytes(range(256)) * 4096
    expected = b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$%d\r\n%b\r\n" % (len(value), value)
    got = bytearray()

    def listen() -> None:
        while len(got) < len(expected):
            got.extend(peer.recv(65_536))

    thread = threading.Thread(target=listen)
    thread.start()
    wire.send([(b"SET", b"k", memoryview(value))], soon())
    thread.join()
    assert got == expected


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 400\r\n", b"$x\r\n", b":1.5\r\n", b"$3\r\nabcd\r\n", b"$99999999999\r\n", b"x" * 100_000,
    ],
)  # fmt: skip
def test_a_peer_that_speaks_something_else_breaks_the_wire(
    pair: tuple[Wire, socket.socket], said: bytes
) -> None:
    wire, peer = pair
    peer.sendall(said)
    with pytest.raises(WireBroken):
        wire.reply(soon())
    assert not wire.is_idle()
    with pytest.raises(WireBroken):
        wire.reply(soon())


def test_a_value_of_another_length_breaks_the_wire(pair: tuple[Wire, socket.socket]) -> None:
    wire, peer = pair
    peer.sendall(b"$5\r\nabcde\r\n")
    with pytest.raises(WrongLength):
        wire.value_into(memoryview(bytearray(4)), soon())
    assert not wire.is_idle()


@pytest.mark.parametrize("said", [b"", b"$10\r\nabc", b"+O"])
@pytest.mark.parametrize("closes", [False, True])
def test_a_reply_that_never_ends_does(pair: tuple[Wire, socket.socket], said: bytes, closes: bool) -> None:
    wire, peer = pair
    peer.sendall(said)
    if closes:
        peer.close()
    with pytest.raises(WireBroken) as error:
        wire.reply(soon(0.2))
    assert error.value.timed_out is not closes


def test_a_peer_that_always_says_a_little_more_is_given_up_at_the_deadline(
    pair: tuple[Wire, socket.socket],
) -> None:
    wire, peer = pair
    done = threading.Event()

    def dribble() -> None:
        peer.sendall(b"$1000000\r\n")
        try:
            while not done.wait(0.005):
                peer.sendall(b"x")
        except OSError:
            return

    thread = threading.Thread(target=dribble)
    thread.start()
    with pytest.raises(WireBroken) as error:
        wire.value_into(memoryview(bytearray(1_000_000)), soon(0.3))
    assert error.value.timed_out
    done.set()
    thread.join()


def test_a_peer_that_reads_nothing_is_given_up_at_the_deadline(pair: tuple[Wire, socket.socket]) -> None:
    wire, _ = pair
    with pytest.raises(WireBroken) as error:
        wire.send([(b"SET", b"k", memoryview(bytearray(32 << 20)))], soon(0.2))
    assert error.value.timed_out


def test_close_wakes_whoever_waits(pair: tuple[Wire, socket.socket]) -> None:
    wire, _ = pair
    threading.Timer(0.1, wire.close).start()
    with pytest.raises(WireBroken) as error:
        wire.reply(soon(30))
    assert not error.value.timed_out


@pytest.mark.parametrize(
    "spoil",
    [
        lambda wire, _: wire.send([(b"PING",)], soon()),
        lambda _, peer: peer.sendall(b"+PONG\r\n"),
        lambda _, peer: peer.close(),
        lambda wire, _: wire.close(),
    ],
    ids=["a reply is owed", "something came unasked", "the peer is gone", "closed"],
)
def test_a_wire_that_is_out_of_step_is_not_idle(
    pair: tuple[Wire, socket.socket], spoil: Callable[[Wire, socket.socket], None]
) -> None:
    wire, peer = pair
    assert wire.is_idle()
    spoil(wire, peer)
    assert not wire.is_idle()


@pytest.mark.parametrize("said", ["ERR Protocol error: invalid bulk length", None])
def test_whoever_hangs_up_on_what_is_sent_may_have_said_why(
    pair: tuple[Wire, socket.socket], said: str | None
) -> None:
    wire, peer = pair
    peer.sendall(b"+OK\r\n")
    if said is not None:
        peer.sendall(f"-{said}\r\n".encode())
    peer.close()
    with pytest.raises(WireBroken) as error:
        wire.send([(b"PING",), (b"SET", b"k", memoryview(bytearray(32 << 20)))], soon())
    assert error.value.refusal == (None if said is None else ErrorReply(said))
    assert not error.value.timed_out
