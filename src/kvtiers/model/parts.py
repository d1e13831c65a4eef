"""Parts: the shards that make up a chunk, one per (KV group, rank).

A chunk has one part in the simple case, one per rank under tensor parallelism (replicated ranks share one), one per KV
group in hybrid models. The parts of a chunk are committed, counted as a hit and evicted together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

from kvtiers.model.errors import LayoutMismatch
from kvtiers.model.keys import ChunkKey
from kvtiers.model.layout import KVLayout, round_to_page


class Part(NamedTuple):
    """One shard of every chunk of a namespace."""

    group: int
    """KV group (0 unless the model is hybrid)."""
    rank: int
    """Rank that owns the bytes (0 without tensor parallelism)."""
    nbytes: int
    """Payload bytes of this part of one full chunk."""

    @property
    def slot_bytes(self) -> int:
        """Bytes its slot takes: the payload rounded up to 4 KiB."""
        return round_to_page(self.nbytes)


class Parts(tuple[Part, ...]):
    """All parts of a namespace's chunks, in the order in which slots and records number them."""

    __slots__ = ()

    def __new__(cls, parts: Sequence[Part]) -> Self:
        if not parts:
            raise LayoutMismatch("a chunk has at least one part")
        if len({(part.group, part.rank) for part in parts}) != len(parts):
            raise LayoutMismatch("two parts have the same group and rank")
        if any(part.nbytes < 1 for part in parts):
            raise LayoutMismatch("a part has at least one byte")
        return super().__new__(cls, parts)

    @classmethod
    def single(cls, layout: KVLayout, chunk_tokens: int) -> Parts:
        """The simple case: one process, one KV group."""
        return cls((Part(group=0, rank=0, nbytes=layout.nbytes(chunk_tokens)),))

    @property
    def slot_bytes(self) -> int:
        """Arena bytes one chunk takes."""
        return sum(part.slot_bytes for part in self)


class RecordRef(NamedTuple):
    """Names one record in any store: a part of a chunk of a namespace."""

    namespace: bytes
    """Namespace digest, 32 bytes."""
    key: ChunkKey
    part: int
    """Index into the namespace's `Parts`."""
