"""The service is killed, stopped, restarted and ended under live clients: they miss and go on, and the disk is warm."""

from __future__ import annotations

import logging
import signal
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.model.tiers import Tier
from kvtiers.node.idle import watch_while_idle
from kvtiers.node.ownership import mappers_of
from kvtiers.testing.chaos import wait_until
from kvtiers.testing.service_process import ServiceProcess

if TYPE_CHECKING:
    from tests.node.conftest import MakeChild, MakeEngine, MakeService

    from kvtiers.testing.direct_engine import DirectEngine

pytestmark = pytest.mark.slow

CHUNKS = 6


def settle_on_disk(engine: DirectEngine, chunks: int) -> None:
    assert wait_until(lambda: engine.stats()["tiers"]["disk"]["entries"] >= chunks)


class TestKilledService:
    def test_what_was_asked_is_a_miss_and_the_disk_is_warm_after_the_restart(
        self, service: ServiceProcess, make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
    ) -> None:
        engine = make_engine(service.socket).connect()
        client, tokens, other = engine.client, engine.tokens(1, CHUNKS), engine.tokens(2, CHUNKS)
        engine.store(tokens)
        settle_on_disk(engine, CHUNKS)
        held = engine.stage(tokens)
        half_written = engine.open_store(other)
        service.pause()  # so that nothing is answered before it is killed
        waiting = client.stage(engine.space, engine.oracle.keys(tokens), deadline=time.monotonic() + 60)
        opening = client.open_store(engine.space, engine.root, engine.oracle.keys(engine.tokens(3, CHUNKS)))
        client.step()
        old_view = engine.slots(held, 0)[0]
        with caplog.at_level(logging.WARNING, "kvtiers.node.client"):
            service.kill()
            engine.until(lambda: not client.connected)
            assert waiting.done
            assert waiting.stopped_by is MissReason.TIER_OPEN
            assert opening.refused == [(0, CHUNKS, Refusal.TIER_OPEN)]
            for _ in range(50):  # it goes on, without a cache
                assert engine.stage(tokens).stopped_by is MissReason.TIER_OPEN
                time.sleep(0.002)
        assert [record.levelname for record in caplog.records] == ["WARNING"]  # said once
        assert np.array_equal(
            old_view, engine.kv(engine.oracle.keys(tokens)[0])
        )  # what it was given stays right
        assert client.view(held.arena, int(held.offsets[0, 0]), 4096) is None

        del old_view
        service.start()
        engine.connect()
        assert engine.load(tokens).tiers == (Tier.DISK,) * CHUNKS
        assert client.view(held.arena, int(held.offsets[0, 0]), 4096) is None  # never of another arena
        client.commit(half_written)
        client.release(held)
        engine.stats()
        assert half_written.committed == 0
        assert engine.load(other).num_chunks == 0
        engine.store(other)
        assert engine.load(other).num_chunks == CHUNKS

    def test_clients_come_back_by_themselves_and_again(
        self, service: ServiceProcess, make_engine: MakeEngine
    ) -> None:
        engines = [make_engine(service.socket, f"model {number}").connect() for number in range(3)]
        for _ in range(2):
            service.kill()
            for engine in engines:
                engine.until(lambda engine=engine: not engine.client.connected)  # type: ignore[misc]
            service.start()
            for engine in engines:
                engine.connect()
                engine.store(engine.tokens(1, 2))
                assert engine.load(engine.tokens(1, 2)).num_chunks == 2
        assert all(engine.client.counters["connects"] == 3 for engine in engines)

    def test_its_socket_is_replaced(self, service: ServiceProcess, make_engine: MakeEngine) -> None:
        service.kill()
        assert service.socket.exists()
        service.start()
        make_engine(service.socket).connect()

    def test_memory_is_not_taken_twice(self, service: ServiceProcess, make_engine: MakeEngine) -> None:
        """The next service waits until the engines, which notice at their next step, have let go of the old arena."""
        busy, idle = make_engine(service.socket).connect(), make_engine(service.socket).connect()
        for engine in (busy, idle):
            engine.store(engine.tokens(1, 2))
        held = busy.slots(busy.stage(busy.tokens(1, 2)), 0)
        service.kill()
        service.start(wait=False)
        assert wait_until(lambda: "still map" in service.log)
        busy.until(lambda: not busy.client.connected)
        idle.client.step()
        assert not wait_until(lambda: service.ready, 0.5)  # `held` keeps it mapped
        del held
        service.wait_ready()
        busy.connect()
        idle.connect()

    def test_idle_engine_that_watches_lets_go_without_a_step(
        self, service: ServiceProcess, make_engine: MakeEngine
    ) -> None:
        engine = make_engine(service.socket)
        watch_while_idle(engine.client)
        engine.connect()
        held = engine.slots(engine.store(engine.tokens(1, 2)), 0)[0]
        service.kill()
        service.start(wait=False)
        assert not wait_until(lambda: service.ready, 0.7)  # what is being read stays
        assert np.array_equal(held, engine.kv(engine.oracle.keys(engine.tokens(1, 2))[0]))
        del held
        service.wait_ready()
        engine.until(lambda: engine.client.counters["connects"] == 2)
        engine.store(engine.tokens(1, 2))

    def test_engine_that_never_notices_does_not_keep_it_from_starting(
        self, service: ServiceProcess, make_engine: MakeEngine
    ) -> None:
        engine = make_engine(service.socket).connect()
        service.kill()
        service.start("--memory-wait", "0.5")
        assert "have not let go" in service.log
        engine.connect()

    def test_only_processes_that_map_the_arena_are_waited_for(
        self, service: ServiceProcess, make_child: MakeChild
    ) -> None:
        child = make_child(service.socket, "connect")
        child.hear("holding")
        maps = Path(f"/proc/{child.process.pid}/maps").read_text().splitlines()
        inode = next(int(line.split(maxsplit=5)[4]) for line in maps if "memfd:kvtiers-arena" in line)
        assert mappers_of(inode) == sorted([service.pid, child.process.pid])
        assert mappers_of(inode + 1) == []


