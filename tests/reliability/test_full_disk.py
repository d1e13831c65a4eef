"""No space left, on a real file system of 8 MiB: reads go on, nothing leaks, and it recovers when there is room."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvtiers.config import Machine, PathSpace
from kvtiers.model.tiers import Tier
from kvtiers.runtime.cache import TieredCache
from kvtiers.runtime.node import CacheNode
from kvtiers.runtime.plan import plan_node
from kvtiers.testing.cache_oracle import SMALL_LAYOUT, CacheOracle
from kvtiers.testing.chaos import MIB, faulty_plan, namespace, small_config, wait_until
from kvtiers.testing.disk_damage import du, record_files

pytestmark = pytest.mark.slow

SIZE = 8 * MIB
TOKENS = list(range(100))
PLENTY = list(range(50_000, 50_000 + 16 * 60))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own (tmpfs; needs the right to mount)."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = tmp_path / "disk"
    place.mkdir()
    if libc.mount(b"tmpfs", bytes(place), b"tmpfs", 0, b"size=%d" % SIZE) != 0:
        pytest.skip(f"a small file system can't be mounted here: {os.strerror(ctypes.get_errno())}")
    yield place
    libc.umount2(bytes(place), 2)  # MNT_DETACH: even if a failed test still has files open


def fill(path: Path, leave: int = 0) -> None:
    """Take all space of the file system but `leave` bytes."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(64 * 1024))
    free = os.statvfs(path).f_bavail * os.statvfs(path).f_frsize
    os.truncate(path, path.stat().st_size - max(0, leave - free))


class Bench:
    def __init__(self, disk: Path, min_free: str = "0") -> None:
        self.path, self.filler = disk / "cache", disk / "filler"
        self.config = small_config(self.path, {"disk.max_size": "7Mi", "disk.min_free_space": min_free})
        room = PathSpace(self.path, device=1, total=SIZE, free=SIZE)  # fitted while it was empty
        machine = replace(Machine.probe(), paths=(room,))
        plan, _ = faulty_plan(plan_node(self.config, machine), disk={"full_pause_s": 0.2})
        self.node = CacheNode(plan)
        self.cache = TieredCache(self.config, SMALL_LAYOUT, namespace(), node=self.node)
        self.oracle = CacheOracle(namespace())

    def store(self, tokens: list[int]) -> int:
        return self.cache.store(tokens, self.oracle.kv(tokens)).accepted

    def loads(self, tokens: list[int]) -> int:
        loaded = self.cache.load(tokens).result()
        self.oracle.check(tokens, loaded.num_tokens, loaded.kv)
        return loaded.num_tokens

    def entries(self) -> int:
        entries: int = self.cache.stats()["tiers"]["disk"]["entries"]
        return entries

    def close(self) -> None:
        self.cache.close()
        assert self.node.close(20)


@pytest.fixture
def bench(small_disk: Path) -> Iterator[Bench]:
    bench = Bench(small_disk)
    yield bench
    bench.filler.unlink(missing_ok=True)
    bench.close()


def test_reads_and_stores_go_on_and_writes_come_back_with_the_space(bench: Bench) -> None:
    assert bench.store(TOKENS) == 6
    bench.cache.flush()
    bench.cache.evict("cpu")
    fill(bench.filler)
    for number in range(8):  # more than memory holds: what can't be written is dropped, not kept for ever
        tokens = list(range(number * 1000, number * 1000 + 256))
        assert bench.store(tokens) > 0
        assert bench.loads(TOKENS) % 16 == 0
    assert wait_until(lambda: bench.cache.stats()["tiers"]["disk"]["failed"] > 0)
    assert list((bench.path / "tmp").iterdir()) == []
    assert bench.cache.stats()["tiers"]["disk"]["breaker"] == "closed", "a full disk works"
    assert bench.cache.stats()["open_tickets"] == 0

    bench.filler.unlink()
    bench.store(PLENTY[:512])
    assert wait_until(lambda: not bench.cache.stats()["tiers"]["disk"]["backlog"])
    bench.cache.flush()
    bench.cache.evict("cpu")
    assert bench.loads(PLENTY[:512]) > 0
    assert bench.node.wait_settled(20)
    assert bench.cache.check_integrity() == []
    assert bench.cache.stats()["tiers"]["cpu"]["leased_chunks"] == 0
    assert bench.node.guards[Tier.DISK].usage().used_bytes == du(bench.path)


