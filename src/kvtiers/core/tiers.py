"""The tiers' books: bytes, budgets and order of eviction. They decide nothing; who calls them does."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from kvtiers.core.admission import Admission, admission_for
from kvtiers.core.index import Chunk
from kvtiers.core.policies import policy_for
from kvtiers.core.policies.base import EvictionPolicy
from kvtiers.core.remembering import Remembered
from kvtiers.core.settings import MemorySettings, StoreSettings
from kvtiers.core.slots import SlotPool
from kvtiers.model.reasons import Refusal
from kvtiers.model.tiers import Tier


class MemoryTier:
    """A tier of slots: the arena (cpu) or the pool on the device (gpu)."""

    def __init__(self, tier: Tier, settings: MemorySettings) -> None:
        self.tier = tier
        self.settings = settings
        self.ceiling = settings.ceiling
        self.keeps = settings.ceiling > 0
        """Whether chunks stay here; a disabled CPU tier only stages."""
        self.slots = SlotPool(settings.capacity, settings.segments)
        self.policy: EvictionPolicy[Chunk] = policy_for(settings.policy)
        self.policy.set_limits(int(settings.ceiling * settings.probation_share), settings.idle_after_s)
        self.used = 0
        """Bytes of the cache proper, slots being filled by an engine included."""
        self.staged = 0
        """Bytes of the staging share in use."""
        self.write_leased = 0
        """Bytes that copies to here and writes from here, both in the background, hold leased."""
        self.sources = 0
        """Bytes that are being sealed here, or copied from here into another memory tier: leased, but not for long."""
        self.leaving = 0
        """Bytes being brought to the next tier so that they can be dropped here."""
        self.leased = 0
        """Copies that somebody holds."""
        self.asked: int | None = None
        """Bytes that an eviction on demand is still to bring it down to; what is stored or used meanwhile is added."""
        self.changes = 0
        """Grows whenever a copy may have become fit to be evicted."""
        self.backlog: OrderedDict[Chunk, None] = OrderedDict()
        """GPU pool: chunks to copy down as soon as a budget allows."""

    @property
    def staging_free(self) -> int:
        """Bytes of the staging share not in use."""
        return self.settings.staging - self.staged


class Waiting(NamedTuple):
    """A chunk's wait to be written."""

    since: float
    refusal: Refusal | None = None
    """What keeps it."""


class Resting(NamedTuple):
    """A pause in that wait."""

    waiting: Waiting
    until: float


class StoreTier:
    """A tier of records: disk or remote."""

    def __init__(self, tier: Tier, settings: StoreSettings, memory: int) -> None:
        self.tier = tier
        self.settings = settings
        self.policy: EvictionPolicy[Chunk] = policy_for(settings.policy)
        self.admission: Admission = admission_for(settings.admission, memory)
        self.used = 0
        """Bytes of our records, writes under way (estimated) and deletes under way included."""
        self.arriving = 0
        """Bytes of records being written, estimated."""
        self.leaving = 0
        """Bytes of records being deleted."""
        self.foreign = 0
        """Bytes in the same place that are not ours."""
        self.up = True
        self.paused_until = float("-inf")
        """No write is tried before this time: the store was full, or its queue was."""
        self.asked: int | None = None
        """Bytes of our records that an eviction on demand is still to bring it down to; what is written meanwhile is added."""
        self.deletes = 0
        """Deletes under way."""
        self.reads = 0
        """Reads under way."""
        self.writes = 0
        """Writes under way."""
        self.writing_bytes = 0
        """Arena bytes of these."""
        self.next_write_at = float("-inf")
        """The pace of writes allows none before this time."""
        self.backlog: OrderedDict[Chunk, Waiting] = OrderedDict()
        """Chunks to write as soon as a budget allows; they hold no lease while they wait."""
        self.resting: OrderedDict[Chunk, Resting] = OrderedDict()
        """Chunks that a shared store could not take although it may take others, in the order in which they go back to the backlog."""
        self.remembered = Remembered(settings.remember) if settings.remember is not None else None
        """What is known of a store that others share."""
        self.stuffed = False
        """The last write found no space, and nothing of ours was left to make some."""
        self.partial: dict[Chunk, None] = {}
        """Chunks of which recovery has not named every part yet."""

    @property
    def rests_until(self) -> float:
        """No write is tried before this time: after a failure, or to keep the pace."""
        return max(self.paused_until, self.next_write_at)

    @property
    def emptying(self) -> bool:
        """Whether an eviction on demand goes on, and waits for more than for reads to end."""
        return self.asked is not None and self.leaving > 0

    def is_to_write(self, chunk: Chunk) -> bool:
        """Whether the chunk waits to be written."""
        return chunk in self.backlog or chunk in self.resting

    def can_hold(self, nbytes: int) -> bool:
        """Whether so many bytes would fit if all that is ours were deleted."""
        ceiling = self.settings.ceiling
        return ceiling is None or self.foreign + nbytes <= ceiling

    def fits(self, nbytes: int) -> bool:
        """Whether so many bytes more stay below the ceiling, and now already below the capacity."""
        settings = self.settings
        if settings.capacity is None or settings.ceiling is None:
            return True
        held = self.used + self.foreign
        return held - self.leaving + nbytes <= settings.ceiling and held + nbytes <= settings.capacity
