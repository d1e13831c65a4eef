"""The core's state as plain values, for `stats()` and what is built on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvtiers.core.messages import SessionId
from kvtiers.core.state import State
from kvtiers.core.tickets import Session
from kvtiers.core.tiers import MemoryTier, StoreTier
from kvtiers.model.tiers import Tier


def report(state: State, sessions: Mapping[SessionId, Session]) -> dict[str, Any]:
    """Usage and entries per tier, what is under way, and the counters."""
    tiers: dict[str, Any] = {}
    for memory in (state.gpu, state.cpu):
        if memory is not None:
            tiers[memory.tier] = _memory(state, memory)
    for store in state.stores.values():
        tiers[store.tier] = _store(store)
    counted = state.counters.snapshot()
    for name, counters in counted.pop("tiers").items():
        if name in tiers:
            tiers[name].update(counters)
        elif any(counters.values()):
            tiers[name] = {"enabled": False, **counters}
    return {
        "tiers": tiers,
        **counted,
        "namespaces": sum(1 for _ in state.index.spaces()),
        "chunks": sum(len(space.chunks) for space in state.index.spaces()) - state.index.num_ghosts,
        "ghosts": state.index.num_ghosts,
        "operations": len(state.pending),
        "sessions": len(sessions),
        "open_tickets": sum(len(session.tickets) for session in sessions.values()),
    }


def _memory(state: State, tier: MemoryTier) -> dict[str, Any]:
    settings = tier.settings
    return {
        "enabled": tier.tier is not Tier.CPU or tier.keeps,
        "capacity_bytes": settings.nominal,
        "slot_bytes": settings.capacity,
        "ceiling_bytes": settings.ceiling,
        "low_watermark_bytes": settings.low,
        "usage_bytes": tier.used,
        "usage_percent": 100.0 * tier.used / settings.nominal if settings.nominal else 0.0,
        "staging_bytes": settings.staging,
        "staged_bytes": tier.staged,
        "write_leased_bytes": tier.write_leased,
        "offloadable_bytes": tier.policy.idle_bytes(state.now),
        "entries": len(tier.policy),
        "leased_chunks": tier.leased,
    }


def _store(store: StoreTier) -> dict[str, Any]:
    capacity = store.settings.capacity
    held = store.used + store.foreign
    return {
        "enabled": True,
        "up": store.up,
        "capacity_bytes": capacity,
        "ceiling_bytes": store.settings.ceiling,
        "low_watermark_bytes": store.settings.low,
        "usage_bytes": held,
        "usage_percent": 100.0 * held / capacity if capacity else 0.0,
        "foreign_bytes": store.foreign,
        "deleting_bytes": store.leaving,
        "entries": len(store.policy),
        "writes_in_flight": store.writes,
        "backlog": len(store.backlog) + len(store.resting),
    }
