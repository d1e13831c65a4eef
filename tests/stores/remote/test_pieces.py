"""Records of pieces over a key-value engine, with every step of the engine in the test's hands."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import combinations
from pathlib import Path

import pytest

from kvtiers.model.errors import (
    RecordInvalid,
    RecordMissing,
    StoreError,
    StoreFull,
    StoreTransient,
)
from kvtiers.model.parts import RecordRef
from kvtiers.records.codecs.registry import codec_for
from kvtiers.stores.base import RecordStore, SealedPart
from kvtiers.stores.call_time import CallTime
from kvtiers.stores.manifest import MANIFEST_BYTES, decode_manifest, equal_pieces
from kvtiers.stores.pieces import PiecedStore
from kvtiers.testing.memory_values import MemoryEngine, MemoryValues
from kvtiers.testing.sealed_parts import Damage, make_part, reads_back, slot
from kvtiers.testing.store_kit import RecordStoreContract

NBYTES = 300_001
PIECE = 65_536


class TestPiecedStore(RecordStoreContract):
    listable = False
    exact_usage = False

    def make_store(self, place: Path) -> RecordStore:
        engine = self._engines.setdefault(str(place), MemoryEngine())
        return PiecedStore(MemoryValues(engine))

    @pytest.fixture(autouse=True)
    def _own_engines(self) -> None:
        self._engines: dict[str, MemoryEngine] = {}

    def damage(self, store: RecordStore, ref: RecordRef, how: Damage) -> None:
        (engine,) = self._engines.values()
        damage(engine, ref, how)


class TestEncodedPiecedStore(TestPiecedStore):
    def make_store(self, place: Path) -> RecordStore:
        engine = self._engines.setdefault(str(place), MemoryEngine())
        return PiecedStore(MemoryValues(engine), codec=codec_for("zstd"))


def names_of(engine: MemoryEngine, ref: RecordRef) -> tuple[str, list[str]]:
    mine = sorted(name for name in engine.values if f"{{{ref.key.hex()}}}:{ref.part}" in name)
    manifest = min(mine, key=len)
    return manifest, [name for name in mine if name != manifest]


def damage(engine: MemoryEngine, ref: RecordRef, how: Damage) -> None:
    manifest, pieces = names_of(engine, ref)
    target = manifest if how is Damage.FLIP_HEADER else pieces[-1]
    value = bytearray(engine.values[target])
    if how in (Damage.FLIP_HEADER, Damage.FLIP_PAYLOAD, Damage.FLIP_PADDING):
        value[len(value) // 2] ^= 1
        engine.values[target] = bytes(value)
    elif how is Damage.TRUNCATE:
        engine.values[target] = bytes(value[: len(value) // 2])
    elif how is Damage.EMPTY:
        engine.values[manifest] = b""
    elif how is Damage.REMOVE:
        del engine.values[manifest]
    else:
        others = {name for name in engine.values if f"{{{ref.key.hex()}}}" not in name}
        engine.values[manifest] = engine.values[min(others, key=len)]


class Steps:
    """Lets two writers make their steps in an order given beforehand."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.count = 0
        self.fail_at = fail_at

    def __call__(self, step: str) -> None:
        self.count += 1
        if self.count == self.fail_at:
            raise StoreTransient(f"{step} failed")


def store_on(engine: MemoryEngine, before: Callable[[str], None] | None = None) -> PiecedStore:
    store = PiecedStore(MemoryValues(engine, piece_bytes=PIECE, before=before))
    store.open()
    return store


def steps_of_a_write(part: SealedPart) -> int:
    steps = Steps()
    store_on(MemoryEngine(), steps).write(part)
    return steps.count


def test_a_write_that_fails_at_any_step_leaves_no_record_and_no_piece() -> None:
    part = make_part(1, NBYTES)
    for fail_at in range(1, steps_of_a_write(part) + 1):
        engine = MemoryEngine()
        with pytest.raises(StoreTransient):
            store_on(engine, Steps(fail_at)).write(part)
        assert not engine.values, fail_at
        store = store_on(engine)
        store.write(part)
        assert reads_back(store, part)


