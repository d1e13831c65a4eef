"""What a client's calls give back: filled in by a later `NodeClient.step`, never waited for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvtiers.model.parts import Parts
from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.model.tiers import Tier

Offsets = npt.NDArray[np.uint64]


class Attachment:
    """A namespace declared to the service. Made anew by the client at each reconnect."""

    __slots__ = ("chunk_tokens", "error", "itemsize", "namespace", "parts", "space")

    def __init__(self, namespace: bytes, parts: Parts, chunk_tokens: int, itemsize: int) -> None:
        self.namespace = namespace
        self.parts = parts
        self.chunk_tokens = chunk_tokens
        self.itemsize = itemsize
        self.space: int | None = None
        """The service's number for it; None while there is none, and everything is a miss."""
        self.error: str | None = None
        """Why the service does not take it (another layout under the same digest, chunks too large)."""

    @property
    def ready(self) -> bool:
        """Whether the service knows it at this moment."""
        return self.space is not None


class Granted:
    """A load or a store: asked for, answered, and closed by whoever asked."""

    __slots__ = ("arena", "closed", "done", "epoch", "offsets", "op", "space")

    def __init__(self, op: int, space: Attachment, epoch: int) -> None:
        self.op = op
        self.space = space
        self.epoch = epoch
        """Counts the client's connections; the service's own numbers begin anew when it does."""
        self.done = False
        """Whether the answer is there. It always comes: at the deadline, or when the connection is lost."""
        self.closed = False
        """Whether its slots were given back."""
        self.arena = b""
        """Names the arena that the offsets are of; empty without slots."""
        self.offsets: Offsets = np.zeros((0, len(space.parts)), np.uint64)
        """Byte offset of each part of each chunk, `[chunks, parts]`."""


class Load(Granted):
    """Chunks from the start of the keys that lie in the arena, verified and leased, from `done` until `release`."""

    __slots__ = ("stopped_by", "tiers")

    def __init__(self, op: int, space: Attachment, epoch: int) -> None:
        super().__init__(op, space, epoch)
        self.tiers: tuple[Tier, ...] = ()
        """Where each chunk came from."""
        self.stopped_by: MissReason | None = None
        """Why it is not more; None if every key was found. TIER_OPEN: the service can't be reached."""

    @property
    def num_chunks(self) -> int:
        """Chunks that can be copied out."""
        return len(self.tiers)


class Store(Granted):
    """Chunks to be written to their slots, then committed or aborted."""

    __slots__ = ("committed", "indices", "lost", "open", "refused")

    def __init__(self, op: int, space: Attachment, epoch: int) -> None:
        super().__init__(op, space, epoch)
        self.indices: tuple[int, ...] = ()
        """Place among the keys of each chunk accepted; a row of `offsets` each."""
        self.open: set[int] = set()
        """Those neither committed nor aborted yet."""
        self.committed: int = 0
        """Chunks of which the service has said that they can be hit."""
        self.lost: int = 0
        """Chunks that were to be committed, but the service refused, or was gone before it answered."""
        self.refused: list[tuple[int, int, Refusal]] = []
        """Runs of chunks not accepted: first index, count, why. TIER_OPEN: the service can't be reached."""


class Answer:
    """Any other answer: `value` once `done`, None if it did not come."""

    __slots__ = ("done", "value")

    def __init__(self) -> None:
        self.done = False
        self.value: Any = None
