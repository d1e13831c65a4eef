"""Sessions and their tickets: what a client has asked for and which leases it holds for that."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from kvtiers.core.index import Chunk, MemoryCopy, Space
from kvtiers.core.messages import SessionId, Slots, TicketId
from kvtiers.model.keys import ChunkKey
from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.model.tiers import Tier


class Match(NamedTuple):
    """What a lookup found: the number of chunks from the start, where each would come from, and why it stopped."""

    tiers: tuple[Tier, ...]
    pending: int
    """Chunks at the end of the match that are being read or copied at this moment."""
    stopped_by: MissReason | None
    """None: every chunk asked for was found."""


class StoreSlot(NamedTuple):
    """One chunk accepted for storing: write its parts to `slots` of `tier`, then commit."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    """Its place in the keys given."""
    tier: Tier
    slots: Slots


class LoadSlot(NamedTuple):
    """One chunk ready to be copied out: it lies, leased, in `slots` of `memory`; it came from `tier`."""

    memory: Tier
    slots: Slots
    tier: Tier
    checksums: tuple[bytes, ...]
    """Of each part; empty while it has none: one made in the GPU pool gets them when it is copied down."""


class StoreTicket:
    """A store under way. Its copies each hold one lease until committed or aborted."""

    __slots__ = ("accepted", "chain", "copies", "edges", "first", "id", "keys", "near", "pins", "position", "refused",
                 "room", "root", "session", "space")  # fmt: skip

    def __init__(  # noqa: PLR0917 - a chain; all of it is always given
        self,
        ticket_id: TicketId,
        session: SessionId,
        space: Space,
        root: ChunkKey,
        keys: Sequence[ChunkKey],
        first: int,
        near: int | None = None,
    ) -> None:
        self.id = ticket_id
        self.near = near
        """The segment to take slots from, if it has any."""
        self.session = session
        self.space = space
        self.root = root
        self.keys = keys
        self.first = first
        """Number of the first chunk to be stored; those before it are only looked at."""
        self.position = 0
        """Keys looked at so far; the ticket is complete when it is their number."""
        self.room: int | None = None
        """Bytes of slots that it may still be given; None: as many as there are."""
        self.edges: list[MemoryCopy] = []
        """Copies of the chain that nothing behind them protects from eviction."""
        self.pins: list[MemoryCopy] = []
        """Of these, those leased while room is being made for what follows."""
        self.accepted: list[StoreSlot] = []
        self.refused: list[tuple[int, Refusal]] = []
        self.copies: dict[int, MemoryCopy] = {}
        """By index; those not committed yet."""
        self.chain: list[Chunk] = []
        """The whole prefix, for touching it from last to first."""


class LoadState(Enum):
    """How far a load is."""

    OPENING = "opening"
    """Still being matched."""
    PROBING = "probing"
    """Matched as far as anything is known here; a shared store is being asked for the rest."""
    QUEUED = "queued"
    """Waiting for staging room; holds none of it."""
    STAGING = "staging"
    """Waiting for reads."""
    SETTLED = "settled"
    """Answered; its chunks are leased until it is released."""
    RELEASED = "released"


class LoadTicket:
    """A load under way."""

    __slots__ = (
        "asks_until",
        "copies",
        "deadline",
        "id",
        "keys",
        "near",
        "probed",
        "ready",
        "room",
        "session",
        "space",
        "state",
        "stopped_by",
        "tiers",
        "unasked",
        "waiting",
    )

    def __init__(  # noqa: PLR0917 - a chain; all of it is always given
        self,
        ticket_id: TicketId,
        session: SessionId,
        space: Space,
        keys: Sequence[ChunkKey],
        deadline: float,
        near: int | None = None,
    ) -> None:
        self.id = ticket_id
        self.near = near
        """The segment to take slots from, if it has any."""
        self.session = session
        self.space = space
        self.keys = keys
        self.deadline = deadline
        self.asks_until = deadline
        """When it stops waiting for a probe, if it has something to read: that takes time as well."""
        self.state = LoadState.OPENING
        self.room = 0
        """Staging bytes that it may still ask for; only while OPENING."""
        self.probed = 0
        """Probes it has waited for."""
        self.unasked: MissReason | None = None
        """Why the last of them gave no answer, or nobody was asked."""
        self.copies: list[MemoryCopy | None] = []
        """One for each chunk matched; None where a read is still to be begun. Each one holds a lease."""
        self.tiers: list[Tier] = []
        self.waiting = 0
        """Copies among them that are still being filled."""
        self.ready = 0
        """Chunks from the start known to lie in memory, verified and leased, before the answer; never less until it is released."""
        self.stopped_by: MissReason | None = None

    @property
    def num_chunks(self) -> int:
        """Chunks matched so far; final once settled."""
        return len(self.copies)

    def slots(self, begin: int = 0, end: int | None = None) -> list[LoadSlot]:
        """Where the chunks lie. Only of a settled ticket, or up to `ready`."""
        return [
            LoadSlot(copy.tier, copy.slots, tier, copy.checksums)
            for copy, tier in zip(self.copies[begin:end], self.tiers[begin:end], strict=True)
            if copy is not None
        ]


class Session:
    """One client of the core: an engine's process, or the process the cache lives in."""

    __slots__ = ("dead", "id", "near", "quarantine", "spaces", "tickets")

    def __init__(self, session_id: SessionId, near: int | None = None) -> None:
        self.id = session_id
        self.near = near
        """The segment of memory nearest to it."""
        self.tickets: dict[TicketId, StoreTicket | LoadTicket] = {}
        self.spaces: dict[Space, None] = {}
        """Namespaces that it is attached to."""
        self.dead = False
        self.quarantine: list[MemoryCopy] = []
        """Copies that a dead client may still be writing to; leased until nobody maps the arena for it."""
