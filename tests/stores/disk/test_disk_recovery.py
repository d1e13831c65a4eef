"""After any start: what the log lost is found by the walk, what it made up is taken back, and `usage` is what `du` says."""

from __future__ import annotations

import os
import random
import shutil
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvtiers.model.errors import RecordCorrupt, RecordForeign, RecordMissing, StoreError
from kvtiers.model.parts import RecordRef
from kvtiers.records.codecs.registry import codec_for
from kvtiers.stores.base import DamagedRecord, StoredRecord
from kvtiers.stores.disk import recovery
from kvtiers.stores.disk.catalog import Catalog, Settled
from kvtiers.stores.disk.entry import ENTRY_BYTES
from kvtiers.testing.disk_damage import damage_file, flip_bit, make_other_version
from kvtiers.testing.store_kit import Damage, make_part, reads_back, slot

if TYPE_CHECKING:
    from tests.stores.disk.conftest import Disk

PARTS = [make_part(number, 5000 + 4096 * (number % 2)) for number in range(6)]


def fill(disk: Disk) -> None:
    store = disk.open()
    for part in PARTS:
        store.write(part)
    disk.close()


def test_a_fast_start_touches_no_record(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(disk)
    opened: list[str] = []
    really_open = os.open

    def spy(path: str, *rest: Any, **named: Any) -> int:
        opened.append(path)
        return really_open(path, *rest, **named)

    monkeypatch.setattr(os, "open", spy)
    store = disk.open()
    assert [record.ref for record in store.recover()] == [part.ref for part in PARTS]
    assert not [path for path in opened if path.endswith(".kv")]
    assert store.usage().used_bytes == disk.du()  # the last run's note tells it already


def test_a_lost_log_is_a_slow_start_and_nothing_else(disk: Disk) -> None:
    fill(disk)
    disk.log.unlink()
    store = disk.open()
    assert list(store.recover()) == []
    news = list(store.reconcile())
    assert all(isinstance(one, StoredRecord) for one in news)
    by_ref = {one.ref: one for one in news if isinstance(one, StoredRecord)}
    assert set(by_ref) == {part.ref for part in PARTS}
    assert by_ref[PARTS[3].ref].payload_bytes == len(PARTS[3].payload)
    assert by_ref[PARTS[3].ref].parent == PARTS[3].parent
    assert all(reads_back(store, part) for part in PARTS)
    assert store.usage().used_bytes == disk.du()
    assert list(store.check()) == []
    assert {record.ref for record in disk.open().recover()} == set(by_ref)


@pytest.mark.parametrize("position", range(0, ENTRY_BYTES, 13))
def test_a_flipped_log_entry_is_ignored_and_restored(disk: Disk, position: int) -> None:
    fill(disk)
    flip_bit(disk.log, 2 * ENTRY_BYTES + position, position % 8)
    store = disk.open()
    assert {record.ref for record in store.recover()} == {part.ref for part in PARTS} - {PARTS[2].ref}
    assert store.stats()["log_damaged"] == 1
    assert [one.ref for one in store.reconcile() if isinstance(one, StoredRecord)] == [PARTS[2].ref]
    assert reads_back(store, PARTS[2])
    assert list(store.check()) == []
    again = disk.open()
    assert len(list(again.recover())) == 6
    assert again.stats()["log_damaged"] == 0


def test_an_entry_without_a_file_is_taken_back(disk: Disk) -> None:
    fill(disk)
    disk.file(PARTS[1].ref).unlink()
    disk.file(PARTS[4].ref).unlink()
    store = disk.open()
    assert len(list(store.recover())) == 6
    assert sorted(store.reconcile()) == sorted([PARTS[1].ref, PARTS[4].ref])
    assert store.exists([part.ref for part in PARTS]) == [True, False, True, True, False, True]
    assert store.usage().used_bytes == disk.du()
    assert len(list(disk.open().recover())) == 4


def test_a_lost_tombstone_is_taken_back(disk: Disk) -> None:
    fill(disk)
    before = disk.log.read_bytes()
    disk.open().delete(PARTS[0].ref)
    disk.close()
    disk.log.write_bytes(before)
    assert list(disk.open().reconcile()) == [PARTS[0].ref]


def test_where_log_and_header_disagree_the_header_is_right(disk: Disk, tmp_path: Path) -> None:
    """As after a crash between the intent of a replacement and its rename."""
    fill(disk)
    log = disk.log.read_bytes()
    disk.open(codec=codec_for("zstd")).write(make_part(0, 300_001))
    disk.close()
    disk.log.write_bytes(log)
    store = disk.open()
    (news,) = store.reconcile()
    assert isinstance(news, StoredRecord)
    assert (news.ref, news.payload_bytes) == (PARTS[0].ref, 300_001)
    assert reads_back(store, make_part(0, 300_001))
    assert store.usage().used_bytes == disk.du()
    assert list(store.check()) == []


@pytest.mark.parametrize("how", [Damage.TRUNCATE, Damage.EMPTY, Damage.FLIP_HEADER, Damage.SWAP])
@pytest.mark.parametrize("log_is_lost", [False, True])
def test_a_file_that_no_header_speaks_for_is_removed(disk: Disk, how: Damage, *, log_is_lost: bool) -> None:
    fill(disk)
    path = disk.file(PARTS[0].ref)
    damage_file(path, how, disk.file(PARTS[1].ref))  # of another size
    if log_is_lost:
        disk.log.unlink()
    store = disk.open()
    told = len(list(store.recover()))
    news = list(store.reconcile())
    if how is Damage.FLIP_HEADER and not log_is_lost:  # the size is right: found out when it is read
        assert news == []
        with pytest.raises(RecordCorrupt, match="checksum"):
            reads_back(store, PARTS[0])
    elif log_is_lost:
        assert (told, len(news)) == (0, 5)
    else:
        assert news == [PARTS[0].ref]
    assert not path.exists()
    assert store.stats()["corrupt"] + store.stats()["foreign"] == 1
    assert store.usage().used_bytes == disk.du()
    store.write(PARTS[0])
    assert reads_back(store, PARTS[0])


def foreigners(disk: Disk) -> list[Path]:
    """Everything that might lie in a cache directory and is none of ours."""
    record = disk.file(PARTS[0].ref)
    made = [
        disk.path / "README",
        disk.path / "tmp" / "notes.txt",
        disk.path / "lmcache" / "deep" / "er" / "model@7f.pt",
        record.with_suffix(".kv.bak"),
        record.with_name(record.name.replace(".0.kv", ".00.kv")),
        record.with_name(record.name.replace(".0.kv", ".70000.kv")),
        record.with_name("z" * 64 + ".0.kv"),
        record.parent.parent.parent / "00" / "00" / record.name,  # not the directory of its key
        disk.path / "index-v0.log",
    ]
    for path in made:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(str(path)).randbytes(10_000))
    link = disk.path / "link"
    link.symlink_to(record)
    directory_link = disk.path / "directory-link"
    directory_link.symlink_to("/")
    fifo = disk.path / "fifo"
    os.mkfifo(fifo)
    hard = disk.path / "hard-link"
    hard.hardlink_to(disk.path / "README")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(disk.path)  # a socket's path is at most 107 bytes
        server.bind("socket")
        os.chdir(here)
    return [*made, link, directory_link, fifo, hard, disk.path / "socket"]