def test_a_writer_that_stops_at_any_step_harms_nobody() -> None:
    part = make_part(1, NBYTES)

    class Stopped(BaseException):
        """The process is gone: nothing is cleaned up."""

    def stop_at(step_number: int) -> Callable[[str], None]:
        made = iter(range(1, 1000))

        def before(step: str) -> None:
            if next(made) == step_number:
                raise Stopped

        return before

    for number in range(1, steps_of_a_write(part) + 1):
        engine = MemoryEngine()
        with pytest.raises(Stopped):
            store_on(engine, stop_at(number)).write(part)
        other = store_on(engine)
        assert other.exists([part.ref]) == [False]
        with pytest.raises(RecordMissing):
            reads_back(other, part)
        other.write(part)
        assert reads_back(other, part)


def interleavings(first: int, second: int) -> Iterator[list[int]]:
    """Every order of `first` steps of writer 0 and `second` steps of writer 1."""
    total = first + second
    for places in combinations(range(total), first):
        yield [0 if place in places else 1 for place in range(total)]


def test_two_writers_of_one_record_in_every_order_leave_one_whole_record() -> None:
    from concurrent.futures import ThreadPoolExecutor
    from threading import Event

    parts = [make_part(1, 3 * 4096, version=version) for version in (0, 1)]
    steps = 3  # one piece, the manifest, and what the loser leaves
    payloads = {bytes(part.payload) for part in parts}
    for order in interleavings(steps, steps):
        engine, turn = MemoryEngine(), iter(order)
        gates = [[Event() for _ in range(steps + 4)] for _ in parts]
        done = [[Event() for _ in range(steps + 4)] for _ in parts]

        def gated(
            writer: int,
            engine: MemoryEngine = engine,
            gates: list[list[Event]] = gates,
            done: list[list[Event]] = done,
        ) -> PiecedStore:
            numbers = iter(range(steps + 4))
            last = [-1]

            def before(step: str) -> None:
                if last[0] >= 0:
                    done[writer][last[0]].set()
                last[0] = next(numbers)
                assert gates[writer][last[0]].wait(30)

            return store_on(engine, before)

        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(gated(writer).write, parts[writer]) for writer in (0, 1)]
            position = [0, 0]
            for writer in turn:
                number = position[writer]
                gates[writer][number].set()
                position[writer] += 1
                while not done[writer][number].wait(0.001) and not futures[writer].done():
                    pass
            for writer in (0, 1):
                for gate in gates[writer]:
                    gate.set()
            for future in futures:
                future.result(30)
        reader = store_on(engine)
        out = slot(len(parts[0].payload))
        reader.read_into(parts[0].ref, out, len(parts[0].payload))
        assert bytes(out[: len(parts[0].payload)]) in payloads, order
        manifest, pieces = names_of(engine, parts[0].ref)
        winner = decode_manifest(engine.values[manifest], parts[0].ref)
        assert len(pieces) == winner.num_pieces, order  # the other one's are gone


def test_a_piece_that_the_engine_evicted_is_a_miss_and_the_record_is_offered_no_more() -> None:
    engine = MemoryEngine()
    store, part = store_on(engine), make_part(1, NBYTES)
    store.write(part)
    _, pieces = names_of(engine, part.ref)
    del engine.values[pieces[2]]
    assert store.exists([part.ref]) == [True]
    with pytest.raises(RecordMissing):
        reads_back(store, part)
    assert store.exists([part.ref]) == [False]
    assert store.stats()["incomplete"] == 1


def test_a_reader_of_a_damaged_record_leaves_the_one_written_meanwhile() -> None:
    engine = MemoryEngine()
    part = make_part(1, NBYTES)
    store_on(engine).write(part)
    damage(engine, part.ref, Damage.FLIP_PAYLOAD)
    healed: list[int] = []

    def before(step: str) -> None:
        if step == "remove_if" and not healed:
            healed.append(store_on(engine).write(part))

    reader = store_on(engine, before)
    with pytest.raises(RecordInvalid):
        reads_back(reader, part)
    assert healed
    assert reads_back(reader, part)


