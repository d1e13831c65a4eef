"""Restart: a new process opens a directory of 100,000 chunks and looks up a prompt of 500 of them.

With the index log: seconds from opening the cache to the first lookup that hits, with the comparison of disk and index going on
behind it. With the log removed: until every chunk has been found again by walking. Interpreter and imports are not in the
times. The records are real ones of a tiny layout, written through the store itself.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from kvtiers.model.errors import DeadlineExceeded, InvariantBroken
from kvtiers.model.keys import chunk_keys, root_key
from kvtiers.model.layout import KVLayout
from kvtiers.model.parts import RecordRef
from kvtiers.ops.bench.caches import bench_namespace, prompt
from kvtiers.ops.bench.figures import Figure, S, Target, at_most, times
from kvtiers.ops.bench.limits import prefaulted
from kvtiers.ops.bench.settings import BenchSettings
from kvtiers.ops.bench.shapes import Shape
from kvtiers.records.checksum import checksum
from kvtiers.stores.base import SealedPart
from kvtiers.stores.disk.names import LOG_NAME
from kvtiers.stores.disk.settings import DirectIO, DiskSettings
from kvtiers.stores.disk.store import DiskStore

CHUNKS: Final = 100_000
_TINY_CHUNKS: Final = 200
PROMPT_CHUNKS: Final = 100
_RECORD_BYTES: Final = 8192
_WRITERS: Final = 2
_SCAN_EVERY: Final = 3
"""A scan takes many times as long as a start with the log: it has a turn in every third round."""
_CHILD_DEADLINE_S: Final = 180.0

SHAPE: Final = Shape("restart", KVLayout(1, 1, 8, "bfloat16"), 16, PROMPT_CHUNKS * 512)
"""Payloads of 512 bytes: a record is a header and one page."""
LOG_TARGET_S: Final = at_most(1.0)
SCAN_TARGET_S: Final = at_most(10.0)


@dataclass(frozen=True, slots=True)
class Restarted:
    """What the new process saw, in seconds from opening the cache."""

    opened_s: float
    first_hit_s: float
    all_known_s: float
    reconciled_s: float
    entries_at_first_hit: int
    reconciling_at_first_hit: bool
    """Whether the comparison of disk and index was still going on."""


def restart_room(settings: BenchSettings) -> int:
    """Bytes on the disk."""
    return _chunks(settings) * _RECORD_BYTES * 5 // 4


def bench_restart(
    settings: BenchSettings, directory: Path, *, advance: Callable[[], object] = lambda: None
) -> list[Figure]:
    """Four figures. Raises DeadlineExceeded if the new process does not answer."""
    chunks = _chunks(settings)
    path = directory / "restart"
    write_records(path, chunks, advance=advance)
    log, scan = Restarts(path, chunks), Restarts(path, chunks, remove_log=True)
    for number in range(settings.rounds):
        log.restart()
        advance()
        if number % _SCAN_EVERY == 0:
            scan.restart()
            advance()
    if any(one.entries_at_first_hit != chunks for one in log.seen):
        raise InvariantBroken("a start with the index log did not know every chunk")
    return list(_figures(chunks, log.seen, scan.seen))


class Restarts:
    """Restarts of one kind, and what each of them saw."""

    def __init__(self, path: Path, chunks: int, *, remove_log: bool = False) -> None:
        self._path = path
        self._chunks = chunks
        self._remove_log = remove_log
        self.seen: list[Restarted] = []

    def restart(self) -> None:
        """One more."""
        if self._remove_log:
            (self._path / LOG_NAME).unlink()
        self.seen.append(restarted_in_new_process(self._path, self._chunks))


def _figures(chunks: int, log: list[Restarted], scan: list[Restarted]) -> Iterator[Figure]:
    def figure(name: str, seconds: Sequence[float], target: Target | None, *notes: str) -> Figure:
        return Figure("restart", name, times("restart", seconds, S), target=target, notes=notes)

    behind = sum(one.reconciling_at_first_hit for one in log)
    yield figure(
        f"index log of {chunks:,} chunks, to the first lookup that hits",
        [one.first_hit_s for one in log],
        LOG_TARGET_S,
        f"with the log, the comparison with the disk went on behind the first hit in {behind} of {len(log)} starts",
        "directories and inodes are in the kernel's cache, as after a restarted process; not after a reboot",
        f"{len(log)} starts with the log, {len(scan)} without",
    )
    yield figure("index log, until disk and index are compared", [one.reconciled_s for one in log], None)
    yield figure(
        "no log: by scan, until every chunk is known", [one.all_known_s for one in scan], SCAN_TARGET_S
    )
    yield figure("no log: by scan, to the first lookup that hits", [one.first_hit_s for one in scan], None)


def write_records(path: Path, chunks: int, *, advance: Callable[[], object] = lambda: None) -> None:
    """Fill a directory through the store: prompts of 100 chunks."""
    store = DiskStore(DiskSettings((str(path),), direct_io=DirectIO.OFF, min_free_bytes=0))
    path.mkdir(mode=0o700, parents=True)
    store.open()
    try:
        with ThreadPoolExecutor(_WRITERS) as pool:
            for done in pool.map(lambda number: _write_prompt(store, number), range(chunks // PROMPT_CHUNKS)):
                if done % 50 == 0:
                    advance()
    finally:
        store.close()


def _write_prompt(store: DiskStore, number: int) -> int:
    namespace = bench_namespace().bind(SHAPE.layout, SHAPE.chunk_tokens).digest
    root = root_key(namespace)
    keys = chunk_keys(root, prompt(number, PROMPT_CHUNKS * SHAPE.chunk_tokens), SHAPE.chunk_tokens)
    page = prefaulted(4096)[: SHAPE.chunk_bytes]
    page[:] = np.frombuffer(np.int64(number).tobytes() * (SHAPE.chunk_bytes // 8), np.uint8)
    payload = page.data
    for index, (parent, key) in enumerate(pairwise([root, *keys])):
        store.write(
            SealedPart(
                ref=RecordRef(namespace, key, 0),
                parent=parent,
                num_parts=1,
                token_start=index * SHAPE.chunk_tokens,
                token_count=SHAPE.chunk_tokens,
                itemsize=SHAPE.layout.itemsize,
                checksum=checksum(payload),
                payload=payload,
            )
        )
    return number


def restarted_in_new_process(path: Path, chunks: int) -> Restarted:
    """Raises DeadlineExceeded, InvariantBroken if the process fails."""
    command = [sys.executable, "-m", "kvtiers.ops.bench.restart_child", str(path), str(chunks)]
    try:
        done = subprocess.run(  # noqa: S603 - our own module, with paths of our own
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_CHILD_DEADLINE_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"the new process had not answered after {_CHILD_DEADLINE_S:.0f} s") from None
    if done.returncode != 0:
        raise InvariantBroken(f"the new process failed: {done.stderr.decode(errors='replace').strip()}")
    return msgspec.json.decode(done.stdout, type=Restarted)


def _chunks(settings: BenchSettings) -> int:
    return _TINY_CHUNKS if settings.is_tiny else CHUNKS
