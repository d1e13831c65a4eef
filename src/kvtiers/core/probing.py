"""Asking a shared store what it has: one batched probe for a request whose chain goes on beyond what is known here.

    matching stops at a chunk nobody here has ─▶ Probe(all keys from there on that could be staged) ─▶ known for a while ─▶ matching goes on

Loads that stop at the same chunk wait for one probe. While the store is out of order nobody asks. A load waits no longer than until
its deadline, and half of that time if there is something to be read from nearer by; its probe goes on if it has begun, and what it learns is
remembered for the next one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from kvtiers.core.index import Chunk, Space, StoredCopy, StoredState
from kvtiers.core.messages import Cancel, OpId, Outcome, Priority, Probe
from kvtiers.core.policies.base import Standing
from kvtiers.core.remembering import Remembered
from kvtiers.core.state import ProbePending, State
from kvtiers.core.tickets import LoadState, LoadTicket
from kvtiers.core.tiers import StoreTier
from kvtiers.model.keys import ChunkKey
from kvtiers.model.layout import PAGE_BYTES
from kvtiers.model.reasons import MissReason

_MOST_KEYS: Final = 4096
_ENDED: Final = object()
_REASON_OF: Final = {
    Outcome.REFUSED: MissReason.STAGING_TIMEOUT,
    Outcome.CANCELLED: MissReason.STAGING_TIMEOUT,
}


class Prober:
    """Begins probes, and remembers their answers."""

    def __init__(self, state: State, forget_stale: Callable[[], None]) -> None:
        """`forget_stale` forgets some of what is too old, or too much."""
        self._state = state
        self._forget_stale = forget_stale
        self._under_way: dict[tuple[Space, ChunkKey], tuple[OpId, ProbePending]] = {}
        """Those that somebody waits for, by the first key asked for."""
        self._answers: deque[Iterator[None]] = deque()
        """Of probes, being learnt in steps of `max_hold`."""

    def is_down(self, chunk: Chunk | None) -> bool:
        """Whether a store that can't be asked at this moment may have what nobody here has."""
        return self._may_have(chunk) and any(
            store.remembered is not None and not store.up for store in self._state.stores.values()
        )

    def begin(self, ticket: LoadTicket, index: int) -> bool:
        """Have the store asked for the ticket's chunks from `index` on, the first that nobody here has; False: there is nobody to ask."""
        space, keys, now = ticket.space, ticket.keys, self._state.now
        for store in self._state.stores.values():
            memory = store.remembered
            if memory is None or not store.up or not self._may_have(space.chunks.get(keys[index])):
                continue
            if ticket.deadline <= now or memory.is_absent(space, keys[index], now):
                continue
            wanted = self._unknown(ticket, index, memory)
            if not wanted:  # it may be there, and could not be staged
                ticket.unasked = MissReason.NO_SLOT
                continue
            first = (space, keys[index])
            if first in self._under_way:
                _, pending = self._under_way[first]
            else:
                pending = ProbePending(
                    space, keys[index - 1] if index else None, tuple(wanted), store.tier, []
                )
                op = self._state.begin(pending)
                self._under_way[first] = op, pending
                self._state.outbox.append(
                    Probe(op, space.id, store.tier, pending.keys, ticket.deadline, Priority.LOAD)
                )
            pending.waiters.append(ticket)
            ticket.state = LoadState.PROBING
            return True
        return False

    def leave(self, ticket: LoadTicket) -> None:
        """The load waits no more; what it asked goes on if it has begun, or if others wait for it."""
        for first, (op, pending) in self._under_way.items():
            if ticket in pending.waiters:
                pending.waiters.remove(ticket)
                if not pending.waiters:
                    del self._under_way[first]
                    self._state.outbox.append(Cancel(op))
                return

    def done(self, pending: ProbePending, outcome: Outcome, found: tuple[bool, ...]) -> MissReason | None:
        """The answer: it is remembered. Why those who waited can't go on, if they can't."""
        space = pending.space
        if pending.waiters:
            del self._under_way[space, pending.keys[0]]
        if outcome is not Outcome.OK:
            return _REASON_OF.get(outcome, MissReason.TIER_OPEN)
        self._answers.append(self._learning(pending, found))
        return None

    @property
    def has_more(self) -> bool:
        """Whether answers are still to be learnt (`go_on`)."""
        return bool(self._answers)

    def go_on(self) -> None:
        """Learn at most `max_hold` chunks of the first answer."""
        if self._answers and next(self._answers[0], _ENDED) is _ENDED:
            self._answers.popleft()

    def _learning(self, pending: ProbePending, found: tuple[bool, ...]) -> Iterator[None]:
        state, space, before = self._state, pending.space, pending.before
        store = state.stores[pending.tier]
        assert store.remembered is not None
        for number, (key, there) in enumerate(zip(pending.keys, found, strict=True), 1):
            if state.index.find_space(space.digest) is not space:
                return  # whoever asked is gone, and the namespace with them
            if not there:  # what comes behind it could not be reached
                store.remembered.absent(space, key, state.now)
                break
            self._learn(store, space, key, before)
            before = key
            if not number % state.settings.max_hold:
                self._forget_stale()
                yield
        self._forget_stale()

    def _may_have(self, chunk: Chunk | None) -> bool:
        """Whether it makes sense to ask: not for what is on its way into memory here."""
        return chunk is None or (chunk.gpu is None and chunk.cpu is None)

    def _unknown(self, ticket: LoadTicket, index: int, memory: Remembered) -> list[ChunkKey]:
        """The keys to ask for: no more than can be staged, none behind one that is known not to be there."""
        space, now = ticket.space, self._state.now
        room = min(_MOST_KEYS, ticket.room // space.slot_bytes if space.slot_bytes else 0)
        wanted: list[ChunkKey] = []
        for key in ticket.keys[index : index + room]:
            if memory.is_absent(space, key, now):
                break
            wanted.append(key)
        return wanted

    def _learn(self, store: StoreTier, space: Space, key: ChunkKey, before: ChunkKey | None) -> None:
        """The store has this chunk of a namespace; `before`: the one it continues, as far as anybody here knows."""
        state = self._state
        assert store.remembered is not None
        chunk = space.chunks.get(key)
        if chunk is None or not chunk.parent_key:
            chunk = state.index.meet(space, key, before)
        stored = chunk.stored(store.tier)
        if stored is None:
            if not chunk.num_parts:
                chunk.num_parts = len(space.slot_sizes)
            stored = StoredCopy(space.slot_bytes + PAGE_BYTES * len(space.slot_sizes), StoredState.READY)
            state.index.revive(chunk)
            chunk.set_stored(store.tier, stored)
            store.used += stored.nbytes
            store.policy.insert(chunk, chunk.parent, stored.nbytes, state.now, Standing.ESTABLISHED)
        if stored.state is StoredState.READY:
            store.remembered.there(chunk, state.now)
