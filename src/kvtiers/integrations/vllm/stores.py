"""Chunks on their way into the cache: offered, their blocks pinned, copied by the workers, committed, unpinned.

    offer (pins) → the service says which it wants → the others' blocks are unpinned → workers copy → all ranks have → commit, unpin

A pin is a reference on a block, as a request has one: whatever happens to the request, the block is not given to another before
the copy has ended. Pins are bounded by a share of the engine's blocks, and in time: the service answers or counts as gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from kvtiers.integrations.vllm.messages import ChunkCopy, CopyReport, StoreJob
from kvtiers.model.keys import ChunkKey
from kvtiers.model.reasons import Refusal
from kvtiers.node.client import NodeClient
from kvtiers.node.handles import Attachment, Store

_COPIED_WITHIN_S: Final = 1.0
"""A copy that takes longer is not waited for: requests are preempted instead."""
_ANSWERED_WITHIN_S: Final = 1.0
"""An idle engine makes no steps for an answer that takes longer."""


class BlockPool(Protocol):
    """A `vllm.v1.core.block_pool.BlockPool`, as far as it is used."""

    blocks: Sequence[Any]

    def get_cached_block(self, block_hash: Any, kv_cache_group_ids: list[int]) -> Any:
        """The blocks that hold it, None if there are none."""
        ...

    def touch(self, blocks: Sequence[Any]) -> None:
        """One more reference on each."""
        ...

    def free_blocks(self, ordered_blocks: Iterable[Any]) -> None:
        """One less; what has none is evicted in this order."""
        ...


@dataclass(slots=True)
class Offer:
    """Chunks of one request that were offered together."""

    number: int
    store: Store
    blocks: dict[int, tuple[int, ...]]
    """By index of the chunk: its blocks, pinned."""
    broken: Callable[[], None]
    """To be called if the cache lacks what comes before them."""
    copied_by: int = 0
    """Workers that have copied them."""
    failed: bool = False
    dispatched_at: float | None = None
    """When workers were told to copy them."""


class Commit(NamedTuple):
    """Chunks of which the service has yet to say that they can be hit."""

    store: Store
    chunks: int
    posted_at: float


class Stores:
    """All offers of one engine."""

    def __init__(
        self, client: NodeClient, *, world_size: int, max_pinned: int, clock: Callable[[], float]
    ) -> None:
        """`max_pinned`: blocks."""
        self._client = client
        self._clock = clock
        self._world_size = world_size
        self._max_pinned = max_pinned
        self._offers: dict[int, Offer] = {}
        self._commits: list[Commit] = []
        self._last = 0
        self._pool: BlockPool | None = None
        self.pinned = 0
        """Blocks."""
        self.counters = dict.fromkeys(("stored", "refused", "failed"), 0)
        """Chunks that can be hit, not wanted by the service, lost in copying or on their way to it."""

    def bind(self, pool: BlockPool) -> None:
        """The engine's blocks."""
        self._pool = pool

    def offer(
        self,
        space: Attachment,
        root: ChunkKey,
        keys: Sequence[ChunkKey],
        blocks: dict[int, tuple[int, ...]],
        broken: Callable[[], None],
    ) -> int:
        """Offer the last `len(blocks)` chunks of a chain; returns how many of them were, from the first on.

        `broken` is called in `take_jobs` if the cache lacks chunks before them, which it has to have: none of these is taken then.
        """
        pool = self._pool
        first = len(keys) - len(blocks)
        taken: dict[int, tuple[int, ...]] = {}
        room = self._max_pinned - self.pinned
        for index in range(first, len(keys)):
            ids = blocks[index]
            if pool is None or len(ids) > room or any(pool.blocks[block].is_null for block in ids):
                break
            room -= len(ids)
            taken[index] = ids
        if not taken or pool is None:
            return 0
        store = self._client.open_store(space, root, keys[: first + len(taken)], first=first)
        if store.done:  # nobody is there
            self.counters["refused"] += len(taken)
            return len(taken)
        self._pin(pool, taken)
        self._last += 1
        self._offers[self._last] = Offer(self._last, store, taken, broken)
        return len(taken)

    def take_jobs(self) -> list[StoreJob]:
        """What the service has answered by now; what it does not want is unpinned."""
        self._count_committed()
        jobs, now = [], self._clock()
        for offer in [one for one in self._offers.values() if one.store.done and one.dispatched_at is None]:
            offer.dispatched_at = now
            store = offer.store
            wanted = set(store.indices)
            refused = {index: ids for index, ids in offer.blocks.items() if index not in wanted}
            self.counters["refused"] += len(refused)
            if (min(offer.blocks), Refusal.CHAIN_BROKEN) in {(first, why) for first, _, why in store.refused}:
                offer.broken()
            self._unpin(refused)
            for index in refused:
                del offer.blocks[index]
            if not offer.blocks:
                self._client.abort(store)
                del self._offers[offer.number]
                continue
            chunks = [
                ChunkCopy(tuple(map(int, store.offsets[row])), 0, offer.blocks[index])
                for row, index in enumerate(store.indices)
            ]
            jobs.append(StoreJob(offer.number, store.arena, chunks))
        return jobs

    def copied(self, report: CopyReport) -> None:
        """What the workers have done; a store is over when all of them have."""
        for number, workers in report.stored.items():
            offer = self._offers.get(number)
            if offer is None:
                continue
            offer.copied_by += workers
            offer.failed = offer.failed or number in report.failed
            if offer.copied_by < self._world_size:
                continue
            if offer.failed:
                self._client.abort(offer.store)
                self.counters["failed"] += len(offer.blocks)
            elif self._client.commit(offer.store):
                self._commits.append(Commit(offer.store, len(offer.blocks), self._clock()))
            else:  # not posted: the service they were given by is gone
                self.counters["failed"] += len(offer.blocks)
            self._unpin(offer.blocks)
            del self._offers[number]

    @property
    def busy(self) -> bool:
        """Whether blocks are pinned: the engine must go on stepping."""
        return bool(self._offers)

    @property
    def settling(self) -> bool:
        """Whether the service is about to say that chunks can be hit: they are counted in a step of the engine's after that."""
        since = self._clock() - _ANSWERED_WITHIN_S
        return any(commit.posted_at > since for commit in self._commits)

    @property
    def frees_blocks(self) -> bool:
        """Whether blocks that nobody else uses are free as soon as workers have copied them, which takes a moment."""
        pool, began = self._pool, self._clock() - _COPIED_WITHIN_S
        return pool is not None and any(
            pool.blocks[block].ref_cnt == 1
            for offer in self._offers.values()
            if offer.dispatched_at is not None and offer.dispatched_at > began
            for blocks in offer.blocks.values()
            for block in blocks
        )

    def _count_committed(self) -> None:
        waiting = []
        for commit in self._commits:
            store = commit.store
            if store.committed + store.lost < commit.chunks:
                waiting.append(commit)
            else:
                self.counters["stored"] += store.committed
                self.counters["failed"] += store.lost
        self._commits = waiting

    def _pin(self, pool: BlockPool, chunks: dict[int, tuple[int, ...]]) -> None:
        ids = [block for blocks in chunks.values() for block in blocks]
        pool.touch([pool.blocks[block] for block in ids])
        self.pinned += len(ids)

    def _unpin(self, chunks: dict[int, tuple[int, ...]]) -> None:
        if self._pool is None:
            return
        ids = [block for index in sorted(chunks) for block in chunks[index]]
        self._pool.free_blocks(
            self._pool.blocks[block] for block in reversed(ids)
        )  # a chain's end goes first
        self.pinned -= len(ids)
