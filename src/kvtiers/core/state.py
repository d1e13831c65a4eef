"""What all parts of the core share: the index, the tiers, operations under way, and the box of intents to hand out."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, TypeAlias

from kvtiers.core.counters import Counters
from kvtiers.core.index import Chunk, Index, MemoryCopy, Space, StoredCopy, StoredState
from kvtiers.core.messages import Intent, OpId
from kvtiers.core.settings import CoreSettings
from kvtiers.core.tickets import LoadTicket
from kvtiers.core.tiers import MemoryTier, StoreTier
from kvtiers.model.errors import InvariantBroken
from kvtiers.model.keys import ChunkKey
from kvtiers.model.tiers import Tier


class SealPending(NamedTuple):
    """A seal under way; it holds a lease on the copy."""

    copy: MemoryCopy


class CopyPending(NamedTuple):
    """A copy under way; it holds a lease on both copies."""

    source: MemoryCopy
    target: MemoryCopy


class ReadPending(NamedTuple):
    """A read under way; it holds a lease on the copy it fills."""

    copy: MemoryCopy
    stored: StoredCopy
    tier: Tier
    deadline: float


class WritePending(NamedTuple):
    """A write under way; it holds a lease on the copy it reads."""

    copy: MemoryCopy
    stored: StoredCopy
    tier: Tier
    since: float
    """When the chunk began to wait for it."""


class DeletePending(NamedTuple):
    """A delete under way."""

    chunk: Chunk
    stored: StoredCopy
    tier: Tier
    before: StoredState
    evicts: bool
    """It makes room, or was asked for; otherwise the chunk was lost already."""


class ProbePending(NamedTuple):
    """A probe under way; it holds nothing."""

    space: Space
    before: ChunkKey | None
    """The key before the first one, if the load that asks knows it."""
    keys: tuple[ChunkKey, ...]
    tier: Tier
    waiters: list[LoadTicket]


Pending: TypeAlias = SealPending | CopyPending | ReadPending | WritePending | DeletePending | ProbePending
_BACKGROUND = (SealPending, CopyPending, WritePending)


class State:
    """Shared by the core's parts. `now` is set by every call from outside."""

    def __init__(self, settings: CoreSettings) -> None:
        self.settings = settings
        self.now = 0.0
        self.index = Index(settings.ghosts)
        self.counters = Counters()
        self.cpu = MemoryTier(Tier.CPU, settings.cpu)
        self.gpu = MemoryTier(Tier.GPU, settings.gpu) if settings.gpu else None
        self.stores: dict[Tier, StoreTier] = {}
        for tier, store in ((Tier.DISK, settings.disk), (Tier.REMOTE, settings.remote)):
            if store is not None:
                self.stores[tier] = StoreTier(tier, store, settings.ghosts)
        tiers = [Tier.GPU] if self.gpu else []
        if self.cpu.keeps:
            tiers.append(Tier.CPU)
        self.enabled: tuple[Tier, ...] = (*tiers, *self.stores)
        """Tiers that keep chunks, nearest first."""
        self.pending: dict[OpId, Pending] = {}
        self.background = 0
        """Seals, copies and writes among them."""
        self.outbox: deque[Intent] = deque()
        self.unstaged: deque[MemoryCopy] = deque()
        """Staged copies without a lease: to be kept or dropped at the end of the call."""
        self._last_op = 0

    def memory(self, tier: Tier) -> MemoryTier:
        """The tier of slots. Raises InvariantBroken for one that does not exist."""
        if tier is Tier.CPU:
            return self.cpu
        if tier is Tier.GPU and self.gpu is not None:
            return self.gpu
        raise InvariantBroken(f"there is no memory tier {tier}")

    def begin(self, pending: Pending) -> OpId:
        """A new operation; the caller puts its intent into the outbox."""
        self._last_op += 1
        op = OpId(self._last_op)
        self.pending[op] = pending
        self.background += isinstance(pending, _BACKGROUND)
        return op

    def finish(self, op: OpId) -> Pending:
        """Its one completion has come. Raises InvariantBroken for a second one."""
        pending = self.pending.pop(op, None)
        if pending is None:
            raise InvariantBroken(f"operation {op} completed twice, or was never begun")
        self.background -= isinstance(pending, _BACKGROUND)
        return pending
