"""The offload engine: real storage behind it, refusals at once, failures told, nothing kept or leaked."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import pickle
import re
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from kvtiers.compat import (
    AsyncOffloadEngine,
    DiskBackend,
    InvalidPointer,
    MemoryAllocator,
    MemoryBackend,
    MemoryObj,
    NoBackend,
    OffloadMetrics,
    OffloadQueueFull,
    OffloadRetryableError,
    OutOfMemoryError,
    StorageBackend,
    UnknownTask,
    UnknownTier,
)
from kvtiers.model.errors import CacheClosed, ConfigError, DeadlineExceeded, KvtiersError, LayoutMismatch

MIB_GB = 1 / 1024
WAIT_S = 20.0


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


class DictBackend(StorageBackend):
    """Somebody else's backend: `bytes` in a dict, on the loop it was first used on; can hang, refuse or fail."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.loops: set[asyncio.AbstractEventLoop] = set()
        self.open = asyncio.Event()
        self.open.set()
        self.error: Exception | None = None
        self.accept = True

    async def write(self, key: str, data: bytes) -> bool:
        assert type(data) is bytes
        self.loops.add(asyncio.get_running_loop())
        await self.open.wait()
        if self.error is not None:
            raise self.error
        if self.accept:
            self.values[key] = data
        return self.accept

    async def read(self, key: str) -> bytes | None:
        return self.values.get(key)

    async def delete(self, key: str) -> bool:
        return self.values.pop(key, None) is not None

    async def exists(self, key: str) -> bool:
        return key in self.values


class StuckBackend(MemoryBackend):
    """One of ours whose storage hangs until `released`."""

    def __init__(self) -> None:
        super().__init__(pool_size_gb=MIB_GB)
        self.released = threading.Event()
        self.begun = threading.Semaphore(0)

    def put_now(self, key: str, payload: memoryview, digest: bytes) -> None:
        self.begun.release()
        self.released.wait(WAIT_S)
        super().put_now(key, payload, digest)


def test_the_listing_works_as_it_stands() -> None:
    async def main() -> None:
        engine = AsyncOffloadEngine(max_workers=4, queue_size=1000)
        task_id = await engine.submit("key", b"kv bytes", "cpu")
        assert re.fullmatch(r"offload_[0-9a-f]{8}", task_id)
        await engine.result(task_id)
        health = await engine.check_health()
        assert list(health) == ["queue_size", "pending_tasks", "executor_workers", "metrics"]
        assert (health["queue_size"], health["pending_tasks"], health["executor_workers"]) == (0, 0, 4)
        assert health["metrics"] == engine.metrics.to_dict()
        assert health["metrics"]["succeeded"] == 1
        json.dumps(health)
        assert await engine.backend("cpu").read("key") == b"kv bytes"
        assert await engine.aclose()

    asyncio.run(main())


def test_every_target_really_stores(tmp_path: Path) -> None:
    remote = DictBackend()
    array = np.arange(3000, dtype=np.float16).reshape(3, 1000)

    async def main() -> None:
        with DiskBackend(tmp_path) as disk, MemoryAllocator(-1, MIB_GB) as allocator:
            backends = {"cpu": MemoryBackend(allocator), "disk": disk, "remote": remote}
            async with AsyncOffloadEngine(2, 100, backends=backends) as engine:
                pointer = allocator.allocate(6000)
                pointer.view()[:] = array.view(np.uint8).reshape(-1)
                things: dict[str, MemoryObj] = {
                    "bytes": array.tobytes(),
                    "buffer": bytearray(array.tobytes()),
                    "array": array,
                    "pointer": pointer,
                }
                for (name, data), target in itertools.product(things.items(), backends):
                    await engine.submit(name, data, target)
                await engine.flush()
                allocator.free(pointer)
                with pytest.raises(InvalidPointer):
                    await engine.submit("dead", pointer, "disk")
                for name, target in itertools.product(things, backends):
                    assert await engine.backend(target).read(name) == array.tobytes()
                assert engine.metrics.to_dict()["succeeded"] == 12
            assert allocator.check_integrity() == []
            assert await backends["cpu"].read("bytes") == array.tobytes()  # it was given, so it stays open

    asyncio.run(main())
    assert len(remote.loops) == 1


