"""Whatever lies under a record's name: a read never blocks, never serves it, and removes only what is ours to remove."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtiers.model.errors import (
    CodecError,
    RecordCorrupt,
    RecordForeign,
    RecordMissing,
    StoreFull,
    StoreTransient,
    StoreUnavailable,
)
from kvtiers.records.codecs.none import NoCodec
from kvtiers.records.header import HEADER_BYTES, MAGIC
from kvtiers.stores.disk import DiskSettings, DiskStore, catalog
from kvtiers.stores.disk.failures import as_store_error
from kvtiers.testing.disk_damage import damage_file, flip_bit
from kvtiers.testing.store_kit import Damage, make_part, reads_back, slot

if TYPE_CHECKING:
    from tests.stores.disk.conftest import Disk

PART = make_part(1, 5000)


@pytest.mark.parametrize("kind", ["directory", "fifo", "symlink", "device"])
def test_what_is_no_regular_file_is_a_miss_at_once(disk: Disk, kind: str) -> None:
    store = disk.open()
    store.write(PART)
    path = disk.file(PART.ref)
    aside = path.with_name("aside")
    path.rename(aside)
    match kind:
        case "directory":
            path.mkdir()
            (path / "inside").write_bytes(b"x" * 5000)
        case "fifo":
            os.mkfifo(path)  # opening it would wait for a writer
        case "symlink":
            path.symlink_to(aside)
        case "device":
            try:
                os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
            except PermissionError:
                pytest.skip("making a device node needs CAP_MKNOD")
        case _:
            raise ValueError(kind)
    with pytest.raises(RecordMissing, match="left alone"):
        reads_back(store, PART)
    assert store.exists([PART.ref]) == [False]
    assert store.stats()["unreadable"] == 1
    assert os.path.lexists(path)
    list(store.reconcile())
    assert store.usage().used_bytes == disk.du()
    if kind != "directory":
        store.write(PART)  # its place is taken by the next store
        assert reads_back(store, PART)
    else:
        with pytest.raises(StoreTransient):
            store.write(PART)
        assert list((disk.path / "tmp").iterdir()) == []


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A directory that uid 65534 may use, with the effective uid set to it: root may read everything."""
    if os.geteuid() != 0:
        pytest.skip("changing the effective uid needs root")
    directory = Path(tempfile.mkdtemp(prefix="kvtiers-test-"))
    os.chown(directory, 65534, 65534)
    os.seteuid(65534)
    try:
        yield directory
    finally:
        os.seteuid(0)
        shutil.rmtree(directory)


def test_a_file_we_may_not_read_is_a_miss_and_is_left_alone(as_nobody: Path) -> None:
    store = DiskStore(DiskSettings(paths=(str(as_nobody),), min_free_bytes=0))
    store.open()
    other = make_part(2, 5000)
    store.write(PART)
    store.write(other)
    path = next(path for path in as_nobody.rglob(f"{PART.ref.key.hex()}.0.kv"))
    path.chmod(0)
    with pytest.raises(RecordMissing, match="Permission denied"):
        reads_back(store, PART)
    assert store.exists([PART.ref, other.ref]) == [False, True]
    assert reads_back(store, other)
    assert path.exists()
    used = store.usage().used_bytes
    assert list(store.reconcile()) == []
    assert store.usage().used_bytes == used
    assert store.stats()["unreadable"] == 2  # at the read, and at the walk
    store.close()


def test_a_directory_we_may_not_use_is_told_at_open(as_nobody: Path) -> None:
    as_nobody.chmod(0o500)
    store = DiskStore(DiskSettings(paths=(str(as_nobody / "cache"),)))
    with pytest.raises(StoreUnavailable, match=r"Permission denied.*write"):
        store.open()


def test_a_path_that_is_a_file_is_told_at_open(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailable, match="cache directory"):
        DiskStore(DiskSettings(paths=(str(tmp_path / "file"),))).open()


def test_directories_are_0700_and_files_0600(disk: Disk) -> None:
    old = os.umask(0)
    try:
        store = disk.open()
        store.write(PART)
    finally:
        os.umask(old)
    modes = {path.is_dir(): oct(path.stat().st_mode & 0o777) for path in (disk.path, *disk.path.rglob("*"))}
    assert modes == {True: "0o700", False: "0o600"}


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_every_flipped_bit_of_a_record_is_a_miss(disk: Disk, codec: str) -> None:
    from kvtiers.records.codecs.registry import codec_for

    store = disk.open(codec=codec_for(codec))
    part = make_part(1, 9001)
    store.write(part)
    size = disk.file(part.ref).stat().st_size
    for offset in (*range(0, 300, 3), *range(300, size, 97), size - 1):
        flip_bit(disk.file(part.ref), offset, offset % 8)
        with pytest.raises((RecordCorrupt, RecordForeign)):
            reads_back(store, part)
        if offset in range(8, 12):
            assert store.exists([part.ref]) == [False]
        store.write(part)
        assert reads_back(store, part)


