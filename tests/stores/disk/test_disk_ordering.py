"""The order of system calls that makes a crash at any moment harmless, as they really happen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvtiers.stores.disk import Durability, index_log
from kvtiers.stores.disk.entry import ENTRY_BYTES
from kvtiers.testing.store_kit import make_part

if TYPE_CHECKING:
    from tests.stores.disk.conftest import Disk

PART = make_part(1, 5000)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every call that changes the disk, with what it is about."""
    seen: list[str] = []

    def kind(path: str) -> str:
        name = Path(path).name
        if name.endswith(".kv"):
            return "record"
        if name.endswith(".tmp"):
            return "temp"
        return "log" if name.endswith(".log") else "directory"

    def on_fd(call: str) -> None:
        really = getattr(os, call)

        def spy(fd: int, *rest: Any) -> Any:
            result = really(fd, *rest)
            seen.append(
                f"{call} {kind(str(Path(f'/proc/self/fd/{fd}').readlink()).removesuffix(' (deleted)'))}"
            )
            return result

        monkeypatch.setattr(os, call, spy)

    def on_path(call: str) -> None:
        really = getattr(os, call)

        def spy(path: str, *rest: Any) -> Any:
            result = really(path, *rest)
            seen.append(
                f"{call} {' to '.join(kind(str(one)) for one in (path, *rest) if isinstance(one, str))}"
            )
            return result

        monkeypatch.setattr(os, call, spy)

    for call in ("pwrite", "pwritev", "fdatasync", "fsync"):
        on_fd(call)
    for call in ("rename", "unlink", "mkdir"):
        on_path(call)
    return seen


def test_a_write_publishes_only_what_is_whole_and_announced(disk: Disk, calls: list[str]) -> None:
    store = disk.open()
    store.write(make_part(1, 100))
    calls.clear()
    store.write(PART)
    assert calls == ["pwritev temp", "pwrite log", "rename temp to record"]


def test_fsync_makes_each_step_durable_before_the_next(disk: Disk, calls: list[str]) -> None:
    store = disk.open(durability=Durability.FSYNC)
    store.write(make_part(1, 100))
    calls.clear()
    store.write(PART)
    assert calls == [
        "pwritev temp",
        "fdatasync temp",
        "pwrite log",
        "fdatasync log",
        "rename temp to record",
        "fsync directory",
    ]


def test_fsync_makes_new_directories_durable_too(disk: Disk, calls: list[str]) -> None:
    store = disk.open(durability=Durability.FSYNC)
    calls.clear()
    store.write(PART)
    assert calls[4:] == ["mkdir directory", "fsync directory"] * 3 + [
        "rename temp to record",
        "fsync directory",
    ]


def test_a_deletion_is_announced_before_the_file_goes(disk: Disk, calls: list[str]) -> None:
    store = disk.open()
    store.write(PART)
    calls.clear()
    store.delete(PART.ref)
    assert calls == ["pwrite log", "unlink record"]


def test_a_bad_record_is_announced_before_it_goes(disk: Disk, calls: list[str]) -> None:
    from kvtiers.model.errors import RecordCorrupt
    from kvtiers.testing.disk_damage import flip_bit
    from kvtiers.testing.store_kit import reads_back

    store = disk.open()
    store.write(PART)
    flip_bit(disk.file(PART.ref), 5000)
    calls.clear()
    with pytest.raises(RecordCorrupt):
        reads_back(store, PART)
    assert calls == ["pwrite log", "unlink record"]


def test_the_log_is_compacted_while_it_is_used_and_stays_small(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_log, "_SLACK", 64)
    store = disk.open()
    for number in range(20):
        store.write(make_part(number, 100))
    parts = [make_part(number, 100) for number in range(20, 23)]
    for turn in range(300):
        part = parts[turn % 3]
        store.write(part)
        if turn % 2:
            store.delete(part.ref)
    assert store.stats()["log_compactions"] >= 3
    assert disk.log.stat().st_size < 150 * ENTRY_BYTES
    list(store.reconcile())
    assert list(store.check()) == []
    live = {record.ref for record in store.scan()}
    assert {record.ref for record in disk.open().recover()} == live
