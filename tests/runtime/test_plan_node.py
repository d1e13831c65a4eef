"""From a configuration to what a node is made of: every setting arrives where it takes effect."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvtiers.config import CacheConfig, Machine, PathSpace
from kvtiers.config.sizes import GIB, MIB
from kvtiers.core.settings import MemorySettings, WritePolicy
from kvtiers.memory.arena import HugePages, LockMemory
from kvtiers.memory.numa import Numa
from kvtiers.model.errors import DoesNotFit
from kvtiers.model.tiers import Tier
from kvtiers.runtime.cache import TieredCache
from kvtiers.runtime.plan import NodePlan, plan_node
from kvtiers.stores.disk import DiskStore
from kvtiers.stores.disk.settings import DirectIO, Durability
from kvtiers.stores.guard import GuardPolicy
from kvtiers.testing.cache_oracle import SMALL_LAYOUT, CacheOracle
from kvtiers.testing.chaos import namespace, small_config

TIB = 1 << 40

# The LMCache-compatible template.
TEMPLATE = """\
storage:
  gpu:
    max_utilization: 0.80
    eviction_threshold: 0.75
  cpu:
    enabled: true
    buffer_size: "200Gi"
    numa_aware: true
    eviction_policy: "lru"
  disk:
    enabled: true
    path: "/var/cache/lmcache"
    max_size: "2Ti"
    compression: "zstd"
    compression_level: 3
  remote:
    enabled: true
    backend: "mooncake"
    endpoint: "mooncache.cluster.local:8080"
    connection_pool_size: 32
    timeout_ms: 5000
async:
  max_workers: 8
  queue_size: 10000
  retry_policy:
    max_retries: 3
    backoff_factor: 2
observability:
  metrics_port: 8000
  health_check_interval: 30
