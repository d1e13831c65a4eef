"""An engine of one process, stepped by whoever holds it: stores and loads through a `NodeClient` and checks every byte it reads.

The KV of a chunk is drawn from its key (`cache_oracle`), so engines with equal models agree without talking to each other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtiers.model.keys import ChunkKey, root_key
from kvtiers.model.layout import KVLayout
from kvtiers.model.namespace import Namespace
from kvtiers.model.parts import Part, Parts
from kvtiers.node.client import NodeClient
from kvtiers.node.handles import Granted, Load, Store
from kvtiers.testing.cache_oracle import SMALL_CHUNK, SMALL_LAYOUT, CacheOracle, WrongKV

Bytes = npt.NDArray[np.uint8]
PATIENCE_S: Final = 30.0


class DirectEngine:
    """One client with one model. `ranks`: parts that each chunk's bytes are cut into."""

    def __init__(
        self,
        socket: Path,
        model: str = "a-model",
        *,
        layout: KVLayout = SMALL_LAYOUT,
        chunk_tokens: int = SMALL_CHUNK,
        ranks: int = 1,
        engine: bytes = b"",
    ) -> None:
        namespace = Namespace(
            model=model, fingerprint=f"fingerprint of {model}", engine="tests", world_size=ranks
        )
        self.oracle = CacheOracle(namespace, layout, chunk_tokens)
        self.root: ChunkKey = root_key(self.oracle.digest)
        self.chunk_tokens = chunk_tokens
        self.part_bytes = layout.nbytes(chunk_tokens) // ranks
        parts = Parts([Part(0, rank, self.part_bytes) for rank in range(ranks)])
        self.client = NodeClient(socket, name=model, engine=engine)
        self.space = self.client.attach(
            self.oracle.digest, parts, chunk_tokens=chunk_tokens, itemsize=layout.itemsize
        )

    # --- stepping ---

    def until(self, condition: Callable[[], bool], timeout: float = PATIENCE_S) -> None:
        """Step until it comes true; AssertionError if it does not in time."""
        deadline = time.monotonic() + timeout
        self.client.step()
        while not condition():
            assert time.monotonic() < deadline, "it did not come true in time"
            time.sleep(0.001)
            self.client.step()

    def connect(self, timeout: float = PATIENCE_S) -> DirectEngine:
        """Step until the service knows the model."""
        self.until(lambda: self.space.ready, timeout)
        return self

    # --- storing and loading ---

    def tokens(self, document: int, chunks: int) -> list[int]:
        """A prompt of so many chunks; prompts of one document begin alike."""
        start = document * 1_000_000
        return list(range(start, start + chunks * self.chunk_tokens))

    def kv(self, key: ChunkKey) -> Bytes:
        """The right bytes of a chunk, flat."""
        return self.oracle.chunk(key).reshape(-1).view(np.uint8)

    def open_store(self, tokens: list[int]) -> Store:
        """Ask for slots, and wait for the answer."""
        store = self.client.open_store(self.space, self.root, self.oracle.keys(tokens))
        self.until(lambda: store.done)
        return store

    def write(self, store: Store, tokens: list[int]) -> None:
        """Fill its slots with the right bytes."""
        keys = self.oracle.keys(tokens)
        for row, index in enumerate(store.indices):
            for slot, part in zip(self.slots(store, row), self._cut(self.kv(keys[index])), strict=True):
                np.copyto(slot, part)

    def store(self, tokens: list[int]) -> Store:
        """Open, write, commit, and wait until it can be hit."""
        store = self.open_store(tokens)
        self.write(store, tokens)
        self.client.commit(store)
        self.until(lambda: store.committed == len(store.indices))
        return store

    def stage(self, tokens: list[int], timeout: float = 10.0) -> Load:
        """Ask for a prompt, and wait for the answer; its slots are leased from then on."""
        load = self.client.stage(self.space, self.oracle.keys(tokens), deadline=time.monotonic() + timeout)
        self.until(lambda: load.done)
        return load

    def load(self, tokens: list[int], timeout: float = 10.0) -> Load:
        """Stage, check, release."""
        load = self.stage(tokens, timeout)
        self.check(load, tokens)
        self.client.release(load)
        self.client.step()
        return load

    def check(self, load: Load, tokens: list[int]) -> None:
        """Every byte of every chunk. Raises WrongKV."""
        keys = self.oracle.keys(tokens)
        for row in range(load.num_chunks):
            for slot, part in zip(self.slots(load, row), self._cut(self.kv(keys[row])), strict=True):
                if not np.array_equal(slot, part):
                    raise WrongKV(f"chunk {row} of {load.num_chunks} has bytes that nobody stored there")

    def slots(self, handle: Granted, row: int) -> list[Bytes]:
        """The views of one chunk's parts. AssertionError if the arena is not mapped any more."""
        views = [
            self.client.view(handle.arena, int(offset), self.part_bytes) for offset in handle.offsets[row]
        ]
        found = [view for view in views if view is not None]
        assert len(found) == len(views), "the arena is not mapped any more"
        return found

    def stats(self) -> dict[str, Any]:
        """The service's statistics."""
        answer = self.client.stats()
        self.until(lambda: answer.done)
        assert answer.value is not None, "the service did not answer"
        found: dict[str, Any] = json.loads(answer.value)
        return found

    def _cut(self, kv: Bytes) -> list[Bytes]:
        return [
            kv[start : start + self.part_bytes]
            for start in range(0, self.part_bytes * len(self.space.parts), self.part_bytes)
        ]
