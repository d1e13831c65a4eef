"""InfiniStore's own server, over TCP. Run by `test_infinistore.py`, inside a network namespace."""

from __future__ import annotations

import mmap
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvtiers.model.errors import RecordMissing, StoreFull, StoreTransient
from kvtiers.model.parts import RecordRef
from kvtiers.records.codecs.none import NoCodec
from kvtiers.records.codecs.registry import codec_for
from kvtiers.stores.base import RecordStore
from kvtiers.stores.infinistore.frames import put_request
from kvtiers.stores.infinistore.values import InfiniStoreSettings, InfiniStoreValues, infinistore_store
from kvtiers.stores.key_values import Value
from kvtiers.stores.manifest import Manifest, decode_manifest
from kvtiers.testing.chaos import wait_until
from kvtiers.testing.remote_kit import RemoteStoreContract
from kvtiers.testing.sealed_parts import Damage, make_part, reads_back
from kvtiers.testing.servers.infinistore import InfiniStoreServer
from kvtiers.testing.servers.relay import Relay

MIB = 1 << 20


class TestInfiniStoreOverTcp(RemoteStoreContract):
    cannot_fill = "a full server evicts: test_a_server_that_is_full_evicts_what_was_there_first"
    engine: InfiniStoreServer

    @classmethod
    def start_engine(cls, folder: Path) -> InfiniStoreServer:
        server = InfiniStoreServer(folder)
        server.start()
        return server

    def make_store_at(self, address: tuple[str, int], timeout_s: float) -> RecordStore:
        settings = InfiniStoreSettings("{}:{}".format(*address), timeout_s=timeout_s, piece_bytes=MIB)
        return infinistore_store(settings, NoCodec())

    @contextmanager
    def client(self) -> Iterator[InfiniStoreValues]:
        values = InfiniStoreValues(InfiniStoreSettings("{}:{}".format(*self.engine.address), timeout_s=20))
        values.open()
        try:
            yield values
        finally:
            values.close()

    def damage(self, store: RecordStore, ref: RecordRef, how: Damage) -> None:
        with self.client() as client:
            name, manifest = manifest_of(client, ref)
            last = name if how is Damage.FLIP_HEADER else pieces_of(name, manifest)[-1]
            size = (
                len(client.get(name)) if last == name else manifest.spans()[-1][1] - manifest.spans()[-1][0]
            )
            value = bytearray(size)
            client.get_into([Value(last, memoryview(value))])
            if how in (Damage.FLIP_HEADER, Damage.FLIP_PAYLOAD, Damage.FLIP_PADDING):
                value[len(value) // 2] ^= 1
                client.put([Value(last, memoryview(value))])
            elif how is Damage.TRUNCATE:
                client.put([Value(last, memoryview(value)[: len(value) // 2])])
            elif how is Damage.EMPTY:
                client.put([Value(name, memoryview(b"\0"))])
            elif how is Damage.REMOVE:
                assert client.remove([name]) == 1
            else:
                other, _ = manifest_of(client, make_part(2, 5000).ref)
                client.put([Value(name, memoryview(client.get(other)))])

    def evict(self, ref: RecordRef) -> None:
        with self.client() as client:
            assert client.remove([pieces_of(*manifest_of(client, ref))[-1]]) == 1

    def test_a_server_that_is_full_evicts_what_was_there_first(self, store: RecordStore) -> None:
        part, filler = make_part(1, 5000), memoryview(bytes(16 * MIB))
        store.write(part)
        with self.client() as client:
            for number in range(1024 // 16 + 2):
                client.put([Value(f"filler{number}", filler)])
        assert store.exists([part.ref]) == [False]
        with pytest.raises(RecordMissing):
            reads_back(store, part)
        store.write(part)
        assert reads_back(store, part)

    def test_a_value_that_can_never_fit_is_refused(self, store: RecordStore) -> None:
        too_large = memoryview(mmap.mmap(-1, 1100 * MIB))
        with self.client() as client, pytest.raises(StoreFull):
            client.put([Value("too large", too_large)])
        part = make_part(1, 5000)
        store.write(part)
        assert reads_back(store, part)

    def test_a_read_given_up_half_way_costs_the_others_nothing(self) -> None:
        """The server would die of a connection that ends there."""
        value, out = bytes(48 * MIB), bytearray(48 * MIB)
        with self.client() as patient:
            patient.put([Value("large", memoryview(value)), Value("small", memoryview(b"x"))])
            with Relay(self.engine.address) as relay:
                hasty = InfiniStoreValues(
                    InfiniStoreSettings("{}:{}".format(*relay.address), timeout_s=0.5, piece_bytes=MIB)
                )
                hasty.open()
                relay.limit(4 * MIB)
                with pytest.raises(StoreTransient):
                    hasty.get_into([Value("large", memoryview(out))])
                assert hasty.stats()["answers_owed"] == 1
                hasty.close()
                assert patient.get("small") == b"x"
                relay.limit(None)
                assert wait_until(lambda: hasty.stats()["answers_owed"] == 0, 30)
            assert patient.get("small") == b"x"

    def test_what_was_written_half_way_can_be_removed_and_the_server_lives(self) -> None:
        """Of a plain removal it would die."""
        with self.client() as client, socket.create_connection(self.engine.address, 10) as connection:
            connection.sendall(put_request("half", 2 * MIB) + bytes(MIB))
            assert wait_until(lambda: client.exists(["half"]) == [True], 10)
            assert client.remove(["half", "absent"]) == 1
            assert client.exists(["half"]) == [False]
            client.put([Value("half", memoryview(b"now whole"))])
            assert client.get("half") == b"now whole"

    def test_encoded_records_come_back(self) -> None:
        store = infinistore_store(
            InfiniStoreSettings("{}:{}".format(*self.engine.address), piece_bytes=MIB), codec_for("zstd")
        )
        store.open()
        try:
            part = make_part(1, 3 * MIB + 1)
            assert store.write(part) < len(part.payload)
            assert reads_back(store, part)
        finally:
            store.close()

    def test_names_are_removed_in_one_request_and_counted(self) -> None:
        with self.client() as client:
            names = ["a", "bcd", "efgh", "ijklm" * 20]
            for name in names:
                client.put([Value(name, memoryview(b"value of " + name.encode()))])
            assert client.exists([*names, "absent"]) == [True] * 4 + [False]
            assert client.remove(["bcd", "absent", names[3]]) == 2
            assert client.exists(names) == [True, False, True, False]
            assert client.get("efgh") == b"value of efgh"
            with pytest.raises(RecordMissing):
                client.get("bcd")

    def test_many_names_are_asked_for_at_a_time(self) -> None:
        with self.client() as client:
            for number in range(0, 1000, 7):
                client.put([Value(f"name{number}", memoryview(b"x"))])
            found = client.exists([f"name{number}" for number in range(1000)])
            assert found == [number % 7 == 0 for number in range(1000)]


def manifest_of(client: InfiniStoreValues, ref: RecordRef) -> tuple[str, Manifest]:
    name = f"kv1:{ref.namespace.hex()}:{{{ref.key.hex()}}}:{ref.part}"
    return name, decode_manifest(client.get(name), ref)


def pieces_of(name: str, manifest: Manifest) -> list[str]:
    return [f"{name}:{manifest.piece_id.hex()}:{number}" for number in range(manifest.num_pieces)]
