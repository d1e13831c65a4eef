"""News from outside: what stores find or lose, tiers that go and come back, chunks that turn out damaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from kvtiers.core.deleting import Deleter
from kvtiers.core.index import Chunk, MemoryState, StoredCopy, StoredState
from kvtiers.core.ledger import Ledger
from kvtiers.core.loading import Loading
from kvtiers.core.messages import (
    Damaged,
    Recovered,
    RecoveryEnded,
    SpaceLow,
    SpaceReport,
    StoreDown,
    StoreUp,
    Vanished,
)
from kvtiers.core.policies.base import Standing
from kvtiers.core.state import State
from kvtiers.core.tiers import StoreTier
from kvtiers.model.keys import ChunkKey
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier

# for a million pieces of news at a start (see index.py)
_READY: Final = StoredState.READY
_PARTIAL: Final = StoredState.PARTIAL
_DELETING: Final = StoredState.DELETING
_ESTABLISHED: Final = Standing.ESTABLISHED


class Newsroom:
    """Applies news about stores and chunks."""

    def __init__(self, state: State, ledger: Ledger, deleter: Deleter, loading: Loading) -> None:
        self._state = state
        self._ledger = ledger
        self._deleter = deleter
        self._loading = loading
        self._readers: dict[type, Callable[[Any], None]] = {
            Recovered: self._recovered,
            RecoveryEnded: self._recovery_ended,
            Vanished: self._vanished,
            SpaceReport: self._space_report,
            SpaceLow: self._space_low,
            StoreUp: self._store_up,
            StoreDown: self._store_down,
            Damaged: self._damaged,
        }

    def apply(self, news: object) -> None:
        """Dispatch by type."""
        self._readers[type(news)](news)
        self._loading.reconsider()

    def _store(self, tier: Tier) -> StoreTier:
        return self._state.stores[tier]

    def _find(self, namespace: bytes, key: ChunkKey) -> Chunk | None:
        space = self._state.index.find_space(namespace)
        return space.chunks.get(key) if space is not None else None

    def _recovered(self, news: Recovered) -> None:
        store, mark = self._store(news.tier), news.mark
        space = self._state.index.space(mark.namespace)
        known = space.chunks.get(mark.key)
        stored = known.stored(news.tier) if known is not None else None
        bit = 1 << news.part
        if stored is not None and (not stored.parts_seen or stored.parts_seen & bit):
            return  # known already: told before, or written by this run
        chunk = self._state.index.ensure(space, mark.key, mark.parent, mark.token_start, mark.token_count)
        if not chunk.num_parts:
            chunk.num_parts = mark.num_parts
        if stored is None:
            stored = StoredCopy(0, _PARTIAL)
            chunk.set_stored(news.tier, stored)
            store.partial[chunk] = None
        stored.parts_seen |= bit
        stored.nbytes += news.stored_bytes
        store.used += news.stored_bytes
        if stored.state is _DELETING:
            store.leaving += news.stored_bytes
        elif self._is_whole(chunk, stored):
            store.partial.pop(chunk, None)
            stored.state = _READY
            store.policy.insert(chunk, chunk.parent, stored.nbytes, self._state.now, _ESTABLISHED)

    def _is_whole(self, chunk: Chunk, stored: StoredCopy) -> bool:
        parts = chunk.space.parts
        wanted = chunk.num_parts if parts is None else len(parts)
        return stored.parts_seen == (1 << wanted) - 1

    def _recovery_ended(self, news: RecoveryEnded) -> None:
        store = self._store(news.tier)
        for chunk in list(store.partial):
            stored = chunk.stored(news.tier)
            if stored is not None:
                self._deleter.begin_delete(chunk, stored, store, MissReason.GROUP_STATE_MISSING)
        for chunk in self._state.index.unknown:
            self._ledger.let_go_below(chunk)

    def _vanished(self, news: Vanished) -> None:
        chunk = self._find(news.namespace, news.key)
        stored = chunk.stored(news.tier) if chunk is not None else None
        if (
            chunk is not None and stored is not None and not stored.readers
        ):  # else the read under way will tell
            self._deleter.lost(chunk, stored, self._store(news.tier), news.reason)

    def _space_report(self, news: SpaceReport) -> None:
        self._store(news.tier).foreign = news.foreign_bytes

    def _space_low(self, news: SpaceLow) -> None:
        store = self._store(news.tier)
        store.paused_until = max(store.paused_until, self._state.now + store.settings.full_pause_s)
        self._deleter.give_back(store, max(0, news.bytes_wanted - store.leaving))

    def _store_up(self, news: StoreUp) -> None:
        store = self._store(news.tier)
        store.up = True
        store.paused_until = self._state.now

    def _store_down(self, news: StoreDown) -> None:
        self._store(news.tier).up = False

    def _damaged(self, news: Damaged) -> None:
        chunk = self._find(news.namespace, news.key)
        if chunk is None:
            return
        if news.tier in (Tier.GPU, Tier.CPU):
            copy = chunk.memory(news.tier)
            if copy is not None and copy.state is MemoryState.READY:
                self._loading.drop_damaged(chunk, news.tier, copy)
            return
        stored = chunk.stored(news.tier)
        if stored is not None and self._deleter.deletable(chunk, news.tier):
            self._state.counters.tiers[news.tier].corrupt += 1
            self._deleter.lost(chunk, stored, self._store(news.tier), MissReason.CORRUPT)
