"""`DiskBackend`: real files, several event loops, several backends and processes on one directory."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from kvtiers.compat import DiskBackend, MemoryAllocator, StorageBackend
from kvtiers.compat.disk_backend import _ref_of
from kvtiers.compat.shared_disk import _registry
from kvtiers.model.errors import (
    CodecError,
    ConfigError,
    DeadlineExceeded,
    DirectoryInUse,
    InvalidArgument,
    LayoutMismatch,
    StoreFull,
    StoreTransient,
    StoreUnavailable,
)
from kvtiers.stores.disk import DiskStore
from kvtiers.testing.disk_damage import damage_file, record_files
from kvtiers.testing.store_kit import Damage

WAIT_S = 20.0
SIZES = (0, 1, 2, 511, 4095, 4096, 4097, 100_000, 1_000_001)


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[DiskBackend]:
    with DiskBackend(tmp_path / "cache") as backend:
        yield backend
    assert _registry.places == {}


def kv(nbytes: int, seed: int = 0) -> bytes:
    """Bytes that compress as bf16 KV does: some, not much."""
    rng = np.random.default_rng([nbytes, seed])
    values = rng.integers(0, 256, nbytes, dtype=np.uint8)
    values[1::2] = rng.integers(60, 64, len(values[1::2]), dtype=np.uint8)
    return values.tobytes()


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


def test_the_listing_works_as_it_stands(tmp_path: Path) -> None:
    async def main() -> None:
        backend = DiskBackend(str(tmp_path / "made" / "for" / "it"), compression="zstd")
        assert isinstance(backend, StorageBackend)
        assert backend.base_path == tmp_path / "made" / "for" / "it"
        assert backend.base_path.is_dir()
        assert backend.compression == "zstd"
        assert await backend.write("key", b"data") is True
        assert await backend.exists("key") is True
        assert await backend.read("key") == b"data"
        assert await backend.delete("key") is True
        assert await backend.delete("key") is False
        assert await backend.exists("key") is False
        assert await backend.read("key") is None
        backend.close()

    asyncio.run(main())
    assert (tmp_path / "made" / "for" / "it").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_bytes_of_every_length_come_back(tmp_path: Path, compression: str) -> None:
    async def main(write: bool) -> None:
        with DiskBackend(tmp_path, compression) as backend:
            for nbytes in SIZES:
                if write:
                    await backend.write(f"key {nbytes}", kv(nbytes))
                assert await backend.read(f"key {nbytes}") == kv(nbytes)
                assert await backend.exists(f"key {nbytes}")

    asyncio.run(main(True))
    asyncio.run(main(False))  # closed and opened anew


def test_compression_saves_space_and_does_not_depend_on_the_reader(tmp_path: Path) -> None:
    async def write(where: Path, compression: str) -> int:
        with DiskBackend(where, compression) as backend:
            await backend.write("k", kv(1_000_000))
            return backend.usage().used_bytes

    async def read(where: Path, compression: str) -> bytes | None:
        with DiskBackend(where, compression) as backend:
            return await backend.read("k")

    raw, small = asyncio.run(write(tmp_path / "a", "none")), asyncio.run(write(tmp_path / "b", "zstd"))
    assert small < raw - 250_000
    assert asyncio.run(read(tmp_path / "a", "zstd")) == kv(1_000_000)
    assert asyncio.run(read(tmp_path / "b", "none")) == kv(1_000_000)


@pytest.mark.parametrize(
    "key", ["", "/", "../../etc/passwd", "a/b", "K" * 5000, "键\0值", "\ud800", "vllm@model@1@0@ab12"]
)
def test_any_string_is_a_key(backend: DiskBackend, key: str) -> None:
    async def main() -> None:
        await backend.write(key, b"value")
        await backend.write(key + "x", b"other")
        assert await backend.read(key) == b"value"

    asyncio.run(main())
    assert {path.suffix for path in backend.base_path.rglob("*") if path.is_file()} <= {".kv", ".log", ""}


def test_every_kind_of_buffer_is_taken(backend: DiskBackend) -> None:
    async def main() -> None:
        array = np.arange(600, dtype=np.float16).reshape(2, 3, 100)
        for data in (bytearray(array.tobytes()), memoryview(array.tobytes()), array):
            await backend.write("k", data)
            assert await backend.read("k") == array.tobytes()
        for wrong in (array.T, "text", 7, np.array([object()])):
            with pytest.raises(LayoutMismatch):
                await backend.write("k", wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="str"):
            await backend.read(b"k")  # type: ignore[arg-type]
        assert await backend.read("k") == array.tobytes()

    asyncio.run(main())


def test_bad_options_are_told(tmp_path: Path) -> None:
    makers: list[tuple[type[Exception], Callable[[], DiskBackend]]] = [
        (CodecError, lambda: DiskBackend(tmp_path, "lz77")),
        (CodecError, lambda: DiskBackend(tmp_path, compression_level=99)),
        (ConfigError, lambda: DiskBackend(tmp_path, itemsize=3)),
        (ConfigError, lambda: DiskBackend(tmp_path, deadline_s=0)),
        (StoreUnavailable, lambda: DiskBackend("/proc/nowhere")),
        (StoreUnavailable, lambda: DiskBackend(__file__)),
    ]
    for error, make in makers:
        with pytest.raises(error):
            make()
    DiskBackend(tmp_path).close()  # nothing was left open
    assert _registry.places == {}


@pytest.mark.parametrize("how", list(Damage))
def test_a_damaged_record_is_a_miss_is_counted_and_heals(backend: DiskBackend, how: Damage) -> None:
    async def main() -> None:
        await backend.write("k", kv(300_001))
        await backend.write("other", kv(300_001, seed=1))
        files = record_files(backend.base_path)
        damage_file(files[_ref_of("k")], how, files[_ref_of("other")])
        assert await backend.read("k") is None
        stats = backend.stats()
        assert stats["corrupt"] + stats["foreign"] + stats["vanished"] == 1
        assert await backend.exists("k") is False
        assert await backend.read("other") == kv(300_001, seed=1)
        await backend.write("k", b"new")
        assert await backend.read("k") == b"new"

    asyncio.run(main())


def test_what_is_stored_is_what_was_there_at_the_call(
    backend: DiskBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever writes to the buffer meanwhile, or frees it, gets a miss, never other bytes under the key."""

    async def main() -> None:
        with MemoryAllocator(-1, 1 / 1024) as allocator:
            released = _stalled(backend, monkeypatch, "write")
            buffer, pointer = bytearray(kv(5000)), allocator.allocate(5000)
            pointer.view()[:] = 7
            tasks = [
                asyncio.create_task(backend.write("buffer", buffer)),
                asyncio.create_task(backend.write("pointer", pointer)),
            ]
            await asyncio.sleep(0)
            buffer[:] = kv(5000, seed=1)
            allocator.free(pointer)
            other = allocator.allocate(5000)
            other.view()[:] = 8
            released.set()
            assert await asyncio.gather(*tasks) == [True, True]
            assert await backend.read("buffer") is None
            assert await backend.read("pointer") == b"\7" * 5000
            allocator.free(other)
            assert allocator.allocated == 0

    asyncio.run(main())


