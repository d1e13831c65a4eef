"""When a tier has room by bytes but no slot of the size that is wanted: slots of other sizes hold the slabs.

The coldest chunk of the tier decides, as always. If its slots have the wanted size it goes. If not, its slab is emptied and goes
to the starved size; where somebody holds a chunk in that slab, another one is emptied; where that is so everywhere, the oldest
chunk of the wanted size goes. So sizes grow and shrink with the use of what they hold, and none can starve another.

A slab is emptied by the rules of every eviction (`eviction.py`), with one exception. A chunk that a slower tier has goes though
what continues it stays: it can still be reached through that tier. One that only this tier has takes what continues it along.

What has to be written first leaves when that is done. Until then the slab is closed, and what becomes free is promised to
the sizes that were refused: others that store meanwhile can't take it. Who does not come back loses the claim.
"""

from __future__ import annotations

from enum import Enum
from itertools import islice
from typing import TYPE_CHECKING, Final

from kvtiers.core.index import MemoryCopy, MemoryState
from kvtiers.core.messages import Slots
from kvtiers.core.slabs import Slab
from kvtiers.core.state import State
from kvtiers.core.tiers import MemoryTier

if TYPE_CHECKING:
    from kvtiers.core.eviction import Loss, MemoryEvictor

CLAIM_S: Final = 5.0
"""So long what becomes free is kept for who was refused last."""
_SLABS_TRIED: Final = 8
"""Of each other size, if the slab of the coldest chunk can't be had, or costs too much."""
_OWN_SLABS_TRIED: Final = 64
_LOOKS: Final = 1024
"""Chunks looked at in one call, about: a bound on the time under the mutex."""


class _Outcome(Enum):
    FREED = "freed"
    """Take again."""
    COMING = "coming"
    """It leaves when the next tier has it, or the share of one call is used up."""
    NOTHING = "nothing"


class Going(Enum):
    """What became of a chunk that was to leave."""

    GONE = "gone"
    LEAVING = "leaving"
    """As soon as the next tier has it."""
    STAYS = "stays"
    """No other tier has it, none takes it now, and it is not to be lost."""


