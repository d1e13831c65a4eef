"""Nothing grows: anonymous memory outside the arena, threads, file descriptors, mappings and tickets, over 20,000 cycles and 200 caches."""

from __future__ import annotations

import gc
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kvtiers.memory.cuda import DevicePool
from kvtiers.model.tiers import Tier
from kvtiers.runtime.cache import TieredCache
from kvtiers.runtime.familiar import Familiar
from kvtiers.runtime.node import CacheNode
from kvtiers.runtime.plan import plan_node
from kvtiers.testing.cache_oracle import SMALL_LAYOUT, CacheOracle
from kvtiers.testing.chaos import MIB, namespace, small_config

WARM_SHARE = 4
"""After a quarter of the cycles everything that is bounded has reached its bound."""


class Footprint(NamedTuple):
    """What this process has."""

    anonymous: int
    """Bytes; the arena is a memfd and does not count."""
    threads: int
    descriptors: int
    arenas: int

    @classmethod
    def now(cls) -> Footprint:
        gc.collect()
        rollup = Path("/proc/self/smaps_rollup").read_text()
        (anonymous,) = [int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Anonymous:")]
        arenas = sum("kvtiers-arena" in line for line in Path("/proc/self/maps").read_text().splitlines())
        descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        return cls(anonymous * 1024, threading.active_count(), descriptors, arenas)


def has_grown(before: Footprint, after: Footprint, allowed: int) -> list[str]:
    grown = []
    if after.anonymous - before.anonymous > allowed:
        grown.append(f"{(after.anonymous - before.anonymous) / MIB:.1f} MiB of anonymous memory")
    grown += [
        f"{name}: {getattr(before, name)} before, {getattr(after, name)} after"
        for name in ("threads", "descriptors", "arenas")
        if getattr(after, name) != getattr(before, name)
    ]
    return grown


def bounded_node(path: Path, values: dict[str, Any]) -> CacheNode:
    """What is remembered of chunks that are gone has small bounds here, so that it is full before the count begins."""
    plan = plan_node(small_config(path, values))
    node = CacheNode(replace(plan, core=replace(plan.core, ghosts=200)))
    node.familiar = Familiar(memory=200)
    return node


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("cycles", "values"),
    [
        (20_000, {"disk.compression": "zstd", "disk.direct_io": "off"}),
        (6_000, {"gpu.capacity": "1Mi", "gpu.device": "cpu", "disk.write_policy": "write_on_evict"}),
    ],
    ids=["20000 with a disk", "6000 with a gpu pool and a disk"],
)
def test_cycles_of_storing_loading_and_evicting_leave_nothing(
    tmp_path: Path, cycles: int, values: dict[str, Any]
) -> None:
    node = bounded_node(tmp_path / "cache", values)
    cache = TieredCache(small_config(tmp_path / "cache", values), SMALL_LAYOUT, namespace(), node=node)
    oracle = CacheOracle(namespace())
    tiers = [tier for tier in (Tier.GPU, Tier.CPU) if node.capacity(tier)]
    before: Footprint | None = None
    for cycle in range(cycles):
        tokens = list(range(cycle * 20, cycle * 20 + 17))  # a chunk that was never seen
        receipt = cache.store(tokens, oracle.kv(tokens))
        if cycle % 10 == 0:
            receipt.wait(30)
            for tier in tiers:
                cache.evict(tier)
        pending = cache.load(tokens)
        if cycle % 3:
            loaded = pending.result()
            if cycle % 100 == 1:
                oracle.check(tokens, loaded.num_tokens, loaded.kv)
        if cycle % 50 == 0:
            cache.evict("disk", 0.002)
        if cycle % 1000 == 0:
            TieredCache(cache.config, SMALL_LAYOUT, namespace(), node=node).close()
        if cycle == cycles // WARM_SHARE:
            assert node.wait_settled(60)
            before = Footprint.now()
    assert before is not None
    assert node.wait_settled(60)
    after = Footprint.now()
    stats = cache.stats()
    assert has_grown(before, after, allowed=3 * MIB) == []
    assert stats["open_tickets"] == 0
    assert stats["operations"] == 0
    assert stats["sessions"] == 1
    assert stats["ghosts"] <= 200
    assert node._core.loads == {}
    assert cache.check_integrity() == []
    cache.close()
    assert node.close()


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_200_caches_opened_and_closed_leave_nothing(tmp_path: Path) -> None:
    oracle, tokens = CacheOracle(namespace()), list(range(100))
    DevicePool(4096, "cpu").close()  # imports torch
    before: Footprint | None = None
    for number in range(260):
        values = {"gpu.capacity": "1Mi", "gpu.device": "cpu"} if number % 2 else {}
        with TieredCache(small_config(tmp_path / "cache", values), SMALL_LAYOUT, namespace()) as cache:
            cache.store(tokens, oracle.kv(tokens))
            loaded = cache.load(tokens).result()
            oracle.check(tokens, loaded.num_tokens, loaded.kv)
        if number == 59:  # the allocator has its arenas for as many threads as there will be
            before = Footprint.now()
    assert before is not None
    assert has_grown(before, Footprint.now(), allowed=3 * MIB) == []
