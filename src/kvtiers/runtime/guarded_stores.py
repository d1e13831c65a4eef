"""A node's stores, opened, each behind its guard."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from kvtiers.memory.arena import Arena
from kvtiers.model.tiers import Tier
from kvtiers.runtime.latency import Latencies
from kvtiers.runtime.plan import NodePlan, StorePlan
from kvtiers.stores.guard import Guard, Operation, OpOutcome


def open_stores(
    plan: NodePlan, arena: Arena, latencies: Latencies, clock: Callable[[], float], undo: ExitStack
) -> dict[Tier, Guard]:
    """By tier; `undo` closes them. Raises DirectoryInUse, StoreUnavailable."""
    guards: dict[Tier, Guard] = {}
    for tier, store in plan.stores.items():
        shared = ("exists",) if tier in plan.shared else ()
        latencies.expect(tier, "read", "write", "delete", "probe", "stage", *shared)
        guards[tier] = guard = _guarded(tier, store, latencies, clock)
        guard.use_memory(arena.buffer(0, arena.nbytes))
        guard.open()
        undo.callback(guard.close)
    return guards


def _guarded(tier: Tier, store: StorePlan, latencies: Latencies, clock: Callable[[], float]) -> Guard:
    def observe(operation: Operation, seconds: float, _: OpOutcome) -> None:
        latencies.observe(tier, operation, seconds)

    return Guard(store.store, store.guard, clock=clock, on_finished=observe)
