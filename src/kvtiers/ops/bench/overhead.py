"""What the cache costs the engine's thread.

The p99 of `store()` beside a disk that hangs in everything, by that of a cache without a disk: calls in turns, the arenas full. A second
cache without a disk takes part, so that the reader sees by how much two that are alike differ.
The Python work of a store and a load per chunk, with 1 KiB of KV a chunk so that copying does not count: a store's whole time on
the caller's thread, and the processor time that a load takes on it. And a run with every lock watched.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from kvtiers.config import CacheConfig
from kvtiers.model.errors import InvariantBroken
from kvtiers.model.tiers import Tier
from kvtiers.ops.bench.caches import Prompts, bench_cache, bench_config
from kvtiers.ops.bench.figures import US, Figure, Series, at_most, compare, times
from kvtiers.ops.bench.lock_watch import LockWatch, watched_locks
from kvtiers.ops.bench.lookup import CHUNKS, TINY_CHUNKS
from kvtiers.ops.bench.measure import Contestant, interleave, repeated
from kvtiers.ops.bench.settings import BenchSettings
from kvtiers.ops.bench.shapes import Shape, bookkeeping, synthetic_kv
from kvtiers.ops.bench.watched_store import WatchedStore
from kvtiers.runtime.cache import TieredCache
from kvtiers.runtime.node import CacheNode
from kvtiers.runtime.plan import plan_node
from kvtiers.runtime.shared_core import SharedCore

_MUTEX: Final = SharedCore.__module__
"""Where the one mutex that guards the core is made."""
_CALLS: Final = 200
_TINY_CALLS: Final = 5
_PAUSE: Final = 3.0
"""An engine computes between its stores: so many times what the last one took. Without it they outrun the checksums and are refused."""
_ARENA_CHUNKS: Final = 24
_FLUSH_S: Final = 60.0
_REPEATS: Final = 3

STALL_TARGET: Final = at_most(1.2)
STORE_TARGET_US: Final = at_most(25.0)
LOAD_TARGET_US: Final = at_most(15.0)
WAITS_TARGET: Final = at_most(0.0)


class Stallable(NamedTuple):
    """A cache on a disk that can be made to hang."""

    cache: TieredCache
    store: WatchedStore


def bench_overhead(
    settings: BenchSettings, directory: Path, *, advance: Callable[[], object] = lambda: None
) -> list[Figure]:
    """Six figures and one more a shape."""
    figures = [
        _stalled(shape, settings, directory / f"{shape.name}-stalled", advance) for shape in settings.shapes
    ]
    figures += _per_chunk(settings, advance)
    figures += _watched(settings, directory / "watched")
    return figures


# --- a disk that hangs ------------------------------------------------------------------------------------------------


def _stalled(shape: Shape, settings: BenchSettings, directory: Path, advance: Callable[[], object]) -> Figure:
    calls = _TINY_CALLS if settings.is_tiny else _CALLS
    config = _one_chunk_config(shape, None)
    with (
        bench_cache(config, shape) as alone,
        bench_cache(config, shape) as alike,
        stallable(_one_chunk_config(shape, directory), shape) as hung,
    ):
        caches = {"no disk": alone, "no disk, a second cache": alike, "stalled disk": hung.cache}
        stores = {name: _Stores(cache, shape) for name, cache in caches.items()}
        hung.store.stall()
        p99 = {
            name: times(name, taken)
            for name, taken in _p99s(stores, calls, settings.rounds, advance=advance).items()
        }
        if not hung.store.inside:
            raise InvariantBroken("no call hung in the stalled disk: nothing was measured")
        hung.store.release()
    accepted = {name: f"{one.accepted:.0%}" for name, one in stores.items()}
    note = (
        f"{shape.name}: p99 of {calls} calls a round, the caches in turns call by call, pauses of {_PAUSE:g} times a store; "
        f"{accepted['stalled disk']} of the stores were accepted beside the stalled disk, {accepted['no disk']} without one"
    )
    without, second, beside = p99.values()
    control = compare(second, without).spread
    return Figure(
        "overhead",
        "p99 of store() of one chunk, disk stalled",
        beside,
        shape.name,
        comparisons=(compare(beside, without, STALL_TARGET), compare(beside, second)),
        notes=(
            note,
            f"{shape.name}: the two caches without a disk, one by the other: {control.median:.2f} [{control.low:.2f}–{control.high:.2f}]",
        ),
    )


def _p99s(
    stores: Mapping[str, _Stores], calls: int, rounds: int, *, advance: Callable[[], object]
) -> dict[str, list[float]]:
    """Of each, one for each round but the first. In turns call by call: a p99 is two calls of 200, and a bad moment is everyone's."""
    p99: dict[str, list[float]] = {name: [] for name in stores}
    for number in range(-1, rounds):
        taken: dict[str, list[float]] = {name: [] for name in stores}
        for call in range(calls):
            order = list(stores.items())
            for name, one in order if call % 2 else reversed(order):
                seconds = one.store()
                if seconds is not None:
                    taken[name].append(seconds)
        for name, each in taken.items():
            if not each:
                raise InvariantBroken("every store of a round was refused: there is nothing to measure")
            if number >= 0:
                p99[name].append(float(np.quantile(each, 0.99)))
            advance()
    return p99


