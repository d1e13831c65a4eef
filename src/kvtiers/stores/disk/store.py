"""The disk tier as a `RecordStore`: records spread over one or more directories, each a `Volume` of its own.

A new record goes to the directory its key prefers, or to the next one that has room; a record is found wherever it lies, so
directories may be added, reordered, or moved between disks from run to run. All calls run on I/O threads, several at once; what
is locked during I/O, and why, is told in `catalog.py`.

`exists` and `usage` are memory only. `close` waits for nobody: the directories stay locked until the last call under way has
ended, and a process that ends lets go of them anyway.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final

from kvtiers.model.errors import RecordInvalid, RecordMissing, StoreFull, StoreUnavailable
from kvtiers.model.keys import ChunkKey
from kvtiers.model.parts import RecordRef
from kvtiers.records.buffers import AlignedBuffers
from kvtiers.stores.base import RecordStore, SealedPart, StoredRecord, StoreUsage
from kvtiers.stores.disk.counters import Counters
from kvtiers.stores.disk.entry import identity_of, stored_record
from kvtiers.stores.disk.failures import as_store_error
from kvtiers.stores.disk.gate import Gate
from kvtiers.stores.disk.integrity import inconsistencies
from kvtiers.stores.disk.names import by_preference
from kvtiers.stores.disk.record_file import opened, read_header
from kvtiers.stores.disk.recovery import News, Reconciliation
from kvtiers.stores.disk.settings import DiskSettings
from kvtiers.stores.disk.space import allocated
from kvtiers.stores.disk.volume import Volume
from kvtiers.stores.disk.walk import Kind, walk

_NAME: Final = "disk"


class DiskStore(RecordStore):
    """Keeps records as files. Use: `open`, then `recover` for the core's index, then `reconcile` in the background."""

    name = _NAME

    def __init__(self, settings: DiskSettings) -> None:
        self.settings = settings
        buffers = AlignedBuffers(settings.scratch_buffers, settings.scratch_bytes)
        self._counters = Counters()
        self._volumes = [Volume(path, settings, buffers, self._counters) for path in settings.paths]
        self._gate = Gate(f"the disk store at {', '.join(settings.paths)}", self._close_volumes)

    # --- contract -----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Lock the directories and load their logs (a million entries take a second); no record is touched.

        Raises DirectoryInUse, StoreUnavailable.
        """
        self._check_apart()
        opened_volumes: list[Volume] = []
        try:
            for volume in self._volumes:
                volume.open()
                opened_volumes.append(volume)
            self._remove_duplicates()
            self._gate.unlock()
        except BaseException:
            for volume in opened_volumes:
                volume.close()
            raise

    def write(self, part: SealedPart) -> int:
        with self._gate.entered():
            holder = self._holder(identity_of(part.ref))
            order = self._order(part.ref.key, first=holder)
            for volume in order[:-1]:
                try:
                    taken = volume.write(part)
                    break
                except StoreFull:
                    continue
            else:
                volume = order[-1]
                taken = volume.write(part)
            if holder is not None and holder is not volume:
                holder.delete(part.ref)
            return taken

    def read_into(self, ref: RecordRef, out: memoryview, nbytes: int) -> StoredRecord:
        with self._gate.entered():
            holder = self._holder(identity_of(ref))
            if holder is None:
                raise RecordMissing("no such record")
            return holder.read_into(ref, out, nbytes)

    def exists(self, refs: Sequence[RecordRef]) -> list[bool]:
        identities = [identity_of(ref) for ref in refs]
        with self._gate.entered():
            first, *others = (volume.catalog.table.which_exist(identities) for volume in self._volumes)
            return [any(found) for found in zip(first, *others, strict=True)] if others else first

    def delete(self, ref: RecordRef) -> bool:
        with self._gate.entered():
            holder = self._holder(identity_of(ref))
            return holder is not None and holder.delete(ref)

    def usage(self) -> StoreUsage:
        """`used_bytes`: what `du` counts for the paths; exact after a reconciliation, kept as things change."""
        free = {v.device: v.free_bytes for v in self._volumes if v.free_bytes is not None}
        return StoreUsage(
            used_bytes=sum(volume.catalog.used_bytes for volume in self._volumes),
            records=sum(len(volume.catalog.table) for volume in self._volumes),
            free_bytes=sum(free.values()) if free else None,
        )

    def probe(self) -> None:
        """Raises StoreUnavailable naming the path that does not work; a full disk works."""
        with self._gate.entered():
            for volume in self._volumes:
                volume.probe()

    def close(self) -> None:
        self._gate.shut()

    def scan(self) -> Iterator[StoredRecord]:
        """Every sound header below the paths, by walking. Raises StoreTransient, StoreUnavailable."""
        for volume in self._volumes:
            yield from self._scan_volume(volume)

    def recover(self) -> Iterator[StoredRecord]:
        """From the logs. The order of use is exact in each directory; several are interleaved evenly."""
        snapshots = [volume.catalog.table.snapshot() for volume in self._volumes]
        if len(snapshots) == 1:
            return map(stored_record, snapshots[0])
        ranked = (
            [((position + 1) / len(entries), entry) for position, entry in enumerate(entries)]
            for entries in snapshots
        )
        return (stored_record(entry) for _, entry in heapq.merge(*ranked))

    def reconcile(self) -> Iterator[News]:
        """`reconcile_steps`, flattened."""
        for news in self.reconcile_steps():
            yield from news

    def reconcile_steps(self) -> Iterator[list[News]]:
        """As `reconcile`, returning after each step of bounded work, most often with no news, so that the caller may pause or stop.

        Ends early when the store is closed. Raises StoreTransient, StoreUnavailable.
        """
        for volume in self._volumes:
            steps = Reconciliation(volume.catalog, partial(self._known_elsewhere, volume)).steps()
            try:
                while (news := self._next_step(volume, steps)) is not None:
                    yield news
            finally:
                steps.close()

    def remember(self, refs_by_use: Iterable[RecordRef]) -> None:
        identities = [identity_of(ref) for ref in refs_by_use]
        with self._gate.entered():
            for volume in self._volumes:
                volume.catalog.table.reorder(identities)
                volume.catalog.compact()

    def check(self) -> Iterator[str]:
        """Compare table, logs and directories. True only while nothing is being written or removed."""
        for volume in self._volumes:
            try:
                yield from inconsistencies(volume.catalog)
            except OSError as error:
                yield f"{volume.path} can't be looked through: {error}"

    def stats(self) -> Mapping[str, int]:
        """The events of `counters.Event`; `foreign_files` and `foreign_bytes`: what is not ours, as the last walk found it."""
        others = [volume.catalog.other for volume in self._volumes]
        return {
            **self._counters.snapshot(),
            "foreign_files": sum(other.foreign_files for other in others),
            "foreign_bytes": sum(other.foreign_bytes for other in others),
        }

    # --- beyond the contract ------------------------------------------------------------------------------------------

    def find(self, ref: RecordRef) -> StoredRecord | None:
        """What is known of a record, from memory."""
        identity = identity_of(ref)
        for volume in self._volumes:
            entry = volume.catalog.table.get(identity)
            if entry is not None:
                return stored_record(entry)
        return None

    @property
    def bypasses_page_cache(self) -> bool:
        """Whether all paths are read and written with O_DIRECT; known once open."""
        return all(volume.catalog.direct_flags for volume in self._volumes)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _holder(self, identity: bytes) -> Volume | None:
        for volume in self._volumes:
            if volume.catalog.table.get(identity) is not None:
                return volume
        return None

    def _order(self, key: ChunkKey, first: Volume | None) -> list[Volume]:
        preferred = [self._volumes[index] for index in by_preference(self.settings.paths, key)]
        if first is None:
            return preferred
        return [first, *(volume for volume in preferred if volume is not first)]

    def _next_step(self, volume: Volume, steps: Iterator[list[News]]) -> list[News] | None:
        """None at the end of the walk, and when the store is closed meanwhile."""
        try:
            with self._gate.entered():
                return next(steps, None)
        except StoreUnavailable:
            return None
        except OSError as error:
            raise as_store_error(error, f"looking through {volume.path}") from error

    def _known_elsewhere(self, own: Volume, identity: bytes) -> bool:
        return any(
            volume is not own and volume.catalog.table.get(identity) is not None for volume in self._volumes
        )

    def _check_apart(self) -> None:
        """One inside another, through a link perhaps, would be counted twice. Of two names of one directory the lock tells."""
        real = [os.path.join(os.path.realpath(path), "") for path in self.settings.paths]
        for index, one in enumerate(real):
            for other in real[index + 1 :]:
                if one != other and (one.startswith(other) or other.startswith(one)):
                    raise StoreUnavailable(
                        f"the paths {self.settings.paths[index]} and {other.rstrip('/')} lie one in the other; give paths apart"
                    )

    def _remove_duplicates(self) -> None:
        """A crash between a record's move to another path and its removal from the first left it on both."""
        for index, volume in enumerate(self._volumes):
            for other in self._volumes[index + 1 :]:
                for identity in volume.catalog.table.identities() & other.catalog.table.identities():
                    other.catalog.remove_duplicate(identity)

    def _scan_volume(self, volume: Volume) -> Iterator[StoredRecord]:
        try:
            for found in walk(volume.path):
                if found.kind is not Kind.RECORD or found.ref is None:
                    continue
                try:
                    with opened(volume.catalog.record_path(found.ref), volume.catalog.direct_flags) as file:
                        header = read_header(file, found.ref, volume.buffers)
                        taken = allocated(file.status)
                except (RecordInvalid, OSError):
                    continue
                yield StoredRecord.of(header, taken)
        except OSError as error:
            raise as_store_error(error, f"looking through {volume.path}") from error

    def _close_volumes(self) -> None:
        for volume in self._volumes:
            volume.close()