def test_a_flip_in_the_magic_is_damage_not_a_stranger(disk: Disk) -> None:
    store = disk.open()
    store.write(PART)
    flip_bit(disk.file(PART.ref), len(MAGIC) - 1, 5)
    with pytest.raises(RecordForeign):
        reads_back(store, PART)
    assert not disk.file(PART.ref).exists()


def test_a_file_that_grew_is_corrupt(disk: Disk) -> None:
    store = disk.open()
    for extra in (1, 4096, 1 << 20):
        store.write(PART)
        with disk.file(PART.ref).open("ab") as file:
            file.write(b"\0" * extra)
        with pytest.raises(RecordCorrupt):
            reads_back(store, PART)
        assert not disk.file(PART.ref).exists()


def test_two_swapped_records_are_both_refused_and_removed(disk: Disk) -> None:
    store = disk.open()
    one, two = make_part(1, 5000), make_part(2, 5000)
    store.write(one)
    store.write(two)
    path, other = disk.file(one.ref), disk.file(two.ref)
    path.rename(disk.path / "aside")
    other.rename(path)
    (disk.path / "aside").rename(other)
    for part in (one, two):
        with pytest.raises(RecordForeign, match="chunk"):
            reads_back(store, part)
        assert not disk.file(part.ref).exists()
    assert store.stats()["foreign"] == 2


def test_another_part_of_the_same_chunk_is_refused(disk: Disk) -> None:
    store = disk.open()
    first, second = make_part(1, 5000, part=0), make_part(1, 5000, part=1)
    store.write(first)
    store.write(second)
    shutil.copyfile(disk.file(second.ref), disk.file(first.ref))
    with pytest.raises(RecordForeign, match="part 1"):
        reads_back(store, first)


