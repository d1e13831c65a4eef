"""What other hosts do to a shared directory at the same time, and what they leave there. The hosts are processes; ESTALE is made up."""

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
from pathlib import Path

import pytest

from kvtiers.model.errors import (
    RecordCorrupt,
    RecordMissing,
    StoreFull,
    StoreTransient,
)
from kvtiers.model.parts import RecordRef
from kvtiers.records.codecs.registry import codec_for
from kvtiers.stores.disk.direct_io import read_from_start
from kvtiers.stores.shared_fs import SharedFsSettings, SharedFsStore
from kvtiers.testing.disk_damage import flip_bit, make_other_version, record_file
from kvtiers.testing.sealed_parts import make_part, reads_back, slot

from .shared_fs_child import NBYTES, NUMBERS, VERSIONS
from .test_shared_fs import store_in

CHILD = Path(__file__).with_name("shared_fs_child.py")
_WAIT_S = 60.0


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
