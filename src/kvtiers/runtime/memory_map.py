"""Everything that lies in a node's memory, and whose it is: a document for operators."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from heapq import merge
from itertools import chain
from operator import itemgetter
from typing import Any, Final, Protocol, TypeVar

from kvtiers.core.core import Core
from kvtiers.core.memory_map import MemoryMap
from kvtiers.model.tiers import Tier
from kvtiers.runtime.plan import NodePlan

T = TypeVar("T")
FORMAT: Final = 1
"""Raised when a field of the document changes its meaning or goes."""
_SLOTS_AT_ONCE: Final = 256


class Mapped(Protocol):
    """A node, as far as this page needs it."""

    @property
    def plan(self) -> NodePlan:
        """Which stores there are."""
        ...

    def inspect(self, look: Callable[[Core], T]) -> T:
        """Read the core under its mutex."""
        ...

    def stats(self) -> dict[str, Any]:
        """As `CacheNode.stats`."""
        ...

    @property
    def clock(self) -> Callable[[], float]:
        """What the core's times are of."""
        ...


def memory_map(node: Mapped) -> dict[str, Any]:
    """The tiers' and namespaces' sums and every slot in use, as plain values; sizes in bytes, ages in seconds.

    Slots are looked at 256 at a time while the cache goes on, so sums over them may differ by what came and went meanwhile.
    """
    uses = {tier: _walk(node, tier) for tier in (Tier.GPU, Tier.CPU)}
    stats = node.stats()
    return {
        "format": FORMAT,
        "taken_at": time.time(),
        "arena": stats["arena"],
        "tiers": {tier: _tier_sums(stats["tiers"], tier, uses.get(tier)) for tier in stats["tiers"]},
        "namespaces": _namespaces(node, uses),
        "slots": list(chain.from_iterable(uses.values())),
    }


def _walk(node: Mapped, tier: Tier) -> list[dict[str, Any]]:
    """In order of their offsets.

    As dicts of plain values at once: the garbage collector does not track those, while 100,000 tuples more would have it look at
    the whole cache, which stops every thread for 0.2 s.
    """
    found: list[list[dict[str, Any]]] = []
    walk: MemoryMap | None = node.inspect(lambda core: core.memory_map(tier))
    while walk is not None:
        step = node.inspect(lambda _: walk.take(_SLOTS_AT_ONCE, node.clock()))
        if step is None:
            break
        found.append([{"tier": tier.value, **use._asdict()} for use in sorted(step)])
    return list(
        merge(*found, key=itemgetter("offset"))
    )  # one sort of all would keep other threads waiting too


def _tier_sums(tiers: dict[str, Any], tier: str, uses: list[dict[str, Any]] | None) -> dict[str, Any]:
    named = (
        "enabled",
        "capacity_bytes",
        "usage_bytes",
        "usage_percent",
        "entries",
        "leased_chunks",
        "staged_bytes",
    )
    sums = {name: tiers[tier][name] for name in named if name in tiers[tier]}
    if uses is not None:
        sums["slots"] = len(uses)
        sums["slot_bytes_taken"] = sum(use["nbytes"] for use in uses)
        sums["slot_bytes_by_state"] = _summed((use["state"], use["nbytes"]) for use in uses)
    return sums


def _namespaces(node: Mapped, uses: dict[Tier, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for namespace, entry in node.inspect(lambda core: core.namespaces()).items():
        found[namespace.hex()] = entry
    for tier in (Tier.DISK, Tier.REMOTE):
        records = node.inspect(lambda core, tier=tier: core.records(tier)) if tier in node.plan.stores else ()  # type: ignore[misc]
        for name, nbytes in _summed((digest.hex(), size) for digest, size in records).items():
            found[name][f"{tier}_bytes"] = nbytes
    for tier, of_tier in uses.items():
        for name, nbytes in _summed((use["namespace"], use["nbytes"]) for use in of_tier).items():
            found[name][f"{tier}_bytes"] = nbytes
    return dict(found)


def _summed(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = defaultdict(int)
    for name, nbytes in pairs:
        sums[name] += nbytes
    return dict(sums)