def test_what_can_t_be_done_is_refused_at_once() -> None:
    async def main() -> None:
        async with AsyncOffloadEngine(backends={"remote": DictBackend()}) as engine:
            with pytest.raises(UnknownTier, match="targets are cpu, disk, remote"):
                await engine.submit("k", b"", "gpu")
            with pytest.raises(NoBackend, match=r"backends=\{'disk': DiskBackend"):
                await engine.submit("k", b"", "disk")
            with pytest.raises(NoBackend, match="source="):
                await engine.offload("k", "remote")
            with pytest.raises(UnknownTask):
                await engine.result("offload_00000000")
            for data in ("text", None, np.zeros((4, 4)).T):
                with pytest.raises(LayoutMismatch):
                    await engine.submit("k", data, "remote")  # type: ignore[arg-type]
            assert (await engine.check_health())["pending_tasks"] == 0
        with pytest.raises(CacheClosed):
            await engine.submit("k", b"", "remote")

    asyncio.run(main())
    with pytest.raises(ConfigError) as caught:
        AsyncOffloadEngine(0, 0, cpu_pool_gb=0, write_timeout_s=0)
    assert len(caught.value.problems) == 4
    with pytest.raises(UnknownTier):
        AsyncOffloadEngine(backends={"tape": DictBackend()})


def test_a_full_queue_refuses_at_once_and_for_its_target_only() -> None:
    async def main() -> None:
        stuck = StuckBackend()
        async with AsyncOffloadEngine(2, 3, backends={"remote": stuck}, cpu_pool_gb=MIB_GB) as engine:
            tasks = [await engine.submit(f"{number}", b"data", "remote") for number in range(5)]
            for _ in range(2):
                stuck.begun.acquire(timeout=WAIT_S)
            with pytest.raises(OffloadQueueFull, match="the chunk stays where it was"):
                await engine.submit("one more", b"data", "remote")
            health = await engine.check_health()
            assert (health["queue_size"], health["pending_tasks"]) == (3, 5)
            await engine.result(
                await engine.submit("elsewhere", b"data", "cpu")
            )  # no other target is held up
            stuck.released.set()
            for task in tasks:
                await engine.result(task)
            await engine.result(await engine.submit("one more", b"data", "remote"))
        stuck.close()

    asyncio.run(main())


def test_a_failure_is_told_and_the_next_try_works() -> None:
    async def main() -> None:
        remote = DictBackend()
        async with AsyncOffloadEngine(2, 10, backends={"remote": remote}) as engine:
            remote.error = OSError("no route to host")
            task_id = await engine.submit("k", b"data", "remote")
            with pytest.raises(OffloadRetryableError, match="stays where it was"):
                await engine.result(task_id)
            with pytest.raises(OffloadRetryableError) as caught:  # it may be asked again
                await engine.result(task_id)
            error = caught.value
            assert (error.task_id, error.key, error.target) == (task_id, "k", "remote")
            assert isinstance(error.__cause__, OSError)
            assert type(error.target) is str
            remote.error, remote.accept = None, False
            with pytest.raises(OffloadRetryableError, match="refused"):
                await engine.result(await engine.submit("k", b"data", "remote"))
            remote.accept = True
            await engine.result(await engine.submit("k", b"data", "remote"))
            assert remote.values == {"k": b"data"}
            metrics = engine.metrics.to_dict()["targets"]["remote"]
            assert (metrics["succeeded"], metrics["failed"]) == (1, 2)
            assert "refused" in metrics["last_error"]

    asyncio.run(main())


def test_the_error_can_be_pickled_and_caught_as_ours() -> None:
    error = pickle.loads(pickle.dumps(OffloadRetryableError("offload_1", "key", "disk")))
    assert (error.task_id, error.key, error.target) == ("offload_1", "key", "disk")
    assert isinstance(error, KvtiersError)


def test_a_pending_task_can_be_awaited_by_its_id() -> None:
    async def main() -> None:
        stuck = StuckBackend()
        async with AsyncOffloadEngine(1, 10, backends={"disk": stuck}) as engine:
            task_id = await engine.submit("k", b"data", "disk")
            task = engine.pending_tasks[task_id]
            stuck.released.set()
            await task
            assert task_id not in engine.pending_tasks
            assert await stuck.read("k") == b"data"

    asyncio.run(main())


def test_data_that_changes_on_its_way_is_never_stored() -> None:
    async def main() -> None:
        remote, stuck = DictBackend(), StuckBackend()
        async with AsyncOffloadEngine(1, 10, backends={"remote": remote, "cpu": stuck}) as engine:
            remote.open.clear()
            blocker = await engine.submit("first", b"data", "remote")
            wait_until(lambda: bool(remote.loops))
            buffer, kept = bytearray(b"one" * 100), bytearray(b"one" * 100)
            changed = [await engine.submit("k", buffer, target) for target in ("remote", "cpu")]
            constant = await engine.submit("kept", kept, "remote")
            buffer[5] = 0
            stuck.released.set()
            (loop,) = remote.loops
            loop.call_soon_threadsafe(remote.open.set)
            await engine.result(blocker)
            for task_id in changed:
                with pytest.raises(OffloadRetryableError, match="changed"):
                    await engine.result(task_id)
            await engine.result(constant)
            assert set(remote.values) == {"first", "kept"}
            assert await stuck.read("k") is None

    asyncio.run(main())


