"""What the HTTP side needs of a cache: a contract, so that it can be tested without one and serve whatever holds one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from kvtiers.model.errors import KvtiersError
from kvtiers.model.tiers import Tier


class TierNotOurs(KvtiersError):
    """The tier can't be evicted from here: it is disabled, or an engine owns it. The message says which."""


class Eviction(NamedTuple):
    """What an eviction did."""

    chunks: int
    nbytes: int
    demoting: int
    """Chunks that leave as soon as the next tier has them."""


class Operated(Protocol):
    """A cache as its operator sees it. Any thread may call; nothing here waits for a disk."""

    def stats(self) -> Mapping[str, Any]:
        """As `CacheNode.stats`."""
        ...

    def evict(self, tier: Tier, target_usage: float) -> Eviction:
        """Evict down to a share of the tier's capacity, 0 to 1. Raises TierNotOurs, CacheClosed."""
        ...

    def memory(self) -> Mapping[str, Any]:
        """As `runtime.memory_map`. Takes some milliseconds for each thousand slots. Raises CacheClosed."""
        ...

    def serving(self) -> bool:
        """Whether engines are served: False while it starts and once it is being closed."""
        ...
