"""Records in a directory that several hosts share: NFS, CephFS, Weka, 3FS, or one that two services of this host use.

The files are those of the disk tier (`disk/names.py`, `disk/record_file.py`), so `kvtiers disk verify` reads them too:

    <path>/tmp/<host>-<pid>-<store>-<n>.tmp               records on their way, and what is being removed
    <path>/<namespace hex>/<hh>/<hh>/<key hex>.<part>.kv  records

Nobody owns the directory, so nothing is locked and nothing about it is remembered: every call looks at what lies there now. Files
and directories appear and vanish under other hosts' hands at any step:

- A record is published by a rename of a complete, closed file (closing is when NFS tells that it was full), so its name is a whole
  record or nothing. A directory that somebody removed as empty in that moment is made again.
- ESTALE is a file that was replaced or removed elsewhere: the name is looked up once more.
- A record that failed its checks is moved aside first, and removed only if it is the file that was read; if another host published
  a new one in between, that is put back.
- What a dead host left in `tmp` is removed by age, a bounded number of files after some writes, by the file server's clock.

`path` itself is never made: it has to lie on the share, and its absence tells that the share is not mounted. `open` touches no file:
a hung server must not hang a start. Runs on I/O threads; a system call on a hung mount can't be ended (the guard above stops waiting).
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from typing import Final, TypeVar

from kvtiers.model.errors import (
    CodecError,
    RecordCorrupt,
    RecordForeign,
    RecordInvalid,
    RecordMissing,
    StoreError,
    StoreUnavailable,
)
from kvtiers.model.parts import RecordRef
from kvtiers.records.buffers import AlignedBuffers
from kvtiers.records.codecs.base import Codec
from kvtiers.records.header import RecordHeader
from kvtiers.records.sealing import UnknownCodec, seal
from kvtiers.stores.base import RecordStore, SealedPart, StoredRecord, StoreUsage
from kvtiers.stores.disk.catalog import unlink_quietly
from kvtiers.stores.disk.direct_io import open_new, write_from_start
from kvtiers.stores.disk.failures import as_store_error, is_full, is_unreadable
from kvtiers.stores.disk.gate import Gate
from kvtiers.stores.disk.names import is_record_directory, record_name
from kvtiers.stores.disk.record_file import OpenFile, OtherVersion, opened, read_header, read_record
from kvtiers.stores.disk.round_trip import page_goes_round
from kvtiers.stores.disk.settings import DirectIO, Durability
from kvtiers.stores.own_records import OwnRecords
from kvtiers.stores.shared_fs.many_stats import which_are_files
from kvtiers.stores.shared_fs.settings import SharedFsSettings, directory_of
from kvtiers.stores.shared_fs.system_calls import (
    NO_PLACE,
    again_if_stale,
    has_a_place,
    is_same_file,
    sync_directory,
)
from kvtiers.stores.shared_fs.temp_files import TempFiles

T = TypeVar("T")

_RENAME_TRIES: Final = 16
"""Each one loses only to a host that removed the directory as empty since the try before."""
_REAP_EVERY_S: Final = 600.0
_SPACE_EVERY_S: Final = 10.0


class Event(StrEnum):
    """What is counted; names in `SharedFsStore.stats()`."""

    BYTES_WRITTEN = "bytes_written"
    BYTES_READ = "bytes_read"
    CORRUPT = "corrupt"
    """Records removed because their checksum, size or padding was wrong."""
    FOREIGN = "foreign"
    """Files under a record's name that hold another record (removed), or one of another format version or an unknown codec (left alone)."""
    UNREADABLE = "unreadable"
    """Files that could not be opened or that are no regular files; left alone."""
    PUT_BACK = "put_back"
    """Records that another host wrote anew while a damaged one was being removed."""
    TEMP_REMOVED = "temp_removed"
    """Unfinished files of dead hosts, removed by age."""