class _Stores:
    """Single-chunk stores; the arena is full from the start."""

    def __init__(self, cache: TieredCache, shape: Shape) -> None:
        self._cache = cache
        self._kv = synthetic_kv(shape, shape.chunk_tokens)
        self._prompts = Prompts(shape.chunk_tokens)
        for _ in range(2 * _ARENA_CHUNKS):
            cache.store(self._prompts.new(), self._kv)
        cache.flush(_FLUSH_S)
        self._made = self._accepted = 0

    @property
    def accepted(self) -> float:
        """Share of the stores."""
        return self._accepted / self._made

    def store(self) -> float | None:
        """One, and a pause. None if it was refused: that copies nothing, and would make the figure better."""
        tokens = self._prompts.new()
        began = time.perf_counter()
        receipt = self._cache.store(tokens, self._kv)
        seconds = time.perf_counter() - began
        time.sleep(_PAUSE * seconds)
        self._made += 1
        self._accepted += receipt.accepted
        return seconds if receipt.accepted else None


def _one_chunk_config(shape: Shape, directory: Path | None) -> CacheConfig:
    room = {"disk.max_size": (4 * _ARENA_CHUNKS) * shape.chunk_bytes + (4 << 20)} if directory else {}
    return bench_config(
        shape, arena_bytes=_ARENA_CHUNKS * shape.chunk_bytes + (1 << 20), directory=directory, values=room
    )


@contextmanager
def stallable(config: CacheConfig, shape: Shape, watch: LockWatch | None = None) -> Iterator[Stallable]:
    """A cache made as always, but for the `WatchedStore` in front of its disk. At the end the disk works again."""
    plan = plan_node(config)
    disk = plan.stores[Tier.DISK]
    store = (
        WatchedStore(disk.store)
        if watch is None
        else WatchedStore(disk.store, lambda thread: any(lock.owner == thread for lock in watch.of(_MUTEX)))
    )
    plan = replace(plan, stores={Tier.DISK: replace(disk, store=store)})
    with ExitStack() as stack:
        if watch is not None:
            watch.in_io = store.inside.__contains__
            with watched_locks(watch):
                node = CacheNode(plan)
        else:
            node = CacheNode(plan)
        stack.callback(node.close)
        stack.callback(store.release)
        yield Stallable(stack.enter_context(bench_cache(config, shape, node=node)), store)


# --- work per chunk ---------------------------------------------------------------------------------------------------


