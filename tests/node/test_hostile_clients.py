"""Clients that send nonsense, do not read, resize the arena or scribble on it: nobody else notices, and no wrong byte is served."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier
from kvtiers.node import protocol as p
from kvtiers.node import server
from kvtiers.node.framing import answer_decoder, encode_batch
from kvtiers.node.peers import Peer
from kvtiers.stores.guard import Operation
from kvtiers.testing.chaos import wait_until
from kvtiers.testing.faulty_store import Stall

if TYPE_CHECKING:
    from tests.node.conftest import LocalNode, MakeChild, MakeEngine, MakeLocal

    from kvtiers.testing.direct_engine import DirectEngine

CHUNKS = 4
HELLO = encode_batch([p.Hello(p.PROTOCOL_VERSION, "bare")])


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(str(path))
    return sock


def receive(sock: socket.socket) -> tuple[list[Any], list[int]]:
    """The next batch, and descriptors that came with it."""
    decoder = answer_decoder()
    descriptors: list[int] = []
    while True:
        received, fds, _, _ = socket.recv_fds(sock, 1 << 16, 4)
        descriptors += fds
        if not received:
            return [], descriptors
        decoder.feed(received)
        for batch in decoder.batches():
            return list(batch), descriptors


def ask_for_ever(sock: socket.socket) -> None:
    for first in range(1, 1_000_000, 50):
        sock.sendall(encode_batch([p.GetStats(op) for op in range(first, first + 50)]))


NONSENSE = {
    "noise": b"GET / HTTP/1.1\r\n\r\n",
    "a huge frame": b"\xff\xff\xff\xff",
    "an unknown message": b"\x05\x00\x00\x00" + b"\x91\x92\xcc\xc8\x01",
    "a request before hello": encode_batch([p.GetStats(1)]),
    "two hellos": HELLO + HELLO,
    "a namespace not attached": HELLO + encode_batch([p.Stage(1, 0, bytes(32), 1)]),
    "half a key": HELLO
    + encode_batch([p.Attach(1, bytes(32), [(0, 0, 4096)], 16, 2), p.Stage(2, 0, bytes(33), 1)]),
    "an answer": encode_batch([p.Committed(1)]),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_closes_that_connection_and_nothing_else(
    local: LocalNode, make_engine: MakeEngine, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    engine = make_engine(local.socket).connect()
    tokens = engine.tokens(1, CHUNKS)
    engine.store(tokens)
    with connect(local.socket) as sock:
        sock.sendall(NONSENSE[what])
        while receive(sock)[0]:  # until it is closed
            pass
    assert local.server.counters["garbage"] == 1
    assert "makes no sense" in caplog.text
    assert engine.load(tokens).num_chunks == CHUNKS
    assert engine.client.counters["losses"] == 0


def test_frame_that_never_ends_holds_nobody_up(local: LocalNode, make_engine: MakeEngine) -> None:
    with connect(local.socket) as sock:
        sock.sendall((1 << 20).to_bytes(4, "little") + b"x" * 1000)
        engine = make_engine(local.socket).connect()
        engine.store(engine.tokens(1, CHUNKS))
        assert engine.load(engine.tokens(1, CHUNKS)).num_chunks == CHUNKS


def test_other_version_is_told_so_and_closed(local: LocalNode) -> None:
    with connect(local.socket) as sock:
        sock.sendall(encode_batch([p.Hello(p.PROTOCOL_VERSION + 1, "newer")]))
        batch, _ = receive(sock)
        assert isinstance(batch[0], p.Farewell)
        assert "version" in batch[0].reason
        assert not batch[0].again
        assert receive(sock) == ([], [])


def test_client_that_does_not_read_is_closed(make_local: MakeLocal, make_engine: MakeEngine) -> None:
    local = make_local(max_outbox_bytes=1 << 16)
    with connect(local.socket) as sock:
        sock.sendall(HELLO)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            ask_for_ever(sock)
    assert wait_until(lambda: local.server.counters["unread"] == 1)
    make_engine(local.socket).connect()


def test_too_many_clients_are_turned_away(make_local: MakeLocal, make_engine: MakeEngine) -> None:
    local = make_local(max_clients=2)
    engine = make_engine(local.socket).connect()
    with connect(local.socket), connect(local.socket) as third:
        assert third.recv(1) == b""
    assert engine.stats()["tiers"]


def test_one_that_asks_for_much_at_once_takes_turns_with_others(
    local: LocalNode, make_engine: MakeEngine
) -> None:
    engine = make_engine(local.socket).connect()
    space = engine.space.space
    assert space is not None
    with connect(local.socket) as sock:
        sock.sendall(HELLO)
        receive(sock)
        attach = p.Attach(1, engine.space.namespace, [(0, 0, engine.part_bytes)], engine.chunk_tokens, 2)
        sock.sendall(encode_batch([attach]))
        [attached], _ = receive(sock)
        asked = 3 * 2048
        sock.sendall(encode_batch([p.Stage(op, attached.space, b"k" * 32, 0) for op in range(2, 2 + asked)]))
        engine.store(engine.tokens(1, 2))
        decoder, turns = answer_decoder(), list[int]()
        while sum(turns) < asked:
            received = sock.recv(1 << 16)
            assert received, "the connection was closed"
            decoder.feed(received)
            turns += [len(batch) for batch in decoder.batches()]
        assert max(turns) < 2048  # others are heard between these


def test_one_that_attaches_chunks_of_many_parts_takes_turns_with_others(local: LocalNode) -> None:
    parts = [(0, rank, 4096) for rank in range(1024)]
    asked = 2 * 64
    with connect(local.socket) as sock:
        sock.sendall(HELLO)
        receive(sock)
        sock.sendall(encode_batch([p.Attach(op, bytes(32), parts, 16, 2) for op in range(1, 1 + asked)]))
        decoder, turns = answer_decoder(), list[int]()
        while sum(turns) < asked:
            received = sock.recv(1 << 16)
            assert received, "the connection was closed"
            decoder.feed(received)
            turns += [len(batch) for batch in decoder.batches()]
    assert max(turns) == 1


def test_one_request_is_about_so_many_slots_and_no_more(local: LocalNode) -> None:
    parts = [(0, rank, 1) for rank in range(32)]
    most = p.MAX_SLOTS // len(parts)
    with connect(local.socket) as sock:
        sock.sendall(HELLO)
        receive(sock)
        sock.sendall(encode_batch([p.Attach(1, bytes(32), parts, 16, 2)]))
        [attached], _ = receive(sock)
        for count, staged, opened in ((most + 1, p.Failed, p.Failed), (most, p.Staged, p.Opened)):
            keys = b"".join(number.to_bytes(32, "little") for number in range(count))
            stage = p.Stage(2, attached.space, keys, 1000)
            store = p.OpenStore(3, attached.space, bytes(32), keys)
            for asked, wanted in ((stage, staged), (store, opened)):
                sock.sendall(encode_batch([asked]))
                [answer], _ = receive(sock)
                assert isinstance(answer, wanted)
            sock.sendall(encode_batch([p.Release(2), p.Abort(3)]))
        sock.sendall(encode_batch([p.Goodbye()]))
        assert receive(sock) == ([], [])


def test_client_whose_end_could_not_be_seen_is_turned_away(
    local: LocalNode,
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The kernel calls every process of a PID namespace that is not below ours 0."""
    monkeypatch.setattr(server, "peer_of", lambda sock: Peer(0, os.getuid()))
    engine = make_engine(local.socket)
    assert wait_until(lambda: bool(engine.client.step()) or local.server.counters["refused"] > 0)
    assert not engine.client.connected
    assert "shareProcessNamespace" in caplog.text


