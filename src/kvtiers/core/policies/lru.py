"""Leaf-first LRU with probation.

Plain LRU over prefix chains evicts the head of a chain and strands its tail. Here the victim is the least recently used
*leaf*: a key without a child in the tier. A chain is touched from last to first, so it dies from its end
(docs/decisions/eviction.md has the figures).

Keys wait in order of use. One that comes to the front and still has a child is parked; when its last child goes, it is a
leaf older than everything that waits, and a heap brings it back in its old order. One that may not go (leased) is in use
right now and becomes the most recent. So a search moves each key at most once for each time it was used or lost its last
child: O(1) amortised, O(log n) for what comes back from parking.

Chunks promoted from a slower tier stand in a queue of their own, on probation, until they are touched again (the idea of
SLRU, Karedla et al. 1994): while that queue holds more than its share, it gives the victims, so one large promotion can't
flush what is hot. Keys that can't be reached any more stand in a third queue, which goes before both.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

from kvtiers.core.policies.base import EvictionPolicy, Standing

K = TypeVar("K", bound=Hashable)

_MAX_STEPS = 4096
"""Keys looked at most in one search: a bound on the time under the mutex. The next search goes on from there."""


class _Entry(Generic[K]):
    __slots__ = ("nbytes", "order", "parent", "queue", "returned", "touched")

    def __init__(self, parent: K | None, nbytes: int, touched: float, order: int, queue: _Queue[K]) -> None:
        self.parent = parent
        self.nbytes = nbytes
        self.touched = touched
        self.order = order
        """Grows with every use."""
        self.queue = queue
        self.returned = False
        """Came back from parking and stands in the queue's heap."""


class _Queue(Generic[K]):
    """Keys in order of use; parked ones are in neither collection."""

    __slots__ = ("returned", "waiting")

    def __init__(self) -> None:
        self.waiting: OrderedDict[K, _Entry[K]] = OrderedDict()
        self.returned: list[tuple[int, K]] = []
        """Heap of (order, key); an entry whose key was used, removed or parked since is stale."""