def test_a_full_engine_refuses_and_keeps_no_pieces() -> None:
    engine = MemoryEngine(capacity=200_000)
    store = store_on(engine)
    with pytest.raises(StoreFull):
        store.write(make_part(1, NBYTES))
    assert not engine.values
    small = make_part(2, 50_000)
    store.write(small)
    assert reads_back(store, small)


def test_deleting_removes_every_piece() -> None:
    engine = MemoryEngine()
    store, part = store_on(engine), make_part(1, NBYTES)
    store.write(part)
    assert len(engine.values) == 1 + -(-NBYTES // PIECE)
    store.delete(part.ref)
    assert not engine.values


def test_a_lost_answer_to_the_manifest_leaves_a_miss() -> None:
    engine = MemoryEngine()
    part = make_part(1, NBYTES)

    class LosesAnswers(MemoryValues):
        def swap(self, name: str, value: bytes) -> bytes | None:
            super().swap(name, value)
            raise StoreTransient("no answer")

    store = PiecedStore(LosesAnswers(engine))
    store.open()
    with pytest.raises(StoreTransient):
        store.write(part)
    reader = store_on(engine)
    with pytest.raises(StoreError):
        reads_back(reader, part)
    reader.write(part)
    assert reads_back(reader, part)


@pytest.mark.parametrize("nbytes", [1, 4096, 4 << 20, (4 << 20) + 1, 32 << 20, 5_898_240, 123_456_789])
def test_pieces_are_few_and_equal(nbytes: int) -> None:
    most = 4 << 20
    each = equal_pieces(nbytes, most)
    count = -(-nbytes // each)
    assert each <= most
    assert count == -(-nbytes // most)


def test_every_flipped_bit_of_a_manifest_is_found() -> None:
    engine = MemoryEngine()
    store, part = store_on(engine), make_part(1, 5000)
    store.write(part)
    name, _ = names_of(engine, part.ref)
    sound = engine.values[name]
    assert len(sound) == MANIFEST_BYTES
    for bit in range(0, 8 * MANIFEST_BYTES, 7):
        value = bytearray(sound)
        value[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RecordInvalid):
            decode_manifest(bytes(value), part.ref, 5000)


class TimedValues(MemoryValues):
    """Notes at each step by when it has to end."""

    def __init__(self, engine: MemoryEngine, fail_at: str = "") -> None:
        self.time = CallTime()
        self.deadlines: list[float] = []
        self.fail_at = fail_at
        super().__init__(engine, piece_bytes=PIECE, before=self.note)

    def note(self, step: str) -> None:
        self.deadlines.append(self.time.until)
        if step == self.fail_at:
            raise StoreTransient("it was too slow")

    def within_time(self, seconds: float = math.inf) -> AbstractContextManager[object]:
        return self.time.within(min(seconds, 5.0))


@pytest.mark.parametrize("fails", ["", "swap"])
def test_all_steps_of_a_record_have_one_deadline(fails: str) -> None:
    part, engine = make_part(1, NBYTES), MemoryEngine()
    values = TimedValues(engine, fails)
    store = PiecedStore(values)
    store.open()
    calls: list[Callable[[], object]] = [lambda: store.write(part)]
    if not fails:
        calls += [lambda: store.write(part), lambda: reads_back(store, part), lambda: store.delete(part.ref)]
    for call in calls:
        values.deadlines.clear()
        with pytest.raises(StoreTransient) if fails else nullcontext():
            call()
        assert len(values.deadlines) > 2
        assert len(set(values.deadlines)) == 1
        assert values.deadlines[0] < math.inf
    assert values.time.until == math.inf


def test_any_number_of_names_is_asked_for_by_one_deadline() -> None:
    values = TimedValues(MemoryEngine())
    store = PiecedStore(values)
    store.open()
    ref = make_part(1, 100).ref
    assert store.exists([ref] * 4096) == [False] * 4096
    assert len(values.deadlines) > 1
    assert len(set(values.deadlines)) == 1
    assert values.deadlines[0] < math.inf


def test_what_is_part_of_something_has_no_more_time_than_that() -> None:
    call_time = CallTime()
    with call_time.within(5.0) as outer, call_time.within(100.0) as inner:
        assert inner == outer
    with call_time.within(5.0) as outer, call_time.within(0.0) as inner:
        assert inner < outer
    assert call_time.until == math.inf
