"""The slot pool against the plainest model there is: intervals that must not overlap, nor cross a border."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtiers.core.slots import SlotPool
from kvtiers.model.errors import InvariantBroken

PAGE = 4096
SHAPES = [(1,), (3,), (7,), (2, 5), (1, 1, 4)]


def pages(*counts: int) -> tuple[int, ...]:
    return tuple(count * PAGE for count in counts)


@settings(deadline=None, max_examples=200)
@given(
    capacity=st.integers(1, 200),
    cuts=st.sets(st.integers(1, 199), max_size=3),
    history=st.lists(st.tuples(st.sampled_from(SHAPES), st.integers(0, 10), st.none() | st.integers(0, 3))),
)
def test_no_two_slots_overlap_and_none_crosses_a_border(
    capacity: int, cuts: set[int], history: list[tuple[tuple[int, ...], int, int | None]]
) -> None:
    borders = [*(cut * PAGE for cut in sorted(cuts) if cut < capacity), capacity * PAGE]
    pool = SlotPool(capacity * PAGE, borders)
    held: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for shape, back, near in history:
        if held and back < 4:
            pool.give(held.pop(back % len(held))[1])
        else:
            sizes = pages(*shape)
            before = pool.taken
            slots = pool.take(sizes, near)
            if slots is None:
                assert pool.taken == before, "all or nothing"
            else:
                held.append((sizes, slots))
        spans = sorted(
            (slot, slot + size) for sizes, slots in held for size, slot in zip(sizes, slots, strict=True)
        )
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
        assert all(begin >= 0 and end <= capacity * PAGE for begin, end in spans)
        assert not any(begin < border < end for begin, end in spans for border in borders)
        assert pool.taken_bytes == sum(end - begin for begin, end in spans)
        assert pool.check_integrity() == []
    for _, slots in held:
        pool.give(slots)
    assert pool.taken_bytes == 0
    assert pool.check_integrity() == []
    whole = max(end - begin for begin, end in zip([0, *borders], borders, strict=False))
    assert pool.take((whole,)) is not None, "what is given back joins what is free beside it"


@pytest.mark.parametrize("size", [1, 3, 7, 64, 100])
def test_slots_of_one_size_waste_nothing(size: int) -> None:
    pool = SlotPool(1000 * PAGE)
    taken = 0
    while pool.take(pages(size)) is not None:
        taken += 1
    assert taken == 1000 // size


def test_a_slot_comes_from_the_segment_asked_for_as_long_as_it_has_any() -> None:
    pool = SlotPool(20 * PAGE, [10 * PAGE, 20 * PAGE])
    near = [pool.take(pages(1), near=1) for _ in range(12)]
    assert all(slots is not None and slots[0] >= 10 * PAGE for slots in near[:10])
    assert all(slots is not None and slots[0] < 10 * PAGE for slots in near[10:])


def test_without_a_wish_the_segment_with_most_room_is_used() -> None:
    pool = SlotPool(20 * PAGE, [10 * PAGE, 20 * PAGE])
    for _ in range(10):
        assert pool.take(pages(1)) is not None
    assert 4 <= sum(1 for slot in pool.taken if slot < 10 * PAGE) <= 6


def test_a_slot_given_back_twice_is_a_bug() -> None:
    pool = SlotPool(4 * PAGE)
    slots = pool.take(pages(1))
    assert slots is not None
    pool.give(slots)
    with pytest.raises(InvariantBroken):
        pool.give(slots)