class LeafFirstLRU(EvictionPolicy[K]):
    """Least recently used leaf first."""

    def __init__(self) -> None:
        self._entries: dict[K, _Entry[K]] = {}
        self._children: dict[K, int] = {}
        """How many keys here have this parent; the parent itself may be elsewhere."""
        self._established: _Queue[K] = _Queue()
        self._probation: _Queue[K] = _Queue()
        self._unreachable: _Queue[K] = _Queue()
        self._probation_bytes = 0
        self._probation_limit = 0
        self._idle_after_s: float | None = None
        self._last_order = 0

    def set_limits(self, probation_bytes: int, idle_after_s: float | None) -> None:
        self._probation_limit = probation_bytes
        self._idle_after_s = idle_after_s

    def insert(self, key: K, parent: K | None, nbytes: int, now: float, standing: Standing) -> None:
        if key in self._entries:
            self.remove(key)
        queue = self._established
        if standing is Standing.PROBATION:
            queue = self._probation
            self._probation_bytes += nbytes
        self._last_order += 1
        entry = _Entry(parent, nbytes, now, self._last_order, queue)
        self._entries[key] = entry
        queue.waiting[key] = entry
        if parent is not None:
            self._children[parent] = self._children.get(parent, 0) + 1

    def touch(self, key: K, now: float) -> None:
        entry = self._entries.get(key)
        if entry is None:
            return
        entry.touched = now
        self._to_end(key, entry, self._established)

    def resize(self, key: K, nbytes: int) -> None:
        entry = self._entries.get(key)
        if entry is None:
            return
        if entry.queue is self._probation:
            self._probation_bytes += nbytes - entry.nbytes
        entry.nbytes = nbytes

    def remove(self, key: K) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        entry.queue.waiting.pop(key, None)
        if entry.queue is self._probation:
            self._probation_bytes -= entry.nbytes
        parent = entry.parent
        if parent is None:
            return
        left = self._children[parent] - 1
        if left:
            self._children[parent] = left
            return
        del self._children[parent]
        above = self._entries.get(parent)
        if above is not None and not above.returned and parent not in above.queue.waiting:
            above.returned = True
            heapq.heappush(above.queue.returned, (above.order, parent))

    def expedite(self, key: K) -> None:
        entry = self._entries.get(key)
        if entry is not None and entry.queue is not self._unreachable:
            entry.touched = float("-inf")
            self._to_end(key, entry, self._unreachable)

    def victim(self, now: float, may_go: Callable[[K], bool]) -> K | None:
        unreachable = self._unreachable
        if unreachable.waiting or unreachable.returned:
            key = self._coldest_leaf(unreachable, may_go)
            if key is not None:
                return key
        established = self._coldest_leaf(self._established, may_go)
        if established is not None and not self._probation_bytes:
            return established
        on_probation = self._coldest_leaf(self._probation, may_go)
        if established is None or on_probation is None:
            return on_probation if established is None else established
        older, newer = self._entries[established], self._entries[on_probation]
        idle, idle_on_probation = self._is_idle(older, now), self._is_idle(newer, now)
        if idle is not idle_on_probation:
            return established if idle else on_probation
        if self._probation_bytes > self._probation_limit:
            return on_probation
        return established if older.order < newer.order else on_probation

    def coldest_first(self) -> Iterator[K]:
        for queue in (self._unreachable, self._probation, self._established):
            entries = [(entry.order, key) for key, entry in self._entries.items() if entry.queue is queue]
            yield from (key for _, key in sorted(entries, key=lambda pair: pair[0]))

    def idle_bytes(self, now: float) -> int:
        if self._idle_after_s is None:
            return 0
        return sum(entry.nbytes for entry in self._entries.values() if self._is_idle(entry, now))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def check_integrity(self) -> list[str]:
        problems: list[str] = []
        children: dict[K, int] = {}
        for entry in self._entries.values():
            if entry.parent is not None:
                children[entry.parent] = children.get(entry.parent, 0) + 1
        if children != self._children:
            problems.append("lru: the count of children differs from the entries")
        on_probation = sum(e.nbytes for e in self._entries.values() if e.queue is self._probation)
        if self._probation_bytes != on_probation:
            problems.append("lru: the bytes on probation differ from the entries")
        for key, entry in self._entries.items():
            waits = key in entry.queue.waiting
            returned = entry.returned and (entry.order, key) in entry.queue.returned
            if waits == returned and (waits or key not in self._children):
                problems.append(f"lru: {key!r} is a leaf that is never looked at, or is looked at twice")
        waiting = sum(len(q.waiting) for q in (self._established, self._probation, self._unreachable))
        if waiting > len(self._entries):
            problems.append("lru: a removed key is still waiting")
        return problems

    def _to_end(self, key: K, entry: _Entry[K], queue: _Queue[K]) -> None:
        if entry.queue is not queue:
            entry.queue.waiting.pop(key, None)
            if entry.queue is self._probation:
                self._probation_bytes -= entry.nbytes
            entry.queue = queue
            queue.waiting[key] = entry
        elif key in queue.waiting:
            queue.waiting.move_to_end(key)
        else:
            queue.waiting[key] = entry
        entry.returned = False
        self._last_order += 1
        entry.order = self._last_order

    def _coldest_leaf(self, queue: _Queue[K], may_go: Callable[[K], bool]) -> K | None:
        waiting, children = queue.waiting, self._children
        denials = len(waiting) + len(queue.returned)
        for _ in range(_MAX_STEPS):
            key = self._returned_first(queue) if queue.returned else next(iter(waiting), None)
            if key is None:
                return None
            if key in children:  # parked until its last child goes
                waiting.pop(key, None)
                self._entries[key].returned = False
            elif may_go(key):
                return key
            else:
                self._to_end(key, self._entries[key], queue)
                denials -= 1
                if denials <= 0:
                    return None
        return None

    def _returned_first(self, queue: _Queue[K]) -> K | None:
        """The key used longest ago among those that wait and those that came back from parking."""
        waiting, returned = queue.waiting, queue.returned
        first = next(iter(waiting), None)
        while returned:
            order, key = returned[0]
            entry = self._entries.get(key)
            if entry is not None and entry.returned and entry.order == order and entry.queue is queue:
                return key if first is None or order < waiting[first].order else first
            heapq.heappop(returned)  # stale
        return first

    def _is_idle(self, entry: _Entry[K], now: float) -> bool:
        return self._idle_after_s is not None and now - entry.touched >= self._idle_after_s