class Starving:
    """Finds slots in one tier when the pool has none."""

    def __init__(self, state: State, tier: MemoryTier, evictor: MemoryEvictor) -> None:
        self._state = state
        self._tier = tier
        self._evictor = evictor
        self._claim: tuple[int, ...] = ()
        """Sizes that were refused and are to get what is leaving."""
        self._claim_ends = 0.0
        self._closed: list[Slab] = []
        """Slabs being emptied for the claim."""
        self._awaited: list[MemoryCopy] = []
        """Copies that are leaving for it."""
        self._in_vain: tuple[int, tuple[int, ...]] = (-1, ())
        """The tier's count of changes when these sizes could not be had: until it grows it is no use to try."""
        self._evictions = 0
        self._looks = self._own_looks = 0

    @property
    def claimed(self) -> bool:
        """Whether something is leaving for a size that was refused."""
        return bool(self._claim)

    def find(self, sizes: tuple[int, ...], near: int | None, loss: Loss) -> Slots | None:
        """Slots of these sizes, after evicting at most `max_hold` chunks; None: there are none, or not yet."""
        tier, pool = self._tier, self._tier.slots
        if self._in_vain == (tier.changes, sizes):
            return None
        self._evictions = self._state.settings.max_hold
        self._looks = self._own_looks = _LOOKS
        if self._claim and self._state.now >= self._claim_ends:
            self._end_claim()
        while True:
            slots = pool.take(sizes, near)
            if slots is not None:
                if sizes == self._claim:
                    self._end_claim()
                return slots
            outcome = self._free_one(pool.lacking, sizes, loss)
            if outcome is _Outcome.FREED:
                continue
            if outcome is _Outcome.COMING:
                self._stake(sizes)
            else:
                self._in_vain = (tier.changes, sizes)
            return None

    # --- the claim ---

    def _stake(self, sizes: tuple[int, ...]) -> None:
        if self._claim in ((), sizes):
            self._claim = sizes
            self._claim_ends = self._state.now + CLAIM_S
            self._tier.slots.promise(sizes)

    def _end_claim(self) -> None:
        self._claim = ()
        self._awaited.clear()
        self._reopen()
        self._tier.slots.promise(())

    def _reopen(self) -> None:
        self._tier.slots.reopen(self._closed)
        self._closed = []

    # --- one step ---

    def _free_one(self, size: int, sizes: tuple[int, ...], loss: Loss) -> _Outcome:
        """Evict one chunk of the wanted size, or a slab of others."""
        if self._evictions <= 0:
            return _Outcome.COMING
        mine = self._claim in ((), sizes)
        if mine and self._closed:
            outcome = self._go_on_emptying(loss)
            if outcome is not _Outcome.NOTHING:
                return outcome
        if mine and any(copy.leaving for copy in self._awaited):
            return _Outcome.COMING
        self._awaited.clear()
        chunk = self._evictor.coldest()
        copy = chunk.memory(self._tier.tier) if chunk is not None else None
        if copy is None:
            return _Outcome.NOTHING
        if size in copy.chunk.space.slot_sizes:
            return self._evict(copy, loss)
        if mine:  # what becomes free is kept for another size's claim otherwise
            self._closed = self._choose(copy, size)
            if self._closed:
                self._tier.slots.close(self._closed)
                outcome = self._go_on_emptying(loss)
                if outcome is not _Outcome.NOTHING:
                    return outcome
        outcome = self._evict_own(size, loss)
        if outcome is _Outcome.NOTHING and mine and self._looks < 0:
            return self._evict(
                copy, loss
            )  # so much hangs on every slab that it has to be taken away bit by bit
        return outcome

    def _evict(self, copy: MemoryCopy, loss: Loss) -> _Outcome:
        self._evictions -= 1
        going = self._evictor.let_go(copy, loss)
        if going is Going.LEAVING:
            self._awaited.append(copy)
            return _Outcome.COMING
        return _Outcome.FREED if going is Going.GONE else _Outcome.NOTHING

    def _evict_own(self, size: int, loss: Loss) -> _Outcome:
        """The oldest chunk of the size that may go, or rather what continues it."""
        for slab in islice(self._tier.slots.slabs_of(size), _OWN_SLABS_TRIED):
            for owner in slab.owners:
                self._own_looks -= 1
                if self._own_looks < 0:
                    return _Outcome.NOTHING
                if isinstance(owner, MemoryCopy) and not owner.detached:
                    leaf = self._last_of(owner)
                    if leaf is not None:
                        return self._evict(leaf, loss)
        return _Outcome.NOTHING

    def _last_of(self, copy: MemoryCopy) -> MemoryCopy | None:
        """A chunk that continues this one, or itself, without any behind it in the tier; None if it may not go."""
        tier = self._tier.tier
        while self._own_looks > 0:
            self._own_looks -= 1
            after = None
            if copy.chunk.children_in(tier):
                after = next(
                    (c for child in copy.chunk.children() if (c := child.memory(tier)) is not None), None
                )
            if after is None:
                return copy if self._may_go(copy) else None
            copy = after
        return None

    # --- slabs ---

    def _choose(self, coldest: MemoryCopy, size: int) -> list[Slab]:
        """Slabs to empty for a slot of `size`: those of the coldest chunk, if it does not cost many others, else the cheapest."""
        pool = self._tier.slots
        window, cost = self._cheapest([pool.slab_of(slot) for slot in coldest.slots], size)
        if window and cost <= 2 * sum(slab.taken for slab in window):
            return window
        oldest = [
            slab
            for other in pool.sizes
            if other != size
            for slab in islice(pool.slabs_of(other), _SLABS_TRIED)
        ]
        instead, cost_instead = self._cheapest(oldest, size)
        if instead and (not window or cost_instead < cost):
            return instead
        if not window:
            for slab in oldest:
                pool.put_off(slab)
        return window

    def _cheapest(self, slabs: list[Slab], size: int) -> tuple[list[Slab], int]:
        """Of the windows around these slabs the one for which the fewest chunks have to leave; empty if there is none."""
        best: list[Slab] = []
        lowest = 0
        for slab in slabs:
            window = None if slab.size == size else slab.segment.window(slab, size)
            victims = None if window is None else self._victims(window)
            if window is not None and victims is not None and (not best or len(victims) < lowest):
                best, lowest = window, len(victims)
        return best, lowest

    def _go_on_emptying(self, loss: Loss) -> _Outcome:
        """Evict what may go from the closed slabs. NOTHING: they can't be emptied now, and are open again."""
        victims = self._victims(self._closed)
        if victims is None:
            self._reopen()
            return _Outcome.NOTHING
        for copy in victims:
            if copy.detached or copy.leaving:
                continue  # with what continued it
            if self._evictions <= 0:
                return _Outcome.COMING
            self._evictions -= 1
            going = self._evictor.let_go(copy, loss)
            if going is Going.STAYS:
                self._reopen()
                return _Outcome.NOTHING
            if going is Going.LEAVING:
                self._awaited.append(copy)
        if any(slab.taken for slab in self._closed):
            return _Outcome.COMING
        self._closed = []
        return _Outcome.FREED

    def _victims(self, slabs: list[Slab]) -> list[MemoryCopy] | None:
        """What has to leave for these slabs to become empty, in order; None if somebody holds some of it, or it is too much to tell."""
        victims: dict[MemoryCopy, None] = {}
        for slab in slabs:
            owned = 0
            for owner in slab.owners:
                if isinstance(owner, MemoryCopy):
                    owned += 1
                    if not self._collect(owner, victims):
                        return None
            if owned != slab.taken:
                return None
        return list(victims)

    def _collect(self, copy: MemoryCopy, victims: dict[MemoryCopy, None]) -> bool:
        """The copy, behind what has to leave before it. Of one that is on its way out nothing has to."""
        tier = self._tier.tier
        path = [(copy, False)]
        while path:
            at, behind_done = path.pop()
            if at.leaving or at in victims:
                continue
            self._looks -= 1
            if self._looks < 0 or not self._may_go(at):
                return False
            if behind_done or not at.chunk.children_in(tier) or self._evictor.is_clean(at):
                victims[at] = None
                continue
            path.append((at, True))
            for child in at.chunk.children():
                self._looks -= 1
                after = child.memory(tier)
                if after is not None:
                    path.append((after, False))
                if self._looks < 0:
                    return False
        return True

    @staticmethod
    def _may_go(copy: MemoryCopy) -> bool:
        return copy.state is MemoryState.READY and not (copy.leases or copy.staged or copy.detached)
