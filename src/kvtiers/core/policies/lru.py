"""Least recently used leaf first: the default. A chain is touched from last to first, so it dies from its end."""

from __future__ import annotations

from kvtiers.core.policies.base import K
from kvtiers.core.policies.leaf_first import LeafFirst
from kvtiers.core.policies.lines import Entry, Line


class _RecencyLine(Line[K]):
    """Keys in order of use."""

    __slots__ = ()

    def use(self, key: K, entry: Entry[K], turn: int) -> None:
        """It waits behind all others."""
        entry.line = self
        entry.turn = turn
        entry.returned = False
        self.waiting[key] = entry
        self.waiting.move_to_end(key)


class LeafFirstLRU(LeafFirst[K]):
    """Least recently used leaf first."""

    def __init__(self) -> None:
        super().__init__(_RecencyLine())
