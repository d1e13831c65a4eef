"""Space: `usage` is what `du` says, a full disk refuses writes and nothing else, and it recovers when there is room."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtiers.model.errors import StoreFull
from kvtiers.records.codecs.registry import codec_for
from kvtiers.stores.disk import DirectIO, DiskStore, volume
from kvtiers.stores.disk.space import OtherBytes
from kvtiers.testing.disk_damage import du
from kvtiers.testing.store_kit import make_part, reads_back

if TYPE_CHECKING:
    from tests.stores.disk.conftest import Disk

TINY = 4 << 20


@pytest.mark.parametrize("direct_io", list(DirectIO))
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_usage_is_what_du_says_at_every_moment(disk: Disk, direct_io: DirectIO, codec: str) -> None:
    store = disk.open(direct_io=direct_io, codec=codec_for(codec))
    rng = random.Random(5)
    numbers = range(12)
    for turn in range(80):
        number = rng.choice(numbers)
        if rng.random() < 0.7:
            store.write(make_part(number, rng.choice([1, 4096, 70_000, 300_001]), version=turn))
        else:
            store.delete(make_part(number, 1).ref)
        assert store.usage().used_bytes == disk.du()
    assert list(store.check()) == []


def test_usage_counts_what_an_earlier_run_left_before_any_walk(disk: Disk) -> None:
    store = disk.open()
    for number in range(30):
        store.write(make_part(number, 50_000))
    (disk.path / "somebody-elses").write_bytes(b"x" * 1_000_000)
    list(store.reconcile())
    again = disk.open()
    assert again.usage().used_bytes == disk.du()
    assert again.usage().records == 30


def test_bytes_that_appear_during_a_walk_count_once() -> None:
    other = OtherBytes()
    other.reset(1000)
    other.begin_walk()
    other.add(inode=7, nbytes=4096)  # the walk will see it
    other.add(inode=8, nbytes=4096)  # the walk has passed there
    other.add(inode=9, nbytes=4096)  # removed again
    other.forget(inode=9)
    assert other.total == 1000 + 2 * 4096
    other.end_walk({7: 4096, 1: 500})
    assert other.total == 4096 + 4096 + 500


def test_free_space_is_known_without_asking_the_disk(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    store = disk.open()
    store.write(make_part(1, 5000))
    for call in ("statvfs", "stat", "lstat", "fstat", "scandir", "open"):
        monkeypatch.setattr(os, call, None)
    usage = store.usage()
    monkeypatch.undo()
    assert usage.free_bytes is not None
    assert usage.free_bytes > 0


def test_a_deletion_tells_of_the_space_it_gave_back(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a cache that evicts because space is low would go on until nothing is left."""
    store = disk.open()
    store.write(make_part(1, 5000))
    low = store.usage().free_bytes
    assert low is not None
    monkeypatch.setattr(volume, "free_bytes", lambda _path: low + 12_345)
    assert store.usage().free_bytes == low
    store.delete(make_part(1, 5000).ref)
    assert store.usage().free_bytes == low + 12_345