class SharedFsStore(RecordStore):
    """Keeps records as files in a directory that others use at the same time."""

    name = "fs"

    def __init__(
        self,
        settings: SharedFsSettings,
        codec: Codec,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`codec`: for new records; what others encoded is read as well."""
        self.settings = settings
        self.path = directory_of(settings.endpoint)
        self._codec = codec
        self._clock = clock
        self._buffers = AlignedBuffers(settings.scratch_buffers, settings.scratch_bytes)
        self._direct_flags = os.O_DIRECT if settings.direct_io is DirectIO.AUTO else 0
        self._directory_mode, self._file_mode = (0o2770, 0o660) if settings.group_shared else (0o700, 0o600)
        self._temp = TempFiles(self.path)
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(Event, 0)
        self._records = OwnRecords()
        self._used_bytes = 0
        self._free_bytes: int | None = None
        self._reap_at = self._space_at = clock()
        self._gate = Gate(f"the store in {self.path}", lambda: None)

    # --- contract -----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        self._gate.unlock()

    def write(self, part: SealedPart) -> int:
        with self._gate.entered():
            temp = self._temp.new()
            try:
                header, written_at = self._write_temp(temp, part)
                self._publish(temp, self._record_path(part.ref))
            except OSError as error:
                unlink_quietly(temp)
                raise self._failed(error, "writing a record") from error
            except CodecError as error:
                unlink_quietly(temp)
                raise RecordCorrupt(f"the record can't be sealed: {error}") from error
            except BaseException:
                unlink_quietly(temp)
                raise
            self._count(Event.BYTES_WRITTEN, header.record_bytes)
            self._records.written(part.ref)
            self._look_after(written_at)
            return header.record_bytes

    def read_into(self, ref: RecordRef, out: memoryview, nbytes: int) -> StoredRecord:
        path = self._record_path(ref)
        with self._gate.entered():
            try:
                header = again_if_stale(lambda: self._read_verified(path, ref, nbytes, out))
            except FileNotFoundError:
                self._raise_if_directory_is_gone()
                raise RecordMissing("no such record") from None
            except OSError as error:
                if is_unreadable(error):
                    self._raise_if_directory_is_gone()
                    self._count(Event.UNREADABLE)
                    raise RecordMissing(
                        f"{path} can't be read: {error.strerror or error}; it is left alone. Services that run "
                        "as different users need storage.remote.fs.group_shared"
                    ) from error
                raise self._failed(error, "reading a record") from error
            self._count(Event.BYTES_READ, header.record_bytes)
            return StoredRecord.of(header, header.record_bytes)

    def exists(self, refs: Sequence[RecordRef]) -> list[bool]:
        """A regular file lies under its name. One stat each; several at a time where each takes a round trip."""
        with self._gate.entered():
            try:
                found = which_are_files(
                    [self._record_path(ref) for ref in refs], self.settings.parallel_stats
                )
            except OSError as error:
                raise self._failed(error, "looking for records") from error
            if refs and not any(found):
                self._raise_if_directory_is_gone()
            return found

    def delete(self, ref: RecordRef) -> bool:
        path = self._record_path(ref)
        with self._gate.entered():
            try:
                again_if_stale(lambda: os.unlink(path))
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                self._raise_if_directory_is_gone()
                return False
            except OSError as error:
                raise self._failed(error, "removing a record") from error
            self._records.removed(ref)
            self._prune_above(ref)
            return True

    def discard(self, record: StoredRecord) -> bool:
        """What was written anew has another write id; a file that takes its name meanwhile is put back."""
        path = self._record_path(record.ref)
        with self._gate.entered():
            try:
                with opened(path, self._direct_flags) as file:
                    header = read_header(file, record.ref, self._buffers)
                    return header.write_id == record.write_id and self._move_away(record.ref, path, file)
            except (FileNotFoundError, RecordInvalid):
                return False
            except OSError as error:
                raise self._failed(error, "removing a record") from error

    def usage(self) -> StoreUsage:
        """Of the whole file system, everybody's, as it said last (at a probe, and with writes); `records`: this store's own."""
        with self._lock:
            return StoreUsage(self._used_bytes, len(self._records), self._free_bytes)

    def probe(self) -> None:
        """Write, read and remove one page. Raises StoreUnavailable; a full file system works."""
        with self._gate.entered():
            try:
                self._with_temp_directory(
                    lambda: page_goes_round(self._temp.new(), self._direct_flags, self._buffers)
                )
                self._look_at_space()
            except OSError as error:
                if is_full(error):
                    return
                failed = self._failed(error, "trying the directory")
                if isinstance(failed, StoreUnavailable):
                    raise failed from error
                raise StoreUnavailable(f"{failed}; check mount and server") from error

    def close(self) -> None:
        self._gate.shut()

    def stats(self) -> Mapping[str, int]:
        with self._lock:
            return {str(event): count for event, count in self._counts.items()}

    # --- writing ------------------------------------------------------------------------------------------------------

    def _write_temp(self, temp: str, part: SealedPart) -> tuple[RecordHeader, float]:
        """Returns the header, and when it was written by the file server's clock."""
        fd = self._with_temp_directory(lambda: open_new(temp, self._direct_flags))
        try:
            if self.settings.group_shared:
                os.fchmod(fd, self._file_mode)  # whatever the umask
            with seal(**part._asdict(), codec=self._codec, buffers=self._buffers) as record:
                write_from_start(fd, record.buffers)
                header = record.header
            if self.settings.durability is Durability.FSYNC:
                os.fsync(fd)
            return header, os.fstat(fd).st_mtime
        finally:
            os.close(fd)

    def _publish(self, temp: str, path: str) -> None:
        for _ in range(_RENAME_TRIES):
            if has_a_place(lambda: os.rename(temp, path)):
                break
            has_a_place(lambda: self._make_directories(os.path.dirname(path)))
        else:
            os.rename(temp, path)
        if self.settings.durability is Durability.FSYNC:
            sync_directory(os.path.dirname(path))

    def _with_temp_directory(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except OSError as error:
            if error.errno not in NO_PLACE:
                raise
        self._make_directory(self._temp.directory)
        return call()

    def _make_directories(self, directory: str) -> None:
        made = self.path
        for name in os.path.relpath(directory, self.path).split(os.sep):
            made = f"{made}/{name}"
            self._make_directory(made)

    def _make_directory(self, path: str) -> None:
        try:
            os.mkdir(path, self._directory_mode)
        except FileExistsError:
            return
        if self.settings.group_shared:
            try:
                os.chmod(path, self._directory_mode)
            except FileNotFoundError:  # removed as empty already
                pass

    # --- reading and removing -----------------------------------------------------------------------------------------

    def _read_verified(self, path: str, ref: RecordRef, nbytes: int, out: memoryview) -> RecordHeader:
        with opened(path, self._direct_flags) as file:
            try:
                return read_record(file, ref, nbytes, out, self._buffers)
            except (OtherVersion, UnknownCodec):
                self._count(Event.FOREIGN)
                raise
            except RecordInvalid as error:
                self._count(Event.FOREIGN if isinstance(error, RecordForeign) else Event.CORRUPT)
                with suppress(OSError):  # gone already, or it stays and fails its checks again
                    self._move_away(ref, path, file)
                raise

    def _move_away(self, ref: RecordRef, path: str, file: OpenFile) -> bool:
        """Remove it, unless another file has taken its name; `file` is still open, so its inode is nobody else's on this host."""
        aside = self._temp.new()
        if not is_same_file(os.lstat(path), file.status):
            return False
        self._with_temp_directory(lambda: os.rename(path, aside))
        if is_same_file(os.lstat(aside), file.status):
            os.unlink(aside)
            self._records.removed(ref)
            return True
        os.rename(aside, path)
        self._count(Event.PUT_BACK)
        return False

    def _prune_above(self, ref: RecordRef) -> None:
        """Remove the directories that a removed record has left empty; a writer that needs one makes it again."""
        above = os.path.dirname(record_name(ref))
        while is_record_directory(above):
            try:
                os.rmdir(f"{self.path}/{above}")
            except OSError:
                return
            above = os.path.dirname(above)

    def _record_path(self, ref: RecordRef) -> str:
        return f"{self.path}/{record_name(ref)}"

    # --- now and then -------------------------------------------------------------------------------------------------

    def _look_after(self, server_time: float) -> None:
        """After a write: what dead hosts left, and how full the file system is, each seldom."""
        now = self._clock()
        with self._lock:
            reap, look = now >= self._reap_at, now >= self._space_at
            if reap:
                self._reap_at = now + _REAP_EVERY_S
            if look:
                self._space_at = now + _SPACE_EVERY_S
        try:
            if reap:
                removed = self._temp.reap(server_time - self.settings.orphan_age_s)
                self._count(Event.TEMP_REMOVED, removed)
            if look:
                self._look_at_space()
        except OSError:
            pass  # the record is written; next time

    def _look_at_space(self) -> None:
        status = os.statvfs(self.path)
        with self._lock:
            self._used_bytes = (status.f_blocks - status.f_bfree) * status.f_frsize
            self._free_bytes = status.f_bavail * status.f_frsize

    # --- failures -----------------------------------------------------------------------------------------------------

    def _failed(self, error: OSError, doing: str) -> StoreError:
        try:
            self._raise_if_directory_is_gone()
        except StoreUnavailable as gone:
            return gone
        return as_store_error(error, f"{doing} in {self.path}")

    def _raise_if_directory_is_gone(self) -> None:
        try:
            if os.access(self.path, os.R_OK | os.X_OK) and stat.S_ISDIR(os.stat(self.path).st_mode):
                return
            os.stat(self.path)
            reason = "it is no directory that this user may read"
        except OSError as error:
            reason = error.strerror or str(error)
        raise StoreUnavailable(
            f"the shared directory {self.path} can't be used: {reason}; mount the share, and make this directory on it once"
        )

    def _count(self, event: Event, count: int = 1) -> None:
        with self._lock:
            self._counts[event] += count
