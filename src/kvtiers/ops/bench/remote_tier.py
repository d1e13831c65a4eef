"""The remote tier on a Valkey of the run's own, against a bare socket and a peer on the same server.

Through the whole cache: a store is from `store()` until every record of a prompt is in the server; a load is by another instance,
which has never heard of the prompt, call to result: it asks what is there, reads, verifies, copies to the caller. And the records
alone, one at a time on one thread: what the client costs is measured there. Records are raw; one by one also compressed, the tier's default,
beside the raw ones: what pays depends on the network, and this one is none.

The limit is one connection to a process that only sends and receives, at the chunk's size; the server and both ends share the
machine's cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np

from kvtiers.model.errors import InvariantBroken
from kvtiers.model.tiers import Tier
from kvtiers.ops.bench.caches import Prompts, bench_cache, bench_config
from kvtiers.ops.bench.figures import Figure, Series, at_least, at_most, best, compare, rates, times
from kvtiers.ops.bench.latency import BANDS_MS, loads_a_round
from kvtiers.ops.bench.loopback import Loopback
from kvtiers.ops.bench.measure import Contestant, interleave
from kvtiers.ops.bench.peer_turns import PeerTurns
from kvtiers.ops.bench.record_turns import COMPRESSED, TIMEOUT_MS, RecordTurns
from kvtiers.ops.bench.shapes import Shape, synthetic_kv
from kvtiers.ops.engines import Engine
from kvtiers.runtime.cache import TieredCache

SOCKET_TARGET: Final = at_least(0.7)
PEER_TARGET: Final = at_least(1.5)
CPU_TARGET: Final = at_most(0.5)
CPU_S_PER_GB: Final = "CPU s/GB"
_MIB: Final = 1 << 20
_WAIT_S: Final = 120.0
_ARENA_PROMPTS: Final = 4
_WIDE: Final = {"cpu.eviction_threshold": 0.6, "cpu.low_watermark": 0.5}


def bench_remote_tier(
    shape: Shape,
    rounds: int,
    engine: Engine,
    turns: PeerTurns,
    *,
    advance: Callable[[], object] = lambda: None,
) -> list[Figure]:
    """Loads, stores, what they cost, and the latency of one chunk. `engine` is emptied all the time; `turns` have another. Raises DoesNotFit."""
    kv = synthetic_kv(shape, shape.tokens)
    with (
        _cache(shape, engine) as writer,
        _cache(shape, engine) as reader,
        Loopback(shape.chunk_bytes, shape.chunks) as bare,
        RecordTurns(engine, shape) as records,
    ):
        ours = _Ours(writer, reader, shape, kv, engine)
        contestants: dict[str, Contestant] = {
            "bare socket, sent": bare.send,
            "store": ours.store,
            "bare socket, received": bare.receive,
            "load": ours.load,
            **{f"records, {name}": turn for name, turn in records.contestants().items()},
        }
        taken = interleave(contestants | turns.contestants, rounds, advance=advance)
        latencies = ours.latencies(rounds)
        advance()
    series = {name: rates(name, seconds, shape.nbytes) for name, seconds in taken.items()}
    figures = []
    for name, limit in (("load", "bare socket, received"), ("store", "bare socket, sent")):
        peers = turns.series(name, series)
        beaten = best(peers) if peers else None
        figures.append(
            Figure(
                "remote",
                f"Valkey, {name}",
                series[name],
                shape.name,
                comparisons=(
                    compare(series[name], series[limit], SOCKET_TARGET),
                    *(compare(series[name], one, PEER_TARGET if one is beaten else None) for one in peers),
                ),
                notes=tuple(turns.notes),
            )
        )
    for name, limit in (("read", "bare socket, received"), ("written", "bare socket, sent")):
        one = series[f"records, {name}"]
        against = (compare(one, series[limit], SOCKET_TARGET),)
        figures.append(
            Figure("remote", f"Valkey, records {name} one by one", one, shape.name, comparisons=against)
        )
        packed = series[f"records, {name}, {COMPRESSED}"]
        figures.append(
            Figure(
                "remote",
                f"Valkey, records {name} one by one, {COMPRESSED}",
                packed,
                shape.name,
                comparisons=(compare(packed, one),),
            )
        )
    for name, cpu_s, target in (
        ("records read", records.cpu_s["read"], CPU_TARGET),
        ("records written", records.cpu_s["written"], CPU_TARGET),
        (f"records read, {COMPRESSED}", records.cpu_s[f"read, {COMPRESSED}"], None),
        (f"records written, {COMPRESSED}", records.cpu_s[f"written, {COMPRESSED}"], None),
        ("load by the whole cache", ours.cpu_s["load"], None),
        ("store by the whole cache", ours.cpu_s["store"], None),
    ):
        per_gb = tuple(value / shape.nbytes * 1e9 for value in cpu_s[1:])  # the first round warms up
        figures.append(
            Figure("remote", f"CPU here: {name}", Series(name, CPU_S_PER_GB, per_gb), shape.name, target)
        )
    return [*figures, *_latency_figures(shape, latencies)]


class _Ours:
    """The turns of two instances on one server."""

    def __init__(
        self, writer: TieredCache, reader: TieredCache, shape: Shape, kv: Any, engine: Engine
    ) -> None:
        self._writer, self._reader = writer, reader
        self._shape, self._kv, self._engine = shape, kv, engine
        self._into = np.ones_like(kv)
        self._prompts = Prompts(shape.tokens)
        self._tokens = self._prompts.new()
        self.cpu_s: dict[str, list[float]] = {"load": [], "store": []}
        self._fill()
        self._load()
        if not np.array_equal(self._into, kv):
            raise InvariantBroken("what was loaded is not what was stored")
        self._forget()

    def store(self) -> float:
        """A new prompt, into an empty server."""
        self._writer.evict(Tier.CPU)
        self._writer.flush(_WAIT_S)
        self._engine.clear()
        return self._timed("store", self._fill)

    def load(self) -> float:
        """Of a prompt that the other instance has stored just before."""
        self.store()
        self.cpu_s["store"].pop()
        seconds = self._timed("load", self._load)
        self._forget()
        return seconds

    def latencies(self, rounds: int) -> list[float]:
        """Seconds of loads of one chunk each, of prompts that this instance has never heard of."""
        step = self._shape.chunk_tokens
        kv = np.ascontiguousarray(self._kv[:, :, :step])
        into = np.ones_like(kv)
        found: list[float] = []
        for _ in range(rounds):
            self._engine.clear()
            batch = [
                self._prompts.new()[:step] for _ in range(min(loads_a_round(self._shape), self._shape.chunks))
            ]
            for tokens in batch:
                self._writer.store(tokens, kv).wait(_WAIT_S)
            self._writer.flush(_WAIT_S)
            for tokens in batch:
                began = time.perf_counter()
                loaded = self._reader.load(tokens, into=into).result()
                found.append(time.perf_counter() - began)
                _check(loaded, 1)
            self._forget()
        return found

    def _timed(self, what: str, work: Callable[[], None]) -> float:
        cpu, began = time.process_time(), time.perf_counter()
        work()
        seconds = time.perf_counter() - began
        self.cpu_s[what].append(time.process_time() - cpu)
        return seconds

    def _fill(self) -> None:
        self._tokens = self._prompts.new()
        receipt = self._writer.store(self._tokens, self._kv)
        if receipt.accepted_tokens != len(self._tokens):
            raise InvariantBroken(
                f"a store took {receipt.accepted_tokens} of {len(self._tokens)} tokens: {receipt.refusal}"
            )
        self._writer.flush(_WAIT_S)

    def _load(self) -> None:
        _check(self._reader.load(self._tokens, into=self._into).result(), self._shape.chunks)

    def _forget(self) -> None:
        """The reader's memory is empty again."""
        self._reader.flush(_WAIT_S)
        self._reader.evict(Tier.CPU)
        self._reader.flush(_WAIT_S)


