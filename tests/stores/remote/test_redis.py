"""Records in a real Valkey: over TCP, and encoded over its Unix socket with a password and a time to live."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtiers.model.parts import RecordRef
from kvtiers.records.codecs.registry import codec_for
from kvtiers.stores.base import RecordStore
from kvtiers.stores.redis import RedisSettings, redis_store
from kvtiers.testing.remote_kit import Address
from kvtiers.testing.sealed_parts import Damage, make_part
from kvtiers.testing.servers.process import RemoteEngine
from kvtiers.testing.servers.valkey import ValkeyServer
from kvtiers.testing.store_kit import RecordStoreContract
from kvtiers.testing.valkey_kit import MIB, PASSWORD, ValkeyContract, damage, settings_for


class TestValkey(ValkeyContract):
    @classmethod
    def start_engine(cls, folder: Path) -> RemoteEngine:
        server = ValkeyServer(folder)
        server.start()
        return server

    def settings(self, address: Address, timeout_s: float) -> RedisSettings:
        return settings_for(address, timeout_s)


class TestEncodedOverUnixSocketWithPassword(RecordStoreContract):
    listable = False
    exact_usage = False

    @pytest.fixture(scope="class")
    @classmethod
    def server_of_class(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
        server = ValkeyServer(tmp_path_factory.mktemp("kvt") / "v", password=PASSWORD)
        server.start()
        yield server
        server.stop()

    @pytest.fixture(autouse=True)
    def _server(self, server_of_class: ValkeyServer) -> None:
        self.server = server_of_class
        self.server.clear()

    def make_store(self, place: Path) -> RecordStore:
        endpoint = f"unix://{self.server.unix_socket}"
        settings = settings_for(self.server.address, endpoint=endpoint, password=PASSWORD, ttl_s=600)
        return redis_store(settings, codec_for("zstd"))

    def damage(self, store: RecordStore, ref: RecordRef, how: Damage) -> None:
        damage(self.server, ref, how, [self.server])

    def test_every_value_has_its_time_to_live(self, store: RecordStore) -> None:
        store.write(make_part(1, 3 * MIB))
        names = self.server.execute("KEYS", "*")
        assert len(names) > 2
        assert all(0 < self.server.execute("TTL", name) <= 600 for name in names)