def test_a_record_replaced_while_it_is_found_bad_is_kept(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    store = disk.open()
    store.write(PART)
    flip_bit(disk.file(PART.ref), HEADER_BYTES + 5)
    remove = catalog.Catalog.remove_bad

    def replace_first(self: catalog.Catalog, *found: object) -> None:
        store.write(PART)
        remove(self, *found)  # type: ignore[arg-type]

    monkeypatch.setattr(catalog.Catalog, "remove_bad", replace_first)
    with pytest.raises(RecordCorrupt):
        reads_back(store, PART)
    assert store.exists([PART.ref]) == [True]
    assert reads_back(store, PART)


def test_a_record_removed_while_it_is_read_is_read_whole(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    store = disk.open()
    store.write(PART)
    read = os.preadv

    def delete_first(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        store.delete(PART.ref)
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", delete_first)
    assert reads_back(store, PART)
    assert store.exists([PART.ref]) == [False]


# --- errors of the disk (injected: a disk that fails can't be had) ------------------------------------------------------


def fail_with(monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    def failing(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, failing)


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOMEM, errno.ETIMEDOUT])
def test_a_read_error_may_pass(disk: Disk, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    store = disk.open()
    store.write(PART)
    fds = open_fds()
    fail_with(monkeypatch, "preadv", number)
    with pytest.raises(StoreTransient):
        reads_back(store, PART)
    monkeypatch.undo()
    assert open_fds() == fds
    assert reads_back(store, PART)


def test_a_sector_that_stays_bad_is_given_up_and_heals(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    store = disk.open()
    store.write(PART)
    fail_with(monkeypatch, "preadv", errno.EIO)
    for _ in range(7):
        with pytest.raises(StoreTransient):
            reads_back(store, PART)
    with pytest.raises(RecordCorrupt, match="can't read"):
        reads_back(store, PART)
    assert store.exists([PART.ref]) == [False]
    monkeypatch.undo()
    store.write(PART)
    assert reads_back(store, PART)


def test_read_errors_between_good_reads_never_add_up(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    store = disk.open()
    store.write(PART)
    for _ in range(20):
        with monkeypatch.context() as failing:
            fail_with(failing, "preadv", errno.EIO)
            with pytest.raises(StoreTransient):
                reads_back(store, PART)
        assert reads_back(store, PART)


@pytest.mark.parametrize("call", ["pwritev", "rename", "pwrite", "open", "fstat"])
@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EIO, StoreTransient),
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EROFS, StoreUnavailable),
        (errno.EMFILE, StoreTransient),
    ],
)
@pytest.mark.parametrize("durability", ["rename", "fsync"])
def test_a_write_that_fails_leaves_nothing(
    disk: Disk,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    number: int,
    error: type[Exception],
    *,
    durability: str,
) -> None:
    store = disk.open(durability=durability)
    store.write(make_part(2, 5000))
    older = make_part(1, 5000, version=1)
    store.write(older)
    fds, used = open_fds(), store.usage()
    fail_with(monkeypatch, call, number)
    for part in (PART, make_part(3, 5000)):
        with pytest.raises(error):
            store.write(part)
    monkeypatch.undo()
    assert open_fds() == fds
    assert store.usage().records == used.records
    assert list((disk.path / "tmp").iterdir()) == []
    assert reads_back(store, older)
    assert store.exists([make_part(3, 5000).ref]) == [False]
    list(store.reconcile())
    assert list(store.check()) == []
    store.write(PART)
    assert reads_back(store, PART)


def test_a_directory_that_could_not_be_synced_takes_the_record_back(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = disk.open(durability="fsync")
    store.write(PART)
    fail_with(monkeypatch, "fsync", errno.EIO)
    with pytest.raises(StoreTransient):
        store.write(make_part(1, 5000, version=1))
    monkeypatch.undo()
    assert store.exists([PART.ref]) == [False]
    list(store.reconcile())
    assert list(store.check()) == []


def test_a_deletion_that_fails_keeps_the_record(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    store = disk.open()
    store.write(PART)
    fail_with(monkeypatch, "unlink", errno.EIO)
    with pytest.raises(StoreTransient):
        store.delete(PART.ref)
    monkeypatch.undo()
    assert reads_back(store, PART)
    assert list(store.check()) == []
    assert [record.ref for record in disk.open().recover()] == [PART.ref]


def test_a_probe_tells_that_the_disk_does_not_work(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    store = disk.open()
    for call, number in (
        ("pwritev", errno.EIO),
        ("preadv", errno.EIO),
        ("open", errno.EROFS),
        ("statvfs", errno.EIO),
    ):
        with monkeypatch.context() as failing:
            fail_with(failing, call, number)
            with pytest.raises(StoreUnavailable, match=str(disk.path)):
                store.probe()
    with monkeypatch.context() as failing:
        fail_with(failing, "pwritev", errno.ENOSPC)
        store.probe()  # full, but alive
    store.probe()
    assert list((disk.path / "tmp").iterdir()) == []


def test_a_codec_that_fails_is_no_fault_of_the_disk(disk: Disk) -> None:
    class Broken(NoCodec):
        name = "broken"

        def encode(self, payload: memoryview, out: memoryview, itemsize: int) -> int:
            raise CodecError("no")

    store = disk.open(codec=Broken())
    with pytest.raises(RecordCorrupt, match="sealed"):
        store.write(PART)
    assert list((disk.path / "tmp").iterdir()) == []


def test_what_one_codec_wrote_another_reads(disk: Disk) -> None:
    from kvtiers.records.codecs.registry import codec_for

    part = make_part(1, 300_001)
    disk.open(codec=codec_for("zstd")).write(part)
    encoded = disk.file(part.ref).stat().st_size
    assert encoded < 300_001
    store = disk.open()
    assert reads_back(store, part)
    store.write(part)
    assert disk.file(part.ref).stat().st_size > encoded
    assert reads_back(disk.open(codec=codec_for("zstd")), part)


def test_an_errno_tells_what_kind_of_failure_it_is() -> None:
    assert isinstance(as_store_error(OSError(errno.EFBIG, "File too large"), "x"), StoreFull)
    assert isinstance(as_store_error(OSError(errno.EACCES, "Permission denied"), "x"), StoreUnavailable)
    assert isinstance(as_store_error(OSError(errno.EIO, "I/O error"), "x"), StoreTransient)


def test_calls_before_open_are_refused(tmp_path: Path) -> None:
    store = DiskStore(DiskSettings(paths=(str(tmp_path / "disk"),)))
    with pytest.raises(StoreUnavailable, match="not open"):
        store.exists([PART.ref])
    store.close()


def test_close_does_not_wait_and_the_directory_stays_locked_until_the_last_call_ends(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvtiers.model.errors import DirectoryInUse

    store = disk.open()
    inside, go_on = threading.Event(), threading.Event()
    rename = os.rename

    def stalled(source: str, target: str) -> None:
        inside.set()
        assert go_on.wait(30)
        rename(source, target)

    monkeypatch.setattr(os, "rename", stalled)
    writer = threading.Thread(target=store.write, args=(PART,))
    writer.start()
    assert inside.wait(30)
    store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        store.write(PART)
    monkeypatch.undo()
    with pytest.raises(DirectoryInUse):
        disk.open()
    go_on.set()
    writer.join(30)
    again = disk.open()
    assert [record.ref for record in again.recover()] == [PART.ref]
    assert reads_back(again, PART)


def test_nothing_leaks_over_many_cycles(disk: Disk) -> None:
    store = disk.open()
    fds = open_fds()
    threads = threading.active_count()
    for turn in range(300):
        store.write(PART)
        assert reads_back(store, PART)
        if turn % 3 == 0:
            damage_file(disk.file(PART.ref), Damage.FLIP_PAYLOAD)
            with pytest.raises(RecordCorrupt):
                store.read_into(PART.ref, slot(5000), 5000)
        else:
            store.delete(PART.ref)
    assert (open_fds(), threading.active_count()) == (fds, threads)
    store.close()
    assert open_fds() < fds
