"""Leaf first: what every policy of ours shares. In which order leaves go is its line's affair (`lines.py`).

A prompt's chunks are a chain: without its head the rest of it can't be found. So the victim is always a *leaf*, a key without a
child in the tier, and a chain dies from its end (docs/decisions/eviction.md has the figures).

A search moves each key at most once for each time it was used or lost its last child: O(1) amortised, O(log n) for what comes
back from parking. What may not go (leased) waits anew once the search has ended, so it is not asked about for ever.

Keys stand in one of four lines. The established ones stand in the policy's own. Chunks promoted from a slower tier are on
probation until they are touched again (the idea of SLRU, Karedla et al. 1994): while they hold more than their share they give
the victims, so one large promotion can't flush what is hot. Keys that were not used for the idle time go before both, and
those that can't be reached any more before everything.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from kvtiers.core.policies.base import EvictionPolicy, K, Standing
from kvtiers.core.policies.lines import Entry, Line

_MAX_STEPS = 4096
"""Keys looked at most in one search: a bound on the time under the mutex. The next search goes on from there."""


class LeafFirst(EvictionPolicy[K]):
    """The first leaf of a line."""

    def __init__(self, established: Line[K]) -> None:
        self._entries: dict[K, Entry[K]] = {}
        self._children: dict[K, int] = {}
        """How many keys here have this parent; the parent itself may be elsewhere."""
        self._established = established
        self._probation: Line[K] = Line()
        self._idle: Line[K] = Line()
        self._unreachable: Line[K] = Line()
        self._probation_bytes = 0
        self._probation_limit = 0
        self._idle_after_s: float | None = None
        self._by_use: OrderedDict[K, Entry[K]] = OrderedDict()
        """If there is an idle time: what is established or on probation, least recently used first."""
        self._turn = 0

    def set_limits(self, probation_bytes: int, idle_after_s: float | None) -> None:
        self._probation_limit = probation_bytes
        self._idle_after_s = idle_after_s
        self._by_use.clear()
        if idle_after_s is not None:
            ageing = [item for item in self._entries.items() if self._ages(item[1])]
            self._by_use.update(sorted(ageing, key=lambda item: item[1].touched))

    def insert(self, key: K, parent: K | None, nbytes: int, now: float, standing: Standing) -> None:
        if key in self._entries:
            self.remove(key)
        line = self._established
        self._turn += 1
        if standing is Standing.PROBATION:
            entry = Entry(parent, nbytes, now, self._probation)
            entry.rank = line.newcomer_rank()
            line = self._probation
            self._probation_bytes += nbytes
        else:
            entry = Entry(parent, nbytes, now, line)
        line.enter(key, entry, self._turn)
        self._entries[key] = entry
        if self._idle_after_s is not None:
            self._by_use[key] = entry
        if parent is not None:
            self._children[parent] = self._children.get(parent, 0) + 1

    def touch(self, key: K, now: float) -> None:
        entry = self._entries.get(key)
        if entry is None:
            return
        entry.touched = now
        self._turn += 1
        if entry.line is not self._established:
            self._leave(key, entry)
        self._established.use(key, entry, self._turn)
        if self._idle_after_s is not None:
            self._by_use[key] = entry
            self._by_use.move_to_end(key)

    def used_at(self, key: K) -> float | None:
        entry = self._entries.get(key)
        return None if entry is None or entry.touched == float("-inf") else entry.touched

    def resize(self, key: K, nbytes: int) -> None:
        entry = self._entries.get(key)
        if entry is None:
            return
        if entry.line is self._probation:
            self._probation_bytes += nbytes - entry.nbytes
        entry.nbytes = nbytes

    def remove(self, key: K) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        self._leave(key, entry)
        parent = entry.parent
        if parent is None:
            return
        left = self._children[parent] - 1
        if left:
            self._children[parent] = left
            return
        del self._children[parent]
        above = self._entries.get(parent)
        if above is not None:
            above.line.come_back(parent, above)

    def expedite(self, key: K) -> None:
        entry = self._entries.get(key)
        if entry is not None and entry.line is not self._unreachable:
            entry.touched = float("-inf")
            self._move(key, entry, self._unreachable)

    def victim(self, now: float, may_go: Callable[[K], bool]) -> K | None:
        if self._idle_after_s is not None:
            self._gather_idle(now - self._idle_after_s)
        for line in (self._unreachable, self._idle):
            if line.waiting or line.returned:
                key = self._first_leaf(line, may_go)
                if key is not None:
                    return key
        established = self._first_leaf(self._established, may_go)
        if not self._probation_bytes:
            return established
        on_probation = self._first_leaf(self._probation, may_go)
        if established is None or on_probation is None:
            return on_probation if established is None else established
        if self._probation_bytes > self._probation_limit:
            return on_probation
        order = self._established.order
        older, newer = self._entries[established], self._entries[on_probation]
        return established if order(older) < order(newer) else on_probation

    def coldest_first(self) -> Iterator[K]:
        entries = list(self._entries.items())
        lines = (self._unreachable, self._idle, self._probation, self._established)
        place = {line: number for number, line in enumerate(lines)}

        def walk() -> Iterator[K]:
            entries.sort(key=lambda item: (place[item[1].line], item[1].line.order(item[1])))
            yield from (key for key, _ in entries)

        return walk()

    def idle_bytes(self, now: float) -> int:
        if self._idle_after_s is None:
            return 0
        before = now - self._idle_after_s
        return sum(entry.nbytes for entry in self._entries.values() if entry.touched <= before)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def check_integrity(self) -> list[str]:
        name, problems = type(self).__name__, list[str]()
        children: dict[K, int] = {}
        for entry in self._entries.values():
            if entry.parent is not None:
                children[entry.parent] = children.get(entry.parent, 0) + 1
        if children != self._children:
            problems.append(f"{name}: the count of children differs from the entries")
        on_probation = sum(e.nbytes for e in self._entries.values() if e.line is self._probation)
        if self._probation_bytes != on_probation:
            problems.append(f"{name}: the bytes on probation differ from the entries")
        for key, entry in self._entries.items():
            listed = entry.line.times_listed(key, entry)
            if listed > 1 or (not listed and key not in self._children):
                problems.append(f"{name}: {key!r} is a leaf that is never looked at, or is looked at twice")
        lines = (self._established, self._probation, self._idle, self._unreachable)
        if sum(line.num_waiting() for line in lines) > len(self._entries):
            problems.append(f"{name}: a removed key is still waiting")
        ageing = {key for key, entry in self._entries.items() if self._ages(entry)}
        if set(self._by_use) != (set() if self._idle_after_s is None else ageing):
            problems.append(f"{name}: the order of use that finds idle keys differs from the entries")
        return problems

    def _ages(self, entry: Entry[K]) -> bool:
        return entry.line is self._established or entry.line is self._probation

    def _leave(self, key: K, entry: Entry[K]) -> None:
        entry.line.park(key, entry)
        if entry.line is self._probation:
            self._probation_bytes -= entry.nbytes
        if self._idle_after_s is not None:
            self._by_use.pop(key, None)

    def _move(self, key: K, entry: Entry[K], line: Line[K]) -> None:
        self._leave(key, entry)
        self._turn += 1
        line.enter(key, entry, self._turn)

    def _gather_idle(self, before: float) -> None:
        """Move what was not used since then into the line of the idle ones; each key once after its last use."""
        by_use = self._by_use
        for _ in range(_MAX_STEPS):
            item = next(iter(by_use.items()), None)
            if item is None or item[1].touched > before:
                return
            self._move(*item, self._idle)

    def _first_leaf(self, line: Line[K], may_go: Callable[[K], bool]) -> K | None:
        in_use: list[K] = []
        found = None
        for _ in range(_MAX_STEPS):
            key = line.first()
            if key is None:
                break
            if key not in self._children:
                if may_go(key):
                    found = key
                    break
                in_use.append(key)
            line.park(key, self._entries[key])
        for key in in_use:
            self._turn += 1
            line.pass_over(key, self._entries[key], self._turn)
        return found
