"""Which record lies under which name of one directory: the only place that makes, replaces and removes records' names.

The order that makes a crash at any moment harmless:

    publish  temporary file, complete (and synced)  →  entry in the log  →  rename  →  published in the table
    delete   doomed in the table  →  tombstone in the log  →  unlink  →  gone from the table

So a name is either absent or a whole record, and a file without an entry, or an entry without a file, is at worst what the next
reconciliation finds. What can't be appended to a full log is only counted: a deletion must work on a full disk.

Locks, all for I/O threads; payload I/O is done under none of them.
- `_stripe(identity)`, one of 64, orders what happens to one name. It is held for the log's `pwrite`, the rename or unlink, in FSYNC
  mode the syncs between them, and the read of one header when a stranger's file is settled: a hung disk hangs these threads only.
- `_directories` keeps a walk from removing as empty the directory that a first record is about to be put into. It is held for
  mkdir and rename, or rmdir; a rename into a directory that is there needs it not.
- Table, log and counters have their own, held for moments. Order: stripe, directories, log, table.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from typing import Final, NamedTuple

from kvtiers.model.errors import RecordForeign, RecordInvalid, StoreError
from kvtiers.model.parts import RecordRef
from kvtiers.records.buffers import AlignedBuffers
from kvtiers.records.header import HEADER_BYTES
from kvtiers.stores.disk.counters import Counters, Event
from kvtiers.stores.disk.direct_io import let_go_of_pages, read_ahead
from kvtiers.stores.disk.entry import (
    file_bytes,
    identity_of,
    pack_note,
    pack_put,
    pack_tombstone,
    ref_of,
    with_allocated,
)
from kvtiers.stores.disk.failures import as_store_error
from kvtiers.stores.disk.index_log import IndexLog
from kvtiers.stores.disk.names import LOG_NAME, is_record_directory, record_name
from kvtiers.stores.disk.record_file import OpenFile, OtherVersion, opened, read_header
from kvtiers.stores.disk.settings import Durability
from kvtiers.stores.disk.space import OtherBytes, allocated
from kvtiers.stores.disk.table import Table

_STRIPES: Final = 64


class Settled(NamedTuple):
    """What became of a file that a walk found."""

    entry: bytes | None
    """The entry in the table, if it is new or was changed."""
    is_foreign: bool = False
    """It counts as someone else's."""
    lost: bool = False
    """The table knew a record of that name, and does no more."""
    damaged: bool = False
    """As what lay there failed its checks."""


_NOTHING_NEW: Final = Settled(None)


