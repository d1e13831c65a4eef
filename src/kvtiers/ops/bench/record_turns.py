"""Records of a remote store, one at a time on one thread, raw and compressed: its turns in the rounds, and what they cost in processor time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Self

import numpy as np

from kvtiers.config import CacheConfig
from kvtiers.model.errors import InvariantBroken
from kvtiers.model.keys import ChunkKey
from kvtiers.model.parts import RecordRef
from kvtiers.ops.bench.limits import flat, prefaulted
from kvtiers.ops.bench.measure import Contestant
from kvtiers.ops.bench.shapes import Shape, synthetic_kv
from kvtiers.ops.engines import Engine
from kvtiers.records.checksum import checksum
from kvtiers.runtime.remote_plan import remote_store
from kvtiers.stores.base import RecordStore, SealedPart

TIMEOUT_MS: Final = 30_000
"""Of a call: a benchmark would rather wait for a slow machine than measure a miss."""
COMPRESSED: Final = "zstd"
"""The tier's default. Its records are of the same KV; rates are of the KV, not of what travels."""
_NAMESPACE: Final = b"bench remote".ljust(32, b".")


def bench_store(engine: Engine, compression: str = "none") -> RecordStore:
    """Not yet open; by default it writes records as they are."""
    remote = {**engine.remote(), "compression": compression, "timeout_ms": TIMEOUT_MS}
    return remote_store(CacheConfig.from_mapping({"storage": {"remote": remote}}, environ={}))


def ref_of(number: int) -> RecordRef:
    """Of a chunk of one part."""
    return RecordRef(_NAMESPACE, ChunkKey(number.to_bytes(32, "big")), 0)


def part_of(ref: RecordRef, payload: memoryview, known: bytes = b"") -> SealedPart:
    """`known`: its checksum, if it was made already, as it is in the cache."""
    return SealedPart(
        ref=ref,
        parent=ChunkKey(bytes(32)),
        num_parts=1,
        token_start=0,
        token_count=256,
        itemsize=2,
        checksum=known or checksum(payload),
        payload=payload,
    )


class RecordTurns:
    """A prompt's chunks as records of an engine. Use it in a `with`; one thread calls."""

    def __init__(self, engine: Engine, shape: Shape) -> None:
        self._engine = engine
        self._raw, self._packed = bench_store(engine), bench_store(engine, COMPRESSED)
        size, total = shape.chunk_bytes, shape.nbytes
        self._memory = prefaulted(2 * total)
        self._memory[:total] = flat(synthetic_kv(shape, shape.tokens))
        views = [self._memory[start : start + size].data for start in range(0, 2 * total, size)]
        self._parts = [part_of(ref_of(number), views[number]) for number in range(shape.chunks)]
        self._targets = views[shape.chunks :]
        self.cpu_s: dict[str, list[float]] = {"written": [], "read": []}
        self.cpu_s |= {f"{name}, {COMPRESSED}": [] for name in self.cpu_s}
        """Of this process, turn by turn."""

    def contestants(self) -> dict[str, Contestant]:
        """By the names in `cpu_s`."""
        return {
            "written": lambda: self._written("written", self._raw),
            "read": lambda: self._read("read", self._raw),
            f"written, {COMPRESSED}": lambda: self._written(f"written, {COMPRESSED}", self._packed),
            f"read, {COMPRESSED}": lambda: self._read(f"read, {COMPRESSED}", self._packed),
        }

    def _written(self, name: str, store: RecordStore) -> float:
        """Into an empty server."""
        self._engine.clear()
        return self._timed(name, lambda: self._write_all(store))

    def _read(self, name: str, store: RecordStore) -> float:
        """What was written just before; compared with it afterwards."""
        self._engine.clear()
        self._write_all(store)
        seconds = self._timed(name, lambda: self._read_all(store))
        half = len(self._memory) // 2
        if not np.array_equal(self._memory[:half], self._memory[half:]):
            raise InvariantBroken("what was read is not what was written")
        self._memory[half:] = 0
        return seconds

    def _write_all(self, store: RecordStore) -> None:
        for part in self._parts:
            store.write(part)

    def _read_all(self, store: RecordStore) -> None:
        for part, target in zip(self._parts, self._targets, strict=True):
            store.read_into(part.ref, target, len(target))

    def _timed(self, what: str, work: Callable[[], None]) -> float:
        cpu, began = time.process_time(), time.perf_counter()
        work()
        seconds = time.perf_counter() - began
        self.cpu_s[what].append(time.process_time() - cpu)
        return seconds

    def __enter__(self) -> Self:
        for store in (self._raw, self._packed):
            store.use_memory(self._memory.data)
            store.open()
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()
        self._packed.close()
