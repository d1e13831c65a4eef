"""A shared directory passes the conformance kit, and takes what other hosts do to it.

No network file system can be had in a test; the directory is local, and the hosts are processes. ESTALE, which only such a file
system gives, is made up where a test says so.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtiers.model.errors import (
    ConfigError,
    RecordCorrupt,
    RecordMissing,
    StoreFull,
    StoreTransient,
    StoreUnavailable,
)
from kvtiers.model.parts import RecordRef
from kvtiers.records.codecs.registry import codec_for
from kvtiers.stores.base import RecordStore
from kvtiers.stores.disk import DirectIO, Durability
from kvtiers.stores.disk.direct_io import read_from_start
from kvtiers.stores.shared_fs import SharedFsSettings, SharedFsStore, many_stats
from kvtiers.stores.shared_fs.settings import directory_of
from kvtiers.stores.shared_fs.temp_files import TempFiles
from kvtiers.testing.disk_damage import damage_file, flip_bit, make_other_version, record_file, record_files
from kvtiers.testing.sealed_parts import Damage, make_part, reads_back, slot
from kvtiers.testing.servers.needs import missing
from kvtiers.testing.store_kit import RecordStoreContract

from .shared_fs_child import NBYTES, NUMBERS, VERSIONS

CHILD = Path(__file__).with_name("shared_fs_child.py")
_WAIT_S = 60.0


class TestSharedFs(RecordStoreContract):
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


@pytest.fixture
def share(tmp_path: Path) -> Path:
    path = tmp_path / "share"
    path.mkdir()
    return path


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


# --- other hosts ------------------------------------------------------------------------------------------------------


def test_two_hosts_write_and_remove_while_a_third_reads(share: Path) -> None:
    """Every read gives one of the versions, whole, or a miss."""
    payloads = {
        (number): {bytes(make_part(number, NBYTES, version=version).payload) for version in range(VERSIONS)}
        for number in range(NUMBERS)
    }
    children = [
        subprocess.Popen([sys.executable, str(CHILD), str(share), str(seed)], stdout=subprocess.PIPE)
        for seed in (1, 2)
    ]
    store, out, seen = store_in(share), slot(NBYTES), Counter[str]()
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
        end = time.monotonic() + _WAIT_S
        while min(seen["hit"], seen["miss"]) < 200:
            assert time.monotonic() < end, seen
            number = seen.total() % NUMBERS
            ref = make_ref(number)
            try:
                store.read_into(ref, out, NBYTES)
            except RecordMissing:
                seen["miss"] += 1
                continue
            assert bytes(out[:NBYTES]) in payloads[number]
            seen["hit"] += 1
        assert all(child.poll() is None for child in children)
    finally:
        for child in children:
            child.kill()
            child.communicate(timeout=_WAIT_S)
    assert store.stats()["corrupt"] == store.stats()["foreign"] == 0
    for number in range(NUMBERS):
        part = make_part(number, NBYTES)
        store.write(part)
        assert reads_back(store, part)


def make_ref(number: int) -> RecordRef:
    return make_part(number, 1).ref


def test_a_damaged_record_that_another_host_wrote_anew_is_not_removed(
    share: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the narrowest moment: after the reader saw that the damaged file still has the name, before it moves that aside."""
    reader, writer, part = store_in(share), store_in(share), make_part(1, 5000)
    reader.write(part)
    flip_bit(record_file(share, part.ref), 5000)
    rename = os.rename
    healed: list[int] = []

    def late(source: str, target: str) -> None:
        if target.endswith(".tmp") and not healed:
            healed.append(writer.write(part))
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(RecordCorrupt):
        reads_back(reader, part)
    assert healed
    assert reader.stats()["put_back"] == 1
    assert reads_back(reader, part)
    assert not list((share / "tmp").iterdir())


def test_a_record_of_another_version_is_left_to_its_hosts(share: Path) -> None:
    store, part = store_in(share), make_part(1, 5000)
    store.write(part)
    file = record_file(share, part.ref)
    make_other_version(file)
    with pytest.raises(Exception, match="version"):
        reads_back(store, part)
    assert file.exists()


def test_what_is_no_file_is_a_miss_and_is_left_alone(share: Path) -> None:
    store, part = store_in(share), make_part(1, 5000)
    file = record_file(share, part.ref)
    file.mkdir(parents=True)
    assert store.exists([part.ref]) == [False]
    with pytest.raises(RecordMissing):
        reads_back(store, part)
    assert store.delete(part.ref) is False
    file.rmdir()
    os.mkfifo(file)
    with pytest.raises(RecordMissing):  # and does not hang
        reads_back(store, part)
    assert stat.S_ISFIFO(file.stat().st_mode)


def test_directories_removed_as_empty_in_the_wrong_moment_are_made_again(share: Path) -> None:
    store, part, stop = store_in(share), make_part(1, 5000), threading.Event()

    def tidy() -> None:
        while not stop.is_set():
            for name in (share / part.ref.namespace.hex(), share / "tmp"):
                shutil.rmtree(name, ignore_errors=True)

    other = threading.Thread(target=tidy)
    other.start()
    written = 0
    try:
        for _ in range(200):
            try:
                store.write(part)
                written += 1
            except StoreTransient:  # the unfinished file itself was removed
                pass
    finally:
        stop.set()
        other.join(_WAIT_S)
    assert written
    store.write(part)
    assert reads_back(store, part)


@pytest.mark.parametrize(("times", "raised"), [(1, None), (2, StoreTransient)])
def test_a_stale_handle_is_looked_up_once_more(
    share: Path, monkeypatch: pytest.MonkeyPatch, times: int, raised: type[Exception] | None
) -> None:
    """Made up: only a network file system gives ESTALE."""
    store, part = store_in(share), make_part(1, 5000)
    store.write(part)
    left = iter(range(times))

    def stale(*arguments: object) -> int:
        if next(left, None) is not None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read_from_start(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("kvtiers.stores.disk.record_file.read_from_start", stale)
    if raised is None:
        assert reads_back(store, part)
    else:
        with pytest.raises(raised):
            reads_back(store, part)
        assert reads_back(store, part)


# --- what hosts leave -------------------------------------------------------------------------------------------------


def orphan(share: Path, name: str, age_s: float) -> Path:
    path = share / "tmp" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"half a record")
    then = time.time() - age_s
    os.utime(path, (then, then))
    return path


def test_unfinished_files_of_dead_hosts_go_by_age(share: Path) -> None:
    old = orphan(share, "gone_host-17-0123abcd-4.tmp", 7200)
    young = orphan(share, "other_host-17-0123abcd-5.tmp", 60)
    foreign = orphan(share, "notes.txt", 7200)
    store = store_in(share)
    store.write(make_part(1, 5000))
    assert [old.exists(), young.exists(), foreign.exists()] == [False, True, True]
    assert store.stats()["temp_removed"] == 1


def test_unfinished_files_are_looked_for_seldom(share: Path) -> None:
    now = [0.0]
    store = SharedFsStore(SharedFsSettings(str(share)), codec_for("none"), clock=lambda: now[0])
    store.open()
    store.write(make_part(1, 5000))
    old = orphan(share, "gone_host-17-0123abcd-4.tmp", 7200)
    store.write(make_part(2, 5000))
    assert old.exists()
    now[0] = 1e4
    store.write(make_part(3, 5000))
    assert not old.exists()


def test_a_failed_write_leaves_nothing(share: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_in(share)

    def refused(source: str, target: str) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(StoreFull):
        store.write(make_part(1, 5000))
    assert not list((share / "tmp").iterdir())


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
