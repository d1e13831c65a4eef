"""The disk tier against the disk, checksums on.

Store: from `store()` until the last record has its name, against raw writes of as many files of the same size and durability.
Cold load: `load(tokens, into=…)` of a prompt that only the disk has, against raw reads. With zstd: both beside the codec's own
rates. The best raw way of a run is the one with the best median of its rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtiers.model.errors import InvariantBroken
from kvtiers.model.layout import round_to_page
from kvtiers.model.tiers import Tier
from kvtiers.ops.bench.caches import Prompts, bench_cache, bench_config
from kvtiers.ops.bench.disk_limits import DiskLimits
from kvtiers.ops.bench.figures import Comparison, Figure, Series, Target, at_least, best, compare, rates
from kvtiers.ops.bench.limits import prefaulted
from kvtiers.ops.bench.measure import Contestant, interleave, seconds_of
from kvtiers.ops.bench.page_cache import cold_note, drop_from_page_cache
from kvtiers.ops.bench.peer import Peer
from kvtiers.ops.bench.peer_turns import tier_turns
from kvtiers.ops.bench.shapes import Shape, synthetic_kv
from kvtiers.records.codecs.registry import codec_for
from kvtiers.records.header import HEADER_BYTES
from kvtiers.runtime.cache import TieredCache

LOAD_TARGET: Final = at_least(0.9)
STORE_TARGET: Final = at_least(0.85)
PEER_TARGET: Final = at_least(1.3)
_ARENA_ROUNDS: Final = 5
"""Prompts in the arena: one is staged, one queued for the disk (a quarter of the arena may be), the rest is cache."""
_STAGING_FROM: Final = 0.75
_WAIT_S: Final = 120.0
_MIB: Final = 1 << 20
_CODEC_THREADS: Final = (1, 2)
_IN_PAGE_CACHE: Final = "buffered"


def room_needed(shape: Shape, rounds: int) -> int:
    """Bytes on the disk: every store stays until its part of the run ends."""
    return (rounds + 8) * shape.nbytes + _MIB * 4


def bench_disk_tier(
    shape: Shape,
    rounds: int,
    directory: Path,
    *,
    peer: Peer | None = None,
    advance: Callable[[], object] = lambda: None,
) -> list[Figure]:
    """Five figures of a shape, below `directory`. Raises DoesNotFit where memory or disk is too small."""
    kv = synthetic_kv(shape, shape.tokens)
    record_bytes = HEADER_BYTES + round_to_page(shape.chunk_bytes)
    raw, synced, packed = (directory / f"{shape.name}-{part}" for part in ("rename", "fsync", "zstd"))
    with DiskLimits(directory / f"{shape.name}-limit", shape.chunks, record_bytes) as limits:
        figures = _plain(shape, rounds, raw, kv=kv, limits=limits, peer=peer, advance=advance)
        figures += _synced(shape, rounds, synced, kv=kv, limits=limits, advance=advance)
    return figures + _compressed(shape, rounds, packed, kv, advance)


def _plain(
    shape: Shape,
    rounds: int,
    directory: Path,
    *,
    kv: npt.NDArray[Any],
    limits: DiskLimits,
    peer: Peer | None,
    advance: Callable[[], object],
) -> list[Figure]:
    turns = tier_turns(peer, shape, "disk", directory.parent)
    with _opened(shape, rounds, directory) as cache:
        ours = _Ours(cache, shape, kv, directory)
        readers, writers = limits.readers(), limits.writers(sync=False)
        contestants = {"load": ours.load, "store": ours.store, **readers, **writers, **turns.contestants}
        series = _rates(interleave(contestants, rounds, advance=advance), shape)
    loads, stores = turns.series("load", series), turns.series("store", series)
    load = Figure(
        "disk",
        "cold load",
        series["load"],
        shape.name,
        comparisons=(
            *_against(series, readers, "load", LOAD_TARGET),
            *(compare(series["load"], one) for one in loads if one is not best(loads)),
            *(compare(series["load"], one, PEER_TARGET) for one in loads if one is best(loads)),
        ),
        notes=(cold_note([*limits.warm_shares, *ours.warm_shares]), *turns.notes),
    )
    return [load, _store_figure(shape, series, writers, "rename", stores)]


def _synced(
    shape: Shape,
    rounds: int,
    directory: Path,
    *,
    kv: npt.NDArray[Any],
    limits: DiskLimits,
    advance: Callable[[], object],
) -> list[Figure]:
    with _opened(shape, rounds, directory, durability="fsync") as cache:
        ours = _Ours(cache, shape, kv, directory)
        writers = limits.writers(sync=True)
        series = _rates(interleave({"store": ours.store, **writers}, rounds, advance=advance), shape)
    return [_store_figure(shape, series, writers, "fsync", [])]


def _store_figure(
    shape: Shape,
    series: dict[str, Series],
    writers: dict[str, Contestant],
    durability: str,
    peers: list[Series],
) -> Figure:
    against = list(_against(series, writers, "store", STORE_TARGET))
    notes = []
    direct = [series[name] for name in writers if _IN_PAGE_CACHE not in name]
    if durability == "rename" and direct and _IN_PAGE_CACHE in against[0].to.name:
        against.append(compare(series["store"], best(direct)))
        notes.append(
            "a buffered write without fsync ends in memory: it survives a killed process like a record of durability rename, "
            "but the disk has yet to write it"
        )
    return Figure(
        "disk",
        f"store, durability {durability}",
        series["store"],
        shape.name,
        comparisons=(*against, *(compare(series["store"], one) for one in peers)),
        others=tuple(series[name] for name in writers if series[name] not in [one.to for one in against]),
        notes=tuple(notes),
    )


def _against(
    series: dict[str, Series], raw: dict[str, Contestant], ours: str, target: Target
) -> tuple[Comparison, ...]:
    return (compare(series[ours], best(series[name] for name in raw), target),)


def _compressed(
    shape: Shape, rounds: int, directory: Path, kv: npt.NDArray[Any], advance: Callable[[], object]
) -> list[Figure]:
    codec = _CodecTurns(shape, kv)
    with _opened(shape, rounds, directory, compression="zstd") as cache:
        ours = _Ours(cache, shape, kv, directory)
        contestants = {"load": ours.load, "store": ours.store, **codec.contestants()}
        series = _rates(interleave(contestants, rounds, advance=advance), shape)
        notes = (
            f"zstd saves {1 - codec.stored_bytes / shape.nbytes:.0%} of this synthetic KV",
            cold_note(ours.warm_shares),
        )
    return [
        Figure(
            "disk",
            f"{what} with zstd",
            series[ours_name],
            shape.name,
            comparisons=tuple(
                compare(series[ours_name], one)
                for name, one in series.items()
                if name.startswith(f"zstd {does}")
            ),
            notes=notes,
        )
        for what, ours_name, does in (("cold load", "load", "decode"), ("store", "store", "encode"))
    ]


class _Ours:
    """The cache's turns: every store is of a new prompt, every load is of the first one."""

    def __init__(self, cache: TieredCache, shape: Shape, kv: npt.NDArray[Any], directory: Path) -> None:
        self._cache = cache
        self._kv = kv
        self._into = np.ones_like(kv)
        self._prompts = Prompts(shape.tokens)
        self._first = self._prompts.new()
        self._store(self._first)
        self._files = sorted(directory.rglob("*.kv"))
        self.warm_shares: list[float] = []
        self.load()
        if not np.array_equal(self._into, kv):
            raise InvariantBroken("what was loaded from the disk is not what was stored")

    def load(self) -> float:
        """Nothing of it in memory, ours or the page cache's."""
        self._cache.evict(Tier.CPU)
        self._cache.flush(_WAIT_S)
        self.warm_shares.append(drop_from_page_cache(self._files))
        began = time.perf_counter()
        loaded = self._cache.load(self._first, into=self._into).result()
        seconds = time.perf_counter() - began
        if loaded.num_tokens != len(self._first) or set(loaded.tiers) != {Tier.DISK}:
            raise InvariantBroken(
                f"a load brought {loaded.num_tokens} of {len(self._first)} tokens, from {set(loaded.tiers)}: {loaded.stopped_by}"
            )
        return seconds

    def store(self) -> float:
        """Until it is on the disk."""
        return self._store(self._prompts.new())

    def _store(self, tokens: npt.NDArray[np.uint32]) -> float:
        written = self._written()
        began = time.perf_counter()
        receipt = self._cache.store(tokens, self._kv)
        receipt.wait(_WAIT_S)
        seconds = time.perf_counter() - began
        self._cache.flush(_WAIT_S)
        count = self._written() - written
        if receipt.accepted_tokens != len(tokens) or count != receipt.accepted:
            raise InvariantBroken(
                f"a store put {count} of {receipt.accepted} chunks on the disk ({receipt.refusal}): a benchmark wants all"
            )
        return seconds

    def _written(self) -> int:
        return int(self._cache.stats()["tiers"][Tier.DISK]["entries"])