class TestStoppedService:
    def test_engines_go_on_and_find_it_again(self, service: ServiceProcess, make_engine: MakeEngine) -> None:
        engine = make_engine(service.socket).connect()
        tokens = engine.tokens(1, CHUNKS)
        engine.store(tokens)
        service.pause()
        assert engine.stage(tokens, timeout=0.1).stopped_by is MissReason.STAGING_TIMEOUT
        for _ in range(3000):  # more than may be outstanding
            engine.client.stage(engine.space, engine.oracle.keys(tokens), deadline=time.monotonic() + 60)
            engine.client.step()
        assert engine.client.outstanding <= 1024
        assert engine.client.counters["overflows"] > 1000
        service.send_signal(signal.SIGCONT)
        engine.until(lambda: engine.client.outstanding == 0)
        assert engine.load(tokens).num_chunks == CHUNKS


class TestOrderlyEnd:
    @pytest.mark.parametrize("policy", ["write_through", "write_on_evict"])
    def test_sigterm_writes_out_what_was_accepted(
        self, make_service: MakeService, make_engine: MakeEngine, policy: str
    ) -> None:
        service = make_service({"storage.disk.write_policy": policy})
        service.start()
        engine = make_engine(service.socket).connect()
        documents = [engine.tokens(number, CHUNKS) for number in range(8)]
        for tokens in documents:
            store = engine.open_store(tokens)
            engine.write(store, tokens)
            engine.client.commit(store)
            engine.client.step()  # sent, not answered yet
        started = time.monotonic()
        assert service.terminate() == 0
        assert time.monotonic() - started < 10
        engine.until(lambda: not engine.client.connected)
        service.start()
        engine.connect()
        assert [engine.load(tokens).num_chunks for tokens in documents] == [CHUNKS] * 8

    def test_sigterm_ends_a_service_whose_clients_are_stopped(
        self, service: ServiceProcess, make_child: MakeChild
    ) -> None:
        child = make_child(service.socket, "store")
        child.hear("holding")
        child.process.send_signal(signal.SIGSTOP)
        assert service.terminate() == 0
        assert not service.socket.exists()

    def test_clients_are_told(
        self, service: ServiceProcess, make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
    ) -> None:
        engine = make_engine(service.socket).connect()
        with caplog.at_level(logging.WARNING, "kvtiers.node.client"):
            assert service.terminate() == 0
            engine.until(lambda: not engine.client.connected)
        assert "the service ends" in caplog.text


class TestOnePathOneService:
    def test_second_service_says_who_has_it(self, service: ServiceProcess, folder: Path) -> None:
        (folder / "second").mkdir()
        second = ServiceProcess(folder / "second")
        second.socket = service.socket
        second.start(wait=False)
        try:
            assert wait_until(lambda: second.exit_code is not None)
            assert second.exit_code == 1
            assert f"is served by process {service.pid}" in second.log
        finally:
            second.kill()
        assert service.exit_code is None
        assert service.socket.exists()

    def test_directory_is_for_its_user_only(self, service: ServiceProcess) -> None:
        assert stat.S_IMODE(service.socket.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(service.socket.stat().st_mode) == 0o600

    def test_open_directory_is_refused(self, make_service: MakeService) -> None:
        service = make_service()
        service.socket.parent.mkdir()
        service.socket.parent.chmod(0o755)
        service.start(wait=False)
        assert wait_until(lambda: service.exit_code is not None)
        assert service.exit_code == 1
        assert "chmod 700" in service.log
