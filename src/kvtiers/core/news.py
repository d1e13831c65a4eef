"""News from outside: what stores find or lose, tiers that go and come back, clients that die."""

from __future__ import annotations

from collections.abc import Callable

from kvtiers.core.index import StoredCopy, StoredState
from kvtiers.core.ledger import Ledger
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
from kvtiers.core.writing import StoreWriter
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier


class Newsroom:
    """Applies news about stores and chunks."""

    def __init__(self, state: State, ledger: Ledger, writer: StoreWriter) -> None:
        self._state = state
        self._ledger = ledger
        self._writer = writer
        self._readers: dict[type, Callable[..., None]] = {
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

    def _store(self, tier: Tier) -> StoreTier:
        return self._state.stores[tier]

    def _recovered(self, news: Recovered) -> None:
        store, mark = self._store(news.tier), news.mark
        space = self._state.index.space(mark.namespace)
        chunk = self._state.index.ensure(space, mark.key, mark.parent, mark.token_start, mark.token_count)
        stored = chunk.stored(news.tier)
        bit = 1 << news.part
        if stored is not None and (stored.state is not StoredState.PARTIAL or stored.parts_seen & bit):
            return  # known already
        chunk.num_parts = mark.num_parts
        if stored is None:
            stored = StoredCopy(0, StoredState.PARTIAL)
            chunk.set_stored(news.tier, stored)
        stored.parts_seen |= bit
        stored.nbytes += news.stored_bytes
        store.used += news.stored_bytes
        if stored.parts_seen.bit_count() == mark.num_parts:
            stored.state = StoredState.READY
            store.policy.insert(chunk, chunk.parent, stored.nbytes, self._state.now, Standing.ESTABLISHED)

    def _recovery_ended(self, news: RecoveryEnded) -> None:
        store = self._store(news.tier)
        for space in self._state.index.spaces():
            for chunk in list(space.chunks.values()):
                stored = chunk.stored(news.tier)
                if stored is not None and stored.state is StoredState.PARTIAL:
                    self._writer.begin_delete(chunk, stored, store)
                elif not chunk.held:
                    self._ledger.expedite_below(chunk)

    def _vanished(self, news: Vanished) -> None:
        space = self._state.index.find_space(news.namespace)
        chunk = space.chunks.get(news.key) if space else None
        stored = chunk.stored(news.tier) if chunk else None
        if chunk is None or stored is None or stored.readers:
            return
        if stored.state in (StoredState.READY, StoredState.PARTIAL):  # else the operation under way will tell
            self._writer.forget(chunk, stored, self._store(news.tier), MissReason.EVICTED)

    def _space_report(self, news: SpaceReport) -> None:
        self._store(news.tier).foreign = news.foreign_bytes

    def _space_low(self, news: SpaceLow) -> None:
        store = self._store(news.tier)
        store.paused_until = max(store.paused_until, self._state.now + store.settings.full_pause_s)
        self._writer.give_back(store, max(0, news.bytes_wanted - store.leaving))

    def _store_up(self, news: StoreUp) -> None:
        store = self._store(news.tier)
        store.up = True
        store.paused_until = self._state.now

    def _store_down(self, news: StoreDown) -> None:
        self._store(news.tier).up = False

    def _damaged(self, news: Damaged) -> None:
        space = self._state.index.find_space(news.namespace)
        chunk = space.chunks.get(news.key) if space else None
        if chunk is None:
            return
        if news.tier in (Tier.GPU, Tier.CPU):
            copy = chunk.memory(news.tier)
            if copy is not None:
                self._state.counters.tiers[news.tier].corrupt += 1
                self._ledger.detach(copy, MissReason.CORRUPT)
            return
        stored = chunk.stored(news.tier)
        if stored is not None and stored.state is StoredState.READY and not stored.readers:
            self._state.counters.tiers[news.tier].corrupt += 1
            self._writer.begin_delete(chunk, stored, self._store(news.tier))