class _CodecTurns:
    """The codec alone, on the chunks of a prompt in memory, with scratch of its own."""

    def __init__(self, shape: Shape, kv: npt.NDArray[Any]) -> None:
        self._codec = codec_for("zstd", level=3)  # the configuration's default
        step, layout = shape.chunk_tokens, shape.layout
        self._itemsize = layout.itemsize
        self._parameters = self._codec.parameters(layout.itemsize)
        self._chunks = [
            np.ascontiguousarray(kv[:, :, start : start + step]).reshape(-1).view(np.uint8).data
            for start in range(0, shape.tokens, step)
        ]
        self._encoded = [prefaulted(self._codec.bound(shape.chunk_bytes)).data for _ in self._chunks]
        self._decoded = [prefaulted(shape.chunk_bytes).data for _ in self._chunks]
        self._sizes = [self._encode(number) for number in range(len(self._chunks))]

    @property
    def stored_bytes(self) -> int:
        """What all chunks take, encoded."""
        return sum(self._sizes)

    def contestants(self) -> dict[str, Contestant]:
        """By one and by two threads."""
        return {
            f"zstd {name}, {threads} thread{'s' if threads > 1 else ''}": self._turn(work, threads)
            for name, work in (("encode", self._encode), ("decode", self._decode))
            for threads in _CODEC_THREADS
        }

    def _turn(self, work: Callable[[int], object], threads: int) -> Contestant:
        def turn() -> float:
            with ThreadPoolExecutor(threads) as pool:
                return seconds_of(lambda: list(pool.map(work, range(len(self._chunks)))))

        return turn

    def _encode(self, number: int) -> int:
        return self._codec.encode(self._chunks[number], self._encoded[number], self._itemsize)

    def _decode(self, number: int) -> None:
        self._codec.decode(
            self._encoded[number][: self._sizes[number]], self._decoded[number], self._parameters
        )


def _opened(shape: Shape, rounds: int, directory: Path, **disk: Any) -> Any:
    values: dict[str, Any] = {f"disk.{name}": value for name, value in disk.items()}
    values |= {
        "disk.max_size": room_needed(shape, rounds),
        "cpu.eviction_threshold": _STAGING_FROM,
        "cpu.low_watermark": _STAGING_FROM - 0.05,
    }
    config = bench_config(shape, arena_bytes=_ARENA_ROUNDS * shape.nbytes, directory=directory, values=values)
    return bench_cache(config, shape)


def _rates(taken: dict[str, list[float]], shape: Shape) -> dict[str, Series]:
    return {name: rates(name, seconds, shape.nbytes) for name, seconds in taken.items()}
