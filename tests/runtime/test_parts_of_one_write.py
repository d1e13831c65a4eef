"""A chunk of several parts that is written again: what fails half-way never makes a whole of parts of two writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from kvtiers.core.messages import Chunkmark, OpId, Outcome, Priority, Write
from kvtiers.model.errors import StoreTransient
from kvtiers.model.keys import ChunkKey
from kvtiers.model.parts import Part, Parts, RecordRef
from kvtiers.model.tiers import Tier
from kvtiers.records.checksum import checksum
from kvtiers.runtime.offload import OffloadEngine
from kvtiers.stores.guard import Guard, Operation
from kvtiers.stores.pieces import PiecedStore
from kvtiers.testing.chaos import works_again
from kvtiers.testing.faulty_store import Fail
from kvtiers.testing.memory_values import MemoryEngine, MemoryValues
from kvtiers.testing.sealed_parts import make_part, slot

if TYPE_CHECKING:
    from tests.runtime.conftest import MakeChaos

PAGE = 4096
MARK = Chunkmark(b"n" * 32, ChunkKey(b"k" * 32), ChunkKey(b"p" * 32), 3, 0, 16)
PARTS = Parts([Part(group=0, rank=rank, nbytes=PAGE) for rank in range(3)])
REFS = [RecordRef(MARK.namespace, MARK.key, number) for number in range(3)]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_rewrite_that_fails_leaves_no_part_of_the_write_before(failing: int, make_chaos: MakeChaos) -> None:
    one = make_chaos()
    space = one.node.attach(MARK.namespace, PARTS, chunk_tokens=16, itemsize=2)
    # the core hands out no slot meanwhile: nothing else is stored here
    slots = tuple(one.node.arena.nbytes - (3 - number) * PAGE for number in range(3))

    def write(generation: int) -> Outcome:
        for place in slots:
            one.node.arena.view(place, PAGE)[:] = generation
        sums = tuple(checksum(one.node.arena.buffer(place, PAGE)) for place in slots)
        intent = Write(OpId(10_000 + generation), space, Tier.DISK, MARK, slots, sums, Priority.STORE)
        return one.node.engine._write(intent).outcome

    assert write(1) is Outcome.OK
    assert one.disk.store.exists(REFS) == [True] * 3
    one.disk.inject(Fail(StoreTransient), Operation.WRITE, times=None, where=lambda ref: ref.part == failing)
    # what was written of it can't be taken back either
    one.disk.inject(Fail(StoreTransient), Operation.DELETE, skip=3, times=None)
    assert write(2) is not Outcome.OK
    assert one.disk.store.exists(REFS) == [number < failing for number in range(3)]
    one.disk.heal()
    assert works_again(one.node)  # three failures open the breaker
    assert write(3) is Outcome.OK
    assert one.disk.store.exists(REFS) == [True] * 3
    for ref in REFS:  # the core knows nothing of them: the audit would say so
        one.disk.store.delete(ref)


def test_a_mixture_is_removed_but_not_what_another_instance_writes_meanwhile() -> None:
    """The reader has found parts of two writes. Before it removes them, the writer of the newer one has begun anew."""
    engine = MemoryEngine()

    def client(before: Callable[[str], None] | None = None) -> PiecedStore:
        store = PiecedStore(MemoryValues(engine, before=before))
        store.open()
        return store

    writer = client()

    def write(part: int, write_id: bytes) -> None:
        writer.write(make_part(1, PAGE, part=part)._replace(write_id=write_id * 16))

    renewed: list[int] = []

    def renew(step: str) -> None:
        if step == "remove_if" and not renewed:
            renewed.append(0)
            write(0, b"c")

    write(0, b"a")
    write(1, b"b")
    reader = client(renew)
    refs = [make_part(1, PAGE, part=number).ref for number in range(2)]
    records = [reader.read_into(ref, slot(PAGE), PAGE) for ref in refs]
    assert OffloadEngine._refuse_mixture(Guard(reader), records) is Outcome.MISSING
    assert renewed
    assert writer.exists(refs) == [True, False]
    assert writer.read_into(refs[0], slot(PAGE), PAGE).write_id == b"c" * 16
