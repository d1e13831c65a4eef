"""Leaf-first LRU with probation.

Plain LRU over prefix chains would evict the head of a chain and strand its tail; touching a chain from last to first and
evicting leaves only makes it die from its end (up to 10 points of hit rate on agent traces, docs/decisions/eviction.md).
A parent is touched after its children, so the oldest key is nearly always a leaf. Where it is not (a child came later
than the last touch of its parent) or may not go (leased), it is used right now and goes to the recent end: every key is
moved at most once per round, so a victim is found in O(1) amortised.

Chunks promoted from a slower tier stand in a second queue, on probation, until they are touched again (the idea of SLRU,
Karedla et al. 1994): while that queue holds more than its share, it gives the victims, so one large disk hit can't flush
what is hot.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import TypeVar

from kvtiers.core.policies.base import EvictionPolicy, Standing

K = TypeVar("K", bound=Hashable)

_MAX_STEPS = 4096
"""Keys looked at most in one search for a victim: a bound on the time under the mutex."""


class _Entry:
    __slots__ = ("nbytes", "parent", "probation", "touched")

    def __init__(self, parent: object | None, nbytes: int, touched: float, probation: bool) -> None:
        self.parent = parent
        self.nbytes = nbytes
        self.touched = touched
        self.probation = probation


class LeafFirstLRU(EvictionPolicy[K]):
    """Least recently used leaf first."""

    def __init__(self) -> None:
        self._established: OrderedDict[K, _Entry] = OrderedDict()
        self._probation: OrderedDict[K, _Entry] = OrderedDict()
        self._children: dict[object, int] = {}
        self._probation_bytes = 0
        self._probation_limit = 0
        self._idle_after_s: float | None = None

    def set_limits(self, probation_bytes: int, idle_after_s: float | None) -> None:
        self._probation_limit = probation_bytes
        self._idle_after_s = idle_after_s

    def insert(self, key: K, parent: K | None, nbytes: int, now: float, standing: Standing) -> None:
        on_probation = standing is Standing.PROBATION
        entry = _Entry(parent, nbytes, now, on_probation)
        if on_probation:
            self._probation[key] = entry
            self._probation_bytes += nbytes
        else:
            self._established[key] = entry
        if parent is not None:
            self._children[parent] = self._children.get(parent, 0) + 1

    def touch(self, key: K, now: float) -> None:
        entry = self._established.get(key)
        if entry is not None:
            entry.touched = now
            self._established.move_to_end(key)
            return
        entry = self._probation.pop(key, None)
        if entry is not None:
            self._establish(key, entry)
            entry.touched = now

    def resize(self, key: K, nbytes: int) -> None:
        entry = self._established.get(key) or self._probation.get(key)
        if entry is None:
            return
        if entry.probation:
            self._probation_bytes += nbytes - entry.nbytes
        entry.nbytes = nbytes

    def remove(self, key: K) -> None:
        entry = self._established.pop(key, None)
        if entry is None:
            entry = self._probation.pop(key, None)
            if entry is None:
                return
            self._probation_bytes -= entry.nbytes
        if entry.parent is not None:
            left = self._children[entry.parent] - 1
            if left:
                self._children[entry.parent] = left
            else:
                del self._children[entry.parent]

    def expedite(self, key: K) -> None:
        for queue in (self._established, self._probation):
            entry = queue.get(key)
            if entry is not None:
                entry.touched = float("-inf")
                queue.move_to_end(key, last=False)

    def victim(self, now: float, may_go: Callable[[K], bool]) -> K | None:
        for queue in self._search_order(now):
            key = self._first_leaf(queue, may_go)
            if key is not None:
                return key
        return None

    def coldest_first(self) -> Iterator[K]:
        yield from list(self._probation)
        yield from list(self._established)

    def idle_bytes(self, now: float) -> int:
        if self._idle_after_s is None:
            return 0
        entries = (*self._established.values(), *self._probation.values())
        return sum(entry.nbytes for entry in entries if self._is_idle(entry, now))

    def __len__(self) -> int:
        return len(self._established) + len(self._probation)

    def __contains__(self, key: object) -> bool:
        return key in self._established or key in self._probation

    def check_integrity(self) -> list[str]:
        problems: list[str] = []
        children: dict[object, int] = {}
        for entry in [*self._established.values(), *self._probation.values()]:
            if entry.parent is not None:
                children[entry.parent] = children.get(entry.parent, 0) + 1
        if children != self._children:
            problems.append("lru: the count of children differs from the entries")
        if self._probation_bytes != sum(entry.nbytes for entry in self._probation.values()):
            problems.append("lru: the bytes on probation differ from the entries")
        if self._established.keys() & self._probation.keys():
            problems.append("lru: a key is both established and on probation")
        return problems

    def _search_order(self, now: float) -> tuple[OrderedDict[K, _Entry], OrderedDict[K, _Entry]]:
        established_first = (self._established, self._probation)
        probation_first = (self._probation, self._established)
        if not self._established or not self._probation:
            return established_first
        oldest = next(iter(self._established.values()))
        oldest_on_probation = next(iter(self._probation.values()))
        if self._is_idle(oldest, now):
            return established_first
        if self._probation_bytes > self._probation_limit or self._is_idle(oldest_on_probation, now):
            return probation_first
        return probation_first if oldest_on_probation.touched <= oldest.touched else established_first

    def _first_leaf(self, queue: OrderedDict[K, _Entry], may_go: Callable[[K], bool]) -> K | None:
        for _ in range(min(len(queue), _MAX_STEPS)):
            key = next(iter(queue))
            if key not in self._children and may_go(key):
                return key
            entry = queue[key]
            if entry.probation and key in self._children:
                del queue[key]  # a child was stored on top of it: it has proved itself
                self._establish(key, entry)
            else:
                queue.move_to_end(key)
        return None

    def _establish(self, key: K, entry: _Entry) -> None:
        if entry.probation:
            entry.probation = False
            self._probation_bytes -= entry.nbytes
        self._established[key] = entry

    def _is_idle(self, entry: _Entry, now: float) -> bool:
        return self._idle_after_s is not None and now - entry.touched >= self._idle_after_s
