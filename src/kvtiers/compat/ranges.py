"""A free list for ranges of any size: first fit, neighbours merged. Pure arithmetic; the caller's lock guards it.

The cache itself needs none of this: its slots have equal sizes, which never fragment (`core/slots.py`). Pointers of the
LMCache-compatible allocator have any size, so theirs may: what was given back is whole again at once, but a request larger than
the largest hole is refused though the sum of the holes would do.
"""

from __future__ import annotations

from bisect import bisect_left

from kvtiers.model.errors import InvariantBroken


class FreeRanges:
    """Free and taken ranges of `[0, capacity)`. Free ones are kept in order, never empty, never touching each other."""

    __slots__ = ("_sizes", "_starts", "_taken", "_taken_bytes", "capacity")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._starts: list[int] = [0] if capacity else []
        self._sizes: list[int] = [capacity] if capacity else []
        self._taken: dict[int, int] = {}
        self._taken_bytes = 0

    def take(self, nbytes: int) -> int | None:
        """Offset of the lowest hole that holds `nbytes` (at least 1), now taken; None if no hole does. O(holes)."""
        if nbytes < 1:
            raise InvariantBroken(f"a range of {nbytes} bytes was asked for")
        index = next((i for i, size in enumerate(self._sizes) if size >= nbytes), None)
        if index is None:
            return None
        offset = self._starts[index]
        if self._sizes[index] == nbytes:
            del self._starts[index], self._sizes[index]
        else:
            self._starts[index] += nbytes
            self._sizes[index] -= nbytes
        self._taken[offset] = nbytes
        self._taken_bytes += nbytes
        return offset

    def give(self, offset: int) -> None:
        """Free the range taken at `offset`, and merge it with free neighbours. Raises InvariantBroken if there is none."""
        nbytes = self._taken.pop(offset, None)
        if nbytes is None:
            raise InvariantBroken(f"no range taken at {offset}: given back twice?")
        self._taken_bytes -= nbytes
        start, end = offset, offset + nbytes
        index = bisect_left(self._starts, start)
        if index < len(self._starts) and self._starts[index] == end:
            end += self._sizes[index]
            del self._starts[index], self._sizes[index]
        if index and self._starts[index - 1] + self._sizes[index - 1] == start:
            self._sizes[index - 1] += end - start
        else:
            self._starts.insert(index, start)
            self._sizes.insert(index, end - start)

    @property
    def taken_bytes(self) -> int:
        """Bytes of all ranges taken."""
        return self._taken_bytes

    @property
    def largest_hole(self) -> int:
        """The most that one request can get now. O(holes)."""
        return max(self._sizes, default=0)

    def check_integrity(self) -> list[str]:
        """Whether free and taken ranges tile `[0, capacity)`, with no two free neighbours; says what is wrong. O(n log n)."""
        spans = [(start, size, "free") for start, size in zip(self._starts, self._sizes, strict=True)]
        spans += [(start, size, "taken") for start, size in self._taken.items()]
        problems, end, before = [], 0, ""
        for start, size, kind in sorted(spans):
            if start != end or size < 1:
                problems.append(f"ranges: {kind} {size} bytes at {start}, the range before ends at {end}")
            if kind == before == "free":
                problems.append(f"ranges: the holes that meet at {start} were not merged")
            end, before = start + size, kind
        if end != self.capacity:
            problems.append(f"ranges: they end at {end}, the capacity is {self.capacity}")
        if self._taken_bytes != sum(self._taken.values()):
            problems.append("ranges: the sum of the taken bytes is wrong")
        return problems
