"""A cache of this process as the HTTP side sees it, with a GPU tier that is an engine's. Small, real, and with a disk that can fail."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvtiers.http.app import make_app
from kvtiers.http.operated import Eviction, TierNotOurs
from kvtiers.http.server import HttpServer, listen
from kvtiers.model.tiers import Tier
from kvtiers.runtime.cache import TieredCache
from kvtiers.runtime.memory_map import memory_map
from kvtiers.runtime.node import CacheNode
from kvtiers.runtime.plan import plan_node
from kvtiers.testing.cache_oracle import SMALL_LAYOUT
from kvtiers.testing.chaos import faulty_plan, namespace, small_config
from kvtiers.testing.faulty_store import FaultyStore


class OperatedCache:
    """`Operated` over a `TieredCache`."""

    def __init__(self, cache: TieredCache) -> None:
        self.cache = cache
        self.is_serving = True

    def stats(self) -> Mapping[str, Any]:
        """As the cache's."""
        return self.cache.stats()

    def evict(self, tier: Tier, target_usage: float) -> Eviction:
        """From a tier that is the cache's. Raises TierNotOurs."""
        if tier is Tier.GPU:
            raise TierNotOurs("the GPU tier is the engine's own prefix cache: it evicts by itself")
        done = self.cache.evict(tier, target_usage)
        return Eviction(done.chunks, done.nbytes, done.demoting)

    def memory(self) -> Mapping[str, Any]:
        """As the cache's node's."""
        return memory_map(self.cache.node)

    def serving(self) -> bool:
        """As it was told."""
        return self.is_serving


@contextmanager
def served_with_faulty_disk(
    folder: Path, *, health_check_s: float
) -> Iterator[tuple[HttpServer, FaultyStore, TieredCache]]:
    """Its HTTP side on a free port of the loopback, the disk to break, and the cache."""
    config = small_config(folder)
    plan, disk = faulty_plan(replace(plan_node(config), health_check_s=health_check_s))
    node = CacheNode(plan)
    try:
        with (
            TieredCache(config, SMALL_LAYOUT, namespace(), node=node) as cache,
            HttpServer(make_app(OperatedCache(cache)), listen("127.0.0.1", 0, has_token=False)) as server,
        ):
            yield server, disk, cache
    finally:
        disk.heal()
        node.close()
