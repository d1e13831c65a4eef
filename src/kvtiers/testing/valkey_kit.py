"""The remote contract on a Valkey, or a cluster of them, and what tests do to its records behind their store's back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Final

from kvtiers.model.parts import RecordRef
from kvtiers.records.codecs.registry import codec_for
from kvtiers.stores.base import RecordStore
from kvtiers.stores.redis import RedisSettings, redis_store
from kvtiers.testing.remote_kit import Address, RemoteStoreContract
from kvtiers.testing.sealed_parts import Damage
from kvtiers.testing.servers.valkey import ValkeyCluster, ValkeyServer

MIB: Final = 1 << 20
PASSWORD: Final = "öne pass\\word"  # noqa: S105 - of servers that live for a test


class ValkeyContract(RemoteStoreContract):
    """The tests; subclasses say which engine, and how to reach it."""

    codec: ClassVar[str] = "none"

    @abstractmethod
    def settings(self, address: Address, timeout_s: float) -> RedisSettings:
        """Of a store at that address."""

    def make_store_at(self, address: Address, timeout_s: float) -> RecordStore:
        return redis_store(self.settings(address, timeout_s), codec_for(self.codec))

    def servers(self) -> list[ValkeyServer]:
        """All of them."""
        if isinstance(self.engine, ValkeyCluster):
            return self.engine.nodes
        assert isinstance(self.engine, ValkeyServer)
        return [self.engine]

    def server_of(self, ref: RecordRef) -> ValkeyServer:
        """The one that has this record."""
        if isinstance(self.engine, ValkeyCluster):
            return self.engine.node_of(f"{{{ref.key.hex()}}}")
        return self.servers()[0]

    def damage(self, store: RecordStore, ref: RecordRef, how: Damage) -> None:
        damage(self.server_of(ref), ref, how, self.servers())

    def evict(self, ref: RecordRef) -> None:
        server = self.server_of(ref)
        _, pieces = names_of(server, ref)
        server.execute("DEL", pieces[1])

    @contextmanager
    def full(self) -> Iterator[None]:
        for server in self.servers():
            used = server.execute("INFO", "memory")["used_memory"]
            server.execute("CONFIG", "SET", "maxmemory", used + MIB)
        yield
        for server in self.servers():
            server.execute("CONFIG", "SET", "maxmemory", 0)


def settings_for(address: Address, timeout_s: float = 1.0, **changes: Any) -> RedisSettings:
    """Settings of a store in a test: pieces of 1 MiB. `changes`: other fields."""
    values: dict[str, Any] = {
        "endpoint": f"{address[0]}:{address[1]}",
        "timeout_s": timeout_s,
        "connection_pool_size": 8,
        "piece_bytes": MIB,
    }
    return RedisSettings(**(values | changes))


def names_of(server: ValkeyServer, ref: RecordRef) -> tuple[bytes, list[bytes]]:
    """What a record's values are called: the manifest, and the pieces."""
    manifest, *pieces = sorted(server.execute("KEYS", f"*:{{{ref.key.hex()}}}:{ref.part}*"), key=len)
    return manifest, sorted(pieces)


def damage(server: ValkeyServer, ref: RecordRef, how: Damage, servers: Sequence[ValkeyServer]) -> None:
    """Damage a record that `server`, one of `servers`, has."""
    manifest, pieces = names_of(server, ref)
    target = manifest if how is Damage.FLIP_HEADER else pieces[-1]
    value = bytearray(server.execute("GET", target))
    if how in (Damage.FLIP_HEADER, Damage.FLIP_PAYLOAD, Damage.FLIP_PADDING):
        value[len(value) // 2] ^= 1
        server.execute("SET", target, bytes(value))
    elif how is Damage.TRUNCATE:
        server.execute("SET", target, bytes(value[: len(value) // 2]))
    elif how is Damage.EMPTY:
        server.execute("SET", manifest, b"")
    elif how is Damage.REMOVE:
        server.execute("DEL", manifest)
    else:
        server.execute("SET", manifest, _manifest_of_another(servers, ref))


def _manifest_of_another(servers: Sequence[ValkeyServer], ref: RecordRef) -> bytes:
    mine = ref.key.hex().encode()
    found = [(name, server) for server in servers for name in server.execute("KEYS", "*") if mine not in name]
    name, server = min(found, key=lambda one: len(one[0]))
    return bytes(server.execute("GET", name))