def test_data_that_changes_on_its_way_to_disk_is_a_miss(tmp_path: Path) -> None:
    """The record carries the checksum of what was submitted."""

    async def main() -> None:
        with DiskBackend(tmp_path) as disk:
            async with AsyncOffloadEngine(1, 10, backends={"disk": disk}) as engine:
                hold, real = threading.Event(), disk.put_now

                def late(key: str, payload: memoryview, digest: bytes) -> None:
                    hold.wait(WAIT_S)
                    real(key, payload, digest)

                disk.put_now = late  # type: ignore[method-assign]
                buffer = bytearray(b"one" * 5000)
                task_id = await engine.submit("k", buffer, "disk")
                buffer[7] ^= 1
                hold.set()
                await engine.result(task_id)
                assert await disk.read("k") is None
                assert disk.stats()["corrupt"] == 1

    asyncio.run(main())


def test_memory_is_held_until_it_is_stored() -> None:
    async def main() -> None:
        stuck = StuckBackend()
        with MemoryAllocator(-1, MIB_GB) as allocator:
            async with AsyncOffloadEngine(1, 10, backends={"disk": stuck}) as engine:
                pointer = allocator.allocate(100)
                pointer.view()[:] = 7
                task_id = await engine.submit("k", pointer, "disk")
                allocator.free(pointer)
                other = allocator.allocate(100)
                other.view()[:] = 9
                assert other.address != pointer.address
                stuck.released.set()
                await engine.result(task_id)
                assert await stuck.read("k") == b"\7" * 100
                allocator.free(other)
                assert allocator.allocated == 0

    asyncio.run(main())


