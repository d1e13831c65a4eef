"""The client against a service that the test plays itself: what it believes, what it gives up, how often it comes back."""

from __future__ import annotations

import fcntl
import os
import random
import socket
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kvtiers.model.keys import ChunkKey
from kvtiers.model.parts import Part, Parts
from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.node import protocol as p
from kvtiers.node.client import GRACE_S, MAX_OUTSTANDING, NodeClient
from kvtiers.node.framing import encode_batch, request_decoder
from kvtiers.node.handles import Attachment

ARENA_BYTES = 1 << 16
LEASE_MS = 20_000
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
KEYS = [ChunkKey(bytes([number]) * 32) for number in range(4)]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class PlayedService:
    """One listening socket; the test says what is answered."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.sock: socket.socket | None = None
        self.decoder = request_decoder()

    def accept(self) -> None:
        self.listener.settimeout(10)
        self.sock, _ = self.listener.accept()
        self.sock.setblocking(False)
        self.decoder = request_decoder()

    def heard(self) -> list[p.Request]:
        """Everything that has arrived by now."""
        assert self.sock is not None
        try:
            self.decoder.feed(self.sock.recv(1 << 20))
        except BlockingIOError:
            return []
        return [message for batch in self.decoder.batches() for message in batch]

    def welcome(
        self, *, arena: bytes = b"a" * 32, connection: int = 1, nbytes: int = ARENA_BYTES, seals: int = SEALS
    ) -> None:
        assert self.sock is not None
        fd = os.memfd_create("arena", os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, ARENA_BYTES)
            if seals:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            frame = encode_batch([p.Welcome(p.PROTOCOL_VERSION, connection, arena, nbytes, LEASE_MS)])
            socket.send_fds(self.sock, [frame], [fd])
        finally:
            os.close(fd)

    def say(self, *answers: p.Answer) -> None:
        assert self.sock is not None
        self.sock.sendall(encode_batch(answers))

    def hang_up(self) -> None:
        if self.sock is not None:
            self.sock.close()


class Bench:
    """A client with a clock of its own, and the service it talks to."""

    def __init__(self, path: Path) -> None:
        self.service = PlayedService(path)
        self.clock = Clock()
        self.client = NodeClient(path, clock=self.clock, rng=random.Random(0))
        self.space: Attachment = self.client.attach(
            b"n" * 32, Parts([Part(0, 0, 4096)]), chunk_tokens=16, itemsize=2
        )

    def connect(self, **welcome: Any) -> None:
        self.client.step()
        self.service.accept()
        assert isinstance(self.service.heard()[0], p.Hello)
        self.service.welcome(**welcome)
        self.client.step()
        (attach,) = [one for one in self.service.heard() if isinstance(one, p.Attach)]
        self.service.say(p.Attached(attach.op, 7))
        self.client.step()
        assert self.space.ready

    def lose(self) -> None:
        self.service.hang_up()
        self.client.step()
        assert not self.client.connected
        self.clock.now += 10

    def load(self, timeout: float = 1.0) -> Any:
        load = self.client.stage(self.space, KEYS, deadline=self.clock.now + timeout)
        self.client.step()
        return load

    def staged(self, op: int, *offsets: int) -> p.Staged:
        packed = b"".join(offset.to_bytes(8, "little") for offset in offsets)
        return p.Staged(op, packed, bytes([1] * len(offsets)), None)


@pytest.fixture
def bench(folder: Path) -> Iterator[Bench]:
    one = Bench(folder / "s.sock")
    yield one
    one.client.close()
    one.service.hang_up()
    one.service.listener.close()


def test_posts_of_one_step_are_one_frame(bench: Bench) -> None:
    bench.connect()
    for _ in range(3):
        bench.client.stage(bench.space, KEYS, deadline=2000)
    bench.client.report(gpu_usage=0.5, prefill_tokens_per_s=10)
    assert bench.service.heard() == []
    bench.client.step()
    assert bench.service.sock is not None
    bench.service.decoder.feed(bench.service.sock.recv(1 << 20))
    (batch,) = bench.service.decoder.batches()
    assert [type(one) for one in batch] == [p.Stage, p.Stage, p.Stage, p.Report]


class TestWhatItBelieves:
    @pytest.mark.parametrize("offset", [ARENA_BYTES, ARENA_BYTES - 4095, 1, 1 << 63, (1 << 64) - 4096])
    def test_slot_outside_the_arena_ends_the_connection(self, bench: Bench, offset: int) -> None:
        bench.connect()
        load = bench.load()
        bench.service.say(bench.staged(load.op, 0, offset))
        bench.client.step()
        assert not bench.client.connected
        assert load.done
        assert load.num_chunks == 0

    def test_fewer_offsets_than_chunks_end_the_connection(self, bench: Bench) -> None:
        bench.connect()
        load = bench.load()
        bench.service.say(p.Staged(load.op, bytes(8), bytes([1, 1]), None))
        bench.client.step()
        assert not bench.client.connected

    @pytest.mark.parametrize(
        "reply", [p.Staged(1, b"", b"", "a reason nobody knows"), p.Staged(1, bytes(8), b"\x09", None)]
    )
    def test_words_it_does_not_know_end_the_connection(self, bench: Bench, reply: p.Staged) -> None:
        bench.connect()
        load = bench.load()
        bench.service.say(p.Staged(load.op, reply.offsets, reply.tiers, reply.stopped_by))
        bench.client.step()
        assert not bench.client.connected
        assert load.done

    @pytest.mark.parametrize(
        "wrong", [{"nbytes": ARENA_BYTES * 2}, {"seals": 0}, {"seals": fcntl.F_SEAL_GROW}]
    )
    def test_arena_that_could_shrink_or_is_smaller_than_said_is_not_mapped(
        self, bench: Bench, wrong: dict[str, Any]
    ) -> None:
        bench.client.step()
        bench.service.accept()
        bench.service.welcome(**wrong)
        bench.client.step()
        assert not bench.client.connected
        assert bench.client.view(b"a" * 32, 0, 4096) is None

    def test_welcome_without_an_arena_ends_the_connection(self, bench: Bench) -> None:
        bench.client.step()
        bench.service.accept()
        bench.service.say(p.Welcome(p.PROTOCOL_VERSION, 1, b"a" * 32, ARENA_BYTES, LEASE_MS))
        bench.client.step()
        assert not bench.client.connected

    def test_noise_ends_the_connection(self, bench: Bench) -> None:
        bench.connect()
        assert bench.service.sock is not None
        bench.service.sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        bench.client.step()
        assert not bench.client.connected


class TestWhatItGivesUp:
    def test_silence_past_the_deadline_is_a_miss_and_the_service_is_told(self, bench: Bench) -> None:
        bench.connect()
        load = bench.load(timeout=1.0)
        bench.clock.now += 1.0
        bench.client.step()
        assert not load.done  # the answer may be on its way
        bench.clock.now += GRACE_S
        bench.client.step()
        assert load.done
        assert load.stopped_by is MissReason.STAGING_TIMEOUT
        bench.client.step()
        assert p.Release(load.op) in bench.service.heard()
        bench.service.say(bench.staged(load.op, 0))  # too late: it was told to release that
        bench.client.step()
        assert load.num_chunks == 0
        assert bench.client.connected

    def test_store_that_is_not_answered_is_refused_and_aborted(self, bench: Bench) -> None:
        bench.connect()
        store = bench.client.open_store(bench.space, KEYS[0], KEYS, first=1)
        bench.client.step()
        bench.clock.now += 60
        bench.client.step()
        bench.client.step()
        assert store.done
        assert store.refused == [(1, 3, Refusal.TIER_OPEN)]
        assert p.Abort(store.op) in bench.service.heard()

    def test_what_is_outstanding_is_bounded(self, bench: Bench) -> None:
        bench.connect()
        loads = [bench.client.stage(bench.space, KEYS, deadline=2000) for _ in range(MAX_OUTSTANDING + 10)]
        assert [load.done for load in loads] == [False] * MAX_OUTSTANDING + [True] * 10
        assert bench.client.counters["overflows"] == 10

    def test_what_one_request_may_ask_for_is_bounded(self, bench: Bench) -> None:
        bench.connect()
        wide = Attachment(bytes(32), Parts([Part(0, rank, 1) for rank in range(32)]), 16, 2)
        wide.space = 1
        keys = KEYS[:1] * (p.MAX_SLOTS // 32)
        assert not bench.client.stage(wide, keys, deadline=2000).done
        assert bench.client.stage(wide, keys + KEYS[:1], deadline=2000).stopped_by is MissReason.TIER_OPEN
        assert bench.client.open_store(wide, keys[0], keys + KEYS[:1]).done

    def test_what_waits_to_be_sent_is_bounded(self, bench: Bench) -> None:
        bench.connect()
        many = KEYS * 4000
        for _ in range(200):  # nobody reads
            bench.client.stage(bench.space, many, deadline=2000)
            bench.client.step()
        assert bench.client._posted_bytes < 8 << 20
        assert bench.client._link is not None
        assert len(bench.client._link._outgoing) < 16 << 20
        assert bench.client.counters["overflows"] > 0

    def test_deadlines_of_answered_requests_are_forgotten(self, bench: Bench) -> None:
        bench.connect()
        for _ in range(10_000):
            load = bench.load(timeout=1e6)
            bench.service.say(bench.staged(load.op))
            bench.client.step()
            assert load.done
            bench.service.heard()
        assert len(bench.client._waiting._deadlines) <= 5000


class TestHowItComesBack:
    def test_with_growing_pauses(self, bench: Bench) -> None:
        bench.connect()
        bench.service.listener.close()
        bench.service.path.unlink()
        bench.service.hang_up()
        tries: list[float] = []
        connect = bench.client._connect

        def counted() -> None:
            if bench.clock.now >= bench.client._retry_at:
                tries.append(bench.clock.now)
            connect()

        bench.client._connect = counted  # type: ignore[method-assign]
        while bench.clock.now < 1060:
            bench.client.step()
            bench.clock.now += 0.01
        pauses = [later - earlier for earlier, later in pairwise(tries)]
        assert len(tries) < 30  # in a minute
        assert pauses[0] < 0.2
        assert all(2.4 < pause <= 5.1 for pause in pauses[-5:])
        assert len({round(pause, 2) for pause in pauses[-5:]}) > 1  # not all engines at one time

    def test_to_another_service_with_the_same_numbers_nothing_old_is_said(self, bench: Bench) -> None:
        bench.connect(arena=b"a" * 32, connection=1)
        old = bench.load()
        bench.service.say(bench.staged(old.op, 0, 4096))
        bench.client.step()
        assert old.num_chunks == 2
        store = bench.client.open_store(bench.space, KEYS[0], KEYS)
        bench.client.step()
        bench.service.say(p.Opened(store.op, (0).to_bytes(4, "little"), (8192).to_bytes(8, "little"), []))
        bench.client.step()
        bench.lose()
        bench.connect(arena=b"b" * 32, connection=1)
        new = bench.load()
        bench.service.say(bench.staged(new.op, 0))
        bench.client.step()
        bench.service.heard()
        assert bench.client.view(old.arena, 0, 4096) is None
        bench.client.release(old)
        assert not bench.client.commit(store)
        bench.client.step()
        assert bench.service.heard() == []
        bench.lose()
        bench.connect(arena=b"b" * 32, connection=2)
        assert bench.service.heard() == []  # `new` is still read
        bench.client.release(new)
        bench.client.step()
        assert bench.service.heard() == [p.Settled(1)]

    def test_to_the_same_service_says_what_is_settled(self, bench: Bench) -> None:
        bench.connect(connection=5)
        load = bench.load()
        bench.service.say(bench.staged(load.op, 0))
        bench.client.step()
        view = bench.client.view(load.arena, 0, 4096)
        assert view is not None
        bench.lose()
        bench.connect(connection=6)
        assert bench.service.heard() == []
        bench.client.release(load)
        bench.client.step()
        assert bench.service.heard() == [p.Settled(5)]

    def test_store_whose_answer_was_lost_with_the_connection_is_settled(self, bench: Bench) -> None:
        bench.connect(connection=5)
        store = bench.client.open_store(bench.space, KEYS[0], KEYS)
        bench.client.step()
        bench.lose()
        assert store.done
        assert store.refused == [(0, 4, Refusal.TIER_OPEN)]
        bench.client.step()
        bench.service.accept()
        bench.service.welcome(connection=6)
        bench.client.step()
        assert p.Settled(5) in bench.service.heard()

    def test_service_of_another_version_is_not_asked_again_at_once(self, bench: Bench) -> None:
        bench.client.step()
        bench.service.accept()
        bench.service.say(p.Farewell("it speaks another version", again=False))
        bench.client.step()
        bench.clock.now += 1
        bench.client.step()
        bench.service.listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            bench.service.listener.accept()


def test_what_a_client_holds_is_kept_alive(bench: Bench) -> None:
    bench.connect()
    load = bench.load()
    bench.service.say(bench.staged(load.op, 0))
    bench.client.step()
    bench.service.heard()
    said: list[p.Request] = []
    for _ in range(60):
        bench.clock.now += 1
        bench.client.step()
        said += bench.service.heard()
    assert len(said) >= 6  # in three times what its leases last
    assert set(map(type, said)) == {p.Alive}
    bench.client.release(load)
    bench.client.step()
    bench.service.heard()
    for _ in range(60):
        bench.clock.now += 1
        bench.client.step()
    assert bench.service.heard() == []


def test_forked_child_has_no_cache_and_leaves_the_parents_alone(bench: Bench) -> None:
    bench.connect()
    child = os.fork()
    if child == 0:
        ok = bench.client.stage(bench.space, KEYS, deadline=2000).done and not bench.client.connected
        bench.client.step()
        bench.client.close()
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    load = bench.load()
    bench.service.say(bench.staged(load.op, 0))
    bench.client.step()
    assert load.num_chunks == 1
    assert bench.client.view(load.arena, 0, 4096) is not None


def test_nothing_is_said_before_hello_or_after_goodbye(bench: Bench) -> None:
    bench.connect()
    bench.client.close()
    assert bench.service.heard() == [p.Goodbye()]
    assert bench.load().stopped_by is MissReason.TIER_OPEN
    assert bench.client.step() == 0


class TestDetaching:
    def test_what_is_detached_is_a_miss_and_can_be_attached_again(self, bench: Bench) -> None:
        bench.connect()
        bench.client.detach(bench.space)
        bench.client.detach(bench.space)
        assert bench.load().stopped_by is MissReason.TIER_OPEN
        assert bench.service.heard() == [p.Detach(7)]
        again = bench.client.attach(b"n" * 32, bench.space.parts, chunk_tokens=16, itemsize=2)
        bench.client.step()
        (attach,) = bench.service.heard()
        assert isinstance(attach, p.Attach)
        bench.service.say(p.Attached(attach.op, 8))
        bench.client.step()
        assert (again.space, bench.space.space) == (8, None)

    def test_an_answer_that_comes_after_the_detach_is_taken_back(self, bench: Bench) -> None:
        bench.connect()
        other = bench.client.attach(b"o" * 32, bench.space.parts, chunk_tokens=16, itemsize=2)
        bench.client.step()
        (attach,) = bench.service.heard()
        assert isinstance(attach, p.Attach)
        bench.client.detach(other)
        bench.service.say(p.Attached(attach.op, 9))
        bench.client.step()
        bench.client.step()
        assert bench.service.heard() == [p.Detach(9)]
        assert not other.ready

    def test_a_detached_namespace_is_not_attached_at_the_next_connection(self, bench: Bench) -> None:
        bench.connect()
        bench.client.detach(bench.space)
        bench.lose()
        bench.client.step()
        bench.service.accept()
        bench.service.heard()
        bench.service.welcome()
        bench.client.step()
        assert not any(isinstance(one, p.Attach) for one in bench.service.heard())