# --- sharing -------------------------------------------------------------------------------------------------------------


def test_backends_of_one_directory_share_it(tmp_path: Path) -> None:
    """By whatever name they call it; the last one out closes it."""
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    first = DiskBackend(tmp_path / "cache")
    others = [DiskBackend(tmp_path / "link"), DiskBackend(tmp_path / "cache" / ".." / "cache")]

    async def main() -> None:
        await first.write("k", b"data")
        for other in others:
            assert await other.read("k") == b"data"
        first.close()
        first.close()
        with pytest.raises(StoreUnavailable, match="closed"):
            await first.read("k")
        with pytest.raises(StoreUnavailable, match="closed"):
            await first.exists("k")
        await others[0].write("k", b"newer")
        others[0].close()
        assert await others[1].read("k") == b"newer"
        with pytest.raises(ConfigError, match="compression"):
            DiskBackend(tmp_path / "cache", "none")
        others[1].close()
        DiskBackend(tmp_path / "cache", "none").close()

    asyncio.run(main())
    assert _registry.places == {}


def test_another_process_and_another_store_are_kept_out(backend: DiskBackend) -> None:
    code = (
        "import sys\nfrom kvtiers.compat import DiskBackend\nfrom kvtiers.model.errors import DirectoryInUse\n"
        "try:\n    DiskBackend(sys.argv[1])\nexcept DirectoryInUse as error:\n    print(error)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(backend.base_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert f"process {os.getpid()}" in told.stdout

    from kvtiers.stores.disk import DiskSettings

    with pytest.raises(DirectoryInUse, match="this process"):
        DiskStore(DiskSettings(paths=(str(backend.base_path),))).open()


def test_a_dropped_backend_lets_its_directory_go(tmp_path: Path) -> None:
    DiskBackend(tmp_path)
    gc.collect()
    wait_until(lambda: not _registry.places)


def test_threads_that_open_and_close_one_directory_never_meet_a_locked_one(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def work(mark: int) -> None:
        async def turn() -> None:
            with DiskBackend(tmp_path) as backend:
                await backend.write(f"{mark}", kv(500, mark))
                assert await backend.read(f"{mark}") == kv(500, mark)

        try:
            for _ in range(8):
                asyncio.run(turn())
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert _registry.places == {}


def _in_child(backend: DiskBackend, pipe: Any) -> None:
    told: list[str] = []
    for call in (backend.read("k"), backend.exists("k"), backend.write("k", b"child")):
        try:
            told.append(str(asyncio.run(call)))
        except StoreUnavailable as error:
            told.append(str(error))
    backend.close()
    try:
        DiskBackend(backend.base_path)
    except DirectoryInUse as error:
        told.append(str(error))
    pipe.send(told)
    pipe.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_neither_hangs_nor_touches_its_parents_directory(backend: DiskBackend) -> None:
    asyncio.run(backend.write("k", b"data"))
    mine, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(backend, theirs))
    child.start()
    assert mine.poll(WAIT_S)
    *told, refused = mine.recv()
    child.join(WAIT_S)
    assert child.exitcode == 0
    assert all("forked" in text for text in told)
    assert "in use" in refused
    assert asyncio.run(backend.read("k")) == b"data"
    mine.close()
    theirs.close()


# --- concurrency, deadlines, failures ------------------------------------------------------------------------------------


def test_one_backend_serves_several_event_loops(backend: DiskBackend) -> None:
    errors: list[BaseException] = []

    async def many(mark: int) -> None:
        keys = [f"{mark}-{number}" for number in range(12)]
        await asyncio.gather(*(backend.write(key, kv(9000, mark)) for key in keys))
        assert await asyncio.gather(*(backend.read(key) for key in keys)) == [kv(9000, mark)] * 12
        assert all(await asyncio.gather(*(backend.delete(key) for key in keys[::2])))
        assert await asyncio.gather(*(backend.exists(key) for key in keys)) == [False, True] * 6

    def loop(mark: int) -> None:
        try:
            asyncio.run(many(mark))
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            errors.append(error)

    threads = [threading.Thread(target=loop, args=(mark,)) for mark in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert backend.usage().records == 5 * 6


def test_a_reader_sees_one_version_whole_whatever_their_lengths(backend: DiskBackend) -> None:
    """A record is read by its size: reading must not find, and remove, one that was just replaced by another size."""
    versions = [kv(nbytes, nbytes) for nbytes in (10, 5000, 70_000)]

    async def main() -> None:
        await backend.write("k", versions[0])
        rng = random.Random(1)

        async def writer() -> None:
            for _ in range(40):
                await backend.write("k", rng.choice(versions))

        async def reader() -> None:
            for _ in range(60):
                assert await backend.read("k") in versions

        await asyncio.gather(writer(), writer(), reader(), reader(), reader())

    asyncio.run(main())
    stats = backend.stats()
    assert stats["corrupt"] == stats["foreign"] == 0


def _stalled(backend: DiskBackend, monkeypatch: pytest.MonkeyPatch, name: str) -> threading.Event:
    """Make one operation of the disk hang until the event is set."""
    return _stalled_and_counted(backend, monkeypatch, name)[0]


def _stalled_and_counted(
    backend: DiskBackend, monkeypatch: pytest.MonkeyPatch, name: str
) -> tuple[threading.Event, list[str]]:
    """The same; the list has an entry for each call that has begun."""
    released, begun = threading.Event(), list[str]()
    store = backend._disk().store
    real = getattr(store, name)

    def hang(*arguments: Any) -> Any:
        begun.append(name)
        released.wait(WAIT_S)
        return real(*arguments)

    monkeypatch.setattr(store, name, hang)
    return released, begun


def test_a_disk_that_hangs_costs_a_deadline_and_not_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = DiskBackend(tmp_path, deadline_s=0.1)
    released = _stalled(backend, monkeypatch, "write")

    async def main() -> None:
        results = await asyncio.gather(
            *(backend.write(f"{number}", b"data") for number in range(6)), return_exceptions=True
        )
        assert [type(result) for result in results] == [DeadlineExceeded] * 6
        assert await backend.read("0") is None  # one thread is kept for reads

    asyncio.run(main())
    released.set()
    with DiskBackend(tmp_path) as other:
        backend.close()
        wait_until(lambda: asyncio.run(other.exists("0")) and asyncio.run(other.exists("1")))
    with DiskBackend(tmp_path) as other:
        written = [asyncio.run(other.exists(f"{number}")) for number in range(6)]
    assert written == [True, True, False, False, False, False]  # those that had not begun were dropped


def test_closing_does_not_wait_for_a_disk_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtiers.compat.shared_disk._CLOSE_S", 0.05)
    backend = DiskBackend(tmp_path, deadline_s=0.05)
    released = _stalled(backend, monkeypatch, "write")
    with pytest.raises(DeadlineExceeded):
        asyncio.run(backend.write("k", b"data"))
    backend.close()
    released.set()
    wait_until(lambda: not any("disk-backend" in thread.name for thread in threading.enumerate()))


def test_a_cancelled_write_that_has_not_begun_never_does(
    backend: DiskBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    released, begun = _stalled_and_counted(backend, monkeypatch, "write")

    async def main() -> None:
        tasks = [asyncio.create_task(backend.write(f"{number}", b"data")) for number in range(5)]
        for _ in range(1000):
            if len(begun) == 2:  # the backend's threads
                break
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        released.set()
        await backend.write("last", b"data")
        for _ in range(1000):  # nobody waits for the two that had begun
            if await backend.exists("0") and await backend.exists("1"):
                break
            await asyncio.sleep(0.01)
        assert [await backend.exists(f"{number}") for number in range(5)] == [True, True, False, False, False]

    asyncio.run(main())


def test_a_full_queue_refuses_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtiers.compat.shared_disk._MAX_QUEUED", 4)
    with DiskBackend(tmp_path) as backend:
        released = _stalled(backend, monkeypatch, "write")

        async def main() -> None:
            tasks = [asyncio.create_task(backend.write(f"{number}", b"data")) for number in range(20)]
            done, _ = await asyncio.wait(tasks, timeout=0.2)
            assert len(done) >= 20 - 4 - 2
            assert all(isinstance(task.exception(), StoreTransient) for task in done)
            released.set()
            await asyncio.wait(tasks, timeout=WAIT_S)

        asyncio.run(main())


def test_errors_of_the_disk_are_told_and_reads_go_on(
    backend: DiskBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        await backend.write("k", b"data")
        with monkeypatch.context() as patched:
            patched.setattr("kvtiers.stores.disk.volume.free_bytes", lambda path: 0)
            with pytest.raises(StoreFull, match="bytes free"):
                await backend.write("more", b"data")
        assert await backend.read("k") == b"data"
        assert await backend.exists("more") is False

    asyncio.run(main())


def test_threads_and_descriptors_stay_constant(tmp_path: Path) -> None:
    process = psutil.Process()

    async def turn() -> None:
        with DiskBackend(tmp_path) as backend, DiskBackend(tmp_path) as other:
            await backend.write("k", kv(5000))
            await other.read("k")

    asyncio.run(turn())
    gc.collect()
    fds, threads = process.num_fds(), threading.active_count()
    for _ in range(10):
        asyncio.run(turn())
    gc.collect()
    assert process.num_fds() <= fds
    assert threading.active_count() <= threads


def test_a_process_that_never_closes_its_backend_ends(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys\nfrom kvtiers.compat import DiskBackend\nbackend = DiskBackend(sys.argv[1])\n"
        "asyncio.run(backend.write('k', b'data'))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=True)

    async def read() -> bytes | None:
        with DiskBackend(tmp_path) as backend:
            return await backend.read("k")

    assert asyncio.run(read()) == b"data"


def test_what_a_killed_process_has_stored_is_there(tmp_path: Path) -> None:
    code = (
        "import asyncio, os, signal, sys\nfrom kvtiers.compat import DiskBackend\n"
        "async def main():\n    backend = DiskBackend(sys.argv[1])\n"
        "    await backend.write('k', b'data' * 5000)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=False)

    async def read() -> bytes | None:
        with DiskBackend(tmp_path) as backend:
            return await backend.read("k")

    assert asyncio.run(read()) == b"data" * 5000