def _check(loaded: Any, chunks: int) -> None:
    if loaded.tiers != (Tier.REMOTE,) * chunks:
        raise InvariantBroken(
            f"a load brought {loaded.tiers} where {chunks} chunks lie in the remote store: {loaded.stopped_by}"
        )


def _latency_figures(shape: Shape, seconds: list[float]) -> Iterator[Figure]:
    low, high = BANDS_MS[Tier.REMOTE]
    notes = (
        f"remote, one chunk: {shape.name}: {len(seconds)} loads; planned with: {low:g}–{high:g} ms, over a network",
    )
    for quantile in (0.5, 0.99):
        values = seconds if quantile == 0.5 else [float(np.quantile(seconds, quantile))]
        yield Figure(
            "remote",
            f"Valkey, load of one chunk, p{100 * quantile:.0f}",
            times("load", values),
            shape.name,
            at_most(high),
            notes=notes,
            extra={"band_ms": [low, high]},
        )


@contextmanager
def _cache(shape: Shape, engine: Engine) -> Iterator[TieredCache]:
    values: dict[str, Any] = {f"remote.{key}": value for key, value in engine.remote().items()}
    own = {
        "remote.compression": "none",
        "remote.timeout_ms": TIMEOUT_MS,
        "remote.max_queue_bytes": max(_MIB, 2 * shape.nbytes),
        "remote.absent_for_s": 0,
    }
    config = bench_config(shape, arena_bytes=_ARENA_PROMPTS * shape.nbytes, values={**_WIDE, **values, **own})
    with bench_cache(config, shape) as cache:
        yield cache
