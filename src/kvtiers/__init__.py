"""kvtiers: a tiered KV cache for LLM serving.

The public names are imported when they are first used (PEP 562), so that an engine's process that wants only one of them
does not pay for the others.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "CacheConfig": "kvtiers.config",
    "CacheNode": "kvtiers.runtime.node",
    "KVLayout": "kvtiers.model.layout",
    "KvtiersError": "kvtiers.model.errors",
    "MissReason": "kvtiers.model.reasons",
    "Namespace": "kvtiers.model.namespace",
    "Refusal": "kvtiers.model.reasons",
    "Tier": "kvtiers.model.tiers",
    "TieredCache": "kvtiers.runtime.cache",
}

if TYPE_CHECKING:
    from kvtiers.config import CacheConfig as CacheConfig
    from kvtiers.model.errors import KvtiersError as KvtiersError
    from kvtiers.model.layout import KVLayout as KVLayout
    from kvtiers.model.namespace import Namespace as Namespace
    from kvtiers.model.reasons import MissReason as MissReason
    from kvtiers.model.reasons import Refusal as Refusal
    from kvtiers.model.tiers import Tier as Tier
    from kvtiers.runtime.cache import TieredCache as TieredCache
    from kvtiers.runtime.node import CacheNode as CacheNode

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 - the names come from the table above


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'kvtiers' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
