"""A chunk of several parts that is written again: what fails half-way never makes a whole of parts of two writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvtiers.core.messages import Chunkmark, OpId, Outcome, Priority, Write
from kvtiers.model.errors import StoreTransient
from kvtiers.model.keys import ChunkKey
from kvtiers.model.parts import Part, Parts, RecordRef
from kvtiers.model.tiers import Tier
from kvtiers.records.checksum import checksum
from kvtiers.stores.guard import Operation
from kvtiers.testing.chaos import works_again
from kvtiers.testing.faulty_store import Fail

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
        for slot in slots:
            one.node.arena.view(slot, PAGE)[:] = generation
        sums = tuple(checksum(one.node.arena.buffer(slot, PAGE)) for slot in slots)
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
