"""One process owns a directory: really two processes, really stopped, really killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtiers.model.errors import DirectoryInUse, RecordMissing, StoreUnavailable
from kvtiers.stores.disk.lock import DirectoryLock
from kvtiers.stores.disk.survey import is_disk_directory
from kvtiers.testing.store_kit import make_part, reads_back

if TYPE_CHECKING:
    from tests.stores.disk.conftest import Disk

OWNER = """
import sys, time
from kvtiers.stores.disk import DiskSettings, DiskStore
store = DiskStore(DiskSettings(paths=(sys.argv[1],)))
store.open()
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def owner(disk: Disk) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns the directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(disk.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    yield process
    process.kill()
    process.wait(30)
    for stream in (process.stdin, process.stdout):
        if stream:
            stream.close()


def test_a_second_process_is_refused_and_told_who_owns_it(disk: Disk, owner: subprocess.Popen[str]) -> None:
    with pytest.raises(DirectoryInUse, match=rf"process {owner.pid}\b"):
        disk.open()


def test_a_stopped_owner_still_owns_it(disk: Disk, owner: subprocess.Popen[str]) -> None:
    os.kill(owner.pid, signal.SIGSTOP)
    with pytest.raises(DirectoryInUse, match=str(owner.pid)):
        disk.open()
    os.kill(owner.pid, signal.SIGCONT)
    with pytest.raises(DirectoryInUse):
        disk.open()


def test_a_killed_owner_owns_nothing(disk: Disk, owner: subprocess.Popen[str]) -> None:
    owner.kill()
    owner.wait(30)
    store = disk.open()
    store.write(make_part(1, 100))
    assert reads_back(store, make_part(1, 100))


def test_a_second_store_of_the_same_process_is_refused(disk: Disk) -> None:
    disk.open()
    second = DirectoryLock(str(disk.path))
    with pytest.raises(DirectoryInUse, match="this process"):
        second.acquire()


def test_a_forked_child_does_not_keep_the_directory(disk: Disk) -> None:
    store = disk.open()
    gate, held = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(held)
        os.read(gate, 1)  # until the parent has closed and opened again
        os._exit(0)
    try:
        with pytest.raises(DirectoryInUse):
            DirectoryLock(str(disk.path)).acquire()  # the child's end is closed, the parent's is not
        store.close()
        _acquire_soon(DirectoryLock(str(disk.path)))
    finally:
        os.close(held)
        os.waitpid(child, 0)
        os.close(gate)


def _acquire_soon(lock: DirectoryLock) -> None:
    """The child closes its copy when it first runs after the fork."""
    deadline = time.monotonic() + 10
    while True:
        try:
            lock.acquire()
        except DirectoryInUse:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.002)
        else:
            lock.release()
            return


def test_a_store_that_could_not_open_holds_nothing(disk: Disk, owner: subprocess.Popen[str]) -> None:
    free = str(disk.path) + "-free"
    fds = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(DirectoryInUse):
        disk.open(paths=(free, str(disk.path)))
    assert len(list(Path("/proc/self/fd").iterdir())) == fds
    disk.open(paths=(free,))


# --- what lies in the lock's place --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["emptied", "removed"])
def test_a_directory_that_was_emptied_is_taken_anew_at_the_next_check_up(disk: Disk, how: str) -> None:
    store = disk.open()
    part = make_part(1, 5000)
    store.write(part)
    shutil.rmtree(disk.path)
    if how == "emptied":
        disk.path.mkdir()
    else:
        with pytest.raises(StoreUnavailable):
            store.probe()
        disk.path.mkdir()
    store.probe()
    assert DirectoryLock(str(disk.path)).holds is False
    with pytest.raises(DirectoryInUse, match=str(os.getpid())):
        DirectoryLock(str(disk.path)).acquire()
    with pytest.raises(RecordMissing):
        store.read_into(part.ref, memoryview(bytearray(len(part.payload))), len(part.payload))
    store.write(part)
    assert reads_back(store, part)
    list(store.reconcile())
    assert list(store.check()) == []
    again = disk.open()
    assert reads_back(again, part), "the log is there, and knows it"


