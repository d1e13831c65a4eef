"""Eviction policies, one a file, over what they share (`leaf_first.py`, `lines.py`). `policy_for("lru")` makes one; third
parties register in the entry point group `kvtiers.policies`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from kvtiers.core.policies.base import EvictionPolicy
from kvtiers.core.policies.fifo import LeafFirstFIFO
from kvtiers.core.policies.lfu import LeafFirstLFU
from kvtiers.core.policies.lru import LeafFirstLRU
from kvtiers.model.errors import KvtiersError

_BUILT_IN: dict[str, Callable[[], EvictionPolicy[Any]]] = {
    "lru": LeafFirstLRU,
    "lfu": LeafFirstLFU,
    "fifo": LeafFirstFIFO,
}


class UnknownPolicy(KvtiersError):
    """No eviction policy of that name is installed."""


def policy_for(name: str) -> EvictionPolicy[Any]:
    """A fresh, empty policy. Raises UnknownPolicy with the names that exist."""
    if name in _BUILT_IN:
        return _BUILT_IN[name]()
    registered = {entry.name: entry for entry in entry_points(group="kvtiers.policies")}
    if name in registered:
        policy: EvictionPolicy[Any] = registered[name].load()()
        return policy
    raise UnknownPolicy(
        f"eviction policy {name!r} is not one of {', '.join(sorted({*_BUILT_IN, *registered}))}"
    )
