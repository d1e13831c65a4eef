"""What `PagedEngine` is made of: requests, a pool of blocks, and ranks with their memory."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from kvtiers.integrations.vllm.blocks import Bytes, HostBlocks
from kvtiers.integrations.vllm.plan import EnginePlan, Region
from kvtiers.integrations.vllm.worker import WorkerSide
from kvtiers.model.namespace import Namespace
from kvtiers.node.client import NodeClient

BLOCK_TOKENS: Final = 4
CHUNK_BLOCKS: Final = 3
CHUNK_TOKENS: Final = BLOCK_TOKENS * CHUNK_BLOCKS
RANKS: Final = 2
REGIONS: Final = (96, 32)
"""Bytes of a block in each region."""
_GATE_WITHIN_S: Final = 20.0


def paged_plan(num_blocks: int, block_bytes: Sequence[int] = REGIONS, ranks: int = RANKS) -> EnginePlan:
    """Chunks of 12 tokens in three blocks."""
    starts = [num_blocks * sum(block_bytes[:index]) for index in range(len(block_bytes))]
    regions = tuple(Region(start, nbytes) for start, nbytes in zip(starts, block_bytes, strict=True))
    return EnginePlan(
        namespace=Namespace(model="paged", fingerprint="none", engine="tests", world_size=ranks),
        block_tokens=BLOCK_TOKENS,
        hash_tokens=BLOCK_TOKENS,
        chunk_tokens=CHUNK_TOKENS,
        group=0,
        world_size=ranks,
        num_blocks=num_blocks,
        regions=regions,
        itemsize=1,
    )


@dataclass
class PagedRequest:
    """As vLLM's, as far as the connector looks at it; and the blocks that it has."""

    request_id: str
    tokens: list[int]
    max_new: int
    kv_transfer_params: Mapping[str, Any] | None = None
    lora_request: Any | None = None
    skip_reading_prefix_cache: bool = False
    num_tokens: int = 0
    num_computed_tokens: int = 0
    num_output_placeholders: int = 0
    block_hashes: Sequence[bytes] = ()
    blocks: list[int] = field(default_factory=list)
    generated: int = 0
    remote: bool = False
    """Waits for a load."""

    def __post_init__(self) -> None:
        self.extend(())

    def extend(self, tokens: Iterable[int]) -> None:
        """More tokens, and the hashes of the blocks that they fill."""
        self.tokens.extend(tokens)
        self.num_tokens = len(self.tokens)
        while (len(self.block_hashes) + 1) * BLOCK_TOKENS <= self.num_tokens:
            begin = len(self.block_hashes) * BLOCK_TOKENS
            parent = self.block_hashes[-1] if self.block_hashes else b""
            block = self.tokens[begin : begin + BLOCK_TOKENS]
            self.block_hashes = [*self.block_hashes, hashlib.sha256(parent + repr(block).encode()).digest()]


@dataclass
class PagedBlock:
    """One of the pool's."""

    block_id: int
    ref_cnt: int = 0
    is_null: bool = False
    block_hash: bytes | None = None


