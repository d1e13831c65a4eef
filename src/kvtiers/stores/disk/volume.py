"""One disk directory: its lock, its space, its temporary files, and the I/O of payloads. Called by I/O threads, several at once.

What changes a name is `catalog.py`'s. Payloads are read and written here without any lock: an open file is a whole record even if
it is replaced or removed meanwhile, and a temporary file has one writer.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import threading
from typing import Final

from kvtiers.model.errors import (
    CodecError,
    DirectoryInUse,
    RecordCorrupt,
    RecordInvalid,
    RecordMissing,
    StoreFull,
    StoreUnavailable,
)
from kvtiers.model.layout import round_to_page
from kvtiers.model.parts import RecordRef
from kvtiers.records.buffers import AlignedBuffers
from kvtiers.records.header import HEADER_BYTES, RecordHeader
from kvtiers.records.sealing import seal
from kvtiers.stores.base import SealedPart, StoredRecord
from kvtiers.stores.disk.catalog import Catalog, unlink_quietly
from kvtiers.stores.disk.counters import Counters, Event
from kvtiers.stores.disk.direct_io import direct_flags, open_new, write_from_start
from kvtiers.stores.disk.entry import identity_of, pack_put
from kvtiers.stores.disk.failures import as_store_error, is_full, is_unreadable
from kvtiers.stores.disk.lock import DirectoryLock, is_lock_file
from kvtiers.stores.disk.names import LOCK_NAME, TEMP_DIRECTORY, is_temp_name, temp_name
from kvtiers.stores.disk.record_file import OpenFile, OtherVersion, opened, read_record
from kvtiers.stores.disk.round_trip import page_goes_round
from kvtiers.stores.disk.settings import DirectIO, DiskSettings, Durability
from kvtiers.stores.disk.space import allocated, free_bytes

_log = logging.getLogger(__name__)
_READ_ERRORS_TO_REMOVE: Final = 8
"""EIO on one record so often, without a good read between: a bad sector, which only rewriting heals."""
_READ_ERRORS_KEPT: Final = 1_024


class Volume:
    """One directory of a `DiskStore`. `path`: absolute."""

    def __init__(
        self, path: str, settings: DiskSettings, buffers: AlignedBuffers, counters: Counters
    ) -> None:
        self.path = path
        self.settings = settings
        self.counters = counters
        self.buffers = buffers
        self.catalog = Catalog(path, settings.durability, buffers, counters, self._temp_path)
        self.free_bytes: int | None = None
        """As last looked up: at open, at each write, deletion and probe."""
        self.device = 0
        self._lock = DirectoryLock(path)
        self._temp_numbers = itertools.count()
        self._owning = threading.Lock()
        """Held by the one who finds out whose the directory is: lock and log may be made anew then."""
        self._lost: str | None = None
        """Why it is not ours, as was found out last."""
        self._read_errors: dict[bytes, int] = {}
        self._read_errors_lock = threading.Lock()
        self._fsync = settings.durability is Durability.FSYNC

    # --- opening and closing ------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Lock the directory, load the log, clear away unfinished writes. Raises DirectoryInUse, StoreUnavailable."""
        try:
            os.makedirs(self.path, 0o700, exist_ok=True)
            self._lock.acquire()
        except OSError as error:
            raise _cant_open(self.path, error) from error
        try:
            self._make_temp_directory()
            self._clear_temp_directory()
            loaded = self.catalog.log.load()
            self.catalog.table.load(loaded.entries)
            self.counters.add(Event.LOG_DAMAGED, loaded.damaged)
            fixed = [os.lstat(os.path.join(self.path, name)) for name in ("", "lock", TEMP_DIRECTORY)]
            self.catalog.other.reset(sum(map(allocated, fixed)) if loaded.note is None else loaded.note)
            self.device = fixed[0].st_dev
            self.free_bytes = free_bytes(self.path)
            if self.settings.direct_io is DirectIO.AUTO:
                self.catalog.direct_flags = self._find_direct_flags()
        except OSError as error:
            self.catalog.log.close()
            self._lock.release()
            raise _cant_open(self.path, error) from error
        except BaseException:
            self.catalog.log.close()
            self._lock.release()
            raise

    def close(self) -> None:
        """Note what is known, let go of log and lock. Idempotent; nobody may be inside any more."""
        self.catalog.write_note()
        if self._fsync:
            try:
                self.catalog.log.sync()
            except OSError:
                self.counters.add(Event.LOG_LOST)
        self.catalog.log.close()
        self._lock.release()

    def probe(self) -> None:
        """Write, read and remove one page. Raises StoreUnavailable; a full disk works.

        A directory that was emptied under the cache is taken anew, unless another process has it by now; one on another file system
        than at the start is none of ours. Until a probe has found it ours again nothing is written, read or removed there.
        """
        self._find_out()
        try:
            self.free_bytes = free_bytes(self.path)
            page_goes_round(self._temp_path(), self.catalog.direct_flags, self.buffers)
        except OSError as error:
            if not is_full(error):
                raise StoreUnavailable(
                    f"{self.path} does not work: {error.strerror}; check the disk"
                ) from error

    # --- records ------------------------------------------------------------------------------------------------------

    def write(self, part: SealedPart) -> int:
        """Returns allocated bytes. Raises StoreFull, StoreTransient, StoreUnavailable; RecordCorrupt for what can't be sealed."""
        self._check_ours()
        self._refuse_if_low(HEADER_BYTES + round_to_page(len(part.payload)))
        temp = self._temp_path()
        try:
            header, taken = self._write_temp(temp, part)
            self.catalog.publish(part.ref, pack_put(header, taken), temp)
        except OSError as error:
            raise as_store_error(error, f"writing a record to {self.path}") from error
        except CodecError as error:
            raise RecordCorrupt(f"the record can't be sealed: {error}") from error
        finally:
            unlink_quietly(temp)  # after a rename there is nothing of this name
        self._forget_read_errors(identity_of(part.ref))
        self.counters.add(Event.BYTES_WRITTEN, header.record_bytes)
        self.catalog.compact_if_wanted()
        return taken

    def read_into(self, ref: RecordRef, out: memoryview, nbytes: int) -> StoredRecord:
        """As the store contract says."""
        self._check_ours()
        identity = identity_of(ref)
        entry = self.catalog.table.get(identity)
        if entry is None:
            raise RecordMissing("no such record")
        path = self.catalog.record_path(ref)
        try:
            with opened(path, self.catalog.direct_flags) as file:
                header = self._read_verified(file, ref, nbytes, out, identity)
                taken = allocated(file.status)
        except FileNotFoundError:
            self.catalog.forget(identity, entry)
            raise RecordMissing(f"{path} is gone") from None
        except OSError as error:
            if is_unreadable(error):
                self.catalog.set_aside(identity, entry)
                raise RecordMissing(
                    f"{path} can't be read: {error.strerror or error}; it is left alone"
                ) from error
            raise as_store_error(error, f"reading {path}") from error
        self.counters.add(Event.BYTES_READ, header.record_bytes)
        return StoredRecord.of(header, taken)

    def delete(self, ref: RecordRef) -> bool:
        """As the store contract says; looks up the free space again, so that who waits for it learns of it."""
        self._check_ours()
        removed = self.catalog.delete(ref)
        try:
            self.free_bytes = free_bytes(self.path)
        except OSError:
            pass  # the next write will tell
        return removed

    # --- whose the directory is ---------------------------------------------------------------------------------------

    def _find_out(self) -> None:
        """Raises StoreUnavailable if it is not ours any more, and can't be again."""
        with self._owning:
            self._lost = self._whose_is_it()
        self._check_ours()

    def _check_ours(self) -> None:
        if self._lost is not None:
            raise StoreUnavailable(self._lost)

    def _whose_is_it(self) -> str | None:
        """None if it is ours, after it was taken again if need be; else what has happened."""
        try:
            device = os.stat(self.path).st_dev
            if device != self.device and not is_lock_file(os.path.join(self.path, LOCK_NAME)):
                return f"{self.path} is on another file system than it was, and empty: is its disk mounted?"
            self.device = device  # a share that was mounted again has another number
            if self._lock.holds and self.catalog.log.is_there:
                return None
            if not self._lock.holds:
                self._lock.take_again()
            self._make_temp_directory()
            if not self.catalog.compact(anew=True):
                return f"{self.path} has lost its index log, and a new one can't be written"
        except DirectoryInUse as error:
            return f"{self.path} was emptied under this cache, and another has it now: {error}"
        except StoreUnavailable as error:
            return str(error)
        except OSError as error:
            return f"{self.path} does not work: {error.strerror}; check the disk"
        _log.warning(
            "%s had lost its lock or its index log, and has new ones: whatever else was removed is found out as it is missed",
            self.path,
        )
        return None

    # --- inside -------------------------------------------------------------------------------------------------------

    def _temp_path(self) -> str:
        return f"{self.path}/{temp_name(os.getpid(), next(self._temp_numbers))}"

    def _refuse_if_low(self, nbytes: int) -> None:
        try:
            self.free_bytes = free_bytes(self.path)
        except OSError as error:
            raise as_store_error(error, f"looking up the free space of {self.path}") from error
        if self.free_bytes - nbytes < self.settings.min_free_bytes:
            raise StoreFull(
                f"{self.path} has {self.free_bytes} bytes free; a record of {nbytes} would leave less than "
                f"min_free_bytes={self.settings.min_free_bytes}. Free space, or set a smaller capacity"
            )

    def _write_temp(self, path: str, part: SealedPart) -> tuple[RecordHeader, int]:
        fd = self._open_temp(path)
        try:
            with seal(**part._asdict(), codec=self.settings.codec, buffers=self.buffers) as record:
                write_from_start(fd, record.buffers)
                header = record.header
            if self._fsync:
                os.fdatasync(fd)
            return header, allocated(os.fstat(fd))
        finally:
            os.close(fd)

    def _open_temp(self, path: str) -> int:
        try:
            return open_new(path, self.catalog.direct_flags)
        except (
            FileNotFoundError
        ):  # somebody has tidied up, or all of it is gone, and what is there now may be another's
            self._find_out()
            self._make_temp_directory()
            return open_new(path, self.catalog.direct_flags)

    def _read_verified(
        self, file: OpenFile, ref: RecordRef, nbytes: int, out: memoryview, identity: bytes
    ) -> RecordHeader:
        try:
            header = read_record(file, ref, nbytes, out, self.buffers)
        except OtherVersion:
            entry = self.catalog.table.get(identity)
            self.counters.add(Event.FOREIGN)
            if entry is not None:
                self.catalog.set_aside(identity, entry)
            raise
        except RecordInvalid as error:
            self.catalog.count_invalid(error)
            self.catalog.remove_bad(identity, file)
            raise
        except OSError as error:
            if error.errno != errno.EIO or self._read_errors_of(identity) < _READ_ERRORS_TO_REMOVE:
                raise
            self.counters.add(Event.CORRUPT)
            self.catalog.remove_bad(identity, file)
            raise RecordCorrupt(
                f"the disk can't read this record any more ({_READ_ERRORS_TO_REMOVE} errors)"
            ) from None
        self._forget_read_errors(identity)
        return header

    def _read_errors_of(self, identity: bytes) -> int:
        with self._read_errors_lock:
            count = self._read_errors.pop(identity, 0) + 1
            self._read_errors[identity] = count
            if len(self._read_errors) > _READ_ERRORS_KEPT:
                del self._read_errors[next(iter(self._read_errors))]
        return count

    def _forget_read_errors(self, identity: bytes) -> None:
        if identity in self._read_errors:
            with self._read_errors_lock:
                self._read_errors.pop(identity, None)

    def _make_temp_directory(self) -> None:
        try:
            os.mkdir(os.path.join(self.path, TEMP_DIRECTORY), 0o700)
        except FileExistsError:
            pass

    def _clear_temp_directory(self) -> None:
        """The directory is locked, so whoever wrote these is dead."""
        for name in os.listdir(os.path.join(self.path, TEMP_DIRECTORY)):
            if is_temp_name(f"{TEMP_DIRECTORY}/{name}"):
                try:
                    os.unlink(os.path.join(self.path, TEMP_DIRECTORY, name))
                    self.counters.add(Event.TEMP_REMOVED)
                except (FileNotFoundError, IsADirectoryError):
                    pass

    def _find_direct_flags(self) -> int:
        path = self._temp_path()
        try:
            fd = open_new(path, 0)
            try:
                return direct_flags(fd)
            finally:
                os.close(fd)
        except OSError as error:
            if is_full(error):
                return 0
            raise
        finally:
            unlink_quietly(path)


def _cant_open(path: str, error: OSError) -> StoreUnavailable:
    return StoreUnavailable(
        f"{path} can't be used as a cache directory ({error.strerror}: {error.filename or path}); "
        "give a directory that this user may write to"
    )
