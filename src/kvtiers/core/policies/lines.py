"""A line of keys: in which order those of one standing go. What policies differ in is their line, the rest is `leaf_first.py`.

Lines are never searched. A key that comes to the front and still has a child is parked: it stands in the line and is not looked
at. When its last child goes it is a leaf that stands further in front than all who wait, and a heap brings it back in its old order.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import Generic, TypeAlias

from kvtiers.core.policies.base import K

Order: TypeAlias = tuple[int, int]
"""Rank and turn; the lower goes first."""


class Entry(Generic[K]):
    """What is known of a key."""

    __slots__ = ("line", "nbytes", "parent", "rank", "returned", "touched", "turn", "uses")

    def __init__(self, parent: K | None, nbytes: int, touched: float, line: Line[K]) -> None:
        self.parent = parent
        self.nbytes = nbytes
        self.touched = touched
        self.line = line
        self.turn = 0
        """When it took its place in the line: grows over all lines of a policy."""
        self.rank = 0
        """For lines that rank keys: a lower one goes first, whatever its turn."""
        self.uses = 1
        """For lines that count them."""
        self.returned = False
        """Came back from parking and stands in the line's heap."""


class Line(Generic[K]):
    """Keys in order of arrival; parked ones are in neither collection."""

    __slots__ = ("returned", "waiting")

    def __init__(self) -> None:
        self.waiting: OrderedDict[K, Entry[K]] = OrderedDict()
        self.returned: list[tuple[int, int, K, Entry[K]]] = []
        """Heap of (rank, turn, key, entry); an entry that was used, removed or parked since is stale."""

    def enter(self, key: K, entry: Entry[K], turn: int) -> None:
        """The key, new here or parked here, waits behind all others of its rank."""
        entry.line = self
        entry.turn = turn
        entry.returned = False
        self.waiting[key] = entry

    def use(self, key: K, entry: Entry[K], turn: int) -> None:
        """The key was used: it enters if it is new here, and otherwise keeps its place."""
        if entry.line is not self:
            self.enter(key, entry, turn)

    def pass_over(self, key: K, entry: Entry[K], turn: int) -> None:
        """The key, parked by the search that just ended, may not go: it is in use right now, so it waits anew."""
        self.enter(key, entry, turn)

    def park(self, key: K, entry: Entry[K]) -> None:
        """Don't look at it until it comes back. Also the way out of the line. Whatever is parked already is left so."""
        self.waiting.pop(key, None)
        entry.returned = False

    def come_back(self, key: K, entry: Entry[K]) -> None:
        """Its last child has gone: if it was parked, look at it again, in its old order."""
        if not entry.returned and key not in self.waiting:
            entry.returned = True
            heapq.heappush(self.returned, (0, entry.turn, key, entry))

    def first(self) -> K | None:
        """The key that stands in front, of those that are not parked."""
        waiting = self.waiting
        first = next(iter(waiting), None)
        if self.returned:
            back = self.first_returned()
            if back is not None and (first is None or back[1] < waiting[first].turn):
                return back[2]
        return first

    def first_returned(self) -> tuple[int, int, K, Entry[K]] | None:
        """The same, of those that came back from parking."""
        returned = self.returned
        while returned:
            item = returned[0]
            entry = item[3]
            if entry.returned and entry.turn == item[1] and entry.line is self:
                return item
            heapq.heappop(returned)  # stale
        return None

    def order(self, entry: Entry[K]) -> Order:
        """Where an entry stands. Only for entries of one policy; of another line: where it would stand here."""
        return (0, entry.turn)

    def newcomer_rank(self) -> int:
        """The rank of a key that would enter now."""
        return 0

    def times_listed(self, key: K, entry: Entry[K]) -> int:
        """In how many ways a search would come to the key; 0: it is parked. O(n)."""
        returned = entry.returned and any(item[3] is entry for item in self.returned)
        return int(key in self.waiting) + int(returned)

    def num_waiting(self) -> int:
        """Keys that wait and did not come back from parking."""
        return len(self.waiting)