def _per_chunk(settings: BenchSettings, advance: Callable[[], object]) -> list[Figure]:
    shape = bookkeeping(TINY_CHUNKS if settings.is_tiny else CHUNKS)
    config = bench_config(shape, arena_bytes=8 * shape.chunks * 4096 + (1 << 20))
    kv = synthetic_kv(shape, shape.tokens)
    into = np.empty_like(kv)
    prompts = Prompts(shape.tokens)
    with bench_cache(config, shape) as cache:

        def store() -> float:
            tokens = prompts.new()
            began = time.perf_counter()
            receipt = cache.store(tokens, kv)
            seconds = time.perf_counter() - began
            if receipt.accepted != shape.chunks:
                raise InvariantBroken(
                    f"a store took {receipt.accepted} of {shape.chunks} chunks: {receipt.refusal}"
                )
            cache.flush(_FLUSH_S)
            return seconds

        def load(clock: Callable[[], float]) -> Contestant:
            def turn() -> float:
                tokens = prompts.new()
                cache.store(tokens, kv)
                cache.flush(_FLUSH_S)
                began = clock()
                loaded = cache.load(tokens, into=into).result()
                seconds = clock() - began
                if loaded.num_tokens != shape.tokens:
                    raise InvariantBroken(f"a load brought {loaded.num_tokens} tokens: {loaded.stopped_by}")
                return seconds

            return turn

        contestants = {
            "store": repeated(store, _REPEATS),
            "load": repeated(load(time.thread_time), _REPEATS),
            "whole load": repeated(load(time.perf_counter), _REPEATS),
        }
        taken = interleave(contestants, settings.rounds, warmups=3, advance=advance)
    per = shape.chunks
    note = f"per chunk, in prompts of {per} chunks with 1 KiB of KV each; hashing the tokens is part of it; every store evicts as many"
    series = {name: times(name, seconds, US, per=per) for name, seconds in taken.items()}
    return [
        Figure(
            "overhead",
            "store, engine's thread, per chunk",
            series["store"],
            target=STORE_TARGET_US,
            notes=(note,),
        ),
        Figure("overhead", "load, engine's thread, per chunk", series["load"], target=LOAD_TARGET_US),
        Figure("overhead", "load, call to result, per chunk", series["whole load"]),
    ]


# --- locks ------------------------------------------------------------------------------------------------------------


def _watched(settings: BenchSettings, directory: Path) -> list[Figure]:
    shape = bookkeeping(TINY_CHUNKS)
    rounds = 20 if settings.is_tiny else 2_000
    watch = LockWatch()
    config = bench_config(
        shape,
        arena_bytes=_ARENA_CHUNKS * shape.chunks * 4096,
        directory=directory,
        values={"disk.max_size": 64 << 20},
    )
    kv = synthetic_kv(shape, shape.tokens)
    prompts = Prompts(shape.tokens)
    with stallable(config, shape, watch) as hung:
        for stalled in (False, True):
            if stalled:
                hung.cache.flush(_FLUSH_S)
                hung.store.stall()
            watch.engine = threading.get_ident()
            for _ in range(rounds // 2):
                tokens = prompts.new()
                hung.cache.store(tokens, kv)
                hung.cache.lookup(tokens)
                hung.cache.load(tokens, timeout=0.0)
            watch.engine = 0
        calls = hung.store.calls
    mutexes = watch.of(_MUTEX)
    if len(mutexes) != 1 or not calls:
        raise InvariantBroken(f"{len(mutexes)} locks of the node were watched and {calls} calls of the store")
    (mutex,) = mutexes
    longest = max(watch.engine_waits_s, default=0.0)
    note = (
        f"{3 * rounds:,} calls of the engine's thread, the disk stalled in the second half: {watch.engine_acquisitions:,} "
        f"acquisitions of {len(watch.locks)} watched locks, {len(watch.engine_waits_s)} of them waits; {calls:,} calls of the store"
    )
    io_under_mutex = float(hung.store.calls_under_mutex)
    return [
        Figure(
            "overhead",
            "waits of the engine's thread for a lock held across I/O",
            Series("waits", "waits", (float(len(watch.engine_waits_on_io)),)),
            target=WAITS_TARGET,
            notes=(note,),
        ),
        Figure(
            "overhead",
            "store calls made with the node's mutex held",
            Series("calls", "calls", (io_under_mutex,)),
            target=WAITS_TARGET,
        ),
        Figure("overhead", "longest wait of the engine's thread for any lock", times("wait", [longest])),
        Figure("overhead", "longest hold of the node's mutex", times("hold", [mutex.longest_hold_s])),
    ]
