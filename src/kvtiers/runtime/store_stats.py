"""A tier of records in `stats()`: what the core counts of it, and what its store and its guard know."""

from __future__ import annotations

from typing import Any

from kvtiers.stores.guard import Guard


def with_its_store(tier: dict[str, Any], guard: Guard) -> None:
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
