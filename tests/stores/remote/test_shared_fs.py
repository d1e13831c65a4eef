"""A shared directory passes the conformance kit, also where it is missing, full or read-only. It is local: one across a network is in
test_shared_fs_gluster.py, what other hosts do to it in test_shared_fs_hosts.py.
"""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtiers.model.errors import (
    ConfigError,
    StoreFull,
    StoreUnavailable,
)
from kvtiers.model.parts import RecordRef
from kvtiers.records.codecs.registry import codec_for
from kvtiers.stores.base import RecordStore
from kvtiers.stores.disk import DirectIO, Durability
from kvtiers.stores.shared_fs import SharedFsSettings, SharedFsStore, many_stats
from kvtiers.stores.shared_fs.settings import directory_of
from kvtiers.stores.shared_fs.temp_files import TempFiles
from kvtiers.testing.disk_damage import damage_file, record_file, record_files
from kvtiers.testing.sealed_parts import Damage, make_part, reads_back
from kvtiers.testing.servers.needs import missing
from kvtiers.testing.shared_store_kit import SharedStoreContract


class TestSharedFs(SharedStoreContract):
    listable = False
    exact_usage = False

    @pytest.fixture(
        autouse=True,
        params=[("none", "auto", False, "rename"), ("zstd", "off", True, "fsync")],
        ids=["raw-direct", "zstd-buffered-group-fsync"],
    )
    def variant(self, request: pytest.FixtureRequest) -> None:
        self.codec, self.direct_io, self.group_shared, self.durability = request.param

    def make_store(self, place: Path) -> RecordStore:
        place.mkdir(exist_ok=True)
        settings = SharedFsSettings(
            place.as_uri(),
            group_shared=self.group_shared,
            direct_io=DirectIO(self.direct_io),
            durability=Durability(self.durability),
        )
        return SharedFsStore(settings, codec_for(self.codec))

    def damage(self, store: RecordStore, ref: RecordRef, how: Damage) -> None:
        assert isinstance(store, SharedFsStore)
        files = record_files(Path(store.path))
        path = files.pop(ref)
        damage_file(path, how, next(iter(files.values()), None))


def store_in(path: Path, **settings: object) -> SharedFsStore:
    store = SharedFsStore(SharedFsSettings(str(path), **settings), codec_for("none"))  # type: ignore[arg-type]
    store.open()
    return store


# --- the directory itself ---------------------------------------------------------------------------------------------


def test_a_directory_that_is_not_there_is_unavailable_until_it_comes(tmp_path: Path) -> None:
    path = tmp_path / "mnt" / "kv"
    store, part = store_in(path), make_part(1, 5000)
    for call in (
        lambda: store.write(part),
        lambda: reads_back(store, part),
        lambda: store.exists([part.ref]),
        lambda: store.delete(part.ref),
        store.probe,
    ):
        with pytest.raises(StoreUnavailable, match="mount the share"):
            call()
    assert not path.exists()  # what is written below an unmounted mount point fills the wrong disk
    path.mkdir(parents=True)
    store.probe()
    store.write(part)
    assert reads_back(store, part)


def test_a_directory_that_vanishes_and_comes_back_empty_heals(share: Path) -> None:
    store, part = store_in(share), make_part(1, 5000)
    store.write(part)
    share.rename(share.with_name("away"))
    with pytest.raises(StoreUnavailable):
        store.exists([part.ref])
    with pytest.raises(StoreUnavailable):
        store.write(part)
    share.mkdir()
    assert store.exists([part.ref]) == [False]
    store.write(part)
    assert reads_back(store, part)


