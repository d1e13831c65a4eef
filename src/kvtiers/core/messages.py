"""What goes in and out of the core: intents out, completions and news in.

Each intent gets exactly one completion, even if late, failed or refused; until then the slots it names stay leased. The
only exception is `Cancel`: it is advice about another intent, which still completes (as CANCELLED, if it had not begun).
All are NamedTuples: making one takes .3 µs, a frozen dataclass .7.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import NamedTuple, NewType, TypeAlias

from kvtiers.model.keys import ChunkKey
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier

OpId = NewType("OpId", int)
SpaceId = NewType("SpaceId", int)
SessionId = NewType("SessionId", int)
TicketId = NewType("TicketId", int)
Slots: TypeAlias = tuple[int, ...]
"""Byte offset of each part of a chunk in its tier's memory, in the order of the namespace's `Parts`."""


class Priority(IntEnum):
    """Order in every queue: loads outrank stores."""

    LOAD = 0
    SEAL = 1
    STORE = 2
    DEMOTE = 3
    PROMOTE = 4
    DELETE = 5


class Outcome(StrEnum):
    """How an intent ended."""

    OK = "ok"
    PRESENT = "present"
    """The store has it already, from somebody else: nothing was written."""
    MISSING = "missing"
    """The store has no such record."""
    CORRUPT = "corrupt"
    """The record failed its checks; the store has removed it."""
    FULL = "full"
    """No space left in the store."""
    FAILED = "failed"
    """An error, after the guard's retries."""
    UNAVAILABLE = "unavailable"
    """The store can't be reached, or its breaker is open."""
    REFUSED = "refused"
    """The executor's queue was full, or it is closing; nothing was begun."""
    CANCELLED = "cancelled"
    """Given up before it had begun."""


class Chunkmark(NamedTuple):
    """All that a record's header says about its chunk."""

    namespace: bytes
    key: ChunkKey
    parent: ChunkKey
    num_parts: int
    token_start: int
    token_count: int


# --- intents ---------------------------------------------------------------------------------------------------------


class Seal(NamedTuple):
    """Compute the payload checksums of freshly committed arena slots. Completion: SealDone."""

    op: OpId
    space: SpaceId
    slots: Slots
    priority: Priority


class Copy(NamedTuple):
    """Copy a chunk between the GPU pool and the arena; what reaches the arena is sealed on the way. Completion: CopyDone."""

    op: OpId
    space: SpaceId
    source: Tier
    source_slots: Slots
    target: Tier
    target_slots: Slots
    checksums: tuple[bytes, ...]
    """Of the source; empty while it has none."""
    priority: Priority


class Read(NamedTuple):
    """Read and verify a chunk's records into arena slots. Completion: ReadDone."""

    op: OpId
    space: SpaceId
    tier: Tier
    mark: Chunkmark
    slots: Slots
    deadline: float
    priority: Priority


class Write(NamedTuple):
    """Write a sealed chunk from arena slots into a store. Completion: WriteDone."""

    op: OpId
    space: SpaceId
    tier: Tier
    mark: Chunkmark
    slots: Slots
    checksums: tuple[bytes, ...]
    priority: Priority


class Delete(NamedTuple):
    """Remove a chunk's records from a store. Completion: DeleteDone."""

    op: OpId
    tier: Tier
    mark: Chunkmark
    priority: Priority


class Probe(NamedTuple):
    """Ask a store that others share which of these chunks it has, whole. Completion: ProbeDone."""

    op: OpId
    space: SpaceId
    tier: Tier
    keys: tuple[ChunkKey, ...]
    deadline: float
    priority: Priority


class Cancel(NamedTuple):
    """Nobody waits for this operation any more: drop it if it has not begun. Has no completion of its own."""

    op: OpId


Intent: TypeAlias = Seal | Copy | Read | Write | Delete | Probe | Cancel


# --- completions -----------------------------------------------------------------------------------------------------


class SealDone(NamedTuple):
    """`checksums`: one of 16 bytes for each part; empty unless OK."""

    op: OpId
    outcome: Outcome
    checksums: tuple[bytes, ...] = ()


class CopyDone(NamedTuple):
    """`checksums`: as in SealDone when the target is the arena."""

    op: OpId
    outcome: Outcome
    checksums: tuple[bytes, ...] = ()


class ReadDone(NamedTuple):
    """`checksums`: those the records carried, verified."""

    op: OpId
    outcome: Outcome
    checksums: tuple[bytes, ...] = ()
    mark: Chunkmark | None = None
    """What the records say of their chunk; of one that only a probe had named nobody here knew it."""


class WriteDone(NamedTuple):
    """`stored_bytes`: what the chunk's records really take in the store."""

    op: OpId
    outcome: Outcome
    stored_bytes: int = 0


class DeleteDone(NamedTuple):
    """OK also if there was nothing to remove."""

    op: OpId
    outcome: Outcome


class ProbeDone(NamedTuple):
    """`found`: for each key, in order; empty unless OK."""

    op: OpId
    outcome: Outcome
    found: tuple[bool, ...] = ()


Completion: TypeAlias = SealDone | CopyDone | ReadDone | WriteDone | DeleteDone | ProbeDone


# --- news ------------------------------------------------------------------------------------------------------------


class Recovered(NamedTuple):
    """A store found a record of an earlier run. One call per part, least recently used first."""

    tier: Tier
    mark: Chunkmark
    part: int
    stored_bytes: int


class RecoveryEnded(NamedTuple):
    """The store has named everything: chunks of which a part is still missing can go."""

    tier: Tier


class Vanished(NamedTuple):
    """A record that the core believes in is not there any more."""

    tier: Tier
    namespace: bytes
    key: ChunkKey
    reason: MissReason = MissReason.EVICTED


class SpaceReport(NamedTuple):
    """Bytes in the store's place that are not records of ours; they count against its capacity."""

    tier: Tier
    foreign_bytes: int


class SpaceLow(NamedTuple):
    """The place the store lives in runs out of space: give back at least so many bytes."""

    tier: Tier
    bytes_wanted: int


class StoreUp(NamedTuple):
    """The store works (again)."""

    tier: Tier


class StoreDown(NamedTuple):
    """The store's breaker has opened."""

    tier: Tier


class SessionDied(NamedTuple):
    """A client is gone; somebody may still have the arena mapped for it."""

    session: SessionId


class MappersGone(NamedTuple):
    """Nobody of this session can write to the arena any more."""

    session: SessionId


class Damaged(NamedTuple):
    """A chunk in memory failed its checksum (`verify_on_hit`, integrity check)."""

    tier: Tier
    namespace: bytes
    key: ChunkKey


News: TypeAlias = (
    Recovered
    | RecoveryEnded
    | Vanished
    | SpaceReport
    | SpaceLow
    | StoreUp
    | StoreDown
    | SessionDied
    | MappersGone
    | Damaged
)
