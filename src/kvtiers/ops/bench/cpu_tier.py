"""The CPU tier against the machine's copy limit.

Load: `load(tokens, into=…)` of a whole prompt, call to result, against two threads that copy as many bytes to the same arrays.
Store: what `store()` keeps the engine's thread for, from a cache at rest whose arena is full, against one thread's copy; and
several stores back to back until the last checksum is made, against a copy by one thread with xxh3-128 behind it or beside it
(whichever is better: `store()` copies on the engine's thread, so one thread copies) and against the bare copy. What two threads
that both copy and check reach stands there too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvtiers.model.errors import InvariantBroken
from kvtiers.model.keys import TokenIds
from kvtiers.ops.bench.caches import Prompts, bench_cache, bench_config
from kvtiers.ops.bench.figures import Figure, at_least, best, compare, rates
from kvtiers.ops.bench.limits import MemoryLimits, flat, prefaulted
from kvtiers.ops.bench.measure import Contestant, interleave, repeated
from kvtiers.ops.bench.peer import Peer
from kvtiers.ops.bench.peer_turns import tier_turns
from kvtiers.ops.bench.shapes import Shape, synthetic_kv
from kvtiers.runtime.cache import TieredCache

_IN_A_ROW: Final = 4
"""Stores back to back that count as sustained."""
_ARENA_ROUNDS: Final = 6
"""The arena holds so many prompts, less the staging share: every store evicts."""
_REPEATS: Final = 3
"""A prompt is copied in 12 ms here: a turn is the mean of three."""
_FLUSH_S: Final = 60.0

_ONE_COPIES: Final = ("copy and xxh3 in turn, 1 thread", "copy, xxh3 beside it")

LOAD_TARGET: Final = at_least(0.9)
STORE_TARGET: Final = at_least(0.9)
SUSTAINED_TARGET: Final = at_least(0.9)


def bench_cpu_tier(
    shape: Shape,
    rounds: int,
    directory: Path,
    *,
    peer: Peer | None = None,
    advance: Callable[[], object] = lambda: None,
) -> list[Figure]:
    """Three figures of a shape; `directory` is for a peer that wants one. Raises DoesNotFit where the memory is too small."""
    config = bench_config(shape, arena_bytes=_ARENA_ROUNDS * shape.nbytes)
    kv = synthetic_kv(shape, shape.tokens)
    into = np.ones_like(kv)
    region = prefaulted(shape.nbytes)
    with bench_cache(config, shape) as cache, MemoryLimits(shape.chunk_bytes) as limits:
        ours = _Ours(cache, shape, kv, into)
        contestants: dict[str, Contestant] = {
            "copy to load, 2 threads": lambda: limits.copy_in_two(flat(into), region),
            "load": ours.load,
            "copy, 1 thread": lambda: limits.copy(region, flat(kv)),
            "copy by chunks, 1 thread": lambda: limits.copy_in_pieces(region, flat(kv)),
            "store": ours.store,
            "copy, 2 threads": lambda: limits.copy_in_two(region, flat(kv)),
            "sustained": ours.sustained,
            "copy and xxh3 in turn, 1 thread": lambda: limits.copy_and_sum(region, flat(kv)),
            "copy and xxh3 in turn, 2 threads": lambda: limits.copy_and_sum_in_two(region, flat(kv)),
            "copy, xxh3 beside it": lambda: limits.copy_then_sum_beside(region, flat(kv)),
        }
        turns = tier_turns(peer, shape, "cpu", directory)
        contestants = {name: repeated(turn, _REPEATS) for name, turn in contestants.items()}
        taken = interleave(contestants | turns.contestants, rounds, advance=advance)
    series = {name: rates(name, seconds, shape.nbytes) for name, seconds in taken.items()}
    with_sum = best(series[name] for name in _ONE_COPIES)
    return [
        Figure(
            "cpu",
            "load",
            series["load"],
            shape.name,
            comparisons=(
                compare(series["load"], series["copy to load, 2 threads"], LOAD_TARGET),
                *(compare(series["load"], one) for one in turns.series("load", series)),
            ),
            notes=tuple(turns.notes),
        ),
        Figure(
            "cpu",
            "store, engine's thread",
            series["store"],
            shape.name,
            comparisons=(
                compare(series["store"], series["copy, 1 thread"], STORE_TARGET),
                compare(series["store"], series["copy by chunks, 1 thread"]),
            ),
        ),
        Figure(
            "cpu",
            "store, sustained",
            series["sustained"],
            shape.name,
            comparisons=(
                compare(series["sustained"], with_sum, SUSTAINED_TARGET),
                compare(series["sustained"], series["copy and xxh3 in turn, 2 threads"]),
                compare(series["sustained"], series["copy, 1 thread"]),
                compare(series["sustained"], series["copy, 2 threads"]),
                *(compare(series["sustained"], one) for one in turns.series("store", series)),
            ),
            others=tuple(series[name] for name in _ONE_COPIES if series[name] is not with_sum),
        ),
    ]


class _Ours:
    """The cache's turns."""

    def __init__(self, cache: TieredCache, shape: Shape, kv: Any, into: Any) -> None:
        self._cache = cache
        self._kv = kv
        self._into = into
        self._prompts = Prompts(shape.tokens)
        for _ in range(_ARENA_ROUNDS):
            self._keep(self._prompts.new())
        self.load()
        if not np.array_equal(into, kv):
            raise InvariantBroken("what was loaded is not what was stored")

    def load(self) -> float:
        """Of a prompt that was stored just before."""
        tokens = self._prompts.new()
        self._keep(tokens)
        began = time.perf_counter()
        loaded = self._cache.load(tokens, into=self._into).result()
        seconds = time.perf_counter() - began
        if loaded.num_tokens != len(tokens):
            raise InvariantBroken(
                f"a load brought {loaded.num_tokens} of {len(tokens)} tokens: {loaded.stopped_by}"
            )
        return seconds

    def store(self) -> float:
        """One, with nothing under way."""
        tokens = self._prompts.new()
        seconds = self._store(tokens)
        self._cache.flush(_FLUSH_S)
        return seconds

    def sustained(self) -> float:
        """Several back to back, until the last is sealed; per prompt."""
        prompts = [self._prompts.new() for _ in range(_IN_A_ROW)]
        began = time.perf_counter()
        for tokens in prompts:
            self._store(tokens)
        self._cache.flush(_FLUSH_S)
        return (time.perf_counter() - began) / _IN_A_ROW

    def _keep(self, tokens: TokenIds) -> None:
        self._store(tokens)
        self._cache.flush(_FLUSH_S)

    def _store(self, tokens: TokenIds) -> float:
        began = time.perf_counter()
        receipt = self._cache.store(tokens, self._kv)
        seconds = time.perf_counter() - began
        if receipt.accepted_tokens != len(tokens):
            raise InvariantBroken(
                f"a store took {receipt.accepted_tokens} of {len(tokens)} tokens: {receipt.refusal}"
            )
        return seconds
