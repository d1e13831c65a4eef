"""What a store must do that several instances share, as tests: all of `store_kit.py`, and two of it side by side. Needs pytest."""

from __future__ import annotations

import threading
from pathlib import Path

from kvtiers.stores.base import RecordStore
from kvtiers.testing.remote_work import HANG_S, begin, comes_back
from kvtiers.testing.sealed_parts import make_part, reads_back
from kvtiers.testing.store_kit import RecordStoreContract


class SharedStoreContract(RecordStoreContract):
    """The tests. `make_store` gives instances that share what one of them has written."""

    def test_two_instances_share_what_one_has_written(self, store: RecordStore, place: Path) -> None:
        other = self.make_store(place)
        other.open()
        try:
            parts = [make_part(number, 70_000 + number) for number in range(4)]
            for part in parts:
                store.write(part)
            assert other.exists([part.ref for part in parts]) == [True] * 4
            assert all(reads_back(other, part) for part in parts)
            other.delete(parts[0].ref)
            assert store.exists([part.ref for part in parts]) == [False, True, True, True]
        finally:
            other.close()

    def test_two_instances_that_write_one_record_at_a_time_leave_one_whole_record(
        self, store: RecordStore, place: Path
    ) -> None:
        nbytes = 1_300_001
        versions = [make_part(1, nbytes, version=version) for version in (0, 1)]
        payloads = {bytes(part.payload) for part in versions}
        other = self.make_store(place)
        other.open()
        try:
            done = threading.Event()

            def write(instance: RecordStore, number: int) -> None:
                for _ in range(8):
                    instance.write(versions[number])

            def read(instance: RecordStore) -> int:
                turns = 0
                while not done.is_set():
                    turns += comes_back(instance, versions[0].ref, *payloads)
                return turns

            writing = [begin(write, store, 0), begin(write, other, 1)]
            reading = [begin(read, store), begin(read, other)]
            try:
                for call in writing:
                    call.result(HANG_S)
            finally:
                done.set()
            for turns in reading:
                turns.result(HANG_S)
            assert comes_back(other, versions[0].ref, *payloads)
            assert comes_back(store, versions[0].ref, *payloads)
        finally:
            other.close()
