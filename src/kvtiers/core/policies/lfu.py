"""Least frequently used leaf first, with dynamic aging.

Plain LFU keeps for ever what was hot once. Here a key's rank is its count of uses plus the cache's age when it was last used,
and the age is the rank the last search came to (LFU-DA: Arlitt, Cherkasova, Dilley, Friedrich and Jin, "Evaluating content
management techniques for Web proxy caches", 2000). So what is not used any more is overtaken, after about as many turnovers of
the rest as it has uses (15 at most); nothing is ever halved, so no call walks over the keys.

Keys of one rank stand in one bucket, the least recently used first (Shah, Mitra and Matani, "An O(1) algorithm for implementing
the LFU cache eviction scheme", 2010). Their list of buckets is here a dictionary by rank: with aging a use may leap over many.
The age only grows, and by no more than keys were used, so finding the lowest bucket is O(1) amortised as well.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict

from kvtiers.core.policies.base import K
from kvtiers.core.policies.leaf_first import LeafFirst
from kvtiers.core.policies.lines import Entry, Line, Order

_MAX_USES = 15
"""What a count stops at. Bounds how far the lowest bucket may be, and how long what was hot is kept; higher finds no more hits."""


class _FrequencyLine(Line[K]):
    """Keys by rank, within a rank by use."""

    __slots__ = ("_age", "_buckets", "_num_waiting")

    def __init__(self) -> None:
        super().__init__()
        self._buckets: dict[int, OrderedDict[K, Entry[K]]] = {}
        """By rank, none empty, none below the age."""
        self._num_waiting = 0
        self._age = 0

    def enter(self, key: K, entry: Entry[K], turn: int) -> None:
        entry.line = self
        entry.turn = turn
        entry.returned = False
        entry.rank = rank = self._age + entry.uses
        bucket = self._buckets.get(rank)
        if bucket is None:
            self._buckets[rank] = bucket = OrderedDict()
        bucket[key] = entry
        self._num_waiting += 1

    def use(self, key: K, entry: Entry[K], turn: int) -> None:
        if entry.line is self:
            self.park(key, entry)
        if entry.uses < _MAX_USES:
            entry.uses += 1
        self.enter(key, entry, turn)

    def pass_over(self, key: K, entry: Entry[K], turn: int) -> None:
        """To be held is a use. So what is held for long is asked about ever more rarely."""
        self.use(key, entry, turn)

    def park(self, key: K, entry: Entry[K]) -> None:
        entry.returned = False
        bucket = self._buckets.get(entry.rank)
        if bucket is not None and bucket.pop(key, None) is not None:
            self._num_waiting -= 1
            if not bucket:
                del self._buckets[entry.rank]

    def come_back(self, key: K, entry: Entry[K]) -> None:
        if not entry.returned and key not in self._buckets.get(entry.rank, ()):
            entry.returned = True
            heapq.heappush(self.returned, (entry.rank, entry.turn, key, entry))

    def first(self) -> K | None:
        back = self.first_returned() if self.returned else None
        if not self._num_waiting:
            return None if back is None else back[2]
        while (bucket := self._buckets.get(self._age)) is None:
            if back is not None and back[0] <= self._age:
                return back[2]
            self._age += 1
        key = next(iter(bucket))
        return key if back is None or self.order(bucket[key]) < back[:2] else back[2]

    def order(self, entry: Entry[K]) -> Order:
        return (entry.rank, entry.turn)

    def newcomer_rank(self) -> int:
        return self._age + 1

    def num_waiting(self) -> int:
        return self._num_waiting

    def times_listed(self, key: K, entry: Entry[K]) -> int:
        return super().times_listed(key, entry) + int(key in self._buckets.get(entry.rank, ()))


class LeafFirstLFU(LeafFirst[K]):
    """Least frequently used leaf first; of equals the least recently used."""

    def __init__(self) -> None:
        super().__init__(_FrequencyLine())
