"""Calls on the core that are too long for one hold of its mutex: cut into pieces of `max_hold` chunks, others have their turn between.

What the pieces of one call see may differ by what others did meanwhile; each piece leaves the core in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from kvtiers.core.core import Core
from kvtiers.core.eviction import Evicted
from kvtiers.core.messages import SpaceId
from kvtiers.core.tickets import LoadTicket, Match, StoreTicket
from kvtiers.model.keys import ChunkKey
from kvtiers.model.tiers import Tier
from kvtiers.runtime.shared_core import SharedCore


class LongCalls:
    """Over one shared core. Any thread may call."""

    def __init__(self, core: SharedCore, most: int, check_open: Callable[[], None]) -> None:
        """`most`: chunks a hold. `check_open` raises CacheClosed."""
        self._core = core
        self._most = most
        self._check_open = check_open

    def lookup(self, space: SpaceId, keys: Sequence[ChunkKey]) -> Match:
        """What a load would find; of a long chain some may have gone by the time the rest is looked at."""
        tiers: list[Tier] = []
        pending = start = 0
        while True:
            self._check_open()
            part = keys[start : start + self._most]
            match = self._core.look(partial(Core.lookup, space=space, keys=part))
            if not start and (match.stopped_by is not None or len(keys) <= self._most):
                return match
            tiers += match.tiers
            pending += match.pending
            start += self._most
            if match.stopped_by is not None or start >= len(keys):
                return Match(tuple(tiers), pending, match.stopped_by)

    def extend(self, ticket: LoadTicket | StoreTicket, enough: Callable[[], bool] = lambda: False) -> None:
        """Go on with opening a ticket of a long chain, until it is complete or `enough`."""
        if len(ticket.keys) > self._most:
            while self._core.run(lambda core, now: core.extend(ticket, now)) and not enough():
                pass

    def go_on(self) -> None:
        """Do what earlier calls have left to do."""
        while self._core.run(lambda core, now: core.go_on(now)):
            pass

    def commit(self, ticket: StoreTicket, indices: Iterable[int] | None) -> None:
        """The slots hold their KV."""
        most = self._most
        if len(ticket.copies) <= most:
            more = self._core.run(lambda core, now: core.commit(ticket, now, indices))
        else:
            chosen = self._core.run(lambda core, _: core.to_commit(ticket, indices))
            more = False
            for start in range(0, len(chosen), most):
                part = chosen[start : start + most]
                more = self._core.run(lambda core, now, part=part: core.commit(ticket, now, part))  # type: ignore[misc]
        if more:
            self.go_on()

    def evict(self, tier: Tier, target_bytes: int) -> Evicted:
        """Evict until at most so many bytes stay, are on their way out, or may not go."""
        entries = self._core.look(lambda core: core.entries(tier))
        total = Evicted(0, 0, 0)
        while True:
            step = self._core.run(lambda core, now: core.evict(tier, target_bytes, now))
            total = Evicted(
                total.chunks + step.chunks, total.nbytes + step.nbytes, total.demoting + step.demoting
            )
            # what a store fails to delete, or a tier to take, comes up again: once round is enough
            if not step.more or total.chunks + total.demoting >= entries:
                return total