def test_a_write_that_would_leave_too_little_is_refused_before_it_is_begun(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.open().write(make_part(1, 5000))
    store = disk.open(min_free_bytes=1 << 60)
    monkeypatch.setattr(DiskStore, "probe", None)
    with pytest.raises(StoreFull, match="min_free_bytes"):
        store.write(make_part(2, 5000))
    assert reads_back(store, make_part(1, 5000))
    assert store.delete(make_part(1, 5000).ref)


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    mountpoint = tmp_path / "tiny"
    mountpoint.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={TINY}", "tmpfs", str(mountpoint)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"mounting a tmpfs is not permitted here: {mounted.stderr.strip()}")
    try:
        yield mountpoint
    finally:
        subprocess.run(["umount", "--lazy", str(mountpoint)], check=True)


def fill_up(store: DiskStore, nbytes: int) -> list[int]:
    written: list[int] = []
    for number in range(10_000):
        try:
            store.write(make_part(number, nbytes))
        except StoreFull:
            return written
        written.append(number)
    raise AssertionError("it never filled up")


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_full_disk_refuses_writes_reads_on_and_recovers(disk: Disk, tiny: Path, codec: str) -> None:
    disk.path = tiny / "disk"
    store = disk.open(codec=codec_for(codec))
    fds = len(list(Path("/proc/self/fd").iterdir()))
    written = fill_up(store, 300_001)
    assert len(written) >= 5
    refused = make_part(9000, 300_001)
    for _ in range(30):
        with pytest.raises(StoreFull):
            store.write(refused)
    store.probe()  # full, not broken
    assert all(reads_back(store, make_part(number, 300_001)) for number in written)
    assert len(list(Path("/proc/self/fd").iterdir())) == fds
    assert list((disk.path / "tmp").iterdir()) == []
    assert store.usage().used_bytes == disk.du()
    assert store.usage().records == len(written)
    for number in written[:3]:
        assert store.delete(make_part(number, 300_001).ref)
    store.write(refused)
    assert reads_back(store, refused)
    list(store.reconcile())
    assert list(store.check()) == []
    assert len(list(disk.open().recover())) == len(written) - 3 + 1


def test_deleting_works_when_not_even_the_log_has_room(disk: Disk, tiny: Path) -> None:
    disk.path = tiny / "disk"
    store = disk.open()
    written = fill_up(store, 50_000)
    with (tiny / "ballast").open("wb", buffering=0) as ballast:
        try:
            while ballast.write(b"x" * 4096) == 4096:
                pass
        except OSError:
            pass
    for number in written:  # tombstones do not fit once the log's last block is full
        assert store.delete(make_part(number, 50_000).ref)
    store.write(make_part(1, 50_000))
    assert reads_back(store, make_part(1, 50_000))
    list(store.reconcile())
    assert store.usage().used_bytes == disk.du()
    again = disk.open()
    list(again.recover())
    list(again.reconcile())
    assert [record.ref for record in again.scan()] == [make_part(1, 1).ref]
    assert list(again.check()) == []


def test_a_disk_that_is_full_at_the_start_can_be_read(disk: Disk, tiny: Path) -> None:
    disk.path = tiny / "disk"
    written = fill_up(disk.open(), 300_001)
    disk.close()
    with (tiny / "ballast").open("wb", buffering=0) as ballast:
        try:
            while ballast.write(b"x" * 4096):
                pass
        except OSError:
            pass
    (disk.path / "lock").unlink()  # no room for the owner's pid either
    store = disk.open()
    assert all(reads_back(store, make_part(number, 300_001)) for number in written)
    list(store.reconcile())
    assert store.usage().used_bytes == disk.du()


def test_a_file_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    """RLIMIT_FSIZE in a process of its own: the kernel cuts the write short, then refuses."""
    script = """
        import resource, sys
        from pathlib import Path
        from kvtiers.model.errors import StoreFull
        from kvtiers.stores.disk import DiskSettings, DiskStore
        from kvtiers.testing.store_kit import make_part, reads_back

        path = Path(sys.argv[1])
        store = DiskStore(DiskSettings(paths=(str(path),), min_free_bytes=0))
        store.open()
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        small, large = make_part(1, 100_000), make_part(2, 300_000)
        store.write(small)
        for _ in range(5):
            try:
                store.write(large)
            except StoreFull as error:
                print("full:", error)
        assert reads_back(store, small)
        assert store.exists([small.ref, large.ref]) == [True, False]
        assert not list((path / "tmp").iterdir())
        assert list(store.reconcile()) == []
        assert list(store.check()) == []
        store.close()
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "disk")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("full:") == 5


def test_capacity_on_two_paths_of_one_file_system_is_not_counted_twice(disk: Disk) -> None:
    one = disk.open().usage().free_bytes
    two = disk.open(paths=(str(disk.path), str(disk.path) + "-2"))
    assert one is not None
    assert two.usage().free_bytes == pytest.approx(one, rel=0.05)
    assert two.usage().used_bytes == du(disk.path, Path(str(disk.path) + "-2"))