@pytest.mark.parametrize("log_is_lost", [False, True])
def test_what_is_not_ours_is_counted_and_never_touched(disk: Disk, *, log_is_lost: bool) -> None:
    fill(disk)
    strangers = foreigners(disk)
    if log_is_lost:
        disk.log.unlink()
    before = {path: path.lstat() for path in strangers}
    store = disk.open()
    list(store.recover())
    news = list(store.reconcile())
    assert len(news) == (6 if log_is_lost else 0)
    assert {record.ref for record in store.scan()} == {part.ref for part in PARTS}
    assert store.usage().used_bytes == disk.du()
    assert store.usage().records == 6
    assert store.stats()["foreign_files"] == len(strangers)
    inodes = {status.st_ino: status.st_blocks * 512 for status in before.values()}
    assert store.stats()["foreign_bytes"] == sum(inodes.values())  # neither directories nor lock nor log
    for part in PARTS:
        store.delete(part.ref)
    list(store.reconcile())
    store.close()
    for path, status in before.items():
        assert path.lstat()[:8] == status[:8]  # mode, inode, device, links, owner, size
    assert disk.open().usage().used_bytes == disk.du()


@pytest.mark.parametrize("log_is_lost", [False, True])
def test_another_format_version_is_counted_but_neither_served_nor_removed(
    disk: Disk, *, log_is_lost: bool
) -> None:
    fill(disk)
    path = disk.file(PARTS[0].ref)
    make_other_version(path)
    theirs = path.read_bytes()
    if log_is_lost:
        disk.log.unlink()
    store = disk.open()
    list(store.recover())
    if not log_is_lost:
        with pytest.raises(RecordForeign, match="format version"):
            reads_back(store, PARTS[0])
    assert store.exists([PARTS[0].ref]) == [False]
    list(store.reconcile())
    assert store.exists([PARTS[0].ref]) == [False]
    with pytest.raises(RecordMissing):
        reads_back(store, PARTS[0])
    assert PARTS[0].ref not in {record.ref for record in store.scan()}
    assert path.read_bytes() == theirs
    assert store.usage().used_bytes == disk.du()