def test_a_directory_that_another_has_taken_meanwhile_is_left_to_it(disk: Disk) -> None:
    store = disk.open()
    part = make_part(1, 5000)
    store.write(part)
    shutil.rmtree(disk.path)
    disk.path.mkdir()
    other = DirectoryLock(str(disk.path))
    other.acquire()
    with pytest.raises(StoreUnavailable, match="another has it now"):
        store.probe()
    (disk.path / "index-v1.log").write_bytes(b"theirs")
    asked: list[Callable[[], object]] = [
        lambda: store.write(part),
        lambda: store.delete(part.ref),
        lambda: reads_back(store, part),
    ]
    for ask in asked:
        with pytest.raises(StoreUnavailable, match="another has it now"):
            ask()
    store.remember([])
    assert sorted(entry.name for entry in disk.path.iterdir()) == ["index-v1.log", "lock"]
    assert (disk.path / "index-v1.log").read_bytes() == b"theirs"
    other.release()
    store.probe()
    with pytest.raises(DirectoryInUse):
        other.acquire()


def test_the_first_write_finds_out_that_another_has_the_directory(disk: Disk) -> None:
    """It need not wait for a check-up: there is no place for its temporary file."""
    store = disk.open()
    shutil.rmtree(disk.path)
    disk.path.mkdir()
    other = DirectoryLock(str(disk.path))
    other.acquire()
    with pytest.raises(StoreUnavailable, match="another has it now"):
        store.write(make_part(1, 5000))
    assert [entry.name for entry in disk.path.iterdir()] == ["lock"]
    other.release()


def test_a_directory_on_another_file_system_is_not_ours(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when its disk was unmounted: what is written then fills the system's disk."""
    store = disk.open()
    store.write(make_part(1, 5000))
    away = disk.path.rename(disk.path.with_name("away"))
    disk.path.mkdir()
    monkeypatch.setattr(store._volumes[0], "device", -1)
    with pytest.raises(StoreUnavailable, match="is its disk mounted"):
        store.probe()
    with pytest.raises(StoreUnavailable, match="is its disk mounted"):
        store.write(make_part(2, 5000))
    assert list(disk.path.iterdir()) == []
    disk.path.rmdir()
    away.rename(disk.path)  # it is mounted again
    store.probe()
    assert reads_back(store, make_part(1, 5000))
    store.write(make_part(2, 5000))


def test_probes_side_by_side_take_a_directory_again_once(disk: Disk) -> None:
    store = disk.open()
    for _ in range(20):
        shutil.rmtree(disk.path)
        disk.path.mkdir()
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda _: store.probe(), range(4)))
        store.probe()
    disk.open().probe()  # nothing keeps the lock


def test_a_log_that_was_removed_is_written_anew(disk: Disk) -> None:
    store = disk.open()
    part = make_part(1, 5000)
    store.write(part)
    disk.log.unlink()
    store.probe()
    assert disk.log.exists()
    assert reads_back(disk.open(), part), "and the next start knows what there is"


@pytest.mark.parametrize("content", [b"IMPORTANT DATA of somebody\n", b"4711 and more\n", b"x"])
def test_a_file_of_that_name_that_is_no_lock_is_not_touched(disk: Disk, content: bytes) -> None:
    disk.path.mkdir(parents=True, exist_ok=True)
    (disk.path / "lock").write_bytes(content)
    assert not is_disk_directory(str(disk.path))
    with pytest.raises(StoreUnavailable, match="somebody else's"):
        disk.open()
    assert (disk.path / "lock").read_bytes() == content
    assert [entry.name for entry in disk.path.iterdir()] == ["lock"]


def test_an_empty_lock_is_one(disk: Disk) -> None:
    disk.path.mkdir(parents=True, exist_ok=True)
    (disk.path / "lock").touch()  # a full disk leaves it so
    assert is_disk_directory(str(disk.path))
    disk.open().probe()
    assert (disk.path / "lock").read_bytes().strip() == str(os.getpid()).encode()