@pytest.fixture
def tiny(share: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(share)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        missing(f"mounting a tmpfs is not permitted here: {mounted.stderr.strip()}")
    yield share
    subprocess.run(["umount", "--lazy", str(share)], check=True)


def test_a_full_directory_refuses_writes_and_serves_reads(tiny: Path) -> None:
    store = store_in(tiny)
    parts = [make_part(number, 60_000) for number in range(8)]
    written = parts[:2]
    for part in written:
        store.write(part)
    with pytest.raises(StoreFull):
        [store.write(part) for part in parts[2:]]
    assert all(reads_back(store, part) for part in written)
    assert not list((tiny / "tmp").iterdir())
    store.probe()  # it works; it is full
    store.delete(written[0].ref)
    store.write(written[0])
    free = store.usage().free_bytes
    assert free is not None
    assert free < 256 << 10


def test_a_directory_mounted_read_only_is_unavailable_for_writing_and_serves_reads(tiny: Path) -> None:
    store, part = store_in(tiny), make_part(1, 5000)
    store.write(part)
    subprocess.run(["mount", "-o", "remount,ro", str(tiny)], check=True)
    with pytest.raises(StoreUnavailable, match="Read-only"):
        store.write(make_part(2, 5000))
    with pytest.raises(StoreUnavailable):
        store.probe()
    assert reads_back(store, part)
    subprocess.run(["mount", "-o", "remount,rw", str(tiny)], check=True)
    store.write(make_part(2, 5000))


@pytest.mark.parametrize("group_shared", [False, True])
def test_modes_are_as_asked_for_whatever_the_umask(share: Path, group_shared: bool) -> None:
    old = os.umask(0o077)
    try:
        store_in(share, group_shared=group_shared).write(make_part(1, 5000))
    finally:
        os.umask(old)
    file = record_file(share, make_part(1, 5000).ref)
    assert stat.S_IMODE(file.stat().st_mode) == (0o660 if group_shared else 0o600)
    directories = [file.parent, file.parent.parent, file.parent.parent.parent, share / "tmp"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in directories} == {0o2770 if group_shared else 0o700}


@pytest.mark.parametrize(
    ("endpoint", "path"),
    [
        ("/mnt/kv", "/mnt/kv"),
        ("file:///mnt/kv/", "/mnt/kv"),
        ("file://localhost/mnt/a%20b", "/mnt/a b"),
    ],
)
def test_endpoints_name_a_directory(endpoint: str, path: str) -> None:
    assert directory_of(endpoint) == path


@pytest.mark.parametrize("endpoint", ["mnt/kv", "file://host/mnt/kv", "nfs://host/kv", "file:relative", ""])
def test_other_endpoints_are_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError):
        SharedFsSettings(endpoint)


# --- existence in batch -----------------------------------------------------------------------------------------------


def test_a_batch_is_answered_in_order_also_by_several_threads(tmp_path: Path) -> None:
    paths = [str(tmp_path / str(number)) for number in range(300)]
    for path in paths[::3]:
        Path(path).touch()
    expected = [number % 3 == 0 for number in range(300)]
    ticks = iter(range(10))  # a clock on which every stat takes an eighth of a second
    assert many_stats.which_are_files(paths, 16, clock=lambda: float(next(ticks))) == expected
    assert many_stats.which_are_files(paths, 16, clock=lambda: 0.0) == expected
    assert many_stats.which_are_files([], 16) == []


def test_a_file_system_that_fails_is_no_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made up: EIO is what a soft mount gives when its server is away."""
    lstat = os.lstat

    def broken(path: str) -> os.stat_result:
        if path.endswith("/20"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return lstat(path)

    monkeypatch.setattr(os, "lstat", broken)
    ticks = iter(range(10))
    with pytest.raises(OSError, match="Input/output"):
        many_stats.which_are_files(
            [str(tmp_path / str(number)) for number in range(40)], 8, clock=lambda: float(next(ticks))
        )


def test_files_that_cant_be_removed_hide_no_others(share: Path) -> None:
    temp = TempFiles(str(share))
    Path(temp.directory).mkdir(parents=True)
    for number in range(600):
        (Path(temp.directory) / f"somebody's {number}").touch()
    old = temp.new()
    Path(old).touch()
    os.utime(old, (1.0, 1.0))
    assert sum(temp.reap(1000.0) for _ in range(3)) == 1
    assert not Path(old).exists()
    Path(old).touch()
    os.utime(old, (1.0, 1.0))
    assert sum(temp.reap(1000.0) for _ in range(4)) == 1  # from the beginning again
