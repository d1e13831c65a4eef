from __future__ import annotations

import errno
import fcntl
import gc
import os
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvtiers.memory import arena as arena_module
from kvtiers.memory import mapping, numa, pages, prefault, syscalls
from kvtiers.memory.arena import Arena, ArenaDoesNotFit, HugePages, LockMemory
from kvtiers.memory.available import AvailableMemory
from kvtiers.memory.mapping import CloseOutcome
from kvtiers.memory.numa import Numa, Segment
from kvtiers.model.errors import CacheClosed, DoesNotFit, InvariantBroken

MIB = 1 << 20
PAGE = 4096


def mapped_bytes() -> int:
    """Bytes of arenas in this process' address space."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "memfd:kvtiers-arena" in line:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            total += end - start
    return total


@pytest.fixture
def mapped() -> Callable[[], int]:
    """Bytes of arenas beyond those that other tests have left."""
    gc.collect()
    before = mapped_bytes()
    return lambda: mapped_bytes() - before


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def run_in_child(child: object) -> int:
    """Exit code of a forked child that runs `child` and exits with what it returns."""
    assert callable(child)
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = child()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_fresh_arena_is_zeroed_resident_and_page_aligned() -> None:
    arena = Arena(3 * MIB + 1)
    try:
        assert arena.nbytes == 3 * MIB + PAGE
        whole = arena.view(0, arena.nbytes)
        assert whole.ctypes.data % PAGE == 0
        assert not whole.any()
        observed = pages.observe(whole.ctypes.data, arena.nbytes)
        assert observed.resident_bytes == arena.nbytes
    finally:
        del whole
        assert arena.close() is CloseOutcome.UNMAPPED


def test_views_and_buffers_are_the_same_memory() -> None:
    arena = Arena(MIB)
    view = arena.view(8 * PAGE, 100)
    arena.buffer(8 * PAGE, 3)[:] = b"abc"
    assert view[:3].tobytes() == b"abc"
    assert view.nbytes == 100
    assert view.dtype == np.uint8
    del view
    assert arena.close() is CloseOutcome.UNMAPPED


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(1, 10), (0, MIB + 1), (MIB, 1), (-PAGE, PAGE), (0, -1), (2 * MIB, 0)]
)
def test_view_outside_the_arena_or_off_a_page_is_refused(offset: int, nbytes: int) -> None:
    arena = Arena(MIB)
    with pytest.raises(InvariantBroken, match=str(nbytes)):
        arena.view(offset, nbytes)
    assert arena.close() is CloseOutcome.UNMAPPED


def test_a_client_with_the_descriptor_can_map_it_but_not_resize_it() -> None:
    arena = Arena(MIB)
    arena.view(0, 4)[:] = [1, 2, 3, 4]
    fd = os.dup(arena.fileno())
    for size in (0, PAGE, 2 * MIB):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert os.pread(fd, 4, 0) == b"\1\2\3\4"
    os.close(fd)
    arena.close()


def test_forked_child_has_neither_mapping_nor_descriptor(mapped: Callable[[], int]) -> None:
    arena = Arena(MIB)
    view = arena.view(0, MIB)
    fd = arena.fileno()

    def child() -> int:
        if mapped_bytes():
            return 1
        try:
            os.fstat(fd)
        except OSError as error:
            if error.errno != errno.EBADF:
                return 2
        else:
            return 3
        try:
            arena.fileno()
        except CacheClosed:
            return 0
        return 4

    assert run_in_child(child) == 0
    view[:] = 7
    assert mapped() == MIB
    del view
    assert arena.close() is CloseOutcome.UNMAPPED


def test_child_that_drops_its_copy_of_the_arena_unmaps_nothing_of_its_own() -> None:
    arena = Arena(MIB)
    address = arena.view(0, 1).ctypes.data

    def child() -> int:
        nonlocal arena
        fd = os.memfd_create("other")
        os.ftruncate(fd, MIB)
        libc = syscalls._libc
        fixed = libc.mmap(
            address, MIB, 3, 0x01 | 0x10, fd, 0
        )  # MAP_FIXED: the arena's old address is something else now
        if fixed != address:
            return 1
        arena.close()
        del arena
        gc.collect()
        return 0 if "memfd:other" in Path("/proc/self/maps").read_text() else 2

    assert run_in_child(child) == 0
    arena.close()


def test_more_than_the_limit_given_is_refused_with_the_numbers() -> None:
    with pytest.raises(ArenaDoesNotFit, match=r"2 MiB asked for.*1 MiB available") as caught:
        Arena(2 * MIB, available_bytes=MIB)
    assert (caught.value.needed_bytes, caught.value.available_bytes) == (2 * MIB, MIB)
    assert isinstance(caught.value, DoesNotFit)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    Arena(2 * MIB, available_bytes=2 * MIB).close()


def test_more_than_the_machine_has_is_refused_before_anything_is_taken(mapped: Callable[[], int]) -> None:
    before = descriptors()
    with pytest.raises(ArenaDoesNotFit, match="make the arena smaller"):
        Arena(1 << 46)
    assert mapped() == 0
    assert descriptors() == before


def test_memory_that_others_take_during_the_prefault_ends_it(
    monkeypatch: pytest.MonkeyPatch, mapped: Callable[[], int]
) -> None:
    answers = iter([10 * MIB, 10 * MIB, 10 * MIB])
    monkeypatch.setattr(prefault, "PIECE_BYTES", MIB)
    monkeypatch.setattr(
        arena_module, "available_memory", lambda: AvailableMemory(next(answers, 0), "the test")
    )
    with pytest.raises(ArenaDoesNotFit, match="the test"):
        Arena(8 * MIB)
    gc.collect()
    assert mapped() == 0


def test_prefault_is_interrupted_by_the_progress_callback_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, mapped: Callable[[], int]
) -> None:
    monkeypatch.setattr(prefault, "PIECE_BYTES", MIB)
    seen: list[tuple[int, int]] = []

    def interrupt(done: int, total: int) -> None:
        seen.append((done, total))
        if len(seen) == 3:
            raise KeyboardInterrupt

    before = descriptors()
    with pytest.raises(KeyboardInterrupt):
        Arena(64 * MIB, on_progress=interrupt)
    gc.collect()
    assert seen == [(1 * MIB, 64 * MIB), (2 * MIB, 64 * MIB), (3 * MIB, 64 * MIB)]
    assert mapped() == 0
    assert descriptors() == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvtiers-prefault")]


def test_progress_reaches_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefault, "PIECE_BYTES", MIB)
    seen: list[int] = []
    Arena(5 * MIB + PAGE, on_progress=lambda done, _: seen.append(done)).close()
    assert len(seen) == 6
    assert seen[-1] == 5 * MIB + PAGE


def test_kernel_that_cannot_populate_is_helped_by_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = syscalls.advise

    def old_kernel(address: int, nbytes: int, advice: syscalls.Advice) -> None:
        if advice is syscalls.Advice.POPULATE_WRITE:
            raise OSError(errno.EINVAL, "Invalid argument")
        real(address, nbytes, advice)

    monkeypatch.setattr(syscalls, "advise", old_kernel)
    arena = Arena(2 * MIB, lock_memory=LockMemory.OFF)
    address = arena.view(0, 1).ctypes.data
    assert pages.observe(address, arena.nbytes).resident_bytes == 2 * MIB
    arena.close()


def test_kernel_that_refuses_to_populate_is_named(
    monkeypatch: pytest.MonkeyPatch, mapped: Callable[[], int]
) -> None:
    def full(address: int, nbytes: int, advice: syscalls.Advice) -> None:
        if advice is syscalls.Advice.POPULATE_WRITE:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(syscalls, "advise", full)
    before = descriptors()
    with pytest.raises(ArenaDoesNotFit, match="Cannot allocate memory"):
        Arena(2 * MIB)
    gc.collect()
    assert (mapped(), descriptors()) == (0, before)


def test_close_leaks_knowingly_while_a_view_lives_and_the_view_stays_valid(mapped: Callable[[], int]) -> None:
    arena = Arena(MIB)
    view = arena.view(PAGE, 10)
    part = view[2:4]
    del view
    assert arena.close() is CloseOutcome.LEAKED
    part[:] = 9
    assert mapped() == MIB
    assert arena.close() is CloseOutcome.LEAKED
    del part
    assert arena.close() is CloseOutcome.UNMAPPED
    assert mapped() == 0


def test_a_live_buffer_counts_as_a_view() -> None:
    arena = Arena(MIB)
    buffer = arena.buffer(0, 10)
    assert arena.close() is CloseOutcome.LEAKED
    buffer[0] = 1
    buffer.release()
    del buffer
    assert arena.close() is CloseOutcome.UNMAPPED


def test_leak_keeps_the_mapping_for_good(monkeypatch: pytest.MonkeyPatch, mapped: Callable[[], int]) -> None:
    pinned: list[mapping.Bytes] = []
    monkeypatch.setattr(mapping, "_PINNED", pinned)
    arena = Arena(MIB)
    assert arena.leak() is CloseOutcome.LEAKED
    del arena
    gc.collect()
    assert mapped() == MIB
    pinned.clear()
    assert mapped() == 0


def test_closed_arena_refuses_calls() -> None:
    arena = Arena(MIB)
    arena.close()
    with pytest.raises(CacheClosed):
        arena.view(0, 1)
    with pytest.raises(CacheClosed):
        arena.buffer(0, 1)
    with pytest.raises(CacheClosed):
        arena.fileno()


def test_arena_that_is_only_dropped_gives_its_memory_back(mapped: Callable[[], int]) -> None:
    before = descriptors()
    arena = Arena(MIB)
    del arena
    gc.collect()
    assert mapped() == 0
    assert descriptors() == before


@pytest.mark.slow
def test_cycles_of_opening_and_closing_leak_nothing() -> None:
    def shared_kib() -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssShmem"))

    Arena(MIB).close()
    before = (descriptors(), shared_kib())
    threads = threading.active_count()
    for cycle in range(200):
        arena = Arena(MIB)
        arena.view(0, MIB)[:] = cycle % 251
        assert arena.close() is CloseOutcome.UNMAPPED
    assert (descriptors(), shared_kib()) == before
    assert threading.active_count() <= threads


def test_direct_io_reads_into_and_writes_from_any_slot(tmp_path: Path) -> None:
    path = tmp_path / "record"
    content = np.random.default_rng(1).integers(0, 256, 2 * PAGE, dtype=np.uint8)
    arena = Arena(MIB)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    except OSError as error:
        pytest.skip(f"no O_DIRECT on {tmp_path}: {error}")
    arena.view(3 * PAGE, 2 * PAGE)[:] = content
    assert os.pwritev(fd, [arena.buffer(3 * PAGE, PAGE), arena.buffer(4 * PAGE, PAGE)], 0) == 2 * PAGE
    assert os.preadv(fd, [arena.buffer(77 * PAGE, 2 * PAGE)], 0) == 2 * PAGE
    os.close(fd)
    assert np.array_equal(arena.view(77 * PAGE, 2 * PAGE), content)
    assert arena.close() is CloseOutcome.UNMAPPED


def test_views_taken_while_another_thread_closes_are_valid_or_refused() -> None:
    for _ in range(30):
        arena = Arena(MIB, lock_memory=LockMemory.OFF)
        refused = threading.Event()

        def take(arena: Arena = arena, refused: threading.Event = refused) -> None:
            try:
                while True:
                    arena.view(0, PAGE)[:] = 1
            except CacheClosed:
                refused.set()

        threads = [threading.Thread(target=take, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        arena.close()
        for thread in threads:
            thread.join(10)
        assert refused.is_set()
        assert arena.close() is CloseOutcome.UNMAPPED


@pytest.mark.parametrize("wanted", list(HugePages))
def test_report_tells_what_was_obtained_and_why_not_more(wanted: HugePages) -> None:
    arena = Arena(4 * MIB, huge_pages=wanted)
    report = arena.report
    if report.huge_bytes == report.nbytes:
        assert report.page_bytes > PAGE
    else:
        assert report.page_bytes == PAGE
        assert (wanted is HugePages.OFF) or any("huge pages" in note for note in report.notes)
        assert (wanted is not HugePages.HUGETLB) or any("vm.nr_hugepages" in note for note in report.notes)
    assert f"{report.page_bytes // 1024} KiB pages" in arena.describe()
    assert all(note in arena.describe() for note in report.notes)
    arena.close()


def test_mapping_begins_where_a_huge_page_can() -> None:
    arenas = [Arena(4 * MIB + PAGE) for _ in range(3)]
    assert [arena.view(0, 1).ctypes.data % (2 * MIB) for arena in arenas] == [0, 0, 0]
    for arena in arenas:
        arena.close()


@pytest.mark.parametrize("wanted", [HugePages.ADVISE, HugePages.OFF])
def test_huge_pages_are_made_unless_switched_off_and_a_kernel_that_refuses_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, wanted: HugePages
) -> None:
    asked: list[tuple[int, int]] = []
    real = syscalls.advise

    def old_kernel(address: int, nbytes: int, advice: syscalls.Advice) -> None:
        if advice is syscalls.Advice.COLLAPSE:
            asked.append((address, nbytes))
            raise OSError(errno.EINVAL, "Invalid argument")
        real(address, nbytes, advice)

    monkeypatch.setattr(syscalls, "advise", old_kernel)
    arena = Arena(5 * MIB, huge_pages=wanted, lock_memory=LockMemory.OFF)
    address = arena.view(0, 1).ctypes.data
    whole = 5 * MIB // pages.huge_page_bytes() * pages.huge_page_bytes()
    assert asked == ([(address, whole)] if wanted is HugePages.ADVISE else [])
    assert pages.observe(address, arena.nbytes).resident_bytes == 5 * MIB
    assert not arena.view(0, arena.nbytes).any()
    arena.close()


def test_locking_is_reported_as_the_kernel_sees_it() -> None:
    off = Arena(MIB, lock_memory=LockMemory.OFF)
    assert not off.report.locked
    off.close()
    allowed = Arena(MIB, lock_memory=LockMemory.WHERE_ALLOWED)
    assert allowed.report.locked or any("RLIMIT_MEMLOCK" in note for note in allowed.report.notes)
    allowed.close()


def test_refused_lock_is_a_note_not_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: int, nbytes: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(syscalls, "lock", refuse)
    arena = Arena(MIB)
    assert not arena.report.locked
    assert "RLIMIT_MEMLOCK" in arena.describe()
    arena.close()


def test_segments_cover_the_arena() -> None:
    for policy in Numa:
        arena = Arena(8 * MIB, numa=policy)
        assert sum(segment.nbytes for segment in arena.segments) == arena.nbytes
        assert [segment.offset for segment in arena.segments] == sorted(
            segment.offset for segment in arena.segments
        )
        arena.close()
    assert Arena(MIB, numa=Numa.OFF).segments == (Segment(None, 0, MIB),)


def test_nodes_that_cannot_be_bound_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa, "memory_nodes", lambda: (0, 900))
    arena = Arena(8 * MIB)
    assert [(segment.node, segment.nbytes) for segment in arena.segments] == [(0, 4 * MIB), (900, 4 * MIB)]
    assert "segment of node 900 is not bound" in arena.describe()
    arena.close()


def test_exit_with_threads_still_writing_does_not_crash() -> None:
    code = (
        "import threading\n"
        "from kvtiers.memory.arena import Arena\n"
        "arena = Arena(8 << 20)\n"
        "view = arena.view(0, 8 << 20)\n"
        "def scribble():\n"
        "    while True: view.fill(3)\n"
        "for _ in range(3): threading.Thread(target=scribble, daemon=True).start()\n"
        "print(arena.close().value)\n"
    )
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", code], os.environ)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
