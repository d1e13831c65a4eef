"""Slots of several sizes in one memory: taking one and giving it back is O(1) in the normal case; every so many slots a slab is cut
(`slabs.py`). Pure arithmetic: what is mapped there is not known here.

A slot is named by its byte offset. What a size can't have because others hold the slabs is not this module's affair: who evicts
(`starving.py`) closes slabs, empties them, and keeps others from what becomes free by that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from kvtiers.core.messages import Slots
from kvtiers.core.slabs import SLABS, Segment, Slab
from kvtiers.model.errors import InvariantBroken


class SlotPool:
    """Slots in `[0, capacity)`."""

    __slots__ = ("_orders", "_promised", "_segments", "_slab_of", "_slabs", "capacity", "lacking")

    def __init__(self, capacity: int, borders: Sequence[int] = ()) -> None:
        """`borders`: where the segments end, ascending, the last at `capacity`; none: one segment."""
        self.capacity = capacity
        ends = list(borders) or [capacity]
        target = capacity // SLABS
        self._segments = [Segment(begin, end, target) for begin, end in zip([0, *ends], ends, strict=False)]
        self._slab_of: dict[int, Slab] = {}
        self._slabs: dict[int, OrderedDict[Slab, None]] = {}
        """All of each size, the one to be looked at next first."""
        self._orders: dict[Sequence[int], tuple[int, ...]] = {}
        self._promised: tuple[int, ...] = ()
        self.lacking = 0
        """The size that the last take failed for."""

    def take(self, sizes: tuple[int, ...], near: int | None = None) -> Slots | None:
        """One slot of each size, or None if not all can be had (then none is taken).

        From the segment `near` as far as it has any, else from the one with most free bytes.
        """
        if len(sizes) == 1:
            offset = self._take_one(sizes[0], near)
            return None if offset is None else (offset,)
        taken = [-1] * len(sizes)
        for index in self._order_of(sizes):
            offset = self._take_one(sizes[index], near)
            if offset is None:
                self.give(tuple(slot for slot in taken if slot >= 0))
                return None
            taken[index] = offset
        return tuple(taken)

    def give(self, slots: Slots) -> None:
        """Put slots back. Raises InvariantBroken if one was not taken."""
        for offset in slots:
            slab = self._slab_of.pop(offset, None)
            if slab is None:
                raise InvariantBroken(f"slot at {offset} was given back twice")
            size, owners, segment = slab.size, slab.owners, slab.segment
            segment.free_bytes += size
            owners[(offset - slab.begin) // size] = None
            taken = slab.taken = slab.taken - 1
            if not taken:
                segment.retire(slab)
                del self._slabs[size][slab]
                continue
            slab.free.append(offset)
            if taken == len(owners) - 1 and not slab.closed:
                segment.open[size].append(slab)

    def assign(self, slots: Slots, owner: object) -> None:
        """Remember whose these slots are, until they are given back."""
        for offset in slots:
            slab = self._slab_of[offset]
            slab.owners[(offset - slab.begin) // slab.size] = owner

    # --- for who evicts ---

    def slab_of(self, slot: int) -> Slab:
        """The slab of a slot that is taken."""
        return self._slab_of[slot]

    def slab_if_taken(self, slot: int) -> Slab | None:
        """The slab of a slot, or None if that is free."""
        return self._slab_of.get(slot)

    def slabs_of(self, size: int) -> Iterator[Slab]:
        """The slabs of a size, those cut or put off longest ago first; none may be cut or emptied meanwhile."""
        return iter(self._slabs.get(size, ()))

    @property
    def sizes(self) -> list[int]:
        """Sizes that have slabs."""
        return [size for size, slabs in self._slabs.items() if slabs]

    def put_off(self, slab: Slab) -> None:
        """Look at the others of its size before this one."""
        self._slabs[slab.size].move_to_end(slab)

    def close(self, slabs: Sequence[Slab]) -> None:
        """Take no slot from these any more: they are to become empty, and free for other sizes."""
        for slab in slabs:
            if not slab.full:
                slab.segment.withdraw(slab)
            slab.closed = True

    def reopen(self, slabs: Sequence[Slab]) -> None:
        """The opposite, for those that have not become empty."""
        for slab in slabs:
            if slab.taken and slab.closed:
                slab.closed = False
                if not slab.full:
                    slab.segment.offer(slab)

    def promise(self, sizes: tuple[int, ...]) -> None:
        """From now on other sizes get no new slab if that could leave too little for one slot of each of these; (): anybody may."""
        self._promised = sizes

    # --- books ---

    @property
    def taken_bytes(self) -> int:
        """Bytes of all slots taken."""
        return sum(slab.size for slab in self._slab_of.values())

    @property
    def taken(self) -> frozenset[int]:
        """Offsets of all slots taken."""
        return frozenset(self._slab_of)

    @property
    def taken_in_order(self) -> list[int]:
        """The same, in the order in which they were taken."""
        return list(self._slab_of)

    def check_integrity(self) -> list[str]:
        """Every byte is free or in exactly one slot, and every list agrees; returns what is wrong. O(n)."""
        problems = [problem for segment in self._segments for problem in segment.check_integrity()]
        if [segment.begin for segment in self._segments[1:]] != [s.end for s in self._segments[:-1]]:
            problems.append("slot pool: segments don't follow one another")
        slabs = {slab for segment in self._segments for slab in segment.slabs()}
        if slabs != {slab for of_size in self._slabs.values() for slab in of_size}:
            problems.append("slot pool: slabs of the segments and slabs by size differ")
        taken: dict[Slab, set[int]] = {slab: set() for slab in slabs}
        for offset, slab in self._slab_of.items():
            inside = slab.begin <= offset < slab.fresh and not (offset - slab.begin) % slab.size
            if slab not in taken or not inside:
                problems.append(f"slot pool: the slot at {offset} is not of its slab")
            else:
                taken[slab].add(offset)
        for slab, offsets in taken.items():
            if len(offsets) != slab.taken or offsets.intersection(slab.free):
                problems.append(f"slot pool: slab at {slab.begin} has other slots taken than it counts")
        return problems

    # --- inside ---

    def _take_one(self, size: int, near: int | None) -> int | None:
        segments = self._segments
        for segment in segments if len(segments) == 1 else self._by_preference(near):
            listed = segment.open.get(size)
            if not listed:
                if self._cut(segment, size) is None:
                    continue
                listed = segment.open[size]
            slab = listed[-1]
            if slab.free:
                offset = slab.free.pop()
            else:
                offset = slab.fresh
                slab.fresh = offset + size
            taken = slab.taken = slab.taken + 1
            segment.free_bytes -= size
            if taken == len(slab.owners):
                listed.pop()
            self._slab_of[offset] = slab
            return offset
        self.lacking = size
        return None

    def _by_preference(self, near: int | None) -> list[Segment]:
        segments = sorted(self._segments, key=lambda segment: -segment.free_bytes)
        if near is not None and near < len(segments):
            first = self._segments[near]
            segments.remove(first)
            segments.insert(0, first)
        return segments

    def _cut(self, segment: Segment, size: int) -> Slab | None:
        if self._promised and size not in self._promised and not self._spares(segment.slab_bytes(size)):
            return None
        slab = segment.cut(size)
        if slab is not None:
            self._slabs.setdefault(size, OrderedDict())[slab] = None
        return slab

    def _spares(self, nbytes: int) -> bool:
        """Whether so many bytes can go from what is free without touching what is promised; careful, not exact."""
        largest = max(self._promised)
        whole = sum(e // largest * largest for segment in self._segments for e in segment.extents())
        return whole - nbytes - largest >= sum(self._promised)

    def _order_of(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """The largest first: a small one must not take the extent that only the large one needs whole."""
        order = self._orders.get(sizes)
        if order is None:
            order = self._orders[sizes] = tuple(sorted(range(len(sizes)), key=lambda index: -sizes[index]))
        return order
