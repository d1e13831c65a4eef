"""Under the node's mutex there is no I/O, no copying, no checksum, no logging and no callback; and nobody waits for a hung disk.

The mutex is replaced by one that knows who holds it, and everything that must not happen under it by something that looks.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvtiers.memory import cuda
from kvtiers.records import sealing
from kvtiers.runtime import offload, pools, transfer
from kvtiers.runtime import shared_core as shared_core_module
from kvtiers.runtime.loads import StagedLoad
from kvtiers.runtime.results import PendingLoad
from kvtiers.stores.guard import Guard, Operation
from kvtiers.testing.faulty_store import Stall

if TYPE_CHECKING:
    from pathlib import Path

    from tests.runtime.conftest import MakeCache, MakeChaos

    from kvtiers.testing.cache_oracle import CacheOracle

SYSTEM_CALLS = (
    "open", "close", "read", "write", "pread", "pwrite", "preadv", "pwritev", "fsync", "fdatasync", "fstat", "lstat", "stat",
    "statvfs", "rename", "unlink", "mkdir", "rmdir", "listdir", "scandir", "ftruncate",
)  # fmt: skip


class WatchedLock:
    """A lock that knows which thread holds it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.owner: int | None = None
        self.holds = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        got = self._lock.acquire(blocking, timeout)
        if got:
            self.owner = threading.get_ident()
            self.holds += 1
        return got

    def release(self) -> None:
        self.owner = None
        self._lock.release()

    def locked(self) -> bool:
        return self._lock.locked()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Threading:
    """`threading`, as `runtime/shared_core.py` sees it, with watched locks."""

    def __init__(self) -> None:
        self.locks: list[WatchedLock] = []

    def Lock(self) -> WatchedLock:  # noqa: N802 - stands in for threading.Lock
        self.locks.append(WatchedLock())
        return self.locks[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(threading, name)


class Watch:
    """What was done by a thread that held a watched lock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, locks: list[WatchedLock]) -> None:
        self.locks = locks
        self.caught: set[str] = set()
        self.seen: set[str] = set()
        for name in SYSTEM_CALLS:
            self.watch(monkeypatch, os, name)
        self.watch(monkeypatch, np, "copyto")
        self.watch(monkeypatch, time, "sleep")
        self.watch(monkeypatch, logging.Logger, "handle")
        for module in (offload, sealing):
            self.watch(monkeypatch, module, "checksum" if hasattr(module, "checksum") else "checksum_of")
        self.watch(monkeypatch, StagedLoad, "settle")
        self.watch(monkeypatch, PendingLoad, "_end")
        self.watch(monkeypatch, pools.WorkerPool, "submit")
        self.watch(monkeypatch, pools.WorkerPool, "cancel")
        for name in ("copy_in", "copy_out", "copy_to_host", "copy_from_host"):
            self.watch(monkeypatch, cuda.DevicePool, name)
        for name in ("read_into", "write", "delete", "exists", "usage", "tick"):
            self.watch(monkeypatch, Guard, name)
        self.watch(monkeypatch, transfer.ArenaSlots, "write")

    def watch(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)
        label = f"{getattr(owner, '__name__', owner)}.{name}"

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.seen.add(label)
            me = threading.get_ident()
            if any(lock.owner == me for lock in self.locks):
                self.caught.add(label)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watched = Threading()
    monkeypatch.setattr(shared_core_module, "threading", watched)
    return Watch(monkeypatch, watched.locks)


def test_the_watch_itself_catches_what_it_is_for(watch: Watch, tmp_path: Path) -> None:
    lock = WatchedLock()
    watch.locks.append(lock)
    (tmp_path / "file").write_bytes(b"x")
    with lock:
        os.close(os.open(tmp_path / "file", os.O_RDONLY))
        logging.getLogger("kvtiers.test").warning("under the lock")
    assert watch.caught == {"os.open", "os.close", "Logger.handle"}


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("policy", ["write_through", "write_on_evict"])
def test_nothing_slow_happens_under_the_mutex(
    watch: Watch, make_cache: MakeCache, oracle: CacheOracle, gpu: bool, policy: str
) -> None:
    values: dict[str, Any] = {"disk.write_policy": policy, "disk.max_size": "2Mi", "cpu.verify_on_hit": True}
    if gpu:
        values |= {"gpu.capacity": "1Mi", "gpu.device": "cpu"}
    cache = make_cache(values)
    (lock,) = watch.locks
    tokens = list(range(100))
    cache.store(tokens, oracle.kv(tokens))
    cache.flush()
    for tier in ("gpu", "cpu") if gpu else ("cpu",) * 6:
        cache.evict(tier)
        cache.flush()
    cache.load(tokens).result()
    cache.evict("disk")
    rng = random.Random(0)
    for _ in range(250):
        first = 1000 * rng.randrange(40)
        tokens = list(range(first, first + rng.randrange(1, 160)))
        match rng.randrange(6):
            case 0 | 1:
                cache.store(tokens, oracle.kv(tokens))
            case 2 | 3:
                loaded = cache.load(tokens).result()
                oracle.check(tokens, loaded.num_tokens, loaded.kv)
            case 4:
                cache.evict(rng.choice(["cpu", "disk"]), rng.random())
            case _:
                cache.lookup(tokens)
                cache.stats()
    assert cache.check_integrity() == []
    cache.close()
    assert watch.caught == set()
    assert lock.holds > 500
    wanted = {
        "os.pwritev",
        "os.preadv",
        "os.rename",
        "os.unlink",
        "numpy.copyto",
        "StagedLoad.settle",
        "Guard.write",
    }
    assert wanted <= watch.seen, "it looked at what was going on"
    if gpu:
        assert {"DevicePool.copy_to_host", "DevicePool.copy_from_host"} <= watch.seen


def test_no_call_of_an_engine_waits_for_a_disk_that_hangs_in_everything(make_chaos: MakeChaos) -> None:
    """The disk is freed only after all of this has been done: whatever waited for it would hang until the test's time-out."""
    one = make_chaos({"async.max_workers": 2, "async.queue_size": 8, "disk.max_queue_bytes": "1Mi"})
    warm = list(range(100))
    one.cache.store(warm, one.oracle.kv(warm))
    one.cache.flush()
    released = threading.Event()
    one.disk.inject(Stall(released), *Operation, times=None)
    try:
        accepted = 0
        for number in range(100, 160):  # far more than the arena, the queue and the write leases take
            tokens = list(range(number * 1000, number * 1000 + 64))
            receipt = one.cache.store(tokens, one.oracle.kv(tokens))
            accepted += receipt.accepted
            one.cache.lookup(tokens)
            one.cache.stats()
            one.cache.load(tokens, timeout=0.001)
            one.cache.evict("cpu", 0.9)
        assert accepted >= 60, "stores go on while the disk hangs: what can't be written is dropped"
        assert one.cache.lookup(warm).num_tokens in {0, 96}
        assert not one.node.wait_settled(0.0)
    finally:
        released.set()
    assert one.node.wait_settled(30)