def test_several_event_loops_and_threads_use_one_engine() -> None:
    errors: list[BaseException] = []
    with AsyncOffloadEngine(3, 500, cpu_pool_gb=8 * MIB_GB) as engine:

        async def many(mark: int) -> None:
            tasks = [await engine.submit(f"{mark}-{n}", bytes([mark]) * 500, "cpu") for n in range(40)]
            await asyncio.gather(*(engine.result(task) for task in tasks))
            for number in range(40):
                assert await engine.backend("cpu").read(f"{mark}-{number}") == bytes([mark]) * 500

        def loop(mark: int) -> None:
            try:
                asyncio.run(many(mark))
            except BaseException as error:  # noqa: BLE001 - shown by the assertion below
                errors.append(error)

        threads = [threading.Thread(target=loop, args=(mark,)) for mark in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert errors == []
        assert engine.metrics.to_dict()["succeeded"] == 240


def test_a_task_outlives_the_loop_that_submitted_it() -> None:
    stuck = StuckBackend()
    with AsyncOffloadEngine(1, 10, backends={"disk": stuck}) as engine:

        async def submit_and_give_up() -> str:
            task_id = await engine.submit("k", b"data", "disk")
            with pytest.raises(DeadlineExceeded):
                await engine.result(task_id, timeout=0.01)
            waiting = asyncio.create_task(engine.result(task_id))
            await asyncio.sleep(0)
            waiting.cancel()
            return task_id

        task_id = asyncio.run(submit_and_give_up())
        stuck.released.set()
        asyncio.run(engine.result(task_id))
        assert asyncio.run(stuck.read("k")) == b"data"


def test_a_backend_that_gives_no_answer_is_a_failure_at_the_deadline() -> None:
    async def main() -> None:
        remote = DictBackend()
        remote.open.clear()
        async with AsyncOffloadEngine(1, 10, backends={"remote": remote}, write_timeout_s=0.05) as engine:
            task_id = await engine.submit("k", b"data", "remote")
            with pytest.raises(OffloadRetryableError, match="no answer within"):
                await engine.result(task_id)
            assert (await engine.check_health())["pending_tasks"] == 0

    asyncio.run(main())


def test_closing_is_bounded_fails_what_has_not_begun_and_leaves_what_hangs() -> None:
    stuck = StuckBackend()
    engine = AsyncOffloadEngine(1, 10, backends={"disk": stuck})

    async def begin() -> list[str]:
        return [await engine.submit(f"{number}", b"data", "disk") for number in range(3)]

    hung, *waiting = asyncio.run(begin())
    assert stuck.begun.acquire(timeout=WAIT_S)
    assert engine.close(timeout=0.05) is False
    for task_id in waiting:
        with pytest.raises(OffloadRetryableError, match="closed before"):
            asyncio.run(engine.result(task_id))
    stuck.released.set()
    asyncio.run(engine.result(hung))
    assert engine.close() is True


def test_closing_lets_accepted_tasks_end() -> None:
    async def main() -> None:
        with MemoryAllocator(-1, 4 * MIB_GB) as allocator:
            backend = MemoryBackend(allocator)
            async with AsyncOffloadEngine(2, 200, backends={"cpu": backend}) as engine:
                for number in range(100):
                    await engine.submit(f"{number}", b"data", "cpu")
            assert len(backend) == 100
            backend.close()
            assert allocator.allocated == 0

    asyncio.run(main())


def test_ended_tasks_are_remembered_within_bounds_and_keep_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtiers.compat.offload._REMEMBERED", 1)
    alive: list[Any] = []

    async def main() -> None:
        remote = DictBackend()
        remote.error = OSError("down")
        async with AsyncOffloadEngine(1, 5, backends={"remote": remote}) as engine:

            async def fail(number: int) -> str:
                data = np.zeros(1000, np.uint8)
                alive.append(weakref.ref(data))
                task_id = await engine.submit(f"{number}", data, "remote")
                with pytest.raises(OffloadRetryableError):
                    await engine.result(task_id)
                return task_id

            ids = [await fail(number) for number in range(25)]
            with pytest.raises(UnknownTask):
                await engine.result(ids[0])
            with pytest.raises(OffloadRetryableError):
                await engine.result(ids[-1])
            assert len(engine._ended) == 3 * (1 + 5)
            gc.collect()
            wait_until(lambda: not any(ref() is not None for ref in alive))

    asyncio.run(main())


def test_an_id_in_use_is_not_given_out_again() -> None:
    async def main() -> None:
        ids = iter(["a" * 8, "a" * 8, "a" * 8, "b" * 8])
        async with AsyncOffloadEngine(new_id=lambda: next(ids), cpu_pool_gb=MIB_GB) as engine:
            assert await engine.submit("k", b"1", "cpu") == "offload_aaaaaaaa"
            assert await engine.submit("k", b"2", "cpu") == "offload_bbbbbbbb"

    asyncio.run(main())


def test_threads_and_descriptors_do_not_grow() -> None:
    """Fewer is fine: what earlier tests of this process have left may end meanwhile."""
    process = psutil.Process()

    async def use() -> None:
        engine = AsyncOffloadEngine(2, 10, backends={"remote": DictBackend()}, cpu_pool_gb=MIB_GB)
        async with engine:
            for target in ("cpu", "remote"):
                await engine.result(await engine.submit("k", b"data", target))

    async def drop() -> None:
        engine = AsyncOffloadEngine(2, 10, backends={"remote": DictBackend()}, cpu_pool_gb=MIB_GB)
        for target in ("cpu", "remote"):
            await engine.result(await engine.submit("k", b"data", target))

    asyncio.run(use())
    gc.collect()
    fds, threads = process.num_fds(), threading.active_count()
    for _ in range(4):
        asyncio.run(use())
        asyncio.run(drop())
    gc.collect()
    wait_until(lambda: process.num_fds() <= fds and threading.active_count() <= threads)


# --- the CPU target ------------------------------------------------------------------------------------------------------


def test_the_cpu_target_makes_room_by_last_use_and_refuses_what_never_fits() -> None:
    async def main() -> None:
        backend = MemoryBackend(pool_size_gb=MIB_GB)
        for key in "abc":
            await backend.write(key, bytes([ord(key)]) * 300_000)
        assert await backend.read("a") == b"a" * 300_000
        await backend.write("d", b"d" * 300_000)
        assert [await backend.exists(key) for key in "abcd"] == [True, False, True, True]
        assert backend.evicted == 1
        with pytest.raises(OutOfMemoryError):
            await backend.write("e", b"e" * (1 << 21))
        assert len(backend) == 3  # it evicted nobody
        assert await backend.write("empty", b"") is True
        assert await backend.read("empty") == b""
        await backend.write("a", b"short")
        assert await backend.read("a") == b"short"
        assert [await backend.delete(key) for key in ("a", "a")] == [True, False]
        assert backend.allocator.check_integrity() == []
        backend.close()

    asyncio.run(main())


# --- metrics -------------------------------------------------------------------------------------------------------------


def test_metrics_count_by_target_and_stay_bounded() -> None:
    metrics = OffloadMetrics()
    metrics.record_success("cpu", 0.002)
    metrics.record_success("cpu", 0.2)
    metrics.record_failure("disk", "x" * 10_000)
    metrics.record_failure("disk", OSError("disk on fire"))
    told = metrics.to_dict()
    assert (told["succeeded"], told["failed"]) == (2, 2)
    assert told["targets"]["cpu"]["duration"]["count"] == 2
    assert told["targets"]["disk"]["last_error"] == "OSError: disk on fire"
    for number in range(1000):
        metrics.record_success(f"{number}", 0.0)
    assert len(metrics.to_dict()["targets"]) <= 17
    assert metrics.to_dict()["succeeded"] == 1002
    json.dumps(metrics.to_dict())
