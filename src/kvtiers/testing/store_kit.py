"""What a record store must do to be one of ours, as tests. Subclass, say how to make a store, and pytest runs the rest:

    class TestMyStore(RecordStoreContract):
        def make_store(self, place: Path) -> RecordStore:
            return MyStore(place)

`place` is an empty directory of the test's own; two stores made of one place, one after the other, see the same records (unless
`persistent` is False). A store whose records can be reached from outside should override `damage`, so that the tests of what
happens to a damaged record run too.
"""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
import pytest

from kvtiers.model.errors import RecordInvalid, RecordMissing, StoreError, StoreUnavailable
from kvtiers.model.parts import RecordRef
from kvtiers.records.checksum import checksum
from kvtiers.stores.base import RecordStore
from kvtiers.testing.sealed_parts import NAMESPACE, SCRIBBLE, Damage, key_of, make_part, reads_back, slot

__all__ = ["NAMESPACE", "Damage", "RecordStoreContract", "key_of", "make_part", "reads_back", "slot"]

_WAIT_S: Final = 60.0


class RecordStoreContract(ABC):
    """The tests. Override the class variables and `damage` where the store differs."""

    sizes: ClassVar[tuple[int, ...]] = (1, 512, 4095, 4096, 4097, 65_536, 300_001)
    """Payload sizes; a store must take any number of bytes."""
    persistent: ClassVar[bool] = True
    """A second store made of the same place finds the first one's records."""
    listable: ClassVar[bool] = True
    """`scan` and `recover` yield what is there."""
    exact_usage: ClassVar[bool] = True
    """`usage` follows each write and delete at once, and counts what earlier runs left."""

    alone: ClassVar[bool] = False
    """Nobody else writes to it: `discard` removes whatever is there."""

    @abstractmethod
    def make_store(self, place: Path) -> RecordStore:
        """A store, not yet open, that keeps its records at `place` and nowhere else."""

    def damage(self, store: RecordStore, ref: RecordRef, how: Damage) -> None:
        """Damage the record of `ref` from outside; for SWAP, put another record's bytes under its name."""
        pytest.skip("this store's records can't be reached from outside")

    # --- fixtures -----------------------------------------------------------------------------------------------------

    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        return tmp_path / "records"

    @pytest.fixture
    def store(self, place: Path) -> Iterator[RecordStore]:
        store = self.make_store(place)
        store.open()
        yield store
        store.close()

    def reopen(self, store: RecordStore, place: Path) -> RecordStore:
        """Close `store`, and open another one of the same place. The caller closes it."""
        if not self.persistent:
            pytest.skip("this store keeps nothing")
        store.close()
        again = self.make_store(place)
        again.open()
        return again

    # --- writing and reading ------------------------------------------------------------------------------------------

    def test_every_size_comes_back_bit_exact(self, store: RecordStore) -> None:
        parts = [make_part(number, nbytes) for number, nbytes in enumerate(self.sizes)]
        for part in parts:
            assert store.write(part) > 0
        for part in parts:
            assert reads_back(store, part)

    def test_a_read_tells_what_the_record_is(self, store: RecordStore) -> None:
        part = make_part(3, 5000)
        store.write(part)
        record = store.read_into(part.ref, slot(5000), 5000)
        assert record[:5] == (part.ref, part.parent, part.num_parts, part.token_start, part.token_count)
        assert record.payload_bytes == 5000
        assert record.stored_bytes > 0
        assert record.checksum == part.checksum

    def test_an_unknown_record_is_missing(self, store: RecordStore) -> None:
        with pytest.raises(RecordMissing):
            reads_back(store, make_part(1, 4096))

    def test_an_equal_ref_is_replaced(self, store: RecordStore) -> None:
        store.write(make_part(1, 9000))
        newer = make_part(1, 9000, version=1)
        store.write(newer)
        assert reads_back(store, newer)
        assert not self.exact_usage or store.usage().records == 1

    def test_parts_and_namespaces_are_kept_apart(self, store: RecordStore) -> None:
        other = hashlib.sha256(b"another namespace").digest()
        parts = [
            make_part(1, 4097, part=index, namespace=ns) for ns in (NAMESPACE, other) for index in range(3)
        ]
        for part in parts:
            store.write(part)
        assert all(reads_back(store, part) for part in parts)
        store.delete(parts[0].ref)
        assert store.exists([part.ref for part in parts]) == [False, True, True, True, True, True]

    @pytest.mark.parametrize("nbytes", [4097, 8192, 12_289, 100])
    def test_a_read_of_another_size_is_refused(self, store: RecordStore, nbytes: int) -> None:
        store.write(make_part(1, 12_288))
        with pytest.raises(RecordInvalid):
            store.read_into(make_part(1, 12_288).ref, slot(max(nbytes, 12_288)), nbytes)

    def test_a_read_touches_only_its_slot(self, store: RecordStore) -> None:
        part = make_part(1, 5000)
        store.write(part)
        memory = slot(3 * 8192)
        store.read_into(part.ref, memory[8192:16_384], 5000)
        around = np.concatenate(
            [np.frombuffer(memory[:8192], np.uint8), np.frombuffer(memory[16_384:], np.uint8)]
        )
        assert np.all(around == SCRIBBLE)

    def test_the_payload_is_not_changed_by_writing(self, store: RecordStore) -> None:
        part = make_part(1, 5000)
        store.write(part)
        assert checksum(part.payload) == part.checksum

    # --- existence, deletion, usage -----------------------------------------------------------------------------------

    def test_exists_answers_a_batch_in_order(self, store: RecordStore) -> None:
        assert store.exists([]) == []
        for number in (0, 2, 5):
            store.write(make_part(number, 100))
        assert store.exists([make_part(number, 100).ref for number in range(6)]) == [
            True, False, True, False, False, True,
        ]  # fmt: skip

    def test_a_record_that_was_read_can_be_discarded(self, store: RecordStore) -> None:
        part = make_part(1, 5000)
        store.write(part)
        read = store.read_into(part.ref, slot(5000), 5000)
        assert store.discard(read) is True
        assert store.exists([part.ref]) == [False]
        assert store.discard(read) is False

    def test_what_was_written_anew_since_it_was_read_is_not_discarded(self, store: RecordStore) -> None:
        if self.alone:
            pytest.skip("nobody else writes to this store")
        part = make_part(1, 5000)._replace(write_id=b"one write's id..")
        store.write(part)
        read = store.read_into(part.ref, slot(5000), 5000)
        store.write(part._replace(write_id=b"another one's id"))
        assert store.discard(read) is False
        assert reads_back(store, part)

    def test_a_record_written_anew_is_still_one(self, store: RecordStore) -> None:
        before = store.usage().records
        for version in range(3):
            store.write(make_part(1, 5000, version=version))
        assert store.usage().records == before + 1
        store.delete(make_part(1, 5000).ref)
        assert store.usage().records == before

    def test_deleted_is_gone(self, store: RecordStore) -> None:
        part = make_part(1, 4096)
        store.write(part)
        assert store.delete(part.ref) is True
        assert store.exists([part.ref]) == [False]
        with pytest.raises(RecordMissing):
            reads_back(store, part)
        assert store.delete(part.ref) is False

    def test_a_deleted_record_can_be_written_again(self, store: RecordStore) -> None:
        part = make_part(1, 4096)
        for _ in range(3):
            store.write(part)
            assert reads_back(store, part)
            store.delete(part.ref)
        assert store.exists([part.ref]) == [False]

    def test_usage_grows_and_shrinks(self, store: RecordStore) -> None:
        if not self.exact_usage:
            pytest.skip("this store's usage lags behind")
        before = store.usage()
        taken = sum(store.write(make_part(number, 100_000)) for number in range(4))
        full = store.usage()
        assert full.records == before.records + 4
        assert full.used_bytes >= before.used_bytes + taken
        for number in range(4):
            store.delete(make_part(number, 100_000).ref)
        after = store.usage()
        assert after.records == before.records
        assert after.used_bytes <= full.used_bytes - taken

    def test_replacing_does_not_count_twice(self, store: RecordStore) -> None:
        if not self.exact_usage:
            pytest.skip("this store's usage lags behind")
        store.write(make_part(1, 100_000))
        once = store.usage().used_bytes
        for version in range(1, 4):
            store.write(make_part(1, 100_000, version=version))
        assert store.usage().used_bytes <= once + 100_000 // 2

    # --- listing, reopening -------------------------------------------------------------------------------------------

    def test_scan_names_every_record(self, store: RecordStore) -> None:
        if not self.listable:
            pytest.skip("this store can't be listed")
        parts = [make_part(number, 3000 + number) for number in range(5)]
        for part in parts:
            store.write(part)
        store.delete(parts[2].ref)
        found = {record.ref: record for record in store.scan()}
        assert set(found) == {part.ref for part in parts if part is not parts[2]}
        assert found[parts[4].ref].payload_bytes == 3004
        assert found[parts[4].ref].parent == parts[4].parent

    def test_a_second_store_finds_all_of_the_first(self, store: RecordStore, place: Path) -> None:
        parts = [make_part(number, 5000) for number in range(6)]
        for part in parts:
            store.write(part)
        store.delete(parts[3].ref)
        again = self.reopen(store, place)
        try:
            kept = [part for part in parts if part is not parts[3]]
            if self.listable:
                assert {record.ref for record in again.recover()} == {part.ref for part in kept}
            assert all(reads_back(again, part) for part in kept)
            assert again.exists([parts[3].ref]) == [False]
            assert not self.exact_usage or again.usage().records == 5
        finally:
            again.close()

    def test_recovery_follows_the_order_of_use(self, store: RecordStore, place: Path) -> None:
        if not self.listable:
            pytest.skip("this store can't be listed")
        for number in range(6):
            store.write(make_part(number, 100))
        order = [make_part(number, 100).ref for number in (4, 1, 5, 0, 3, 2)]
        store.remember(order)
        again = self.reopen(store, place)
        try:
            assert self.recovered_order_is_right([record.ref for record in again.recover()], order)
        finally:
            again.close()

    def recovered_order_is_right(self, recovered: list[RecordRef], remembered: list[RecordRef]) -> bool:
        """Exactly, unless a store that spreads its records says otherwise."""
        return recovered == remembered

    def test_reconciliation_has_no_news_of_what_is_known(self, store: RecordStore, place: Path) -> None:
        for number in range(4):
            store.write(make_part(number, 5000))
        assert list(store.reconcile()) == []
        again = self.reopen(store, place)
        try:
            list(again.recover())
            assert list(again.reconcile()) == []
        finally:
            again.close()

    def test_it_is_consistent_after_use(self, store: RecordStore) -> None:
        for number in range(8):
            store.write(make_part(number, 5000))
        for number in range(0, 8, 2):
            store.delete(make_part(number, 5000).ref)
        list(store.reconcile())
        assert list(store.check()) == []

    # --- life and several threads -------------------------------------------------------------------------------------

    def test_a_working_store_passes_its_probe(self, store: RecordStore) -> None:
        before = store.usage().records
        store.probe()
        store.probe()
        assert store.usage().records == before

    def test_close_is_idempotent_and_final(self, store: RecordStore) -> None:
        part = make_part(1, 100)
        store.write(part)
        store.close()
        store.close()
        for call in (lambda: store.write(part), lambda: reads_back(store, part), store.probe):
            with pytest.raises(StoreUnavailable):
                call()

    def test_eight_threads_at_once(self, store: RecordStore) -> None:
        def work(thread: int) -> None:
            parts = [make_part(100 * thread + number, 20_000 + thread) for number in range(6)]
            for part in parts:
                store.write(part)
            for part in parts:
                assert reads_back(store, part)
            for part in parts[::2]:
                assert store.delete(part.ref)
            assert store.exists([part.ref for part in parts]) == [False, True] * 3

        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(work, thread) for thread in range(8)]:
                future.result(_WAIT_S)
        assert not self.exact_usage or store.usage().records == 8 * 3
        list(store.reconcile())
        assert list(store.check()) == []

    def test_eight_threads_on_one_record(self, store: RecordStore) -> None:
        """Whoever reads gets one of the versions, whole, or a miss; never a mixture."""
        versions = [make_part(1, 50_000, version=version) for version in range(3)]
        payloads = {bytes(part.payload) for part in versions}
        begin = threading.Barrier(8)

        def work(thread: int) -> None:
            out = slot(50_000)
            begin.wait(_WAIT_S)
            for turn in range(12):
                if thread < 3:
                    store.write(versions[thread])
                elif thread == 3 and turn % 4 == 3:
                    store.delete(versions[0].ref)
                else:
                    try:
                        store.read_into(versions[0].ref, out, 50_000)
                    except RecordMissing:
                        continue
                    assert bytes(out[:50_000]) in payloads

        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(work, thread) for thread in range(8)]:
                future.result(_WAIT_S)
        store.write(versions[0])
        assert reads_back(store, versions[0])
        assert not self.exact_usage or store.usage().records == 1
        list(store.reconcile())
        assert list(store.check()) == []

    # --- damage -------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("how", list(Damage))
    @pytest.mark.parametrize("nbytes", [5000, 300_001])
    def test_a_damaged_record_is_a_miss_and_heals(self, store: RecordStore, nbytes: int, how: Damage) -> None:
        part = make_part(1, nbytes)
        neighbour = make_part(2, nbytes)
        store.write(part)
        store.write(neighbour)
        self.damage(store, part.ref, how)
        with pytest.raises(RecordMissing if how is Damage.REMOVE else RecordInvalid):
            reads_back(store, part)
        assert store.exists([part.ref]) == [False]  # it is not offered again
        with pytest.raises(RecordMissing):
            reads_back(store, part)
        assert reads_back(store, neighbour)
        store.write(part)
        assert reads_back(store, part)
        list(store.reconcile())
        assert list(store.check()) == []

    @pytest.mark.parametrize("how", list(Damage))
    def test_damage_between_two_runs_is_a_miss(self, store: RecordStore, place: Path, how: Damage) -> None:
        part = make_part(1, 300_001)
        store.write(part)
        store.write(make_part(2, 300_001))
        self.damage(store, part.ref, how)
        again = self.reopen(store, place)
        try:
            list(again.reconcile())
            with pytest.raises((RecordMissing, RecordInvalid)):
                reads_back(again, part)
            again.write(part)
            assert reads_back(again, part)
        finally:
            again.close()

    def test_errors_are_store_errors(self) -> None:
        assert issubclass(RecordInvalid, StoreError)
        assert issubclass(RecordMissing, StoreError)
