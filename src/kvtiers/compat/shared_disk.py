"""One open `DiskStore` for each directory in this process, shared by all `DiskBackend`s on it, with the threads that drive it.

A directory has one owner (the store's lock), but programs make a backend wherever they need one. So the first opens the store,
the last one out closes it. Directories are told apart by device and inode: links and relative paths lead to the same store.

What always holds: opening and closing one directory happen under that directory's lock, never under the registry's; no lock is held
during I/O on records.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from kvtiers.compat.answers import Answer
from kvtiers.core.messages import OpId, Priority
from kvtiers.model.errors import (
    ConfigError,
    RecordInvalid,
    RecordMissing,
    StoreError,
    StoreTransient,
    StoreUnavailable,
)
from kvtiers.model.parts import RecordRef
from kvtiers.records.buffers import AlignedBuffers
from kvtiers.records.codecs.registry import codec_for
from kvtiers.runtime.pools import Job, WorkerPool
from kvtiers.stores.base import SealedPart
from kvtiers.stores.disk.names import record_name
from kvtiers.stores.disk.record_file import opened, read_header, read_record
from kvtiers.stores.disk.settings import DiskSettings
from kvtiers.stores.disk.store import DiskStore

_log = logging.getLogger(__name__)
T = TypeVar("T")

_WORKERS: Final = 3
"""One of them is kept free for reads (`runtime/pools.py`)."""
_MAX_QUEUED: Final = 1000
_SCRATCH_BYTES: Final = 256 << 20
_CLOSE_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class DiskOptions:
    """What all backends on one directory must agree on while it is open."""

    compression: str = "zstd"
    compression_level: int = 3


class SharedDisk:
    """A `DiskStore` and its threads."""

    def __init__(self, path: str, options: DiskOptions) -> None:
        """Raises DirectoryInUse, StoreUnavailable, CodecError, ConfigError."""
        level = {"level": options.compression_level} if options.compression == "zstd" else {}
        codec = codec_for(options.compression, **level)
        if codec.lossy:
            raise ConfigError(
                [
                    f"compression {options.compression!r} gives back other bytes than it was given; use 'zstd' or 'none'"
                ],
                source="DiskBackend",
            )
        self.options = options
        self.store = DiskStore(DiskSettings(paths=(path,), codec=codec))
        self.store.open()
        self._owner = os.getpid()
        self._buffers = AlignedBuffers(_WORKERS, _SCRATCH_BYTES)
        self._ops = itertools.count(1)
        self._pool = WorkerPool("disk-backend", _WORKERS, _MAX_QUEUED)
        self._reconciler = threading.Thread(target=self._reconcile, name="kvtiers-reconcile", daemon=True)
        self._reconciler.start()

    # --- from any thread, without waiting -----------------------------------------------------------------------------

    def start(
        self, priority: Priority, work: Callable[[], T], after: Callable[[], None]
    ) -> tuple[OpId, Answer[T]]:
        """Have a thread of this disk do it. `after` is called once, when the work has ended or was dropped.

        Raises StoreTransient if too much waits already or it is being closed, StoreUnavailable in a forked child; then `after`
        is the caller's to call.
        """
        self.check_process()
        answer: Answer[T] = Answer()
        op = OpId(next(self._ops))

        def run() -> None:
            try:
                result = work()
            except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to whoever waits
                after()
                answer.fail(error)
            else:
                after()
                answer.succeed(result)

        def drop() -> None:
            after()
            answer.fail(
                StoreUnavailable(f"{self.path} was closed, or nobody waited any more, before this began")
            )

        if not self._pool.submit(Job(op, priority, run, drop)):
            raise StoreTransient(
                f"{self.path}: {_MAX_QUEUED} operations wait already, or it is being closed; try again later"
            )
        return op, answer

    def cancel(self, op: OpId) -> bool:
        """Nobody waits for it any more: drop it. False if it has begun or ended."""
        return self._pool.cancel(op)

    def holds(self, ref: RecordRef) -> bool:
        """Memory only."""
        self.check_process()
        return self.store.exists([ref])[0]

    def check_process(self) -> None:
        """Raises StoreUnavailable in a forked child: threads, lock and log belong to the parent."""
        if os.getpid() != self._owner:
            raise StoreUnavailable(
                f"{self.path} was opened before this process was forked; open it here anew"
            )

    @property
    def path(self) -> str:
        """The directory."""
        return self.store.settings.paths[0]

    # --- on I/O threads -----------------------------------------------------------------------------------------------

    def put(self, part: SealedPart) -> int:
        """Store; returns the bytes it takes of the disk. Raises StoreError."""
        self.check_process()
        return self.store.write(part)

    def get(self, ref: RecordRef) -> tuple[bytes, int] | None:
        """Payload and token start; None for what is not there or is damaged, and then it is gone. Raises StoreError.

        The store reads a record of a size that the caller knows. Here only the file knows it, and another version, of another
        size, may take its place at any moment. So the file is opened once and read by its own header: whatever takes its name
        meanwhile, an open file is one whole record.
        """
        if not self.holds(ref):
            return None
        path = f"{self.path}/{record_name(ref)}"
        try:
            with opened(path, os.O_DIRECT if self.store.bypasses_page_cache else 0) as file:
                nbytes = read_header(file, ref, self._buffers).payload_bytes
                with self._buffers.take(nbytes) as slot:
                    header = read_record(file, ref, nbytes, slot, self._buffers)
                    return bytes(slot[:nbytes]), header.token_start
        except (OSError, RecordInvalid) as error:
            self._settle(ref)
            _log.warning("%s: a record is a miss: %s", self.path, error)
            return None

    def _settle(self, ref: RecordRef) -> None:
        """What lies there can't be read: have the store find out the same, count it, and remove it if it is a bad record."""
        known = self.store.find(ref)
        if known is None:
            return
        try:
            with self._buffers.take(known.payload_bytes) as slot:
                self.store.read_into(ref, slot, known.payload_bytes)
        except (RecordMissing, RecordInvalid):
            pass

    def remove(self, ref: RecordRef) -> bool:
        """False if it was not there. Raises StoreError."""
        return self.store.delete(ref)

    # --- life ---------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Drop what waits, let what runs end, let the directory go. What hangs keeps it locked, but nobody waiting."""
        self._pool.close(_CLOSE_S)
        self.store.close()
        self._reconciler.join(_CLOSE_S)

    def _reconcile(self) -> None:
        """Compare log and directory once; ends early when the store is closed."""
        try:
            for _ in self.store.reconcile_steps():
                pass
        except StoreError as error:
            _log.warning("%s could not be compared with its log: %s", self.path, error)


