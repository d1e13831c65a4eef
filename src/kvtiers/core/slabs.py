"""Slabs: how a range of memory is divided among slots of several sizes.

A slab is a whole number of slots of one size, and belongs to that size while one of its slots is taken; then it goes back to
what is free at once, and joins what is free beside it. Slabs are not a fixed grid: one is as long as its slots, and cut from the
beginning of a free extent. So slots of one size lie without gaps, however small the memory is, and what two sizes leave unused
between them is less than a slot. Pure arithmetic: what is mapped there, and whose a slot is, is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

SLABS: Final = 64
"""A slab is about this part of the memory: what a starved size gets of another at once."""
_MOST_SLOTS: Final = 64
"""In one slab: no more are evicted together to free one."""


class Slab:
    """Slots of `size` bytes in `[begin, end)`."""

    __slots__ = ("begin", "closed", "end", "free", "fresh", "owners", "segment", "size", "taken")

    def __init__(self, segment: Segment, begin: int, end: int, size: int) -> None:
        self.segment = segment
        self.begin = begin
        self.end = end
        self.size = size
        self.fresh = begin
        """From here on no slot has been taken yet."""
        self.free: list[int] = []
        """Slots given back, below `fresh`."""
        self.taken = 0
        self.closed = False
        """No slot is taken from it any more: it is being emptied for another size."""
        self.owners: list[object | None] = [None] * ((end - begin) // size)
        """Who holds each slot, as far as the pool was told."""

    @property
    def full(self) -> bool:
        """Whether every slot is taken."""
        return self.taken == len(self.owners)

    def owner(self, slot: int) -> object | None:
        """Who holds it, as far as the pool was told."""
        return self.owners[(slot - self.begin) // self.size]

    def check_integrity(self) -> list[str]:
        """Its free slots, those never taken and the count of those taken make it up."""
        name = f"slab of {self.size} at {self.begin}"
        problems = []
        if (self.end - self.begin) % self.size or (self.fresh - self.begin) % self.size:
            problems.append(f"{name}: not a whole number of slots")
        if len(self.free) + self.taken + (self.end - self.fresh) // self.size != len(self.owners):
            problems.append(f"{name}: free and taken slots don't make it up")
        wrong = [s for s in self.free if (s - self.begin) % self.size or not self.begin <= s < self.fresh]
        if wrong or len(set(self.free)) != len(self.free):
            problems.append(f"{name}: its free list is wrong: {self.free}")
        if not self.taken:
            problems.append(f"{name}: empty, and not given back")
        owned = {n for n, owner in enumerate(self.owners) if owner is not None}
        if owned & {(s - self.begin) // self.size for s in self.free}:
            problems.append(f"{name}: a free slot has an owner")
        return problems


class Segment:
    """One range: all of the memory, or what of it lies on one NUMA node. No slot crosses its borders."""

    __slots__ = (
        "_ending",
        "_extents",
        "_extents_ending",
        "_starting",
        "_target",
        "begin",
        "end",
        "free_bytes",
        "open",
    )

    def __init__(self, begin: int, end: int, target: int) -> None:
        """`target`: bytes that a slab should have."""
        self.begin = begin
        self.end = end
        self.free_bytes = end - begin
        """Not in taken slots."""
        self.open: dict[int, list[Slab]] = {}
        """By size: slabs that slots can be taken from; the last is used first, until it is full."""
        self._target = target
        self._extents = {begin: end} if end > begin else {}
        self._extents_ending = {end: begin} if end > begin else {}
        self._starting: dict[int, Slab] = {}
        self._ending: dict[int, Slab] = {}

    def cut(self, size: int) -> Slab | None:
        """A new slab from the first free extent that is long enough, else a shorter one from the longest; None: no slot fits."""
        wanted = self.slab_bytes(size)
        begin, length = -1, 0
        for start, end in self._extents.items():
            here = min(end - start, wanted)
            if here >= size and (here > length or (here == length and start < begin)):
                begin, length = start, here
        if begin < 0:
            return None
        end = begin + length // size * size
        self._shrink(begin, end)
        slab = self._starting[begin] = self._ending[end] = Slab(self, begin, end, size)
        self.offer(slab)
        return slab

    def retire(self, slab: Slab) -> None:
        """The slab is empty: its bytes are free for any size."""
        if (
            not slab.closed and len(slab.owners) > 1
        ):  # the only slot of a slab leaves it full: it is not listed
            self.withdraw(slab)
        begin, end = slab.begin, slab.end
        del self._starting[begin], self._ending[end]
        before = self._extents_ending.pop(begin, None)
        if before is not None:
            del self._extents[before]
            begin = before
        after = self._extents.pop(end, None)
        if after is not None:
            del self._extents_ending[after]
            end = after
        self._extents[begin] = end
        self._extents_ending[end] = begin

    def offer(self, slab: Slab) -> None:
        """Slots can be taken from the slab (again)."""
        listed = self.open.get(slab.size)
        if listed is None:
            listed = self.open[slab.size] = []
        listed.append(slab)

    def withdraw(self, slab: Slab) -> None:
        """No slot can be taken from it."""
        self.open[slab.size].remove(slab)

    def window(self, slab: Slab, size: int) -> list[Slab] | None:
        """Slabs of other sizes side by side, this one among them, that would leave room for one slot of `size` if they were empty.

        As few as possible to the right, then to the left; None if there are none.
        """
        slabs, begin, end = [slab], slab.begin, slab.end
        while True:
            end = self._extents.get(end, end)
            begin = self._extents_ending.get(begin, begin)
            if end - begin >= size:
                return slabs
            right = self._starting.get(end)
            left = self._ending.get(begin)
            if right is not None and right.size != size:
                slabs.append(right)
                end = right.end
            elif left is not None and left.size != size:
                slabs.append(left)
                begin = left.begin
            else:
                return None

    def slab_bytes(self, size: int) -> int:
        """What a slab for slots of `size` has, where there is room for it."""
        return size * max(1, min(_MOST_SLOTS, self._target // size))

    def extents(self) -> Iterator[int]:
        """Lengths of what no slab has."""
        return (end - begin for begin, end in self._extents.items())

    def slabs(self) -> Iterator[Slab]:
        """All of them."""
        return iter(self._starting.values())

    def check_integrity(self) -> list[str]:
        """Slabs and free extents tile the segment; what can be taken from is listed, and nothing else."""
        problems: list[str] = []
        pieces = [(begin, end, True) for begin, end in self._extents.items()]
        pieces += [(slab.begin, slab.end, False) for slab in self._starting.values()]
        at, was_free = self.begin, False
        for begin, end, free in sorted(pieces):
            if begin != at:
                problems.append(
                    f"segment at {self.begin}: {'gap' if begin > at else 'overlap'} between {at} and {begin}"
                )
            if free and was_free:
                problems.append(f"segment at {self.begin}: two free extents meet at {begin}")
            at, was_free = end, free
        if at != self.end:
            problems.append(f"segment at {self.begin}: its pieces end at {at}, not at {self.end}")
        if {end: begin for begin, end in self._extents.items()} != self._extents_ending:
            problems.append(f"segment at {self.begin}: free extents are not found by their ends")
        if {slab.end: slab for slab in self._starting.values()} != self._ending:
            problems.append(f"segment at {self.begin}: slabs are not found by their ends")
        listed = {slab for slabs in self.open.values() for slab in slabs}
        usable = {slab for slab in self._starting.values() if not slab.full and not slab.closed}
        if listed != usable or sum(map(len, self.open.values())) != len(listed):
            problems.append(f"segment at {self.begin}: slabs with room and slabs listed as such differ")
        taken = sum(slab.taken * slab.size for slab in self._starting.values())
        if self.free_bytes != self.end - self.begin - taken:
            problems.append(
                f"segment at {self.begin}: {self.free_bytes} bytes free by the books, {taken} taken"
            )
        for slab in self._starting.values():
            problems += slab.check_integrity()
        return problems

    def _shrink(self, begin: int, to: int) -> None:
        end = self._extents.pop(begin)
        del self._extents_ending[end]
        if to < end:
            self._extents[to] = end
            self._extents_ending[end] = to
