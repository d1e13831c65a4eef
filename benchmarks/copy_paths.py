"""How near the CPU tier's copies come to the machine's copy limit, and which way of copying a chunk is the fastest.

    python benchmarks/copy_paths.py [--rounds 15] [--shape both] [--beside 1]

Contestants take turns, round by round; every ratio is of one round, given as median (5 to 95 % of the rounds). Limits: bare
`numpy.copyto` of contiguous buffers of a prompt's size, mapped and touched before. `--beside N` runs N threads of plain Python in
the process, as an engine's scheduler does: whoever copies in many small calls then waits for the GIL after each.
docs/decisions/copying.md has the figures and what follows from them.
"""

from __future__ import annotations

import argparse
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import numpy as np

from kvtiers.memory.arena import Arena
from kvtiers.model.layout import KVLayout
from kvtiers.ops.bench.caches import Prompts, bench_cache, bench_config
from kvtiers.ops.bench.limits import MemoryLimits, flat, prefaulted
from kvtiers.ops.bench.measure import Contestant, interleave, seconds_of, spread
from kvtiers.ops.bench.shapes import BOTH, Shape, shapes_named, synthetic_kv
from kvtiers.runtime.cache import TieredCache
from kvtiers.runtime.kv_arrays import kv_arrays
from kvtiers.runtime.transfer import ArenaSlots

_CHUNKS: Final = 8
_FLUSH_S: Final = 60.0
_IN_A_ROW: Final = 4
_ARENA_ROUNDS: Final = 6
"""The arena, and what the limits copy from and into by turns, holds so much of a round: it is as cold for them as for the cache."""
_NO_COPY: Final = Shape("no copy", KVLayout(1, 1, 8, "bfloat16"), 16, 1)
_NO_COPY_CHUNKS: Final = 64

Taken = dict[str, list[float]]


def ways_to_copy(shape: Shape, rounds: int) -> None:
    """Eight chunks between an arena and an array `[layers, 2, tokens, heads, dim]`, one thread, into the array."""
    layout, step = shape.layout, shape.chunk_tokens
    kv = synthetic_kv(shape, _CHUNKS * step)
    into = np.ones_like(kv)
    arena = Arena(_CHUNKS * shape.chunk_bytes)
    raw = arena.view(0, arena.nbytes)
    chunks = [
        raw[start : start + shape.chunk_bytes].view(kv.dtype).reshape(layout.shape(step))
        for start in range(0, arena.nbytes, shape.chunk_bytes)
    ]
    slots, arrays = ArenaSlots(arena), kv_arrays(into, layout, writable=True)

    def one_call_a_chunk() -> None:
        for index, chunk in enumerate(chunks):
            np.copyto(into[:, :, index * step : (index + 1) * step], chunk)

    def one_call_a_plane() -> None:
        for index, chunk in enumerate(chunks):
            part = into[:, :, index * step : (index + 1) * step]
            for layer in range(layout.num_layers):
                for plane in range(layout.planes):
                    np.copyto(part[layer, plane], chunk[layer, plane])

    def as_the_cache_does() -> None:
        for index in range(_CHUNKS):
            slots.read(index * shape.chunk_bytes, arrays, index * step, step, layout)

    taken = interleave(
        {
            "one contiguous copy": partial(seconds_of, lambda: np.copyto(flat(into), raw)),
            "a copyto per chunk, strided": partial(seconds_of, one_call_a_chunk),
            "a copyto per layer and plane": partial(seconds_of, one_call_a_plane),
            "ArenaSlots.read": partial(seconds_of, as_the_cache_does),
        },
        rounds,
    )
    _show(f"ways to copy, {shape.describe()}", taken, "one contiguous copy", arena.nbytes)
    arena.close()


