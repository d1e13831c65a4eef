"""The audit: does everything the core believes add up? Tests run it after every step; operators on demand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from kvtiers.core.index import MemoryCopy, MemoryState, StoredState
from kvtiers.core.loading import Loading
from kvtiers.core.messages import SessionId
from kvtiers.core.state import (
    CopyPending,
    DeletePending,
    ReadPending,
    SealPending,
    State,
    WritePending,
)
from kvtiers.core.tickets import LoadTicket, Session
from kvtiers.core.tiers import MemoryTier, StoreTier


def check_integrity(state: State, sessions: Mapping[SessionId, Session], loading: Loading) -> list[str]:
    """Index, slots, leases, budgets and policies against each other; returns what is wrong. O(n)."""
    leases, copies = _leases(state, sessions)
    problems = [*state.index.check_integrity(), *loading.check_integrity()]
    for tier in (state.cpu, state.gpu):
        if tier is not None:
            problems += _check_memory(state, tier, leases, copies)
    for store in state.stores.values():
        problems += _check_store(state, store)
    return problems


def _leases(state: State, sessions: Mapping[SessionId, Session]) -> tuple[Counter[int], dict[int, MemoryCopy]]:
    """How many leases each copy should have, by id, and every copy anybody knows of."""
    leases: Counter[int] = Counter()
    copies: dict[int, MemoryCopy] = {}

    def hold(copy: MemoryCopy) -> None:
        leases[id(copy)] += 1
        copies[id(copy)] = copy

    for pending in state.pending.values():
        if isinstance(pending, SealPending | ReadPending | WritePending):
            hold(pending.copy)
        elif isinstance(pending, CopyPending):
            hold(pending.source)
            hold(pending.target)
    for session in sessions.values():
        for copy in session.quarantine:
            hold(copy)
        for ticket in session.tickets.values():
            held = ticket.copies if isinstance(ticket, LoadTicket) else list(ticket.copies.values())
            for copy in held:
                if copy is not None:
                    hold(copy)
    for space in state.index.spaces():
        for chunk in space.chunks.values():
            for attached in (chunk.gpu, chunk.cpu):
                if attached is not None:
                    copies[id(attached)] = attached
    return leases, copies


def _check_memory(
    state: State, tier: MemoryTier, leases: Counter[int], copies: Mapping[int, MemoryCopy]
) -> list[str]:
    problems = [*tier.slots.check_integrity(), *tier.policy.check_integrity()]
    name = tier.tier
    mine = [copy for copy in copies.values() if copy.tier is name]
    used = sum(copy.nbytes for copy in mine if not copy.staged)
    staged = sum(copy.nbytes for copy in mine if copy.staged)
    if (used, staged) != (tier.used, tier.staged):
        problems.append(f"{name}: books say {tier.used} used and {tier.staged} staged, copies say {used} and {staged}")
    if tier.used > tier.settings.ceiling or tier.staged > tier.settings.staging:
        problems.append(f"{name}: over its bounds: used {tier.used}, staged {tier.staged}, {tier.settings}")
    slots = sorted(offset for copy in mine for offset in copy.slots)
    if slots != sorted(tier.slots.taken):
        problems.append(f"{name}: slots taken differ from the slots of copies")
    leaving = sum(copy.nbytes for copy in mine if copy.leaving)
    if leaving != tier.leaving:
        problems.append(f"{name}: books say {tier.leaving} bytes are leaving, copies say {leaving}")
    for copy in mine:
        key = copy.chunk.key.hex()[:12]
        if copy.leases != leases[id(copy)]:
            problems.append(f"{name}: chunk {key} has {copy.leases} leases, {leases[id(copy)]} holders are known")
        in_policy = copy.state is MemoryState.READY and not copy.staged and not copy.detached
        if in_policy and copy.chunk not in tier.policy:
            problems.append(f"{name}: chunk {key} is cached, but the policy does not know it")
        if not copy.leases and copy.state is not MemoryState.READY:
            problems.append(f"{name}: chunk {key} is {copy.state} and nobody holds it")
        if not copy.leases and copy.staged:
            problems.append(f"{name}: chunk {key} is staged and nobody holds it")
    kept = sum(1 for copy in mine if copy.state is MemoryState.READY and not copy.staged and not copy.detached)
    if kept != len(tier.policy):
        problems.append(f"{name}: the policy knows {len(tier.policy)} chunks, {kept} are cached")
    return problems


def _check_store(state: State, store: StoreTier) -> list[str]:
    problems = [*store.policy.check_integrity()]
    used = leaving = ready = 0
    readers: Counter[int] = Counter()
    for pending in state.pending.values():
        if isinstance(pending, ReadPending) and pending.tier is store.tier:
            readers[id(pending.stored)] += 1
    for space in state.index.spaces():
        for chunk in space.chunks.values():
            stored = chunk.stored(store.tier)
            if stored is None:
                continue
            used += stored.nbytes
            leaving += stored.nbytes if stored.state is StoredState.DELETING else 0
            ready += stored.state is StoredState.READY
            if stored.state is StoredState.READY and chunk not in store.policy:
                problems.append(f"{store.tier}: chunk {chunk.key.hex()[:12]} lies there, but the policy does not know it")
            if stored.readers != readers[id(stored)]:
                problems.append(f"{store.tier}: chunk {chunk.key.hex()[:12]} has {stored.readers} readers, {readers[id(stored)]} reads run")
    if (used, leaving) != (store.used, store.leaving):
        problems.append(f"{store.tier}: books say {store.used} used, {store.leaving} leaving; chunks say {used}, {leaving}")
    if ready != len(store.policy):
        problems.append(f"{store.tier}: the policy knows {len(store.policy)} chunks, {ready} lie there")
    writes = sum(1 for p in state.pending.values() if isinstance(p, WritePending) and p.tier is store.tier)
    deletes = sum(1 for p in state.pending.values() if isinstance(p, DeletePending) and p.tier is store.tier)
    deleting = sum(
        1
        for space in state.index.spaces()
        for chunk in space.chunks.values()
        if (stored := chunk.stored(store.tier)) is not None and stored.state is StoredState.DELETING
    )
    if writes != store.writes:
        problems.append(f"{store.tier}: {store.writes} writes counted, {writes} run")
    if deletes != deleting:
        problems.append(f"{store.tier}: {deleting} chunks are being deleted, {deletes} deletes run")
    return problems
