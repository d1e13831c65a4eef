"""An instance counts what it has written to a shared store: each record once, and no more than it may remember."""

from __future__ import annotations

from kvtiers.stores.own_records import OwnRecords
from kvtiers.testing.sealed_parts import make_part

REFS = [make_part(number, 1).ref for number in range(5)]


def test_a_record_counts_once_until_it_is_removed() -> None:
    own = OwnRecords()
    for ref in [*REFS[:3], REFS[0], REFS[0]]:
        own.written(ref)
    assert len(own) == 3
    own.removed(REFS[4])  # another instance's
    own.removed(REFS[0])
    own.removed(REFS[0])
    assert len(own) == 2


def test_no_more_are_counted_than_may_be_remembered() -> None:
    own = OwnRecords(most=3)
    for ref in REFS:
        own.written(ref)
    assert len(own) == 3
