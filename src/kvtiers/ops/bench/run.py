"""Puts a run together: checks first, then subject after subject in a working directory that is gone afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Final

from kvtiers.model.errors import InvariantBroken
from kvtiers.ops.bench.cpu_tier import bench_cpu_tier
from kvtiers.ops.bench.disk_tier import bench_disk_tier, room_needed
from kvtiers.ops.bench.figures import Figure
from kvtiers.ops.bench.latency import bench_latency
from kvtiers.ops.bench.lookup import bench_lookup
from kvtiers.ops.bench.machine import machine_report
from kvtiers.ops.bench.overhead import bench_overhead
from kvtiers.ops.bench.peer import Peer, PeerProcess
from kvtiers.ops.bench.remote import bench_remote, remote_room
from kvtiers.ops.bench.report import Report
from kvtiers.ops.bench.restart import bench_restart, restart_room
from kvtiers.ops.bench.settings import BenchSettings, check_directory, check_room, working_directory

Advance = Callable[[], object]
Say = Callable[[str], object]
SUBJECTS: Final = ("tiers", "lookup", "restart", "overhead", "remote")


def _tiers(settings: BenchSettings, directory: Path, peer: Peer | None, advance: Advance) -> list[Figure]:
    figures: list[Figure] = []
    for shape in settings.shapes:
        figures += bench_cpu_tier(shape, settings.rounds, directory, peer=peer, advance=advance)
    for shape in settings.shapes:
        figures += bench_disk_tier(shape, settings.rounds, directory, peer=peer, advance=advance)
    for shape in settings.shapes:
        figures += bench_latency(shape, settings.rounds, directory, advance=advance)
    return figures


def _measure(
    subject: str,
    settings: BenchSettings,
    directory: Path,
    *,
    peer: Peer | None,
    advance: Advance,
    skip: Say,
) -> list[Figure]:
    match subject:
        case "tiers":
            return _tiers(settings, directory, peer, advance)
        case "lookup":
            return bench_lookup(settings, peer=peer, advance=advance)
        case "restart":
            return bench_restart(settings, directory, advance=advance)
        case "overhead":
            return bench_overhead(settings, directory, advance=advance)
        case "remote":
            return bench_remote(settings, directory, skip, peer=peer, advance=advance)
        case _:
            raise InvariantBroken(f"there is no subject {subject!r}")


def run_bench(
    settings: BenchSettings,
    subjects: Sequence[str],
    *,
    command: str,
    advance: Advance = lambda: None,
    say: Say = lambda _: None,
) -> Report:
    """Measure these subjects. Raises ConfigError, DoesNotFit before anything is written; PeerFailed where none can be started."""
    check_directory(settings.directory)
    began = time.monotonic()
    figures: list[Figure] = []
    skipped: list[str] = []
    with working_directory(settings.directory) as directory, _peer(settings) as peer:
        check_room(directory, _room(settings, subjects))
        machine = machine_report(directory)
        for subject in subjects:
            say(f"measuring {subject}")
            figures += _measure(subject, settings, directory, peer=peer, advance=advance, skip=skipped.append)
        return Report(
            command=command,
            rounds=settings.rounds,
            shapes=tuple(shape.describe() for shape in settings.shapes),
            machine=machine,
            figures=tuple(figures),
            skipped=tuple(skipped),
            seconds=time.monotonic() - began,
            peer="" if peer is None else peer.name,
            tiny=settings.is_tiny,
        )


def _room(settings: BenchSettings, subjects: Sequence[str]) -> int:
    """The most that lies there at once: what one shape leaves stays until the end."""
    room = 0
    if "tiers" in subjects:
        room += sum(4 * room_needed(shape, settings.rounds) for shape in settings.shapes)
    if "restart" in subjects:
        room += restart_room(settings)
    if "remote" in subjects:
        room += remote_room(settings)
    return room


@contextmanager
def _peer(settings: BenchSettings) -> Iterator[Peer | None]:
    with PeerProcess(settings.peer) if settings.peer else nullcontext() as peer:
        yield peer