# --- who uses what -------------------------------------------------------------------------------------------------------

_Identity = tuple[int, int]


class _Place:
    """One directory. `users` is guarded by the registry's lock, `disk` by its own."""

    __slots__ = ("disk", "lock", "users")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.disk: SharedDisk | None = None


class _Registry:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.places: dict[_Identity, _Place] = {}


_registry = _Registry()


class DiskLease:
    """One backend's share in a `SharedDisk`."""

    def __init__(self, path: Path, options: DiskOptions) -> None:
        """Make the directory if need be, and open it unless it is open. Raises as SharedDisk, ConfigError if the options differ."""
        try:
            path.mkdir(0o700, parents=True, exist_ok=True)
            status = path.stat()
        except OSError as error:
            raise StoreUnavailable(
                f"{path} can't be made or looked at ({error.strerror}); give a directory that this user may write to"
            ) from error
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._registry = _registry
        self._identity = (status.st_dev, status.st_ino)
        with self._registry.lock:
            self._place = self._registry.places.setdefault(self._identity, _Place())
            self._place.users += 1
        try:
            with self._place.lock:
                self.disk: SharedDisk | None = self._open(str(path.resolve()), options)
        except BaseException:
            self.disk = None
            self._leave()
            raise

    def release(self) -> None:
        """Give the share back; the last one closes the disk. Idempotent; in a forked child there is nothing to give back."""
        with self._lock:
            disk, self.disk = self.disk, None
        if disk is not None and os.getpid() == self._owner:
            self._leave()

    def _open(self, path: str, options: DiskOptions) -> SharedDisk:
        disk = self._place.disk
        if disk is None:
            disk = self._place.disk = SharedDisk(path, options)
        elif disk.options != options:
            raise ConfigError(
                [
                    f"it is open in this process with {disk.options}, {options} was asked for; give the same, or close it first"
                ],
                source=path,
            )
        return disk

    def _leave(self) -> None:
        place = self._place
        with place.lock:
            with self._registry.lock:
                place.users -= 1
                last = place.users == 0
            if not last:
                return
            disk, place.disk = place.disk, None
            if disk is not None:
                disk.close()
            with self._registry.lock:
                if place.users == 0:  # somebody may be waiting for the directory, and opens it anew
                    self._registry.places.pop(self._identity, None)


def _forget_in_child() -> None:
    global _registry
    _registry = _Registry()


os.register_at_fork(after_in_child=_forget_in_child)
