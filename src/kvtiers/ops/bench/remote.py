"""`bench remote`: every engine of the remote tier that is installed here, each started for the run on the loopback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvtiers.model.errors import KvtiersError
from kvtiers.ops.bench.figures import Figure
from kvtiers.ops.bench.peer import Peer
from kvtiers.ops.bench.peer_turns import remote_turns
from kvtiers.ops.bench.remote_records import (
    NAMES,
    bench_existence,
    bench_records,
    room_for_records,
    why_not_measured,
)
from kvtiers.ops.bench.remote_tier import bench_remote_tier
from kvtiers.ops.bench.settings import BenchSettings
from kvtiers.ops.engines import throw_away

Skip = Callable[[str], object]
"""Hears what was not measured, and why."""


def bench_remote(
    settings: BenchSettings,
    directory: Path,
    skip: Skip,
    *,
    peer: Peer | None = None,
    advance: Callable[[], object] = lambda: None,
) -> list[Figure]:
    """Valkey against a bare socket and the peer, which has a server of its own; Mooncake and S3 against their own clients. Raises DoesNotFit."""
    figures: list[Figure] = []
    reason = why_not_measured("redis")
    if reason is not None:
        skip(reason)
    else:
        with (
            throw_away("redis", directory / "redis") as engine,
            throw_away("redis", directory / "redis-of-peer") as of_peer,
        ):
            for shape in settings.shapes:
                turns = remote_turns(peer, shape, directory, of_peer)
                figures += bench_remote_tier(shape, settings.rounds, engine, turns, advance=advance)
            engine.clear()
            figures.append(bench_existence(engine, settings.rounds))
    for backend in NAMES:
        reason = why_not_measured(backend)
        for shape in settings.shapes if reason is None else ():
            try:
                figures += bench_records(backend, shape, settings.rounds, directory)
            except KvtiersError as error:
                reason = f"{backend}, {shape.name}: {error}"
            advance()
        if reason is not None:
            skip(reason)
    return figures


def remote_room(settings: BenchSettings) -> int:
    """Bytes that lie on the disk at once, at most."""
    return sum(room_for_records(shape, settings.rounds) for shape in settings.shapes)
