"""The free list against a map of bytes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtiers.compat.ranges import FreeRanges
from kvtiers.model.errors import InvariantBroken

CAPACITY = 64
SIZES = st.integers(1, 24)


def _first_fit(bytes_taken: list[bool], nbytes: int) -> int | None:
    for start in range(CAPACITY - nbytes + 1):
        if not any(bytes_taken[start : start + nbytes]):
            return start
    return None


def _largest_hole(bytes_taken: list[bool]) -> int:
    longest = run = 0
    for taken in bytes_taken:
        run = 0 if taken else run + 1
        longest = max(longest, run)
    return longest


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(SIZES, st.integers(-1000, -1)), max_size=60))
def test_first_fit_with_merging_does_what_a_byte_map_does(steps: list[int]) -> None:
    """A positive step takes that many bytes, a negative one gives back one of the ranges taken."""
    ranges, taken = FreeRanges(CAPACITY), [False] * CAPACITY
    live: list[tuple[int, int]] = []
    for step in steps:
        if step > 0:
            offset = ranges.take(step)
            assert offset == _first_fit(taken, step)
            if offset is not None:
                taken[offset : offset + step] = [True] * step
                live.append((offset, step))
        elif live:
            offset, nbytes = live.pop(step % len(live))
            ranges.give(offset)
            taken[offset : offset + nbytes] = [False] * nbytes
        assert ranges.check_integrity() == []
        assert ranges.taken_bytes == sum(taken)
        assert ranges.largest_hole == _largest_hole(taken)


def test_all_is_whole_again_when_all_is_given_back_in_any_order() -> None:
    ranges = FreeRanges(100)
    offsets = [ranges.take(10) for _ in range(10)]
    assert ranges.take(1) is None
    for offset in (offsets[i] for i in (3, 7, 0, 9, 4, 1, 8, 2, 6, 5)):
        assert offset is not None
        ranges.give(offset)
    assert ranges.largest_hole == 100


def test_a_range_is_given_back_once() -> None:
    ranges = FreeRanges(10)
    assert ranges.take(4) == 0
    ranges.give(0)
    with pytest.raises(InvariantBroken, match="given back twice"):
        ranges.give(0)
    with pytest.raises(InvariantBroken):
        ranges.take(0)


def test_nothing_fits_into_nothing() -> None:
    assert FreeRanges(0).take(1) is None
    assert FreeRanges(0).check_integrity() == []