def test_a_known_record_that_became_another_version_of_another_size_is_taken_back(disk: Disk) -> None:
    fill(disk)
    path = disk.file(PARTS[0].ref)
    make_other_version(path)
    with path.open("ab") as file:
        file.write(b"x" * 4096)
    store = disk.open()
    list(store.recover())
    assert list(store.reconcile()) == [PARTS[0].ref]
    assert store.exists([PARTS[0].ref]) == [False]
    assert path.exists()
    assert store.usage().used_bytes == disk.du()
    assert list(disk.open().reconcile()) == []


@pytest.mark.parametrize("walked", [False, True], ids=["set aside", "found by a walk"])
def test_a_record_in_the_place_of_what_was_not_ours_counts_once(disk: Disk, *, walked: bool) -> None:
    fill(disk)
    make_other_version(disk.file(PARTS[0].ref))
    store = disk.open()
    list(store.recover())
    with pytest.raises(RecordForeign):
        reads_back(store, PARTS[0])
    if walked:
        list(store.reconcile())
    assert store.stats()["foreign_files"] == 1
    store.write(PARTS[0])
    assert reads_back(store, PARTS[0])
    assert store.usage().used_bytes == disk.du()
    assert (store.stats()["foreign_files"], store.stats()["foreign_bytes"]) == (0, 0)
    assert list(store.check()) == []


def test_a_file_that_nobody_has_counted_is_not_given_up(disk: Disk) -> None:
    fill(disk)
    store = disk.open()
    list(store.recover())
    (disk.path / "theirs").write_bytes(bytes(8192))
    list(store.reconcile())
    late = disk.file(make_part(99, 5000).ref)
    late.parent.mkdir(parents=True, exist_ok=True)
    late.write_bytes(bytes(12_288))
    store.write(make_part(99, 5000))
    assert (store.stats()["foreign_files"], store.stats()["foreign_bytes"]) == (1, 8192)


def test_a_walk_tells_the_damaged_from_the_vanished(disk: Disk) -> None:
    fill(disk)
    store = disk.open()
    list(store.recover())
    os.truncate(disk.file(PARTS[0].ref), 100)
    disk.file(PARTS[1].ref).unlink()
    news = list(store.reconcile())
    assert {(type(one), one) for one in news} == {
        (DamagedRecord, DamagedRecord(*PARTS[0].ref)),
        (RecordRef, PARTS[1].ref),
    }