class Catalog:
    """Table, log and names of the directory `path`. `temp_path` gives a new name for the log's compaction."""

    def __init__(
        self,
        path: str,
        durability: Durability,
        buffers: AlignedBuffers,
        counters: Counters,
        temp_path: Callable[[], str],
    ) -> None:
        self.path = path
        self.counters = counters
        self.table = Table()
        self.other = OtherBytes()
        self.log = IndexLog(os.path.join(path, LOG_NAME))
        self.direct_flags = 0
        """os.O_DIRECT, once it is known to work here."""
        self._buffers = buffers
        self._temp_path = temp_path
        self._fsync = durability is Durability.FSYNC
        self._stripes = [threading.Lock() for _ in range(_STRIPES)]
        self._directories = threading.Lock()
        self.walking = threading.Lock()
        """Held by the one reconciliation that may be under way."""

    @property
    def used_bytes(self) -> int:
        """Allocated bytes of everything below the path, as last known."""
        return self.table.record_bytes + self.log.allocated_bytes + self.other.total

    def record_path(self, ref: RecordRef) -> str:
        """Absolute path of a record's file."""
        return f"{self.path}/{record_name(ref)}"

    # --- changes by the store ----------------------------------------------------------------------------------------

    def publish(self, ref: RecordRef, entry: bytes, temp: str) -> None:
        """Let the complete file `temp` be the record of `ref`. Raises OSError; what was there before then is still, unless only the last sync failed."""
        identity = identity_of(ref)
        path = self.record_path(ref)
        with self._stripe(identity):
            replaced = self._stranger_at(path) if self.table.get(identity) is None else None
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
            if replaced is not None:
                self.other.give_up(replaced)

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

    def remove_bad(self, identity: bytes, file: OpenFile) -> None:
        """Remove a file that failed its checks, unless another has taken its name; `file` is still open."""
        with self._stripe(identity):
            self._remove_bad(identity, file.status)

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
            self.other.set_aside(status.st_ino, allocated(status))

    def remove_duplicate(self, identity: bytes) -> None:
        """Another path has this record too."""
        with self._stripe(identity):
            entry = self.table.doom(identity)
            if entry is not None:
                self._unlink_doomed(identity, entry)
                self.counters.add(Event.DUPLICATES)

    def count_invalid(self, error: RecordInvalid) -> None:
        """A record failed its checks."""
        self.counters.add(Event.FOREIGN if isinstance(error, RecordForeign) else Event.CORRUPT)

    # --- changes by a walk (recovery.py) ------------------------------------------------------------------------------

    def expect(self, ref: RecordRef) -> None:
        """`settle` comes soon: let the disk begin to read the header."""
        read_ahead(self.record_path(ref), HEADER_BYTES)

    def settle(self, ref: RecordRef, known_elsewhere: bool) -> Settled:
        """A file lies under `ref`'s name that the table does not know, or knows with another size: trust its header."""
        identity = identity_of(ref)
        path = self.record_path(ref)
        with self._stripe(identity):
            entry = self.table.get(identity)
            try:
                with opened(path, 0) as file:  # buffered, to profit by what was read ahead
                    if entry is not None and file_bytes(entry) == file.status.st_size:
                        return _NOTHING_NEW  # published or replaced in the meantime
                    try:
                        header = read_header(file, ref, self._buffers)
                        if self.direct_flags:
                            let_go_of_pages(file.fd)
                    except OtherVersion:
                        self.counters.add(Event.FOREIGN)
                        self._drop(identity, entry)
                        return Settled(None, is_foreign=True, lost=entry is not None)
                    except RecordInvalid as error:
                        self.count_invalid(error)
                        self._remove_bad(identity, file.status)
                        gone = entry is not None and self.table.get(identity) is None
                        return Settled(None, lost=gone, damaged=True)
                    new = pack_put(header, allocated(file.status))
            except FileNotFoundError:
                if entry is not None:
                    self._drop(identity, entry)
                    self.counters.add(Event.VANISHED)
                return Settled(None, lost=entry is not None)
            except OSError:
                self.counters.add(Event.UNREADABLE)
                self._drop(identity, entry)
                return Settled(None, is_foreign=True, lost=entry is not None)
            if known_elsewhere and entry is None:
                self.counters.add(Event.DUPLICATES)
                unlink_quietly(path)
                return _NOTHING_NEW
            self._append_or_count(new)
            self.table.publish(new)
            self.counters.add(Event.ADOPTED)
            return Settled(new)

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

    def remove_if_empty(self, name: str) -> int | None:
        """Remove a directory of ours if nothing is in it; returns what its inode was."""
        path = os.path.join(self.path, name)
        with self._directories:
            try:
                status = os.lstat(path)
                os.rmdir(path)
            except OSError:
                return None
            self.other.forget(status.st_ino, allocated(status))
            return status.st_ino

    # --- the log ------------------------------------------------------------------------------------------------------

    def compact_if_wanted(self) -> None:
        """Rewrite the log if garbage outweighs what lives."""
        if self.log.wants_compaction(len(self.table)):
            self.compact()

    def compact(self, *, anew: bool = False) -> bool:
        """Rewrite the log with what the table knows, in its order. False if that could not be done, or is not ours to do.

        `anew`: also if another file, or none, lies in its place.
        """
        if not anew and not self.log.is_there:
            return False  # another cache's by now, perhaps
        note = pack_note(self.other.total)
        try:
            done = self.log.compact(self._temp_path(), lambda: [note, *self.table.for_log()])
        except OSError:
            self.counters.add(Event.LOG_LOST)
            return False
        if done:
            self.counters.add(Event.LOG_COMPACTIONS)
        return done

    def write_note(self) -> None:
        """Remember in the log how much of the directory is not records."""
        self._append_or_count(pack_note(self.other.total))

    # --- inside -------------------------------------------------------------------------------------------------------

    def _stripe(self, identity: bytes) -> threading.Lock:
        return self._stripes[hash(identity) % _STRIPES]

    def _stranger_at(self, path: str) -> int | None:
        """The inode of what lies in the place of a new record; looked for only where there is any foreign file."""
        if not self.other.foreign_files:
            return None
        try:
            return os.lstat(path).st_ino
        except OSError:
            return None

    def _take_back(self, identity: bytes, published_at: str | None) -> None:
        """An intent came to nothing: say in the log what holds instead."""
        older = self.table.give_up(identity)
        if published_at is not None:
            unlink_quietly(published_at)
            self.table.remove(identity)
            older = None
        self._append_or_count(older or pack_tombstone(identity))

    def _rename(self, temp: str, path: str) -> None:
        try:
            os.rename(temp, path)
        except FileNotFoundError:  # no such directory yet
            with self._directories:
                self._make_directories(os.path.dirname(path))
                os.rename(temp, path)

    def _make_directories(self, directory: str) -> None:
        made = self.path
        for name in os.path.relpath(directory, self.path).split(os.sep):
            parent, made = made, os.path.join(made, name)
            try:
                os.mkdir(made, 0o700)
            except FileExistsError:
                continue
            status = os.lstat(made)
            self.other.add(status.st_ino, allocated(status))
            if self._fsync:
                _sync_directory(parent)

    def _remove_bad(self, identity: bytes, seen: os.stat_result) -> None:
        """With the stripe held. `seen`: what the open file is, so that comparing inodes is exact."""
        path = self.record_path(ref_of(identity))
        try:
            now = os.lstat(path)
        except OSError:
            return
        if (now.st_dev, now.st_ino) != (seen.st_dev, seen.st_ino):
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
        self._prune_above(record_name(ref_of(identity)))
        return removed

    def _prune_above(self, name: str) -> None:
        """Remove the directories that a removed record has left empty: 66,000 of them would take 257 MiB."""
        above = os.path.dirname(name)
        while is_record_directory(above) and self.remove_if_empty(above) is not None:
            above = os.path.dirname(above)

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


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def unlink_quietly(path: str) -> None:
    """Remove a file if it can be."""
    try:
        os.unlink(path)
    except OSError:
        pass