def cache_against_limit(shape: Shape, chunks: int, rounds: int) -> None:
    """Load and store of `_CHUNKS` chunks, in prompts of `chunks` each."""
    prompts, tokens = _CHUNKS // chunks, chunks * shape.chunk_tokens
    nbytes = chunks * shape.chunk_bytes
    kv = synthetic_kv(shape, tokens)
    into = [np.ones_like(kv) for _ in range(prompts)]
    arena_bytes = _ARENA_ROUNDS * _CHUNKS * shape.chunk_bytes
    places = itertools.cycle(np.split(prefaulted(arena_bytes), arena_bytes // nbytes))
    config = bench_config(shape, arena_bytes=arena_bytes)
    with bench_cache(config, shape) as cache, MemoryLimits(shape.chunk_bytes) as limits:
        ours = _Ours(cache, kv, into, Prompts(tokens))

        def each(copy: Callable[[Any, Any], float]) -> Contestant:
            return lambda: sum(copy(flat(array), next(places)) for array in into)

        loads = {
            "limit: 2 threads": each(limits.copy_in_two),
            "1 thread": each(limits.copy),
            "load(into=...)": ours.load,
            "load()": ours.load_fresh,
        }
        stores = {
            "limit: 1 thread": each(lambda _, place: limits.copy(place, flat(kv))),
            "store()": ours.store,
        }
        sustained = {
            "copy and xxh3, 1 thread": each(lambda _, place: limits.copy_and_sum(place, flat(kv))),
            "copy, xxh3 beside it": each(lambda _, place: limits.copy_then_sum_beside(place, flat(kv))),
            "store() until sealed": ours.sustained,
        }
        taken = interleave(loads | stores | sustained, rounds)
    title = f"{shape.name}, {prompts} x {chunks} chunks of {shape.chunk_bytes / (1 << 20):.3g} MiB"
    for what, group in (("load", loads), ("store", stores), ("sustained", sustained)):
        part = {name: taken[name] for name in group}
        _show(f"{what}, {title}", part, next(iter(group)), prompts * nbytes)


class _Ours:
    """The cache's turns: each moves all the prompts."""

    def __init__(self, cache: TieredCache, kv: Any, into: list[Any], prompts: Prompts) -> None:
        self._cache, self._kv, self._into, self._prompts = cache, kv, into, prompts

    def load(self) -> float:
        tokens = self._stored()
        return sum(
            seconds_of(lambda one=one, into=into: self._cache.load(one, into=into).result())  # type: ignore[misc]
            for one, into in zip(tokens, self._into, strict=True)
        )

    def load_fresh(self) -> float:
        tokens = self._stored()
        return sum(seconds_of(lambda one=one: self._cache.load(one).result()) for one in tokens)  # type: ignore[misc]

    def store(self) -> float:
        seconds = 0.0
        for _ in self._into:
            seconds += self._store(self._prompts.new())
            self._cache.flush(_FLUSH_S)
        return seconds

    def sustained(self) -> float:
        prompts = [self._prompts.new() for _ in range(_IN_A_ROW * len(self._into))]
        began = time.perf_counter()
        for tokens in prompts:
            self._store(tokens)
        self._cache.flush(_FLUSH_S)
        return (time.perf_counter() - began) / _IN_A_ROW

    def _store(self, tokens: Any) -> float:
        began = time.perf_counter()
        receipt = self._cache.store(tokens, self._kv)
        seconds = time.perf_counter() - began
        assert receipt.accepted_tokens == len(tokens), receipt
        return seconds

    def _stored(self) -> list[Any]:
        tokens = [self._prompts.new() for _ in self._into]
        for one in tokens:
            self._store(one)
        self._cache.flush(_FLUSH_S)
        return tokens


def overhead(rounds: int) -> None:
    """What a call costs beside the copy: chunks of 256 bytes."""
    shape = _NO_COPY
    many = _NO_COPY_CHUNKS
    prompts = {chunks: Prompts(chunks * shape.chunk_tokens) for chunks in (1, many)}
    kv = {chunks: synthetic_kv(shape, chunks * shape.chunk_tokens) for chunks in (1, many)}
    into = {chunks: np.ones_like(array) for chunks, array in kv.items()}
    taken: dict[str, list[float]] = {}
    with bench_cache(bench_config(shape, arena_bytes=64 << 20), shape) as cache:
        for number in range(-5, 20 * rounds):
            for chunks in (1, many):
                tokens = prompts[chunks].new()
                store = seconds_of(lambda: cache.store(tokens, kv[chunks]))  # noqa: B023 - called at once
                cache.flush(_FLUSH_S)
                load = seconds_of(lambda: cache.load(tokens, into=into[chunks]).result())  # noqa: B023
                if number >= 0:
                    for what, seconds in (("store", store), ("load", load)):
                        taken.setdefault(f"{what}, {chunks} chunks", []).append(seconds / chunks)
    print("\nwithout the copy, µs per chunk")
    for name, values in taken.items():
        found = spread([one * 1e6 for one in values])
        print(f"  {name:30} {found.median:7.1f} ({found.low:.1f} to {found.high:.1f})")


def _show(title: str, taken: Taken, limit: str, nbytes: int) -> None:
    print(f"\n{title}")
    for name, seconds in taken.items():
        rate = nbytes / spread(seconds).median / 1e9
        ratio = spread([theirs / ours for ours, theirs in zip(seconds, taken[limit], strict=True)])
        best = nbytes / min(seconds) / 1e9
        print(
            f"  {name:30} {rate:6.2f} GB/s (best {best:5.2f})   {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        )


@contextmanager
def _python_beside(threads: int) -> Iterator[None]:
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            sum(range(1000))

    busy = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for thread in busy:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in busy:
            thread.join(10)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shape", default=BOTH)
    parser.add_argument("--beside", type=int, default=0, help="threads of plain Python in this process")
    parser.add_argument("--only", choices=("ways", "cache", "overhead"), default=None)
    options = parser.parse_args()
    with _python_beside(options.beside):
        for shape in shapes_named(options.shape):
            if options.only in (None, "ways"):
                ways_to_copy(shape, options.rounds)
            if options.only in (None, "cache"):
                for chunks in (_CHUNKS, 1):
                    cache_against_limit(shape, chunks, options.rounds)
        if options.only in (None, "overhead"):
            overhead(options.rounds)


if __name__ == "__main__":
    main()