def test_another_models_records_are_found_under_their_own_namespace_only(disk: Disk) -> None:
    other = make_part(0, 5000, namespace=bytes(32))
    disk.open().write(other)
    disk.close()
    store = disk.open()
    assert [record.ref.namespace for record in store.recover()] == [bytes(32)]
    assert store.exists([PARTS[0].ref, other.ref]) == [False, True]
    with pytest.raises(RecordMissing):
        reads_back(store, PARTS[0])


def test_another_models_file_under_our_name_is_not_served(disk: Disk) -> None:
    store = disk.open()
    ours, theirs = make_part(1, 5000), make_part(1, 5000, namespace=bytes(32))
    store.write(ours)
    store.write(theirs)
    shutil.copyfile(disk.file(theirs.ref), disk.file(ours.ref))
    with pytest.raises(RecordForeign, match="namespace"):
        reads_back(store, ours)
    assert not disk.file(ours.ref).exists()
    assert reads_back(store, theirs)


def test_unfinished_writes_of_dead_processes_are_removed(disk: Disk) -> None:
    fill(disk)
    for name in ("1-0.tmp", "99999-123.tmp"):
        (disk.path / "tmp" / name).write_bytes(b"x" * 5000)
    (disk.path / "tmp" / "keep.me").write_bytes(b"x")
    store = disk.open()
    assert store.stats()["temp_removed"] == 2
    assert [path.name for path in (disk.path / "tmp").iterdir()] == ["keep.me"]
    list(store.reconcile())
    assert store.usage().used_bytes == disk.du()


def test_empty_directories_go_and_come_back(disk: Disk) -> None:
    store = disk.open()
    for part in PARTS:
        store.write(part)
    for part in PARTS:
        store.delete(part.ref)
    list(store.reconcile())
    assert {path.name for path in disk.path.iterdir()} == {"index-v1.log", "lock", "tmp"}
    assert store.usage().used_bytes == disk.du()
    for part in PARTS:
        store.write(part)
    assert all(reads_back(store, part) for part in PARTS)


# --- while others work ------------------------------------------------------------------------------------------------


def test_changes_between_the_steps_of_a_walk_are_no_news(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "FILES_PER_STEP", 1)
    fill(disk)
    store = disk.open()
    fresh = iter(range(100, 200))
    rng = random.Random(3)
    steps = 0
    for news in store.reconcile_steps():
        assert news == []
        steps += 1
        store.write(make_part(next(fresh), 3000))
        if rng.random() < 0.5:
            store.delete(make_part(next(fresh) - 1, 3000).ref)
        store.write(rng.choice(PARTS))
        store.delete(rng.choice(PARTS).ref)
    assert steps > 10
    assert store.usage().used_bytes == disk.du()
    assert list(store.check()) == []


