"""What `stats()` says: what the core counts, and what arena, pools, stores and guards know of themselves. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvtiers.memory.arena import Arena
from kvtiers.model.tiers import Tier
from kvtiers.runtime.latency import Latencies
from kvtiers.runtime.offload import OffloadEngine
from kvtiers.stores.guard import Guard

if TYPE_CHECKING:
    from kvtiers.memory.cuda import DevicePool


def node_stats(
    stats: dict[str, Any],
    *,
    engine: OffloadEngine,
    latencies: Latencies,
    arena: Arena,
    pinned_bytes: int,
    device_pool: DevicePool | None,
    guards: Mapping[Tier, Guard],
) -> dict[str, Any]:
    """`stats`, the core's, with everything else added."""
    stats["async"] = engine.health()
    stats["latency"] = latencies.snapshot()
    stats["arena"] = {
        "nbytes": arena.nbytes,
        "page_bytes": arena.report.page_bytes,
        "locked": arena.report.locked,
        "pinned_bytes": pinned_bytes,
    }
    if Tier.GPU in stats["tiers"] and device_pool is not None:
        stats["tiers"][Tier.GPU]["simulated"] = device_pool.simulated
    for tier, guard in guards.items():
        _with_its_store(stats["tiers"][tier], guard)
    return stats


def _with_its_store(tier: dict[str, Any], guard: Guard) -> None:
    """Add `breaker`, `health` and `store` to what the core said of a tier, and tell overhead from what is foreign there."""
    store = dict(guard.stats())
    # to the core everything that is no record of its own is foreign; a store knows what of that is its own overhead
    others = tier["foreign_bytes"]
    tier["foreign_bytes"] = min(others, store.get("foreign_bytes", others))
    tier["overhead_bytes"] = others - tier["foreign_bytes"]
    tier["breaker"] = str(guard.state)
    health = guard.health()
    tier["health"] = health._replace(up=health.up and tier["up"])._asdict()
    tier["store"] = store
