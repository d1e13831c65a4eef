"""What is known of every chunk: which tiers hold it, in what state, under which parent.

A chunk stands in the index while a tier holds it, while a child of it stands there, or while it is remembered as a ghost
(evicted, so that a later miss can say so). Memory copies and stored copies know nothing of policies or budgets: those are
the tiers' (`tiers.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from enum import Enum

from typing import TYPE_CHECKING

from kvtiers.core.messages import Chunkmark, OpId, Slots, SpaceId
from kvtiers.model.keys import ChunkKey
from kvtiers.model.parts import Parts
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier

if TYPE_CHECKING:
    from kvtiers.core.tickets import LoadTicket


class MemoryState(Enum):
    """Who writes to the slots of a memory copy."""

    STORING = "storing"
    """An engine; not readable."""
    FILLING = "filling"
    """A read or copy of ours; loads may wait for it."""
    READY = "ready"
    """Nobody: readable."""


class MemoryCopy:
    """A chunk's bytes in the arena or the GPU pool. Its slots are free only when `leases` is 0 and it is detached."""

    __slots__ = ("checksums", "chunk", "detached", "filled_by", "leases", "leaving", "nbytes", "slots", "staged", "state",
                 "tier", "waiters")  # fmt: skip

    def __init__(self, chunk: Chunk, tier: Tier, slots: Slots, nbytes: int, state: MemoryState, *, staged: bool) -> None:
        self.chunk = chunk
        self.tier = tier
        self.slots = slots
        self.nbytes = nbytes
        self.state = state
        self.staged = staged
        """In the staging share, not yet part of the cache."""
        self.leases = 0
        self.leaving = False
        """Being written out so that it can be dropped."""
        self.detached = False
        """No longer its chunk's copy: freed with the last lease."""
        self.checksums: tuple[bytes, ...] = ()
        self.filled_by: OpId | None = None
        """The read that is filling it."""
        self.waiters: list[LoadTicket] = []
        """Loads waiting until FILLING ends."""


class StoredState(Enum):
    """What a store is doing with a chunk's records."""

    WRITING = "writing"
    READY = "ready"
    PARTIAL = "partial"
    """Recovered, but some part has not been seen yet."""
    DELETING = "deleting"


class StoredCopy:
    """A chunk's records in a store."""

    __slots__ = ("nbytes", "parts_seen", "readers", "state")

    def __init__(self, nbytes: int, state: StoredState) -> None:
        self.nbytes = nbytes
        """Bytes it takes there; an estimate while WRITING."""
        self.state = state
        self.readers = 0
        self.parts_seen = 0
        """Bit set of the parts that recovery has named."""


class Chunk:
    """One chunk of one namespace."""

    __slots__ = ("children", "cpu", "disk", "gone", "gpu", "key", "num_parts", "parent", "parent_key", "remote", "space",
                 "token_count", "token_start")  # fmt: skip

    def __init__(self, space: Space, key: ChunkKey, parent: Chunk | None, parent_key: ChunkKey, token_start: int, token_count: int) -> None:
        self.space = space
        self.key = key
        self.parent = parent
        self.parent_key = parent_key
        self.token_start = token_start
        self.token_count = token_count
        self.num_parts = 0
        self.children: set[Chunk] | None = None
        self.gpu: MemoryCopy | None = None
        self.cpu: MemoryCopy | None = None
        self.disk: StoredCopy | None = None
        self.remote: StoredCopy | None = None
        self.gone: MissReason = MissReason.NEVER_SEEN
        """Why no tier has it, while none has."""

    @property
    def held(self) -> bool:
        """Whether any tier holds, receives or is deleting it."""
        return self.gpu is not None or self.cpu is not None or self.disk is not None or self.remote is not None

    def memory(self, tier: Tier) -> MemoryCopy | None:
        """Its copy in a tier of slots."""
        return self.gpu if tier is Tier.GPU else self.cpu

    def set_memory(self, tier: Tier, copy: MemoryCopy | None) -> None:
        """Attach or detach the copy in a tier of slots."""
        if tier is Tier.GPU:
            self.gpu = copy
        else:
            self.cpu = copy

    def stored(self, tier: Tier) -> StoredCopy | None:
        """Its copy in a tier of records."""
        return self.disk if tier is Tier.DISK else self.remote

    def set_stored(self, tier: Tier, copy: StoredCopy | None) -> None:
        """Attach or detach the copy in a tier of records."""
        if tier is Tier.DISK:
            self.disk = copy
        else:
            self.remote = copy

    @property
    def mark(self) -> Chunkmark:
        """What its records' headers say."""
        return Chunkmark(
            self.space.digest, self.key, self.parent_key, self.num_parts, self.token_start, self.token_count
        )


