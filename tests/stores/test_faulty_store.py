"""The script of faults does what it says, and only that; the kit holds for a store that is not a disk."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kvtiers.model.errors import RecordCorrupt, RecordMissing, StoreFull, StoreTransient, StoreUnavailable
from kvtiers.model.layout import round_to_page
from kvtiers.model.parts import RecordRef
from kvtiers.stores.base import RecordStore, SealedPart, StoredRecord, StoreUsage
from kvtiers.stores.guard import Operation
from kvtiers.testing.faulty_store import Delay, Fail, FaultyStore, FlipBit, Full, Stall, TornWrite
from kvtiers.testing.store_kit import RecordStoreContract, make_part, reads_back, slot


class DictStore(RecordStore):
    """The smallest store there is: a dictionary."""

    name = "dict"

    def __init__(self) -> None:
        self._records: dict[RecordRef, tuple[SealedPart, bytes]] = {}
        self._closed = False

    def _alive(self) -> None:
        if self._closed:
            raise StoreUnavailable("closed")

    def open(self) -> None:
        self._closed = False

    def write(self, part: SealedPart) -> int:
        self._alive()
        self._records[part.ref] = part, bytes(part.payload)
        return round_to_page(len(part.payload))

    def read_into(self, ref: RecordRef, out: memoryview, nbytes: int) -> StoredRecord:
        self._alive()
        held = self._records.get(ref)
        if held is None:
            raise RecordMissing("no such record")
        if len(held[1]) != nbytes:
            raise RecordCorrupt("another size")
        np.frombuffer(out, np.uint8)[:nbytes] = np.frombuffer(held[1], np.uint8)
        return _described(held[0])._replace(checksum=held[0].checksum)

    def exists(self, refs: Sequence[RecordRef]) -> list[bool]:
        self._alive()
        return [ref in self._records for ref in refs]

    def delete(self, ref: RecordRef) -> bool:
        self._alive()
        return self._records.pop(ref, None) is not None

    def usage(self) -> StoreUsage:
        held = list(self._records.values())
        return StoreUsage(sum(round_to_page(len(payload)) for _, payload in held), len(held), None)

    def probe(self) -> None:
        self._alive()

    def close(self) -> None:
        self._closed = True

    def scan(self) -> Iterator[StoredRecord]:
        return (_described(part) for part, _ in list(self._records.values()))


def _described(part: SealedPart) -> StoredRecord:
    nbytes = len(part.payload)
    return StoredRecord(
        part.ref,
        part.parent,
        part.num_parts,
        part.token_start,
        part.token_count,
        nbytes,
        round_to_page(nbytes),
    )


class TestDictStore(RecordStoreContract):
    alone = True
    persistent = False

    def make_store(self, place: Path) -> RecordStore:
        return DictStore()


class TestFaultyStoreWithoutFaults(RecordStoreContract):
    alone = True
    persistent = False

    def make_store(self, place: Path) -> RecordStore:
        return FaultyStore(DictStore())


@pytest.fixture
def faulty() -> FaultyStore:
    store = FaultyStore(DictStore())
    store.write(PART)
    return store


PART = make_part(1, 5000)


def test_a_fault_strikes_as_often_as_it_says_and_only_where_it_says(faulty: FaultyStore) -> None:
    other = make_part(2, 100)
    fault = faulty.inject(
        Fail(StoreTransient), Operation.READ, times=2, skip=1, where=lambda ref: ref == PART.ref
    )
    assert reads_back(faulty, PART)
    faulty.write(other)
    for _ in range(2):
        assert reads_back(faulty, other)
        with pytest.raises(StoreTransient):
            reads_back(faulty, PART)
    assert reads_back(faulty, PART)
    assert fault.hits == 2


def test_a_stalled_call_hangs_until_it_is_released_and_then_succeeds(faulty: FaultyStore) -> None:
    released = threading.Event()
    stall = faulty.inject(Stall(released), Operation.READ)
    with ThreadPoolExecutor(1) as pool:
        hung = pool.submit(reads_back, faulty, PART)
        assert stall.wait_for_hit(30)
        assert not hung.done()
        assert reads_back(faulty, PART)  # others go on
        released.set()
        assert hung.result(30)


def test_a_delay_takes_its_time() -> None:
    slept: list[float] = []
    faulty = FaultyStore(DictStore(), sleep=slept.append)
    faulty.inject(Delay(2.5))
    faulty.probe()
    assert slept == [2.5]


def test_a_flipped_bit_is_in_what_was_read_not_in_what_is_stored(faulty: FaultyStore) -> None:
    faulty.inject(FlipBit(bit=8 * 77 + 3), Operation.READ)
    out = slot(5000)
    faulty.read_into(PART.ref, out, 5000)
    wrong = np.frombuffer(out, np.uint8)[:5000] ^ np.frombuffer(PART.payload, np.uint8)
    assert wrong[77] == 8
    assert np.count_nonzero(wrong) == 1
    assert reads_back(faulty, PART)


def test_a_torn_write_is_found_out_by_the_next_read_and_heals(faulty: FaultyStore) -> None:
    faulty.inject(TornWrite(), Operation.WRITE)
    assert faulty.write(PART) > 0
    assert faulty.exists([PART.ref]) == [True]
    with pytest.raises(RecordCorrupt):
        reads_back(faulty, PART)
    with pytest.raises(RecordMissing):
        reads_back(faulty, PART)
    faulty.write(PART)
    assert reads_back(faulty, PART)


def test_full_refuses_writes_and_reads_go_on(faulty: FaultyStore) -> None:
    fault = faulty.inject(Full(), Operation.WRITE, times=None)
    with pytest.raises(StoreFull):
        faulty.write(make_part(2, 100))
    assert reads_back(faulty, PART)
    fault.cancel()
    faulty.write(make_part(2, 100))


def test_heal_ends_the_script(faulty: FaultyStore) -> None:
    faulty.inject(Fail(StoreUnavailable), times=None)
    faulty.heal()
    assert reads_back(faulty, PART)
    faulty.probe()