"""


def large_machine(path: str = "/var/cache/lmcache") -> Machine:
    space = PathSpace(Path(path), device=1, total=8 * TIB, free=4 * TIB)
    return Machine(memory_total=512 * GIB, memory_available=500 * GIB, paths=(space,))


def planned(values: dict[str, Any], path: str = "/d") -> NodePlan:
    return plan_node(CacheConfig.from_mapping(values, environ={}), large_machine(path))


def disk_of(plan: NodePlan) -> DiskStore:
    store = plan.stores[Tier.DISK].store
    assert isinstance(store, DiskStore)
    return store


def test_the_template_becomes_a_plan() -> None:
    plan = plan_node(CacheConfig.from_text(TEMPLATE, environ={}), large_machine())
    assert plan.core.cpu.capacity == 200 * GIB
    assert plan.core.cpu.ceiling == 180 * GIB
    assert plan.core.cpu.low == 170 * GIB
    assert plan.core.cpu.staging == 20 * GIB
    assert plan.core.gpu is None, "without a capacity the engine's own prefix cache is the GPU tier"
    assert plan.device_pool is None
    assert plan.core.disk is not None
    assert plan.core.disk.capacity == 2 * TIB
    assert plan.core.disk.max_queued == 10_000
    assert plan.core.remote is not None
    assert plan.core.remote.remember is not None, "others use it as well"
    assert plan.stores[Tier.REMOTE].workers == 4
    assert plan.stores[Tier.REMOTE].store.name == "mooncake"
    assert plan.numa is Numa.PER_NODE
    store = plan.stores[Tier.DISK]
    assert store.workers == 4  # of 8 over all stores
    assert store.max_queued == 10_000
    assert store.guard == GuardPolicy(
        max_retries=3, backoff_factor=2.0, read_deadline_s=5.0, write_deadline_s=30.0
    )
    settings = disk_of(plan).settings
    assert settings.paths == ("/var/cache/lmcache",)
    assert settings.codec.name == "zstd"
    assert settings.scratch_buffers == 8


def test_a_remote_that_is_not_there_takes_no_threads_from_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtiers.runtime.plan.what_is_missing", lambda _: "a client is missing")
    plan = plan_node(CacheConfig.from_text(TEMPLATE, environ={}), large_machine())
    assert list(plan.stores) == [Tier.DISK]
    assert plan.stores[Tier.DISK].workers == 8


def test_planning_touches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    planned({"storage": {"disk": {"enabled": True, "path": str(path)}}}, str(path))
    assert not path.exists()


def test_every_setting_arrives(tmp_path: Path) -> None:
    path = str(tmp_path / "cache")
    plan = planned(
        {
            "storage": {
                "gpu": {"capacity": "1Gi", "device": "cpu", "max_utilization": 0.5, "eviction_threshold": 0.4, "idle_after_s": 7},
                "cpu": {
                    "buffer_size": "100Mi", "eviction_threshold": 0.8, "low_watermark": 0.5, "probation_share": 0.3,
                    "write_lease_share": 0.1, "verify_on_hit": True, "huge_pages": "hugetlb", "lock_memory": True,
                    "numa_aware": False,
                },
                "disk": {
                    "enabled": True, "path": path, "max_size": "10Gi", "eviction_threshold": 0.9, "low_watermark": 0.7,
                    "write_policy": "write_on_evict", "durability": "fsync", "min_free_space": "3Mi",
                    "admission": "second_touch", "direct_io": "off", "read_timeout_ms": 250, "write_timeout_ms": 750,
                    "max_queue_bytes": "5Mi",
                },
            },
            "async": {
                "max_workers": 3, "queue_size": 17, "load_timeout_ms": 1500, "close_timeout_s": 4,
                "retry_policy": {"max_retries": 1, "backoff_factor": 3},
            },
        },
        path,
    )  # fmt: skip
    core = plan.core
    assert core.cpu == MemorySettings(100 * MIB, 80 * MIB, 50 * MIB, "lru", 0.3)
    assert core.write_lease_share == 0.1
    assert core.gpu is not None
    assert (core.gpu.capacity, core.gpu.ceiling) == (GIB // 2, int(GIB * 0.4))
    assert core.gpu.idle_after_s == 7
    assert core.disk is not None
    assert (core.disk.capacity, core.disk.ceiling, core.disk.low) == (10 * GIB, 9 * GIB, 7 * GIB)
    assert core.disk.write_policy is WritePolicy.WRITE_ON_EVICT
    assert core.disk.admission == "second_touch"
    assert core.disk.max_queued == 17
    assert core.disk.max_queued_bytes == 5 * MIB
    store = plan.stores[Tier.DISK]
    assert (store.workers, store.max_queued, store.min_free_bytes) == (3, 17, 3 * MIB)
    assert store.guard == GuardPolicy(
        max_retries=1, backoff_factor=3.0, read_deadline_s=0.25, write_deadline_s=0.75
    )
    settings = disk_of(plan).settings
    assert settings.durability is Durability.FSYNC
    assert settings.direct_io is DirectIO.OFF
    assert settings.min_free_bytes == 3 * MIB
    assert settings.codec.name == "none"
    assert (plan.load_timeout_s, plan.close_timeout_s, plan.verify_on_hit) == (1.5, 4.0, True)
    assert plan.huge_pages is HugePages.HUGETLB
    assert plan.lock_memory is LockMemory.WHERE_ALLOWED
    assert plan.numa is Numa.OFF
    assert plan.device_pool is not None


def test_what_does_not_fit_is_refused_before_anything_is_taken() -> None:
    small = replace(large_machine(), memory_total=24 * GIB, memory_available=20 * GIB)
    with pytest.raises(DoesNotFit, match="KVTIERS_STORAGE__CPU__BUFFER_SIZE=14Gi"):
        plan_node(CacheConfig.from_text(TEMPLATE, environ={}), small)


def test_a_disabled_cpu_tier_keeps_a_small_arena_for_staging_only() -> None:
    plan = planned({"storage": {"cpu": {"enabled": False, "buffer_size": "200Gi"}}})
    assert plan.core.cpu.ceiling == 0
    assert plan.core.cpu.staging == plan.core.cpu.capacity == 256 * MIB


def test_a_remote_whose_backend_is_not_built_warns_once_and_the_cache_runs_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(
        tmp_path / "cache",
        {"remote.enabled": True, "remote.backend": "nobodys", "remote.endpoint": "example.invalid:1"},
    )
    oracle, tokens = CacheOracle(namespace()), list(range(50))
    with caplog.at_level(logging.WARNING, "kvtiers"), TieredCache(config, SMALL_LAYOUT, namespace()) as cache:
        cache.store(tokens, oracle.kv(tokens))
        cache.flush()
        loaded = cache.load(tokens).result()
        assert loaded.num_tokens == 48
        assert Tier.REMOTE not in cache.stats()["tiers"]
        assert cache.check_integrity() == []
    warnings = [record.getMessage() for record in caplog.records]
    assert [text for text in warnings if "nobodys" in text] == warnings
    assert len(warnings) == 1