class Space:
    """A namespace as this core knows it. `parts` is None until a session attaches: recovery may name it earlier."""

    __slots__ = ("chunk_tokens", "chunks", "digest", "id", "parts")

    def __init__(self, space_id: SpaceId, digest: bytes) -> None:
        self.id = space_id
        self.digest = digest
        self.parts: Parts | None = None
        self.chunk_tokens = 0
        self.chunks: dict[bytes, Chunk] = {}


class Index:
    """All namespaces and their chunks, and the ghosts of those that went."""

    def __init__(self, ghosts: int) -> None:
        self._spaces: dict[bytes, Space] = {}
        self._by_id: dict[SpaceId, Space] = {}
        self._ghosts: OrderedDict[Chunk, None] = OrderedDict()
        self._max_ghosts = ghosts

    def space(self, digest: bytes) -> Space:
        """The namespace of that digest, made if it is new."""
        space = self._spaces.get(digest)
        if space is None:
            space = Space(SpaceId(len(self._spaces)), digest)
            self._spaces[digest] = space
            self._by_id[space.id] = space
        return space

    def space_by_id(self, space_id: SpaceId) -> Space:
        """The namespace a session got at attach."""
        return self._by_id[space_id]

    def find_space(self, digest: bytes) -> Space | None:
        """The namespace of that digest, if it is known."""
        return self._spaces.get(digest)

    def spaces(self) -> Iterator[Space]:
        """All namespaces."""
        return iter(self._spaces.values())

    def ensure(self, space: Space, key: ChunkKey, parent_key: ChunkKey, token_start: int, token_count: int) -> Chunk:
        """The chunk of that key, made if it is new, linked to its parent (made too, if it is not the first of its chain)."""
        chunk = space.chunks.get(key)
        if chunk is not None:
            if not chunk.parent_key:  # was made as somebody's unknown parent
                chunk.parent_key, chunk.token_start, chunk.token_count = parent_key, token_start, token_count
                self._link(chunk)
            self._ghosts.pop(chunk, None)
            return chunk
        chunk = Chunk(space, key, None, parent_key, token_start, token_count)
        space.chunks[key] = chunk
        self._link(chunk)
        return chunk

    def _link(self, chunk: Chunk) -> None:
        if chunk.token_start == 0:
            return
        chunks = chunk.space.chunks
        parent = chunks.get(chunk.parent_key)
        if parent is None:
            parent = Chunk(chunk.space, chunk.parent_key, None, ChunkKey(b""), 0, 0)
            chunks[chunk.parent_key] = parent
        chunk.parent = parent
        if parent.children is None:
            parent.children = set()
        parent.children.add(chunk)

    def let_go(self, chunk: Chunk, reason: MissReason) -> None:
        """No tier holds the chunk any more: remember it as a ghost, forget the oldest ghosts."""
        chunk.gone = reason
        self._ghosts[chunk] = None
        self._ghosts.move_to_end(chunk)
        while len(self._ghosts) > self._max_ghosts:
            ghost, _ = self._ghosts.popitem(last=False)
            ghost.gone = MissReason.NEVER_SEEN
            self._forget(ghost)

    def forget(self, chunk: Chunk) -> None:
        """Forget a chunk that no tier holds and that nobody need hear of."""
        self._ghosts.pop(chunk, None)
        self._forget(chunk)

    def _forget(self, chunk: Chunk) -> None:
        while not chunk.held and not chunk.children and chunk not in self._ghosts:
            chunk.space.chunks.pop(chunk.key, None)
            parent, chunk.parent = chunk.parent, None
            if parent is None or parent.children is None:
                return
            parent.children.discard(chunk)
            chunk = parent

    @property
    def num_ghosts(self) -> int:
        """Evicted chunks that are remembered."""
        return len(self._ghosts)

    def check_integrity(self) -> list[str]:
        """Links agree in both directions and nothing stands here without a reason. O(n)."""
        problems: list[str] = []
        for space in self._spaces.values():
            for key, chunk in space.chunks.items():
                name = f"chunk {key.hex()[:12]}"
                if chunk.key != key or chunk.space is not space:
                    problems.append(f"{name} stands under another key or namespace")
                if chunk.parent is not None and chunk not in (chunk.parent.children or ()):
                    problems.append(f"{name} is not among its parent's children")
                for child in chunk.children or ():
                    if child.parent is not chunk or space.chunks.get(child.key) is not child:
                        problems.append(f"{name} has a child that does not know it")
                if not chunk.held and not chunk.children and chunk not in self._ghosts:
                    problems.append(f"{name} is held by no tier and not a ghost")
        if len(self._ghosts) > self._max_ghosts:
            problems.append(f"{len(self._ghosts)} ghosts are remembered, {self._max_ghosts} allowed")
        return problems
