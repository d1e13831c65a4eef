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
    problems += [
        f"session {session.id} keeps store {ticket.id}, of which nothing is open"
        for session in sessions.values()
        for ticket in session.tickets.values()
        if not isinstance(ticket, LoadTicket) and not ticket.copies and ticket.position == len(ticket.keys)
    ]
    for tier in (state.cpu, state.gpu):
        if tier is not None:
            problems += _check_memory(tier, leases, copies)
    for store in state.stores.values():
        problems += _check_store(state, store)
    return problems


def _leases(
    state: State, sessions: Mapping[SessionId, Session]
) -> tuple[Counter[int], dict[int, MemoryCopy]]:
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
            held = (
                ticket.copies if isinstance(ticket, LoadTicket) else (*ticket.copies.values(), *ticket.pins)
            )
            for leased in held:
                if leased is not None:
                    hold(leased)
    for space in state.index.spaces():
        for chunk in space.chunks.values():
            for attached in (chunk.gpu, chunk.cpu):
                if attached is not None:
                    copies[id(attached)] = attached
    return leases, copies


def _check_memory(tier: MemoryTier, leases: Counter[int], copies: Mapping[int, MemoryCopy]) -> list[str]:
    problems = [*tier.slots.check_integrity(), *tier.policy.check_integrity()]
    name = tier.tier
    mine = [copy for copy in copies.values() if copy.tier is name]
    used = sum(copy.nbytes for copy in mine if not copy.staged)
    staged = sum(copy.nbytes for copy in mine if copy.staged)
    if (used, staged) != (tier.used, tier.staged):
        problems.append(
            f"{name}: books say {tier.used} used and {tier.staged} staged, copies say {used} and {staged}"
        )
    if tier.used > tier.settings.ceiling or tier.staged > tier.settings.staging:
        problems.append(f"{name}: over its bounds: used {tier.used}, staged {tier.staged}, {tier.settings}")
    slots = sorted(offset for copy in mine for offset in copy.slots)
    if slots != sorted(tier.slots.taken):
        problems.append(f"{name}: slots taken differ from the slots of copies")
    leased = sum(copy.leases > 0 for copy in mine)
    if leased != tier.leased:
        problems.append(f"{name}: books say {tier.leased} copies are leased, {leased} are")
    leaving = sum(copy.nbytes for copy in mine if copy.leaving)
    if leaving != tier.leaving:
        problems.append(f"{name}: books say {tier.leaving} bytes are leaving, copies say {leaving}")
    for copy in mine:
        key = copy.chunk.key.hex()[:12]
        if copy.leases != leases[id(copy)]:
            problems.append(
                f"{name}: chunk {key} has {copy.leases} leases, {leases[id(copy)]} holders are known"
            )
        if copy.leaving and not copy.leases and not _has_child_that_goes(copy):
            problems.append(f"{name}: chunk {key} is on its way out, and nothing keeps it")
        if _is_candidate(copy) and copy.chunk not in tier.policy:
            problems.append(f"{name}: chunk {key} is cached, but the policy does not know it")
        if not copy.leases and copy.state is not MemoryState.READY:
            problems.append(f"{name}: chunk {key} is {copy.state} and nobody holds it")
        if not copy.leases and copy.staged:
            problems.append(f"{name}: chunk {key} is staged and nobody holds it")
    kept = sum(map(_is_candidate, mine))
    if kept != len(tier.policy):
        problems.append(f"{name}: the policy knows {len(tier.policy)} chunks, {kept} are cached")
    return problems


def _has_child_that_goes(copy: MemoryCopy) -> bool:
    """One that leaves as well, or is only staged; with one that stays it would be stranded."""
    below = (child.memory(copy.tier) for child in copy.chunk.children())
    return any(one is not None and (one.leaving or one.staged) for one in below)


def _is_candidate(copy: MemoryCopy) -> bool:
    return not copy.staged and not copy.detached and not copy.leaving


def _check_store(state: State, store: StoreTier) -> list[str]:
    problems = [*store.policy.check_integrity()]
    name = store.tier
    pending = [
        p for p in state.pending.values() if not isinstance(p, SealPending | CopyPending) and p.tier is name
    ]
    readers = Counter(id(p.stored) for p in pending if isinstance(p, ReadPending))
    writes = [p for p in pending if isinstance(p, WritePending)]
    in_state: Counter[StoredState] = Counter()
    used = leaving = 0
    for space in state.index.spaces():
        for chunk in space.chunks.values():
            stored = chunk.stored(name)
            if stored is None:
                continue
            key = chunk.key.hex()[:12]
            in_state[stored.state] += 1
            used += stored.nbytes
            leaving += stored.nbytes if stored.state is StoredState.DELETING else 0
            if stored.state is StoredState.READY and chunk not in store.policy:
                problems.append(f"{name}: chunk {key} lies there, but the policy does not know it")
            if stored.state is StoredState.PARTIAL and (chunk in store.policy) is (chunk in store.partial):
                problems.append(
                    f"{name}: chunk {key} is partial and nobody, or everybody, is going to delete it"
                )
            if stored.readers != readers[id(stored)]:
                problems.append(
                    f"{name}: chunk {key} has {stored.readers} readers, {readers[id(stored)]} reads run"
                )
    expected = {
        "bytes used": (store.used, used),
        "bytes arriving": (store.arriving, sum(p.stored.nbytes for p in writes)),
        "bytes leaving": (store.leaving, leaving),
        "chunks in the policy": (
            len(store.policy),
            in_state[StoredState.READY] + in_state[StoredState.PARTIAL] - len(store.partial),
        ),
        "writes": (store.writes, len(writes)),
        "reads": (store.reads, sum(isinstance(p, ReadPending) for p in pending)),
        "deletes": (store.deletes, sum(isinstance(p, DeletePending) for p in pending)),
        "chunks being written": (in_state[StoredState.WRITING], len(writes)),
        "bytes being written": (store.writing_bytes, sum(p.copy.nbytes for p in writes)),
        "chunks being deleted": (
            in_state[StoredState.DELETING],
            sum(isinstance(p, DeletePending) for p in pending),
        ),
    }
    problems += [
        f"{name}: {what}: {books} by the books, {counted} counted"
        for what, (books, counted) in expected.items()
        if books != counted
    ]
    return problems
