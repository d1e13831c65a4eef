"""Looks at chunks that change nothing, most of them walks over all of a tier. Each begins with a snapshot of the policy's order, and is then walked outside the owner's lock."""

from __future__ import annotations

from collections.abc import Iterator

from kvtiers.core.index import Chunk, MemoryCopy, MemoryState, StoredCopy, StoredState
from kvtiers.core.state import State
from kvtiers.core.tiers import StoreTier
from kvtiers.model.keys import ChunkKey
from kvtiers.model.tiers import Tier


def order_of_use(store: StoreTier) -> Iterator[tuple[bytes, ChunkKey, int]]:
    """Namespace, key and number of parts of the chunks that it has whole, least recently used first."""
    return (
        (chunk.space.digest, chunk.key, chunk.num_parts)
        for chunk, copy in _copies(store)
        if copy.state is StoredState.READY
    )


def parts_in_doubt(store: StoreTier) -> Iterator[int]:
    """Numbers of parts of the chunks of which some parts are there, and some not."""
    return (chunk.num_parts for chunk, copy in _copies(store) if copy.state is StoredState.PARTIAL)


def records(store: StoreTier) -> Iterator[tuple[bytes, int]]:
    """Namespace and bytes of each chunk that it has."""
    return ((chunk.space.digest, copy.nbytes) for chunk, copy in _copies(store))


def copies(state: State, tier: Tier) -> list[MemoryCopy]:
    """All copies attached in a tier of slots. O(n)."""
    chunks = (chunk for space in state.index.spaces() for chunk in space.chunks.values())
    return [copy for chunk in chunks if (copy := chunk.memory(tier)) is not None]


def is_on_its_way(state: State, chunk: Chunk) -> bool:
    """Whether a chunk is being sealed, copied or written, or waits for that."""
    if any(store.is_to_write(chunk) for store in state.stores.values()):
        return True
    if state.gpu is not None and chunk in state.gpu.backlog:
        return True
    writing = any(s is not None and s.state is StoredState.WRITING for s in (chunk.disk, chunk.remote))
    cpu = chunk.cpu
    return writing or (cpu is not None and (cpu.state is not MemoryState.READY or not cpu.checksums))


def _copies(store: StoreTier) -> Iterator[tuple[Chunk, StoredCopy]]:
    chunks = store.policy.coldest_first()  # the snapshot: now, not at the first step of the walk
    return ((chunk, copy) for chunk in chunks if (copy := chunk.stored(store.tier)) is not None)
