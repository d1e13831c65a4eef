"""One disk directory: its lock, log, table and files. Called by the store's I/O threads, several at once.

The order that makes a crash at any moment harmless:

    write   temporary file, complete (and synced)  →  entry in the log  →  rename  →  published in the table
    delete  doomed in the table  →  tombstone in the log  →  unlink  →  gone from the table

So a name is either absent or a whole record, and a file without an entry, or an entry without a file, is at worst what the next
reconciliation finds. What can't be appended to a full log is only counted: a deletion must work on a full disk.

Locks. Payload I/O is done under none. `_stripe(identity)`, one of 64, orders what happens to one name and is held for the
right-hand part of the lines above: the log's `pwrite`, rename, unlink, in FSYNC mode the syncs between them, and the read of one
header when a stranger's file is settled. Table, log and counters have locks of their own, held for moments; order: stripe, log,
table. A reader holds no lock: an open file is a whole record even if it is replaced or removed meanwhile, and what it found bad
is removed only if the name still leads to that very file.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import threading
from typing import Final

from kvtiers.model.errors import (
    CodecError,
    RecordCorrupt,
    RecordForeign,
    RecordInvalid,
    RecordMissing,
    StoreError,
    StoreFull,
    StoreUnavailable,
)
from kvtiers.model.layout import PAGE_BYTES, round_to_page
from kvtiers.model.parts import RecordRef
from kvtiers.records.buffers import AlignedBuffers
from kvtiers.records.header import HEADER_BYTES, RecordHeader
from kvtiers.records.sealing import seal
from kvtiers.stores.base import SealedPart, StoredRecord
from kvtiers.stores.disk.counters import Counters, Event
from kvtiers.stores.disk.direct_io import direct_flags, open_new, read_from_start, write_from_start
from kvtiers.stores.disk.entry import (
    file_bytes,
    identity_of,
    pack_note,
    pack_put,
    pack_tombstone,
    ref_of,
    stored_record,
    with_allocated,
)
from kvtiers.stores.disk.failures import as_store_error, is_full, is_unreadable
from kvtiers.stores.disk.index_log import IndexLog
from kvtiers.stores.disk.lock import DirectoryLock
from kvtiers.stores.disk.names import LOG_NAME, TEMP_DIRECTORY, is_temp_name, record_name, temp_name
from kvtiers.stores.disk.record_file import OpenFile, OtherVersion, opened, read_header, read_record
from kvtiers.stores.disk.settings import DirectIO, DiskSettings, Durability
from kvtiers.stores.disk.space import OtherBytes, allocated, free_bytes
from kvtiers.stores.disk.table import Table

_STRIPES: Final = 64
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
        self.table = Table()
        self.other = OtherBytes()
        self.log = IndexLog(os.path.join(path, LOG_NAME))
        self.free_bytes: int | None = None
        """As last looked up: at open, at each write and probe."""
        self.device = 0
        self.direct_flags = 0
        self._lock = DirectoryLock(path)
        self._stripes = [threading.Lock() for _ in range(_STRIPES)]
        self._temp_numbers = itertools.count()
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
            loaded = self.log.load()
            self.table.load(loaded.entries)
            self.counters.add(Event.LOG_DAMAGED, loaded.damaged)
            fixed = [os.lstat(os.path.join(self.path, name)) for name in ("", "lock", TEMP_DIRECTORY)]
            self.other.reset(sum(map(allocated, fixed)) if loaded.note is None else loaded.note)
            self.device = fixed[0].st_dev
            self.free_bytes = free_bytes(self.path)
            if self.settings.direct_io is DirectIO.AUTO:
                self.direct_flags = self._find_direct_flags()
        except OSError as error:
            self.log.close()
            self._lock.release()
            raise _cant_open(self.path, error) from error
        except BaseException:
            self.log.close()
            self._lock.release()
            raise

    def close(self) -> None:
        """Note what is known, let go of log and lock. Idempotent; nobody may be inside any more."""
        self.write_note()
        if self._fsync:
            try:
                self.log.sync()
            except OSError:
                self.counters.add(Event.LOG_LOST)
        self.log.close()
        self._lock.release()

    def probe(self) -> None:
        """Write, read and remove one page. Raises StoreUnavailable; a full disk works."""
        path = self._temp_path()
        try:
            self.free_bytes = free_bytes(self.path)
            fd = open_new(path, self.direct_flags)
            try:
                with self.buffers.take(PAGE_BYTES) as page:
                    page[:] = bytes(PAGE_BYTES)
                    write_from_start(fd, (page,))
            finally:
                os.close(fd)
            with opened(path, self.direct_flags) as file, self.buffers.take(PAGE_BYTES) as page:
                if read_from_start(file.fd, (page,)) != PAGE_BYTES:
                    raise StoreUnavailable(f"{self.path} did not give back the page that was written to it")
        except OSError as error:
            if not is_full(error):
                raise StoreUnavailable(
                    f"{self.path} does not work: {error.strerror}; check the disk"
                ) from error
        finally:
            _unlink_quietly(path)

    # --- records ------------------------------------------------------------------------------------------------------

    def write(self, part: SealedPart) -> int:
        """Returns allocated bytes. Raises StoreFull, StoreTransient, StoreUnavailable; RecordCorrupt for what can't be sealed."""
        self._refuse_if_low(HEADER_BYTES + round_to_page(len(part.payload)))
        temp = self._temp_path()
        try:
            header, taken = self._write_temp(temp, part)
            self._publish(part.ref, pack_put(header, taken), temp)
        except OSError as error:
            raise as_store_error(error, f"writing a record to {self.path}") from error
        except CodecError as error:
            raise RecordCorrupt(f"the record can't be sealed: {error}") from error
        finally:
            _unlink_quietly(temp)  # after a rename there is nothing of this name
        self.counters.add(Event.BYTES_WRITTEN, header.record_bytes)
        self.compact_if_wanted()
        return taken

    def read_into(self, ref: RecordRef, out: memoryview, nbytes: int) -> StoredRecord:
        """As the store contract says."""
        identity = identity_of(ref)
        entry = self.table.get(identity)
        if entry is None:
            raise RecordMissing("no such record")
        path = self.record_path(ref)
        try:
            with opened(path, self.direct_flags) as file:
                header = self._read_verified(file, ref, nbytes, out, identity)
                taken = allocated(file.status)
        except FileNotFoundError:
            self.forget(identity, entry)
            raise RecordMissing(f"{path} is gone") from None
        except OSError as error:
            if is_unreadable(error):
                self.set_aside(identity, entry)
                raise RecordMissing(
                    f"{path} can't be read: {error.strerror or error}; it is left alone"
                ) from error
            raise as_store_error(error, f"reading {path}") from error
        self.counters.add(Event.BYTES_READ, header.record_bytes)
        return stored_record(pack_put(header, taken))._replace(checksum=header.checksum)

    def delete(self, ref: RecordRef) -> bool:
        """False if it was not there. Raises StoreTransient, StoreUnavailable; the record is then still known."""
        identity = identity_of(ref)
        with self._stripe(identity):
            entry = self.table.doom(identity)
            if entry is None:
                return False
            removed = self._unlink_doomed(identity, entry)
        self.compact_if_wanted()
        return removed

    # --- settling what a reader or a walk has found (recovery.py) -----------------------------------------------------------

    def settle(self, ref: RecordRef, known_elsewhere: bool) -> tuple[bytes | None, bool]:
        """A file lies under `ref`'s name that the table does not know, or knows with another size: trust its header.

        Returns the entry now in the table if it is new or was changed, and whether the file counts as someone else's.
        """
        identity = identity_of(ref)
        path = self.record_path(ref)
        with self._stripe(identity):
            entry = self.table.get(identity)
            try:
                with opened(path, self.direct_flags) as file:
                    if entry is not None and file_bytes(entry) == file.status.st_size:
                        return None, False  # published or replaced in the meantime
                    try:
                        header = read_header(file, ref, self.buffers)
                    except OtherVersion:
                        self.counters.add(Event.FOREIGN)
                        self._drop(identity, entry)
                        return None, True
                    except RecordInvalid as error:
                        self._count_invalid(error)
                        self._remove_bad(identity, path, file.status)
                        return None, False
                    new = pack_put(header, allocated(file.status))
            except FileNotFoundError:
                return None, False
            except OSError:
                self.counters.add(Event.UNREADABLE)
                self._drop(identity, entry)
                return None, True
            if known_elsewhere and entry is None:
                self.counters.add(Event.DUPLICATES)
                _unlink_quietly(path)
                return None, False
            self._append_or_count(new)
            self.table.publish(new)
            self.counters.add(Event.ADOPTED)
            return new, False

    def remove_duplicate(self, identity: bytes) -> None:
        """Another path has this record too."""
        with self._stripe(identity):
            entry = self.table.doom(identity)
            if entry is not None:
                self._unlink_doomed(identity, entry)
                self.counters.add(Event.DUPLICATES)

    def correct_allocated(self, identity: bytes, entry: bytes, nbytes: int) -> None:
        """The file of `entry` takes `nbytes` of the disk."""
        with self._stripe(identity):
            if self.table.get(identity) is entry:
                self.table.correct(with_allocated(entry, nbytes))

    def forget_if_gone(self, identity: bytes) -> bool:
        """Whether the table knew a record whose file is not there; it no longer does."""
        with self._stripe(identity):
            entry = self.table.get(identity)
            if entry is None or self._lies_there(identity):
                return False
            self._drop(identity, entry)
            self.counters.add(Event.VANISHED)
            return True

    def forget(self, identity: bytes, entry: bytes) -> None:
        """A reader did not find the file of `entry`."""
        with self._stripe(identity):
            if self.table.get(identity) is entry and not self._lies_there(identity):
                self._drop(identity, entry)
                self.counters.add(Event.VANISHED)

    def set_aside(self, identity: bytes, entry: bytes) -> None:
        """What lies under the name of `entry` is not ours to read or to remove: it counts, and is not known any more."""
        with self._stripe(identity):
            if self.table.get(identity) is not entry:
                return
            self._drop(identity, entry)
            self.counters.add(Event.UNREADABLE)
            try:
                status = os.lstat(self.record_path(ref_of(identity)))
            except OSError:
                return
            self.other.add(status.st_ino, allocated(status))

    # --- the log ------------------------------------------------------------------------------------------------------

    def compact_if_wanted(self) -> None:
        """Rewrite the log if garbage outweighs what lives."""
        if self.log.wants_compaction(len(self.table)):
            self.compact()

    def compact(self) -> None:
        """Rewrite the log with what the table knows, in its order."""
        note = pack_note(self.other.total)
        try:
            if self.log.compact(self._temp_path(), lambda: [note, *self.table.for_log()]):
                self.counters.add(Event.LOG_COMPACTIONS)
        except OSError:
            self.counters.add(Event.LOG_LOST)

    def write_note(self) -> None:
        """Remember in the log how much of the directory is not records."""
        self._append_or_count(pack_note(self.other.total))

    # --- inside -------------------------------------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """Allocated bytes of everything below the path, as last known."""
        return self.table.record_bytes + self.log.allocated_bytes + self.other.total

    def record_path(self, ref: RecordRef) -> str:
        """Absolute path of a record's file."""
        return f"{self.path}/{record_name(ref)}"

    def _stripe(self, identity: bytes) -> threading.Lock:
        return self._stripes[hash(identity) % _STRIPES]

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
            return open_new(path, self.direct_flags)
        except FileNotFoundError:  # somebody has tidied up
            self._make_temp_directory()
            return open_new(path, self.direct_flags)

    def _publish(self, ref: RecordRef, entry: bytes, temp: str) -> None:
        identity = identity_of(ref)
        path = self.record_path(ref)
        with self._stripe(identity):
            self.table.intend(entry)
            renamed = False
            try:
                self.log.append(entry)
                if self._fsync:
                    self.log.sync()
                self._rename(temp, path)
                renamed = True
                if self._fsync:
                    _sync_directory(os.path.dirname(path))
            except OSError:
                self._take_back(identity, path if renamed else None)
                raise
            self.table.publish(entry)
        self._forget_read_errors(identity)

    def _take_back(self, identity: bytes, published_at: str | None) -> None:
        """An intent came to nothing: say in the log what holds instead."""
        older = self.table.give_up(identity)
        if published_at is not None:
            _unlink_quietly(published_at)
            self.table.remove(identity)
            older = None
        self._append_or_count(older or pack_tombstone(identity))

    def _rename(self, temp: str, path: str) -> None:
        for _ in range(2):
            try:
                os.rename(temp, path)
                return
            except FileNotFoundError:  # no such directory yet, or a walk has just removed it as empty
                self._make_directories(os.path.dirname(path))
        os.rename(temp, path)

    def _make_directories(self, directory: str) -> None:
        if directory == self.path:
            return
        try:
            os.mkdir(directory, 0o700)
        except FileExistsError:
            return
        except FileNotFoundError:
            self._make_directories(os.path.dirname(directory))
            self._make_directories(directory)
            return
        status = os.lstat(directory)
        self.other.add(status.st_ino, allocated(status))
        if self._fsync:
            _sync_directory(os.path.dirname(directory))

    def _read_verified(
        self, file: OpenFile, ref: RecordRef, nbytes: int, out: memoryview, identity: bytes
    ) -> RecordHeader:
        try:
            header = read_record(file, ref, nbytes, out, self.buffers)
        except OtherVersion:
            entry = self.table.get(identity)
            self.counters.add(Event.FOREIGN)
            if entry is not None:
                self.set_aside(identity, entry)
            raise
        except RecordInvalid as error:
            self._count_invalid(error)
            self._remove_read_bad(identity, file)
            raise
        except OSError as error:
            if error.errno != errno.EIO or self._read_errors_of(identity) < _READ_ERRORS_TO_REMOVE:
                raise
            self.counters.add(Event.CORRUPT)
            self._remove_read_bad(identity, file)
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

    def _count_invalid(self, error: RecordInvalid) -> None:
        self.counters.add(Event.FOREIGN if isinstance(error, RecordForeign) else Event.CORRUPT)

    def _remove_read_bad(self, identity: bytes, file: OpenFile) -> None:
        with self._stripe(identity):
            self._remove_bad(identity, self.record_path(ref_of(identity)), file.status)

    def _remove_bad(self, identity: bytes, path: str, seen: os.stat_result) -> None:
        """Remove the file that was found bad, unless another has taken its name. With the stripe held."""
        try:
            now = os.lstat(path)
        except OSError:
            return
        if (now.st_dev, now.st_ino) != (seen.st_dev, seen.st_ino):  # exact: `seen` is still open
            return
        entry = self.table.doom(identity)
        try:
            if entry is not None:
                self._unlink_doomed(identity, entry)
            else:
                os.unlink(path)
        except (OSError, StoreError):  # stays, and fails its checks again
            self.counters.add(Event.UNREADABLE)

    def _unlink_doomed(self, identity: bytes, entry: bytes) -> bool:
        """Tombstone, unlink, forget; with the stripe held. False if there was no file."""
        self._append_or_count(pack_tombstone(identity))
        path = self.record_path(ref_of(identity))
        removed = True
        try:
            os.unlink(path)
        except FileNotFoundError:
            removed = False
        except (IsADirectoryError, NotADirectoryError):  # not a record: whoever put it there may keep it
            removed = False
        except OSError as error:
            self.table.spare(identity)
            self._append_or_count(entry)
            raise as_store_error(error, f"removing {path}") from error
        self.table.remove(identity)
        return removed

    def _drop(self, identity: bytes, entry: bytes | None) -> None:
        """Know a record no more without touching its file. With the stripe held."""
        if entry is not None:
            self.table.doom(identity)
            self._append_or_count(pack_tombstone(identity))
            self.table.remove(identity)

    def _lies_there(self, identity: bytes) -> bool:
        """Whether a regular file has the record's name; True also if that can't be found out."""
        try:
            return stat.S_ISREG(os.lstat(self.record_path(ref_of(identity))).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True

    def _append_or_count(self, entry: bytes) -> None:
        try:
            self.log.append(entry)
        except OSError:
            self.counters.add(Event.LOG_LOST)

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
            _unlink_quietly(path)


def _cant_open(path: str, error: OSError) -> StoreUnavailable:
    return StoreUnavailable(
        f"{path} can't be used as a cache directory ({error.strerror}: {error.filename or path}); "
        "give a directory that this user may write to"
    )


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unlink_quietly(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass
