"""What the core itself costs, in microseconds per chunk: no I/O, no bytes moved, one thread.

    python benchmarks/core_overhead.py [--chunks 512] [--rounds 60]

Chains of 512 chunks (131,072 tokens at the default chunk size) in an arena for 16 of them, so that most stores evict. Every
figure is the median over the rounds, with the 5 and 95 % quantiles.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvtiers.core.core import Core
from kvtiers.core.messages import (
    Copy,
    CopyDone,
    Delete,
    DeleteDone,
    Outcome,
    Read,
    ReadDone,
    Seal,
    SealDone,
    Write,
    WriteDone,
)
from kvtiers.core.settings import CoreSettings, MemorySettings, StoreSettings
from kvtiers.model.keys import ChunkKey
from kvtiers.model.layout import PAGE_BYTES
from kvtiers.model.parts import Part, Parts
from kvtiers.model.tiers import Tier

_CHAINS_KEPT = 16
_SUMS = (b"x" * 16,)
_ROOT = ChunkKey(b"r" * 32)


def settings_for(chunks: int) -> CoreSettings:
    """An arena for 16 chains and a quarter more for staging; a disk for 128."""
    kept, record = _CHAINS_KEPT * chunks * PAGE_BYTES, 2 * PAGE_BYTES
    disk = 8 * _CHAINS_KEPT * chunks * record
    return CoreSettings(
        cpu=MemorySettings(capacity=kept * 5 // 4, ceiling=kept, low=kept * 9 // 10),
        disk=StoreSettings(capacity=disk, ceiling=disk, low=disk * 9 // 10, max_queued=1_000_000),
    )


def chain(number: int, chunks: int) -> list[ChunkKey]:
    """Keys of one chain."""
    key = hashlib.sha256(str(number).encode()).digest()
    keys = []
    for _ in range(chunks):
        key = hashlib.sha256(key).digest()
        keys.append(ChunkKey(key))
    return keys


def finish(core: Core, now: float) -> None:
    """Everything the core wants done is done, at no cost."""
    while intents := core.intents():
        for intent in intents:
            if isinstance(intent, Seal):
                core.complete(SealDone(intent.op, Outcome.OK, _SUMS), now)
            elif isinstance(intent, Write):
                core.complete(WriteDone(intent.op, Outcome.OK, 2 * PAGE_BYTES), now)
            elif isinstance(intent, Read):
                core.complete(ReadDone(intent.op, Outcome.OK, _SUMS), now)
            elif isinstance(intent, Delete):
                core.complete(DeleteDone(intent.op, Outcome.OK), now)
            elif isinstance(intent, Copy):
                core.complete(CopyDone(intent.op, Outcome.OK, _SUMS), now)


class Stopwatch:
    """Microseconds per chunk, by name."""

    def __init__(self, chunks: int) -> None:
        self._chunks = chunks
        self._taken: dict[str, list[float]] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time what stands inside."""
        began = time.perf_counter()
        yield
        self._taken.setdefault(name, []).append((time.perf_counter() - began) * 1e6 / self._chunks)

    def show(self, write: Callable[[str], object] = print) -> None:
        """One line for each name."""
        write(f"{'':42} median    5 %   95 %   µs per chunk")
        for name, taken in self._taken.items():
            *_, top = cuts = statistics.quantiles(taken, n=20)
            write(f"{name:42} {statistics.median(taken):6.2f} {cuts[0]:6.2f} {top:6.2f}")


def run(chunks: int, rounds: int) -> Stopwatch:
    """Store, look up and load chains; then load them from disk."""
    core, watch, now = Core(settings_for(chunks)), Stopwatch(chunks), 0.0
    session = core.open_session()
    space = core.attach(b"n" * 32, Parts((Part(0, 0, PAGE_BYTES),)), 256)
    for number in range(rounds):
        now += 1.0
        keys = chain(number, chunks)
        full = ", evicting as many" if number >= _CHAINS_KEPT else ""
        with watch.measure(f"open_store of new chunks{full}"):
            store = core.open_store(session, space, _ROOT, keys, now)
            while core.extend(store, now):
                pass
        with watch.measure("commit"):
            core.commit(store, now)
            while core.go_on(now):
                pass
        with watch.measure("completions of seal, write, delete"):
            finish(core, now)
        with watch.measure("lookup"):
            core.lookup(space, keys)
        with watch.measure("open_load of chunks in memory"):
            load = core.open_load(session, space, keys, now, now + 5.0)
            while core.extend(load, now):
                pass
        with watch.measure("release"):
            while core.release(load, now):
                pass
        with watch.measure("open_store of chunks that are present"):
            again = core.open_store(session, space, _ROOT, keys, now)
            while core.extend(again, now):
                pass
    for number in range(rounds - _CHAINS_KEPT, rounds):
        now += 1.0
        while core.evict(Tier.CPU, 0, now).chunks:
            pass
        with watch.measure("open_load of chunks on disk"):
            load = core.open_load(session, space, chain(number, chunks), now, now + 5.0)
            while core.extend(load, now):
                pass
        with watch.measure("completions of reads"):
            finish(core, now)
        while core.release(load, now):
            pass
    return watch


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chunks", type=int, default=512, help="chunks in a chain")
    parser.add_argument("--rounds", type=int, default=60, help="chains stored")
    arguments = parser.parse_args()
    run(arguments.chunks, max(arguments.rounds, 2 * _CHAINS_KEPT)).show()


if __name__ == "__main__":
    main()