def test_arena_can_not_be_resized(local: LocalNode, make_engine: MakeEngine) -> None:
    with connect(local.socket) as sock:
        sock.sendall(HELLO)
        batch, descriptors = receive(sock)
        (fd,) = descriptors
        try:
            size = batch[0].arena_bytes
            assert os.fstat(fd).st_size == size
            for other in (0, size - 4096, size + 4096):
                with pytest.raises(PermissionError):
                    os.ftruncate(fd, other)
        finally:
            os.close(fd)
    engine = make_engine(local.socket).connect()
    engine.store(engine.tokens(1, CHUNKS))
    assert engine.load(engine.tokens(1, CHUNKS)).num_chunks == CHUNKS


class TestScribbling:
    """Whoever maps the arena can write anywhere in it. What it did is found out before the bytes are believed."""

    def scribble(self, engine: DirectEngine, offset: int) -> None:
        view = engine.client.view(engine.client._arena_id, offset, 4096)
        assert view is not None
        view[17] ^= 0xFF

    def stored(self, engine: DirectEngine) -> tuple[list[int], list[int]]:
        tokens = engine.tokens(1, CHUNKS)
        store = engine.store(tokens)
        return tokens, [int(offset) for offset in store.offsets[:, 0]]

    def sealed(self, local: LocalNode) -> bool:
        return wait_until(lambda: local.node.stats()["async"]["completed"].get("seal", 0) >= CHUNKS)

    def test_is_found_at_once_with_verify_on_hit(
        self, make_local: MakeLocal, make_engine: MakeEngine
    ) -> None:
        local = make_local({"cpu.verify_on_hit": True})
        engine, vandal = make_engine(local.socket).connect(), make_engine(local.socket).connect()
        tokens, slots = self.stored(engine)
        local.node.flush(20)  # a write that met the scribble would be refused, and the disk had it never
        self.scribble(vandal, slots[2])
        found = engine.load(tokens)
        assert found.num_chunks == 2
        assert found.stopped_by is MissReason.CORRUPT
        assert wait_until(lambda: engine.load(tokens).num_chunks == CHUNKS)  # again from the disk
        assert local.node.stats()["tiers"]["cpu"]["corrupt"] == 1

    def test_a_load_that_nobody_can_verify_is_answered_with_nothing(
        self, make_local: MakeLocal, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        local = make_local({"cpu.verify_on_hit": True})
        engine = make_engine(local.socket).connect()
        tokens, _ = self.stored(engine)
        with monkeypatch.context() as full:
            full.setattr(local.node.engine, "run_in_memory_pool", lambda job: False)
            found = engine.load(tokens, timeout=60.0)
        assert (found.num_chunks, found.stopped_by) == (0, MissReason.STAGING_TIMEOUT)
        assert engine.load(tokens).num_chunks == CHUNKS, "nothing was dropped"
        assert local.node.stats()["tiers"]["cpu"]["corrupt"] == 0

    def test_is_found_by_the_audit(self, local: LocalNode, make_engine: MakeEngine) -> None:
        engine, vandal = make_engine(local.socket).connect(), make_engine(local.socket).connect()
        _, slots = self.stored(engine)
        assert self.sealed(local)
        self.scribble(vandal, slots[1])
        problems = local.node.check_integrity()
        assert len(problems) == 1
        assert "not those that were committed" in problems[0]
        self.scribble(vandal, slots[1])  # undone, for the audit at the end

    def test_is_never_blessed_by_write_through(self, local: LocalNode, make_engine: MakeEngine) -> None:
        """Between commit and write: the record carries the checksum of what was committed, so the next read refuses it."""
        engine, vandal = make_engine(local.socket).connect(), make_engine(local.socket).connect()
        go_on = threading.Event()
        stalled = local.disk.inject(Stall(go_on, 0.25), Operation.WRITE, times=1)
        tokens, slots = self.stored(engine)
        assert self.sealed(local)
        assert stalled.wait_for_hit(20)
        for slot in slots:
            self.scribble(vandal, slot)
        go_on.set()
        assert wait_until(lambda: engine.stats()["tiers"]["disk"]["entries"] == CHUNKS)
        local.node.evict(Tier.CPU, 0)
        missed = engine.load(tokens)
        assert missed.num_chunks == 0
        assert missed.stopped_by is MissReason.CORRUPT

        def healed() -> (
            bool
        ):  # a store at a time: the records behind the first bad one are found out one by one
            engine.store(tokens)
            return engine.load(tokens).num_chunks == CHUNKS

        assert wait_until(healed)


def test_connections_lost_without_a_word_are_bounded_for_each_process(
    local: LocalNode, make_child: MakeChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_MOST_LOST", 3)

    def departing() -> int:
        found: int = local.server.stats()["service"]["departing"]
        return found

    for lost in range(1, 4):
        with connect(local.socket) as sock:
            sock.sendall(HELLO)
            receive(sock)
        assert wait_until(lambda: departing() >= lost, 20)  # noqa: B023 - called at once
    with connect(local.socket):
        assert wait_until(lambda: local.server.counters["refused"] == 1, 20), "one more is not served"
    other = make_child(local.socket, "connect")
    other.hear("holding")
    other.tell()
    other.hear("closed")


def test_statistics_are_told_once_for_what_arrives_together(local: LocalNode) -> None:
    with connect(local.socket) as sock:
        sock.sendall(HELLO)
        receive(sock)
        for _ in range(2):
            sock.sendall(encode_batch([p.GetStats(op) for op in range(1, 1001)]))
            answers, _ = receive(sock)
            assert [type(answer) for answer in answers] == [p.Stats] + [p.Failed] * 999
