"""Free lists over one range of memory. Pure arithmetic: what is mapped there is not known here.

Equal parts make equal slots, so taking and giving back is O(1) and nothing fragments. Several sizes share the range by size
classes: a class takes new slots from the unclaimed end until that is used up, then lives with what it has.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvtiers.core.messages import Slots
from kvtiers.model.errors import InvariantBroken


class SlotPool:
    """Slots in `[0, capacity)`, named by their byte offset."""

    __slots__ = ("_claimed", "_free", "_size_of", "capacity")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._claimed = 0
        self._free: dict[int, list[int]] = {}
        self._size_of: dict[int, int] = {}

    def take(self, sizes: Sequence[int]) -> Slots | None:
        """One slot of each size, or None if not all can be had (then none is taken)."""
        taken: list[int] = []
        for size in sizes:
            offset = self._take_one(size)
            if offset is None:
                self.give(tuple(taken))
                return None
            taken.append(offset)
        return tuple(taken)

    def give(self, slots: Slots) -> None:
        """Put slots back. Raises InvariantBroken if one was not taken."""
        for offset in slots:
            size = self._size_of.pop(offset, None)
            if size is None:
                raise InvariantBroken(f"slot at {offset} was given back twice")
            self._free[size].append(offset)

    @property
    def taken_bytes(self) -> int:
        """Bytes of all slots taken."""
        return sum(self._size_of.values())

    @property
    def taken(self) -> frozenset[int]:
        """Offsets of all slots taken."""
        return frozenset(self._size_of)

    def check_integrity(self) -> list[str]:
        """Every slot claimed is free or taken exactly once and none overlap; returns what is wrong."""
        spans = [(offset, size) for offset, size in self._size_of.items()]
        spans += [(offset, size) for size, offsets in self._free.items() for offset in offsets]
        spans.sort()
        problems: list[str] = []
        end = 0
        for offset, size in spans:
            if offset != end:
                problems.append(
                    f"slot pool: {'gap' if offset > end else 'overlap'} between {end} and {offset}"
                )
            end = offset + size
        if end != self._claimed:
            problems.append(f"slot pool: slots end at {end}, claimed are {self._claimed}")
        return problems

    def _take_one(self, size: int) -> int | None:
        free = self._free.get(size)
        if free is None:
            free = self._free[size] = []
        if free:
            offset = free.pop()
        elif self._claimed + size <= self.capacity:
            offset = self._claimed
            self._claimed += size
        else:
            return None
        self._size_of[offset] = size
        return offset
