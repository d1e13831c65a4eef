"""A shared directory across a real network: the server is killed, stopped, full and slow, behind a mount that gives calls up (GlusterFS)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from kvtiers.model.parts import RecordRef
from kvtiers.model.reasons import MissReason
from kvtiers.records.codecs.registry import codec_for
from kvtiers.stores.base import RecordStore
from kvtiers.stores.guard import BreakerState, Guard, GuardPolicy
from kvtiers.stores.shared_fs import SharedFsSettings, SharedFsStore
from kvtiers.testing.chaos import wait_until
from kvtiers.testing.disk_damage import damage_file, record_files
from kvtiers.testing.remote_kit import Address, RemoteStoreContract
from kvtiers.testing.sealed_parts import Damage, make_part, reads_back
from kvtiers.testing.servers.gluster import GlusterMount, GlusterServer
from kvtiers.testing.servers.relay import Relay

from .test_hung_share import FROM_REMOTE, HANG_S, ONE, TWO, cache_with_nothing_in_memory, is_up, loaded

MIB = 1 << 20


@pytest.mark.slow
class TestSharedFsOverGluster(RemoteStoreContract):
    keeps_values = True
    cannot_evict = "a record is one file: it is there whole or not at all"
    cannot_crawl = "a system call can't be given up: test_a_share_that_crawls_opens_the_breaker"
    cannot_hurry = "a system call ends when the mount gives it up"
    cannot_misdirect = (
        "its address is a directory: test_a_directory_that_is_not_there_is_unavailable_until_it_comes"
    )
    engine: GlusterServer

    @classmethod
    def start_engine(cls, folder: Path) -> GlusterServer:
        server = GlusterServer(folder)
        server.start()
        return server

    def make_store_at(self, address: Address, timeout_s: float) -> RecordStore:
        return store_in(self.engine.share)

    def damage(self, store: RecordStore, ref: RecordRef, how: Damage) -> None:
        assert isinstance(store, SharedFsStore)
        files = record_files(Path(store.path))
        path = files.pop(ref)
        damage_file(path, how, next(iter(files.values()), None))

    def full(self) -> AbstractContextManager[None]:
        return self.engine.full()


def store_in(share: Path) -> SharedFsStore:
    return SharedFsStore(SharedFsSettings(str(share)), codec_for("none"))


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GlusterServer]:
    server = GlusterServer(tmp_path_factory.mktemp("kvt") / "engine")
    server.start()
    yield server
    server.resume()
    server.stop()


@pytest.mark.slow
def test_a_share_that_crawls_opens_the_breaker_and_gives_right_bytes(
    server: GlusterServer, tmp_path: Path
) -> None:
    with Relay(server.address) as relay:
        mount = GlusterMount(tmp_path / "crawling", relay.address)
        try:
            assert wait_until(mount.serves)
            policy = GuardPolicy(slow_s=0.25, failures_to_open=2, probe_after_s=0.05, probe_after_max_s=0.1)
            guard, part = Guard(store_in(mount.share), policy), make_part(1, 3 * MIB)
            guard.open()
            guard.write(part)
            relay.limit(5 * MIB)
            for _ in range(2):
                assert guard.state is BreakerState.CLOSED
                assert reads_back(guard, part)
            assert guard.state is BreakerState.OPEN
            relay.limit(None)

            def closed() -> bool:
                guard.tick()
                return guard.run_probe() is BreakerState.CLOSED

            assert wait_until(closed)
            assert reads_back(guard, part)
            guard.close()
        finally:
            relay.limit(None)
            mount.stop()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_the_whole_cache_misses_while_the_server_is_away_and_hits_when_it_is_back(
    server: GlusterServer, how: str
) -> None:
    with cache_with_nothing_in_memory(server.share) as cache:
        assert loaded(cache, ONE) == FROM_REMOTE
        (server.pause if how == "stopped" else server.kill)()

        def is_given_up() -> bool:
            tiers, reason = loaded(cache, TWO)
            assert tiers == ()
            return reason is MissReason.TIER_OPEN

        assert wait_until(is_given_up, HANG_S)
        (server.resume if how == "stopped" else server.start)()
        assert wait_until(lambda: is_up(cache), HANG_S)
        tiers, reason = loaded(cache, TWO)
        assert (len(tiers), reason) == (len(FROM_REMOTE[0]), None)