def test_a_record_removed_before_its_news_is_told_is_no_news(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(disk)
    disk.log.unlink()
    store = disk.open()
    settle = Catalog.settle

    def settle_and_remove(self: Catalog, ref: RecordRef, known_elsewhere: bool) -> Settled:
        settled = settle(self, ref, known_elsewhere)
        if ref == PARTS[2].ref:
            assert store.delete(ref)
        return settled

    monkeypatch.setattr(Catalog, "settle", settle_and_remove)
    news = list(store.reconcile())
    assert {one.ref for one in news if isinstance(one, StoredRecord)} == {p.ref for p in PARTS} - {
        PARTS[2].ref
    }
    assert len(news) == 5


@pytest.mark.parametrize("by_the_store", [True, False])
def test_a_record_that_goes_while_it_is_settled_is_news_only_if_nobody_here_removed_it(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, by_the_store: bool
) -> None:
    """A file of another size than the table knows is looked at closely; before that comes, it goes."""
    fill(disk)
    store, ref = disk.open(), PARTS[2].ref
    with disk.file(ref).open("ab") as file:
        file.write(bytes(4096))
    settle = Catalog.settle

    def remove_and_settle(self: Catalog, found: RecordRef, known_elsewhere: bool) -> Settled:
        assert found == ref
        if by_the_store:
            assert store.delete(ref)
        else:
            disk.file(ref).unlink()
        return settle(self, found, known_elsewhere)

    monkeypatch.setattr(Catalog, "settle", remove_and_settle)
    assert list(store.reconcile()) == ([] if by_the_store else [ref])
    assert store.exists([ref]) == [False]
    assert store.usage().used_bytes == disk.du()
    assert list(store.check()) == []


def test_a_walk_among_eight_busy_threads_tells_nothing_false(disk: Disk) -> None:
    """The log knows every record here, so any news at all would be false."""
    store = disk.open()
    stop = threading.Event()

    def work(thread: int) -> None:
        rng = random.Random(thread)
        parts = [make_part(1000 * thread + number, 2000) for number in range(12)]
        while not stop.is_set():
            part = rng.choice(parts)
            if rng.random() < 0.6:
                store.write(part)
            else:
                store.delete(part.ref)

    news: list[StoredRecord | RecordRef] = []
    with ThreadPoolExecutor(8) as pool:
        threads = [pool.submit(work, thread) for thread in range(8)]
        for _ in range(25):
            news += store.reconcile()
        stop.set()
        for thread in threads:
            thread.result(30)
    assert news == []
    list(store.reconcile())
    assert store.usage().used_bytes == disk.du()
    assert list(store.check()) == []
    assert store.stats()["vanished"] == store.stats()["adopted"] == 0


def test_a_walk_broken_off_changes_nothing(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "FILES_PER_STEP", 2)
    fill(disk)
    store = disk.open()
    before = store.usage()
    steps = store.reconcile_steps()
    next(steps)
    assert isinstance(steps, Iterator)
    steps.close()  # type: ignore[attr-defined]
    assert store.usage() == before
    list(store.reconcile())
    assert store.usage() == before


def test_two_walks_at_once_are_one(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "FILES_PER_STEP", 2)
    fill(disk)
    disk.log.unlink()
    store = disk.open()
    first = store.reconcile_steps()
    news = next(first)
    assert list(store.reconcile()) == []
    for step in first:
        news += step
    assert len(news) == 6
    assert store.usage().used_bytes == disk.du()


def test_closing_ends_a_walk(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "FILES_PER_STEP", 2)
    fill(disk)
    store = disk.open()
    steps = store.reconcile_steps()
    next(steps)
    store.close()
    assert list(steps) == []
    disk.open()  # the walk holds nothing


def test_a_directory_that_is_gone_is_a_store_error(disk: Disk) -> None:
    fill(disk)
    store = disk.open()
    shutil.rmtree(disk.path)
    with pytest.raises(RecordMissing):
        reads_back(store, PARTS[0])
    with pytest.raises(StoreError):
        list(store.reconcile())
    with pytest.raises(StoreError):
        store.write(PARTS[0])
    with pytest.raises(StoreError):
        store.probe()


def test_remembering_an_order_needs_not_name_all(disk: Disk) -> None:
    fill(disk)
    store = disk.open()
    unknown = make_part(77, 100).ref
    store.remember([PARTS[5].ref, unknown, PARTS[0].ref])
    order = [record.ref for record in disk.open().recover()]
    assert order == [PARTS[n].ref for n in (1, 2, 3, 4, 5, 0)]


def test_a_record_found_by_the_walk_reads_as_any_other(disk: Disk) -> None:
    fill(disk)
    disk.log.unlink()
    store = disk.open()
    list(store.reconcile())
    record = store.find(PARTS[1].ref)
    assert record is not None
    read = store.read_into(PARTS[1].ref, slot(record.payload_bytes), record.payload_bytes)
    assert read == record._replace(checksum=PARTS[1].checksum, write_id=PARTS[1].write_id)
    assert store.find(make_part(99, 1).ref) is None
