"""What one load of one chunk takes, tier by tier: call to result, one at a time, into the caller's arrays.

The bands beside them are those a deployment is planned with: below 1 ms on the GPU, 1 to 10 ms from CPU memory and from a local
disk, 5 to 50 ms from a remote store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import numpy as np

from kvtiers.model.errors import InvariantBroken
from kvtiers.model.tiers import Tier
from kvtiers.ops.bench.caches import bench_cache, bench_config, prompt
from kvtiers.ops.bench.figures import Figure, at_most, times
from kvtiers.ops.bench.measure import interleave
from kvtiers.ops.bench.page_cache import cold_note, drop_from_page_cache
from kvtiers.ops.bench.shapes import Shape, synthetic_kv
from kvtiers.runtime.cache import TieredCache

_MOST_LOADS: Final = 25
_MOST_BYTES: Final = 384 << 20
BANDS_MS: Final = {
    Tier.GPU: (0.0, 1.0),
    Tier.CPU: (1.0, 10.0),
    Tier.DISK: (1.0, 10.0),
    Tier.REMOTE: (5.0, 50.0),
}
_WAIT_S: Final = 120.0
_SIMULATED: Final = "the GPU tier is simulated in host memory: its figures say nothing about a GPU"
_NO_TORCH: Final = "no GPU tier in this run: torch is not installed"
_NO_REMOTE: Final = "remote (band 5–50 ms): `kvtiers bench remote`"


def loads_a_round(shape: Shape) -> int:
    """Each of another chunk."""
    return max(2, min(_MOST_LOADS, _MOST_BYTES // shape.chunk_bytes))


def bench_latency(
    shape: Shape, rounds: int, directory: Path, *, advance: Callable[[], object] = lambda: None
) -> list[Figure]:
    """p50 and p99 of every tier there is. Raises DoesNotFit."""
    taken: dict[Tier, list[float]] = {}
    notes = [_NO_REMOTE]
    with _tiers(shape, directory / f"{shape.name}-latency") as tiers:
        turns = {tier: _Turn(tier, cache, shape, directory) for tier, cache in tiers.items()}
        interleave({str(tier): turn.run for tier, turn in turns.items()}, rounds, advance=advance)
        for tier, turn in turns.items():
            taken[tier] = turn.seconds[loads_a_round(shape) :]  # the first round warms up
        notes.append(_SIMULATED if Tier.GPU in tiers else _NO_TORCH)
        notes.append(cold_note(turns[Tier.DISK].warm_shares))
        notes.append(f"{shape.name}: {rounds * loads_a_round(shape)} loads a tier")
    return [
        figure for tier, seconds in taken.items() for figure in _figures(tier, shape, seconds, tuple(notes))
    ]


def _figures(tier: Tier, shape: Shape, seconds: list[float], notes: tuple[str, ...]) -> Iterator[Figure]:
    low, high = BANDS_MS[tier]
    target = None if tier is Tier.GPU else at_most(high)
    name = f"{tier} (simulated)" if tier is Tier.GPU else str(tier)
    band = {"band_ms": [low, high]}
    yield Figure(
        "latency", f"{name}, p50", times("load", seconds), shape.name, target, notes=notes, extra=band
    )
    p99 = (float(np.quantile(seconds, 0.99)),)
    yield Figure("latency", f"{name}, p99", times("load", p99), shape.name, target, notes=notes, extra=band)


class _Turn:
    """A round of loads from one tier."""

    def __init__(self, tier: Tier, cache: TieredCache, shape: Shape, directory: Path) -> None:
        self._tier = tier
        self._cache = cache
        self._prompts = [prompt(number, shape.chunk_tokens) for number in range(loads_a_round(shape))]
        kv = synthetic_kv(shape, shape.chunk_tokens)
        self._into = np.ones_like(kv)
        for tokens in self._prompts:
            cache.store(tokens, kv).wait(_WAIT_S)
        cache.flush(_WAIT_S)
        self._files = sorted(directory.rglob("*.kv")) if tier is Tier.DISK else []
        self.seconds: list[float] = []
        self.warm_shares: list[float] = []

    def run(self) -> float:
        if self._tier is Tier.DISK:
            self._cache.evict(Tier.CPU)
            self._cache.flush(_WAIT_S)
            self.warm_shares.append(drop_from_page_cache(self._files))
        for tokens in self._prompts:
            began = time.perf_counter()
            loaded = self._cache.load(tokens, into=self._into).result()
            self.seconds.append(time.perf_counter() - began)
            if loaded.tiers != (self._tier,):
                raise InvariantBroken(
                    f"a load came from {loaded.tiers}, not {self._tier}: {loaded.stopped_by}"
                )
        return sum(self.seconds[-len(self._prompts) :])


@contextmanager
def _tiers(shape: Shape, directory: Path) -> Iterator[dict[Tier, TieredCache]]:
    """A cache for each tier, so that one's promotions are not another's."""
    nbytes = loads_a_round(shape) * shape.chunk_bytes
    wide = {"cpu.eviction_threshold": 0.6, "cpu.low_watermark": 0.5}
    cpu = bench_config(shape, arena_bytes=2 * nbytes)
    room = {"disk.max_size": 2 * nbytes + (1 << 20)}
    disk = bench_config(shape, arena_bytes=4 * nbytes, directory=directory, values={**wide, **room})
    with bench_cache(cpu, shape) as in_memory, bench_cache(disk, shape) as on_disk:
        tiers = {Tier.CPU: in_memory, Tier.DISK: on_disk}
        if find_spec("torch") is None:
            yield tiers
            return
        pool = {"gpu.capacity": 2 * nbytes + (1 << 20), "gpu.device": "cpu"}
        gpu = bench_config(shape, arena_bytes=2 * nbytes, values=pool)
        with bench_cache(gpu, shape) as simulated:
            yield {Tier.GPU: simulated, **tiers}
