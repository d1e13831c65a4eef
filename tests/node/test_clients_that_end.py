"""Clients that are killed, stopped or forked in the middle of something: their slots are used again when nobody can write to them."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from kvtiers.model.reasons import Refusal
from kvtiers.testing.chaos import wait_until
from kvtiers.testing.service_process import ServiceProcess

if TYPE_CHECKING:
    from tests.node.conftest import Child, LocalNode, MakeChild, MakeEngine, MakeLocal

pytestmark = pytest.mark.slow

CHUNKS = 4


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_client_killed_in_the_middle_of_a_store_leaves_nothing(
    local: LocalNode, make_child: MakeChild, make_engine: MakeEngine
) -> None:
    engine = make_engine(local.socket).connect()
    tokens = engine.tokens(1, CHUNKS)
    child = make_child(local.socket, "store")
    child.hear("holding")
    assert engine.open_store(tokens).refused == [(0, CHUNKS, Refusal.IN_FLIGHT)]
    child.kill()
    assert wait_until(lambda: not local.taken())
    assert engine.load(tokens).num_chunks == 0  # half a chunk is no chunk
    engine.store(tokens)
    assert engine.load(tokens).num_chunks == CHUNKS


def test_what_a_killed_client_was_storing_is_taken_from_others_once_the_statistics_list_it_no_more(
    service: ServiceProcess, make_child: MakeChild, make_engine: MakeEngine
) -> None:
    engine = make_engine(service.socket).connect()
    tokens = engine.tokens(1, CHUNKS)
    child = make_child(service.socket, "store")
    child.hear("holding")

    def listed() -> bool:
        return child.process.pid in {client["pid"] for client in service.stats()["service"]["clients"]}

    assert listed()
    child.kill()
    assert wait_until(lambda: not listed())
    assert engine.store(tokens).indices == tuple(range(CHUNKS))
    assert engine.load(tokens).num_chunks == CHUNKS


def test_client_killed_in_the_middle_of_a_load_leaves_nothing_leased(
    local: LocalNode, make_child: MakeChild, make_engine: MakeEngine
) -> None:
    engine = make_engine(local.socket).connect()
    tokens = engine.tokens(1, CHUNKS)
    engine.store(tokens)
    child = make_child(local.socket, "load")
    child.hear("holding")
    assert local.leased() == CHUNKS
    child.kill()
    assert local.comes_to_rest()
    assert engine.load(tokens).num_chunks == CHUNKS


def test_forked_child_that_keeps_the_socket_does_not_keep_the_slots(
    local: LocalNode, make_child: MakeChild
) -> None:
    child = make_child(local.socket, "fork")
    orphan = int(child.hear("holding")[0])
    try:
        assert len(local.taken()) == CHUNKS
        child.process.kill()
        child.process.wait(30)
        assert wait_until(lambda: not local.taken())
        assert is_alive(orphan)  # it still has the socket
        assert not local.server.clients
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_forked_child_can_not_write_to_the_arena(local: LocalNode, make_child: MakeChild) -> None:
    child = make_child(local.socket, "fork-write")
    assert child.hear("holding") == [str(-signal.SIGSEGV)]


class TestStoppedClient:
    """SIGSTOP: it may go on in the middle of a copy at any time."""

    @pytest.fixture
    def impatient(self, make_local: MakeLocal) -> LocalNode:
        return make_local(lease_timeout_s=0.7)

    def stop(self, child: Child) -> None:
        child.process.send_signal(signal.SIGSTOP)

    def go_on(self, child: Child) -> None:
        child.process.send_signal(signal.SIGCONT)

    def test_its_slots_go_into_quarantine_and_what_it_writes_late_harms_nobody(
        self, impatient: LocalNode, make_child: MakeChild, make_engine: MakeEngine
    ) -> None:
        child = make_child(impatient.socket, "late-writer")
        its_slots = {int(offset) for offset in child.hear("holding")}
        self.stop(child)
        assert wait_until(lambda: impatient.server.counters["expired"] == 1)
        assert its_slots <= impatient.taken()
        engine = make_engine(impatient.socket).connect()
        tokens = engine.tokens(1, CHUNKS)
        stored = engine.store(tokens)  # the chunks are free to be stored by others, elsewhere
        assert not its_slots & {int(offset) for offset in stored.offsets[:, 0]}
        self.go_on(child)
        child.tell()
        child.hear("written")
        assert engine.load(tokens).num_chunks == CHUNKS  # checks every byte
        child.tell()
        assert child.hear("back") == ["0"]  # its commit was not taken
        # it committed, so it writes no more: it has said so on its new connection
        assert wait_until(lambda: not its_slots & impatient.taken())

    def test_its_slots_come_back_when_it_is_killed(self, impatient: LocalNode, make_child: MakeChild) -> None:
        child = make_child(impatient.socket, "store")
        child.hear("holding")
        self.stop(child)
        assert wait_until(lambda: impatient.server.counters["expired"] == 1)
        assert len(impatient.taken()) == CHUNKS
        child.kill()
        assert wait_until(lambda: not impatient.taken())

    def test_what_it_was_reading_is_not_overwritten(
        self, impatient: LocalNode, make_child: MakeChild, make_engine: MakeEngine
    ) -> None:
        engine = make_engine(impatient.socket).connect()
        stored = engine.store(engine.tokens(1, CHUNKS))
        child = make_child(impatient.socket, "load")
        its_slots = [int(offset) for offset in child.hear("holding")]

        def what_it_reads() -> list[bytes]:
            views = [engine.client.view(stored.arena, offset, engine.part_bytes) for offset in its_slots]
            return [view.tobytes() for view in views if view is not None]

        before = what_it_reads()
        assert len(before) == CHUNKS
        self.stop(child)
        assert wait_until(lambda: impatient.server.counters["expired"] == 1)
        for document in range(2, 30):  # more than the arena holds
            engine.store(engine.tokens(document, CHUNKS))
        assert what_it_reads() == before
        child.kill()
        assert impatient.comes_to_rest()

    def test_client_that_holds_nothing_is_left_alone(
        self, impatient: LocalNode, make_child: MakeChild
    ) -> None:
        child = make_child(impatient.socket, "connect")
        child.hear("holding")
        self.stop(child)
        busy = make_child(impatient.socket, "store")
        busy.hear("holding")
        assert wait_until(lambda: impatient.server.counters["expired"] == 1)  # the other one
        assert [one["pid"] for one in impatient.server.clients] == [child.process.pid]
        self.go_on(child)
        child.tell()
        child.hear("closed")
        assert wait_until(lambda: not impatient.server.clients)


class TestEngineOfSeveralProcesses:
    """The scheduler is given the slots, its workers write to them."""

    TOKEN = "ab" * 16

    def test_slots_of_a_killed_scheduler_wait_for_its_worker(
        self, local: LocalNode, make_child: MakeChild
    ) -> None:
        worker = make_child(local.socket, "connect", engine=self.TOKEN)
        worker.hear("holding")
        stranger = make_child(local.socket, "connect")
        stranger.hear("holding")
        scheduler = make_child(local.socket, "store", engine=self.TOKEN)
        scheduler.hear("holding")
        scheduler.kill()
        assert wait_until(lambda: local.server.counters["lost"] == 1)
        assert len(local.taken()) == CHUNKS  # the worker may be copying
        worker.kill()
        assert wait_until(lambda: not local.taken())
        assert is_alive(stranger.process.pid)

    def test_worker_that_says_goodbye_is_not_waited_for(
        self, local: LocalNode, make_child: MakeChild
    ) -> None:
        worker = make_child(local.socket, "connect", engine=self.TOKEN)
        worker.hear("holding")
        scheduler = make_child(local.socket, "store", engine=self.TOKEN)
        scheduler.hear("holding")
        scheduler.kill()
        assert wait_until(lambda: local.server.counters["lost"] == 1)
        assert local.taken()
        worker.tell()
        worker.hear("closed")
        assert wait_until(lambda: not local.taken())