def test_what_was_on_the_disk_can_be_read_while_it_is_full(bench: Bench) -> None:
    bench.store(TOKENS)
    bench.cache.flush()
    fill(bench.filler)
    bench.cache.evict("cpu")
    loaded = bench.cache.load(TOKENS).result()
    assert loaded.tiers == (Tier.DISK,) * 6
    bench.oracle.check(TOKENS, loaded.num_tokens, loaded.kv)


def test_a_full_disk_gives_back_its_coldest_records_to_write_new_ones(bench: Bench) -> None:
    for first in range(0, len(PLENTY), 160):
        bench.store(PLENTY[: first + 160])
        bench.cache.flush()
    cold = bench.entries()
    assert cold == 60
    fill(bench.filler)
    bench.store(TOKENS)
    assert wait_until(
        lambda: len([r for r in record_files(bench.path) if r.key in bench.oracle.keys(TOKENS)]) == 6
    )
    assert bench.entries() < cold + 6
    bench.cache.flush()
    bench.cache.evict("cpu")
    assert bench.loads(TOKENS) == 96
    assert bench.loads(PLENTY) < len(PLENTY)
    assert bench.cache.check_integrity() == []


def test_a_cache_opens_on_a_full_disk_and_reads(small_disk: Path) -> None:
    first = Bench(small_disk)
    first.store(TOKENS)
    first.cache.flush()
    first.close()
    fill(first.filler)
    again = Bench(small_disk)
    try:
        assert again.loads(TOKENS) == 96
        again.store(PLENTY[:64])
        assert again.loads(PLENTY[:64]) == 64
    finally:
        again.filler.unlink()
        again.close()


def test_free_space_below_the_minimum_stops_writing_and_gives_space_back_until_there_is_enough(
    small_disk: Path,
) -> None:
    bench = Bench(small_disk, min_free="2Mi")
    try:
        for first in range(0, len(PLENTY), 160):
            bench.store(PLENTY[: first + 160])
            bench.cache.flush()
        assert bench.entries() == 60
        fill(bench.filler, leave=2 * MIB - 20 * 16_384)
        bench.store(TOKENS)  # finds out
        assert wait_until(
            lambda: os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize >= 2 * MIB
        )
        assert wait_until(lambda: bench.node.wait_settled(0.1))
        left = bench.entries()
        assert 20 <= left < 60, "as much as was asked for, not everything"
        bench.filler.unlink()
        assert wait_until(
            lambda: bench.store([1, *TOKENS]) + bench.store([2, *TOKENS]) == 0 or bench.entries() > left
        )
        assert wait_until(lambda: bench.entries() > left)
        assert bench.cache.check_integrity() == []
    finally:
        bench.filler.unlink(missing_ok=True)
        bench.close()


def test_directories_whose_records_went_do_not_fill_a_small_disk(tmp_path: Path) -> None:
    """Every record has a directory or two of its own at this size; left behind, they would take all of its room for ever."""
    config = small_config(tmp_path / "cache", {"disk.max_size": "1Mi"})
    oracle = CacheOracle(namespace())
    with TieredCache(config, SMALL_LAYOUT, namespace()) as cache:
        for number in range(250):
            tokens = list(range(number * 1000, number * 1000 + 32))
            cache.store(tokens, oracle.kv(tokens))
            cache.flush()
        assert cache.node.wait_settled(20)
        stats = cache.stats()["tiers"]["disk"]
        assert stats["stored"] >= 500
        assert stats["entries"] >= 10, "and there is room for more"
        assert cache.node.guards[Tier.DISK].usage().used_bytes == du(tmp_path / "cache")
        assert cache.check_integrity() == []
