"""O_DIRECT where it is offered, buffered where it isn't, and never an error because of the difference."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvtiers.stores.disk import DirectIO, direct_io
from kvtiers.stores.disk.direct_io import (
    direct_flags,
    open_new,
    open_to_read,
    read_from_start,
    write_from_start,
)
from kvtiers.testing.store_kit import make_part, slot

if TYPE_CHECKING:
    from tests.stores.disk.conftest import Disk

PART = make_part(1, 300_001)


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """A directory on a tmpfs."""
    import shutil
    import tempfile

    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no tmpfs at /dev/shm")
    path = Path(tempfile.mkdtemp(prefix="kvtiers-test-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


def test_a_tmpfs_works(disk: Disk, memory_path: Path) -> None:
    store = disk.open(paths=(str(memory_path / "disk"),))
    store.write(PART)
    out = slot(300_001)
    store.read_into(PART.ref, out, 300_001)
    assert out[:300_001] == PART.payload


@pytest.mark.parametrize("mode", list(DirectIO))
def test_memory_off_any_alignment_is_served_all_the_same(disk: Disk, mode: DirectIO) -> None:
    store = disk.open(direct_io=mode)
    off = slot(400_000)[3 : 3 + 300_001]
    off[:] = PART.payload
    store.write(PART._replace(payload=off))
    out = slot(400_000)[5 : 5 + 303_104]
    store.read_into(PART.ref, out, 300_001)
    assert out[:300_001] == PART.payload


def test_reads_bypass_the_page_cache_where_they_can(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    store = disk.open()
    if not store.bypasses_page_cache:
        pytest.skip("this file system offers no O_DIRECT")
    flags: list[int] = []
    read = os.preadv
    write = os.pwritev

    def spy(call: Callable[..., int]) -> Callable[..., int]:
        def transfer(fd: int, *rest: Any) -> int:
            count = call(fd, *rest)
            flags.append(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
            return count

        return transfer

    monkeypatch.setattr(os, "preadv", spy(read))
    monkeypatch.setattr(os, "pwritev", spy(write))
    store.write(PART)
    store.read_into(PART.ref, slot(300_001), 300_001)
    assert flags == [os.O_DIRECT, os.O_DIRECT]


def refuse_direct(monkeypatch: pytest.MonkeyPatch, *calls: str) -> None:
    """A file system that refuses O_DIRECT in these calls with EINVAL."""

    def refusal() -> OSError:
        return OSError(errno.EINVAL, "Invalid argument")

    really_open, really_fcntl = os.open, fcntl.fcntl

    def no_open(path: str, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise refusal()
        return really_open(path, flags, *rest, **named)

    def no_setfl(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise refusal()
        return really_fcntl(fd, command, argument)

    def no_transfer(call: str) -> Any:
        really = getattr(os, call)

        def transfer(fd: int, *rest: Any) -> Any:
            if really_fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                raise refusal()
            return really(fd, *rest)

        return transfer

    for call in calls:
        if call == "open":
            monkeypatch.setattr(os, "open", no_open)
        elif call == "fcntl":
            monkeypatch.setattr(fcntl, "fcntl", no_setfl)
        else:
            monkeypatch.setattr(os, call, no_transfer(call))


@pytest.mark.parametrize("calls", [("open", "fcntl"), ("preadv", "pwritev", "pwrite"), ("open",)])
@pytest.mark.parametrize("states_alignment", [True, False])
def test_a_file_system_that_refuses_is_used_buffered(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, calls: tuple[str, ...], *, states_alignment: bool
) -> None:
    if not states_alignment:
        monkeypatch.setattr(direct_io, "_stated_alignment", lambda _fd: None)
    refuse_direct(monkeypatch, *calls)
    store = disk.open()
    store.write(PART)
    out = slot(300_001)
    store.read_into(PART.ref, out, 300_001)
    assert out[:300_001] == PART.payload
    store.probe()
    assert list(store.check()) == []


@pytest.mark.parametrize(
    ("stated", "offered"), [((0, 0), False), ((512, 512), True), ((4, 4096), True), ((512, 65_536), False)]
)
def test_the_alignment_that_the_kernel_states_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: tuple[int, int], *, offered: bool
) -> None:
    monkeypatch.setattr(direct_io, "_stated_alignment", lambda _fd: stated)
    monkeypatch.setattr(direct_io, "_set_direct", lambda _fd: True)
    fd = open_new(str(tmp_path / "file"), 0)
    assert direct_flags(fd) == (os.O_DIRECT if offered else 0)
    os.close(fd)


def test_where_the_kernel_states_nothing_a_try_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = open_new(str(tmp_path / "file"), 0)
    said = direct_flags(fd)
    monkeypatch.setattr(direct_io, "_stated_alignment", lambda _fd: None)
    assert direct_flags(fd) == said
    os.close(fd)


def test_short_transfers_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.preadv, os.pwritev

    def first_bytes(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
        return [buffers[0][:count]]

    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, at: write(fd, first_bytes(buffers, 700), at))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: read(fd, first_bytes(buffers, 900), at))
    path = str(tmp_path / "file")
    fd = open_new(path, 0)
    source = [PART.payload[:4096], PART.payload[4096:12_288], PART.payload[12_288:16_384]]
    write_from_start(fd, source)
    os.close(fd)
    fd = open_to_read(path, 0)
    memory = slot(16_384)
    assert read_from_start(fd, [memory[:8192], memory[8192:]]) == 16_384
    assert memory == PART.payload[:16_384]
    longer = slot(20_480)
    assert read_from_start(fd, [longer]) == 16_384
    os.close(fd)


def test_a_file_of_odd_length_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PART.payload[:10_001]))
    probe = open_new(str(tmp_path / "probe"), 0)
    fd = open_to_read(str(path), direct_flags(probe))
    memory = slot(12_288)
    assert read_from_start(fd, [memory]) == 10_001
    assert memory[:10_001] == PART.payload[:10_001]
    os.close(fd)
    os.close(probe)
