"""Mooncake's own master and nodes. Run by `test_mooncake.py`, inside a network namespace."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvtiers.model.errors import (
    RecordInvalid,
    RecordMissing,
    StoreError,
    StoreFull,
    StoreTransient,
    StoreUnavailable,
)
from kvtiers.model.parts import RecordRef
from kvtiers.records.codecs.none import NoCodec
from kvtiers.records.codecs.registry import codec_for
from kvtiers.stores.base import RecordStore, SealedPart
from kvtiers.stores.guard import Guard, GuardPolicy
from kvtiers.stores.mooncake.settings import MooncakeSettings
from kvtiers.stores.mooncake.values import MooncakeValues, mooncake_store
from kvtiers.stores.pieces import PiecedStore
from kvtiers.testing.chaos import wait_until
from kvtiers.testing.remote_kit import RemoteStoreContract, ends, works
from kvtiers.testing.sealed_parts import SCRIBBLE, Damage, make_part, reads_back, slot
from kvtiers.testing.servers.mooncake import TIMEOUT_S, MooncakePool

MIB = 1 << 20


def settings_of(endpoint: str, **values: object) -> MooncakeSettings:
    return MooncakeSettings(endpoint, timeout_s=TIMEOUT_S, piece_bytes=MIB, **values)  # type: ignore[arg-type]


def damage(pool: MooncakePool, ref: RecordRef, how: Damage) -> None:
    name, _ = pool.manifest_of(ref)
    pieces = pool.pieces_of(ref)
    target = name if how is Damage.FLIP_HEADER else pieces[-1]
    value = bytearray(pool.client.get(target))
    if how in (Damage.FLIP_HEADER, Damage.FLIP_PAYLOAD, Damage.FLIP_PADDING):
        value[len(value) // 2] ^= 1
        code = pool.client.upsert(target, bytes(value))
    elif how is Damage.TRUNCATE:
        code = pool.client.upsert(target, bytes(value[: len(value) // 2]))
    elif how is Damage.EMPTY:
        code = pool.client.upsert(name, b"\0")
    elif how is Damage.REMOVE:
        code = pool.client.remove(name, True)
    else:
        other = make_part(2, 5000).ref
        code = pool.client.upsert(name, pool.client.get(pool.manifest_of(other)[0]))
    assert code == 0


class TestMooncake(RemoteStoreContract):
    timeout_s = TIMEOUT_S
    cannot_crawl = "the nodes' memory is reached past the master, and past a relay before it"
    cannot_hurry = "a call of the client ends by its environment's time-outs, set once for the process"
    engine: MooncakePool

    @classmethod
    def start_engine(cls, folder: Path) -> MooncakePool:
        pool = MooncakePool(folder)
        pool.start()
        return pool

    def make_store_at(self, address: tuple[str, int], timeout_s: float) -> RecordStore:
        assert timeout_s == TIMEOUT_S
        return mooncake_store(settings_of("{}:{}".format(*address)), NoCodec())

    def damage(self, store: RecordStore, ref: RecordRef, how: Damage) -> None:
        damage(self.engine, ref, how)

    def evict(self, ref: RecordRef) -> None:
        assert self.engine.client.remove(self.engine.pieces_of(ref)[-1], True) == 0

    def test_a_full_engine_refuses_writes_and_goes_on_reading(self, store: RecordStore) -> None:
        """What is pinned is all that stays: to make room for it, the engine evicts the rest.

        A refusal makes the master evict once, as soon as there is something that it may evict (`need_eviction_` in its
        `master_service.cpp`): the first record that is written afterwards can be what it takes.
        """
        from mooncake.store import ReplicateConfig

        pinned = ReplicateConfig()
        pinned.with_hard_pin = True
        client, names = self.engine.client, [f"pinned{number}" for number in range(80)]
        codes = [client.put(name, bytes(MIB), pinned) for name in names]
        assert codes[0] == 0
        assert codes[-1] < 0
        refused = make_part(2, 3 * MIB)
        with pytest.raises(StoreFull):
            ends(lambda: store.write(refused))
        with pytest.raises(RecordMissing):
            reads_back(store, refused)
        assert set(client.batch_remove(names, True)) == {0, -704}

        def is_kept() -> bool:
            store.write(refused)
            return comes_back(store, refused)

        assert wait_until(is_kept)


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("moon") / "engine"


@contextmanager
def pool_of(folder: Path, **values: Any) -> Iterator[MooncakePool]:
    pool = MooncakePool(folder, **values)
    try:
        pool.start()
        yield pool
    finally:
        pool.resume()
        pool.stop()


@contextmanager
def store_of(values: MooncakeValues) -> Iterator[RecordStore]:
    store = PiecedStore(values)
    store.open()
    try:
        yield store
    finally:
        store.close()


def comes_back(store: RecordStore, part: SealedPart) -> bool:
    """Whether it is there and right. AssertionError if it has other bytes."""
    try:
        same = reads_back(store, part)
    except (RecordMissing, StoreTransient, StoreUnavailable):
        return False
    assert same
    return True


def in_arena(arena: memoryview, at: int, part: SealedPart) -> SealedPart:
    """The same part, with its payload in the arena."""
    place = arena[at : at + len(part.payload)]
    place[:] = part.payload
    return part._replace(payload=place)


class TestMooncakeNodes:
    def test_the_arena_is_written_from_and_read_into_as_it_is(self, folder: Path) -> None:
        arena = slot(16 * MIB)
        with pool_of(folder) as pool:
            values = MooncakeValues(settings_of(pool.endpoint))
            values.use_memory(arena)
            with store_of(values) as store:
                part = in_arena(arena, 0, make_part(1, 3 * MIB + 5))
                store.write(part)
                out = arena[8 * MIB : 12 * MIB]
                store.read_into(part.ref, out, len(part.payload))
                assert out[: len(part.payload)] == part.payload
                assert values.stats()["bounced_bytes"] == 0
                assert reads_back(store, part)  # into memory that is not the arena's
                assert values.stats()["bounced_bytes"] == len(part.payload)

    def test_encoded_records_come_back_and_damage_is_found(self, folder: Path) -> None:
        with pool_of(folder) as pool:
            store = mooncake_store(settings_of(pool.endpoint), codec_for("zstd"))
            store.open()
            try:
                part = make_part(1, 3 * MIB + 1)
                assert store.write(part) < len(part.payload)
                assert reads_back(store, part)
                damage(pool, part.ref, Damage.FLIP_PAYLOAD)
                with pytest.raises(RecordInvalid):
                    reads_back(store, part)
                assert store.exists([part.ref]) == [False]
            finally:
                store.close()

    @pytest.mark.parametrize(("bounce_bytes", "waits"), [(8 * MIB, False), (MIB, True)])
    def test_encoded_records_wait_for_no_buffer_unless_their_bytes_are_used_up(
        self, folder: Path, bounce_bytes: int, waits: bool
    ) -> None:
        with pool_of(folder) as pool:
            settings = settings_of(pool.endpoint, connection_pool_size=8, bounce_bytes=bounce_bytes)
            store = mooncake_store(settings, codec_for("zstd"))
            store.open()
            try:
                parts = [make_part(number, 3 * MIB + number) for number in range(8)]
                with ThreadPoolExecutor(8) as threads:
                    list(threads.map(store.write, parts))
                    assert all(threads.map(lambda part: reads_back(store, part), parts))
                assert (store.stats()["connection_waits"] > 0) is waits
            finally:
                store.close()

    def test_a_master_that_died_takes_the_index_and_all_works_with_the_next_one(self, folder: Path) -> None:
        with pool_of(folder) as pool, store_of(MooncakeValues(settings_of(pool.endpoint))) as store:
            part = make_part(1, 300_001)
            store.write(part)
            pool.master.kill()
            for call in (lambda: reads_back(store, part), store.probe, lambda: store.exists([part.ref])):
                with pytest.raises((StoreTransient, StoreUnavailable)):
                    ends(call)
            pool.start_master()
            assert works(store, 30)
            assert store.exists([part.ref]) == [False]
            assert store.restarts() == 1

            def written() -> bool:
                try:
                    store.write(part)
                except StoreError:  # the node comes back a moment after its master
                    return False
                return True

            assert wait_until(written, 30)
            assert reads_back(store, part)

    def test_a_stopped_master_ends_every_call(self, folder: Path) -> None:
        with pool_of(folder) as pool, store_of(MooncakeValues(settings_of(pool.endpoint))) as store:
            part = make_part(1, 300_001)
            store.write(part)
            pool.master.pause()
            for call in (
                lambda: reads_back(store, part),
                lambda: store.write(make_part(2, 100)),
                store.probe,
                lambda: store.delete(part.ref),
            ):
                with pytest.raises((StoreTransient, StoreUnavailable)):
                    ends(call)
            pool.master.resume()
            assert works(store, 30)
            assert reads_back(store, part)

    def test_a_stopped_node_is_an_error_and_nothing_of_it_arrives_later(self, folder: Path) -> None:
        arena = slot(8 * MIB)
        with pool_of(folder) as pool:
            values = MooncakeValues(settings_of(pool.endpoint))
            values.use_memory(arena)
            with store_of(values) as store:
                part = make_part(1, 3 * MIB)
                store.write(part)
                pool.lenders[0].pause()
                with pytest.raises(StoreUnavailable):
                    ends(lambda: store.read_into(part.ref, arena[: 3 * MIB], 3 * MIB))
                arena[:] = bytes([SCRIBBLE]) * len(arena)
                pool.lenders[0].resume()
                assert wait_until(lambda: comes_back(store, part), 30)
                assert bytes(arena) == bytes([SCRIBBLE]) * len(arena)

    def test_of_three_nodes_two_go_on(self, folder: Path) -> None:
        with (
            pool_of(folder, lenders=3, node_gone_after_s=5) as pool,
            store_of(MooncakeValues(settings_of(pool.endpoint))) as plain,
        ):
            store = Guard(plain, GuardPolicy(max_retries=8, base_delay_s=0.02, failures_to_open=1000))
            parts = [make_part(number, 200_000 + number) for number in range(24)]
            for part in parts:
                store.write(part)
            pool.lenders[1].kill()
            found = [comes_back(store, part) for part in parts]
            assert any(found)
            assert not all(found)
            later = [make_part(number, 200_000 + number) for number in range(100, 112)]
            for part in later:
                store.write(part)
            assert all(comes_back(store, part) for part in later)
            lost = [part.ref for part, there in zip(parts, found, strict=True) if not there]

            def forgotten() -> bool:
                for ref in lost:
                    try:
                        store.read_into(ref, slot(300_000), 200_000)
                    except RecordMissing:
                        continue
                    except StoreError:
                        return False
                return True

            assert wait_until(forgotten, 40)

    def test_nodes_that_lend_memory_read_each_others(self, folder: Path) -> None:
        with pool_of(folder, lenders=0) as pool:
            lending = settings_of(pool.endpoint, segment_bytes=32 * MIB)
            with store_of(MooncakeValues(lending)) as one:
                parts = [make_part(number, MIB + number) for number in range(8)]
                for part in parts:
                    one.write(part)
                with store_of(MooncakeValues(lending)) as other:
                    assert all(reads_back(other, part) for part in parts)
                    theirs = make_part(50, 2 * MIB)
                    other.write(theirs)
                    assert reads_back(one, theirs)
