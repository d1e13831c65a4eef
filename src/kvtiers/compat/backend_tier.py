"""Makes a `StorageBackend` the disk or remote tier of a cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from kvtiers.compat.backend import StorageBackend
from kvtiers.compat.backend_store import BackendStore
from kvtiers.core.settings import StoreSettings
from kvtiers.model.errors import ConfigError, UnknownTier
from kvtiers.model.tiers import Tier
from kvtiers.runtime.plan import NodePlan, StorePlan
from kvtiers.stores.guard import GuardPolicy

_CEILING: Final = 0.95
_LOW: Final = 0.90


def with_backend_tier(
    plan: NodePlan,
    backend: StorageBackend,
    capacity_bytes: int,
    *,
    tier: Tier | str = Tier.DISK,
    workers: int = 4,
    max_queued: int = 1000,
    timeout_s: float = 10.0,
) -> NodePlan:
    """The plan with `backend` as its disk (or remote) tier, filled up to 95 % of `capacity_bytes` and behind a guard.

        node = CacheNode(with_backend_tier(plan_node(config), MyBackend(), 10 * 2**30))
        cache = TieredCache(config, layout, namespace, node=node)

    Records of earlier runs are not listed, so the cache counts and finds only what it stored itself.
    """
    tier = Tier(tier)
    if tier not in (Tier.DISK, Tier.REMOTE):
        raise UnknownTier(f"a backend can't be the {tier} tier: it can be 'disk' or 'remote'")
    if capacity_bytes < 1:
        raise ConfigError(
            [f"capacity_bytes must be above 0, got {capacity_bytes}"], source="with_backend_tier"
        )
    settings = StoreSettings(
        capacity=capacity_bytes,
        ceiling=int(capacity_bytes * _CEILING),
        low=int(capacity_bytes * _LOW),
        max_queued=max_queued,
    )
    core = replace(plan.core, disk=settings) if tier is Tier.DISK else replace(plan.core, remote=settings)
    store = StorePlan(
        store=BackendStore(backend, name=str(tier), timeout_s=timeout_s),
        guard=GuardPolicy(read_deadline_s=timeout_s, write_deadline_s=timeout_s),
        workers=workers,
        max_queued=max_queued,
    )
    return replace(plan, core=core, stores={**plan.stores, tier: store})
