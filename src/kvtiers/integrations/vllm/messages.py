"""What the scheduler's side tells the workers in each step, and what they tell back. Pickled by vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class ChunkCopy(NamedTuple):
    """Some blocks of one chunk, between its slots and the engine's blocks."""

    offsets: tuple[int, ...]
    """The chunk's slot for each rank: byte offset in the arena."""
    first: int
    """Place of the first block in the chunk."""
    blocks: tuple[int, ...]
    """Ids of the engine's blocks, in order."""


@dataclass(slots=True)
class LoadJob:
    """Fill a request's blocks from the arena. Reported by its request once nothing can write to them any more."""

    request_id: str
    arena: bytes
    chunks: list[ChunkCopy]


@dataclass(slots=True)
class StoreJob:
    """Copy blocks, which are pinned, to the arena. Reported by its number."""

    number: int
    arena: bytes
    chunks: list[ChunkCopy]


@dataclass(slots=True)
class StepJobs:
    """All that begins with one step."""

    loads: list[LoadJob] = field(default_factory=list)
    stores: list[StoreJob] = field(default_factory=list)


@dataclass(slots=True)
class CopyReport:
    """What a worker has finished, or all of them together."""

    stored: dict[int, int] = field(default_factory=dict)
    """Workers that have copied the store of that number."""
    failed: set[int] = field(default_factory=set)
    """Stores that some worker could not copy."""
    load_seconds: float = 0.0
    load_bytes: int = 0
    store_seconds: float = 0.0
    store_bytes: int = 0

    def add(self, other: CopyReport) -> None:
        """Take in what another worker has finished."""
        for number, workers in other.stored.items():
            self.stored[number] = self.stored.get(number, 0) + workers
        self.failed |= other.failed
        self.load_seconds += other.load_seconds
        self.load_bytes += other.load_bytes
        self.store_seconds += other.store_seconds
        self.store_bytes += other.store_bytes

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not self.stored and not self.load_bytes