class PagedPool:
    """Reference counts, a free list in order of eviction, and which block holds what."""

    def __init__(self, num_blocks: int, scribble: Callable[[int], None]) -> None:
        """`scribble` is called with each block that is given out."""
        self.blocks: Sequence[PagedBlock] = [PagedBlock(index) for index in range(num_blocks)]
        self.blocks[0].is_null, self.blocks[0].ref_cnt = True, 1
        self.cached: dict[bytes, int] = {}
        self._free = OrderedDict.fromkeys(range(1, num_blocks))
        self._scribble = scribble

    @property
    def used(self) -> int:
        """Blocks with references, without the null block."""
        return len(self.blocks) - 1 - len(self._free)

    @property
    def references(self) -> int:
        """On all blocks but the null block."""
        return sum(block.ref_cnt for block in self.blocks[1:])

    def get_cached_block(self, block_hash: bytes, kv_cache_group_ids: list[int]) -> list[PagedBlock] | None:
        """The block that holds it."""
        found = self.cached.get(block_hash)
        return None if found is None else [self.blocks[found]]

    def allocate(self, count: int) -> list[int] | None:
        """Blocks that nobody refers to; None if there are too few."""
        if count > len(self._free):
            return None
        found = [self._free.popitem(last=False)[0] for _ in range(count)]
        for index in found:
            block = self.blocks[index]
            assert block.ref_cnt == 0, "a block that somebody refers to was given out"
            if block.block_hash is not None:
                del self.cached[block.block_hash]
            block.block_hash, block.ref_cnt = None, 1
            self._scribble(index)
        return found

    def touch(self, blocks: Sequence[PagedBlock]) -> None:
        """One more reference on each."""
        for block in blocks:
            self._free.pop(block.block_id, None)
            block.ref_cnt += 1

    def free_blocks(self, ordered_blocks: Iterable[PagedBlock]) -> None:
        """One less on each; what has none is given out in this order."""
        for block in ordered_blocks:
            assert block.ref_cnt > 0, "a block was freed once too often"
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                self._free[block.block_id] = None
                if block.block_hash is None:
                    self._free.move_to_end(block.block_id, last=False)

    def keep(self, index: int, block_hash: bytes) -> None:
        """The block holds what has that hash, from now on."""
        block = self.blocks[index]
        if block.block_hash is None and block_hash not in self.cached:
            block.block_hash = block_hash
            self.cached[block_hash] = index

    def forget(self) -> None:
        """What blocks hold that nobody refers to, as if others had used them since."""
        for index in self._free:
            block_hash, self.blocks[index].block_hash = self.blocks[index].block_hash, None
            if block_hash is not None:
                del self.cached[block_hash]
            self._scribble(index)

    def reset(self) -> bool:
        """Forget what all blocks hold. False, and nothing happened, while any is in use."""
        if self.used:
            return False
        self.forget()
        return True


class RankLink:
    """A rank's client whose arena a test can take away, and whose copies it can hold up."""

    def __init__(self, client: NodeClient) -> None:
        self.client = client
        self.lost_after = -1
        """Views that are still given out; -1: no end."""
        self.gate = threading.Event()
        self.gate.set()

    @property
    def connected(self) -> bool:
        """As the client says."""
        return self.client.connected

    def step(self) -> int:
        """The client's."""
        return self.client.step()

    def view(self, arena: bytes, offset: int, nbytes: int) -> Bytes | None:
        """Held up, or taken away, or the client's."""
        self.gate.wait(_GATE_WITHIN_S)
        if self.lost_after == 0:
            return None
        self.lost_after = max(-1, self.lost_after - 1)
        return self.client.view(arena, offset, nbytes)


class Rank:
    """One worker: its memory, its link and its side of the connector."""

    def __init__(self, rank: int, plan: EnginePlan, client: NodeClient) -> None:
        self.rank = rank
        self.link = RankLink(client)
        self.regions = [np.zeros((plan.num_blocks, region.block_bytes), np.uint8) for region in plan.regions]
        self.worker = WorkerSide(
            self.link,
            HostBlocks(self.regions, plan.blocks_per_chunk),
            rank=rank,
            part_bytes=plan.blocks_per_chunk * plan.block_bytes,
            block_bytes=plan.block_bytes,
        )

    def compute(self, block: int, block_hash: bytes | None, weights: int) -> None:
        """The right bytes for that hash; noise where the block is not full yet."""
        for index, region in enumerate(self.regions):
            source = block_hash or os.urandom(8)
            region[block] = block_kv(source, self.rank, index, weights, region.shape[1])

    def holds(self, block: int, block_hash: bytes, weights: int) -> bool:
        """Whether the block has the right bytes for that hash."""
        return all(
            np.array_equal(region[block], block_kv(block_hash, self.rank, index, weights, region.shape[1]))
            for index, region in enumerate(self.regions)
        )

    def scribble(self, block: int) -> None:
        """What was there is no more."""
        for region in self.regions:
            region[block] = 0xEE


def block_kv(block_hash: bytes, rank: int, region: int, weights: int, nbytes: int) -> Bytes:
    """The KV of a block in one region of one rank."""
    seed = hashlib.shake_128(block_hash + bytes([rank, region]) + weights.to_bytes(8, "little"))
    return np.frombuffer(seed.digest(nbytes), np.uint8)
