"""From what the operator wrote to what a node is made of, in bytes, seconds and threads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvtiers.config import CacheConfig, Fitted, Machine, TierSize, fit
from kvtiers.core.settings import CoreSettings, MemorySettings, StoreSettings, WritePolicy
from kvtiers.memory.arena import HugePages, LockMemory
from kvtiers.memory.numa import Numa
from kvtiers.model.errors import ConfigError, DoesNotFit
from kvtiers.model.parts import Parts
from kvtiers.model.tiers import Tier
from kvtiers.records.codecs.registry import codec_for
from kvtiers.stores.base import RecordStore
from kvtiers.stores.disk.settings import DirectIO, DiskSettings, Durability
from kvtiers.stores.disk.store import DiskStore
from kvtiers.stores.guard import GuardPolicy

if TYPE_CHECKING:
    from kvtiers.memory.cuda import DevicePool

_log = logging.getLogger(__name__)
_MIB = 1 << 20
_MEMORY_WORKERS = 2  # two threads reach the machine's copy limit (docs/decisions/runtime.md)
_MEMORY_QUEUE = 1_000_000
"""Seals and copies hold slots, so their number is bounded by the arena; this only has to be larger than that."""


@dataclass(frozen=True, slots=True)
class StorePlan:
    """One store and how it is driven."""

    store: RecordStore
    guard: GuardPolicy
    workers: int
    max_queued: int
    min_free_bytes: int = 0
    """Below this much free space the core is told to give some back."""


@dataclass(frozen=True, slots=True)
class NodePlan:
    """Everything a `CacheNode` is made of."""

    core: CoreSettings
    stores: Mapping[Tier, StorePlan] = field(default_factory=dict)
    device_pool: Callable[[], DevicePool] | None = None
    """Makes the GPU pool; imports torch only when called."""
    huge_pages: HugePages = HugePages.ADVISE
    lock_memory: LockMemory = LockMemory.OFF
    numa: Numa = Numa.PER_NODE
    memory_workers: int = _MEMORY_WORKERS
    memory_queue: int = _MEMORY_QUEUE
    load_timeout_s: float = 2.0
    close_timeout_s: float = 30.0
    health_check_s: float = 30.0
    """How often a store is probed, whether it is used or not."""
    verify_on_hit: bool = False

    def check_chunk_fits(self, slot_bytes: int) -> None:
        """Raises DoesNotFit if a chunk is too large for what keeps or stages it."""
        core = self.core
        problems = []
        if core.cpu.ceiling and slot_bytes > core.cpu.ceiling:
            problems.append(
                f"one chunk takes {slot_bytes / _MIB:.1f} MiB, the CPU tier keeps {core.cpu.ceiling / _MIB:.1f} MiB"
            )
        if self.stores and slot_bytes > core.cpu.staging:
            problems.append(
                f"one chunk takes {slot_bytes / _MIB:.1f} MiB, the arena's share for staging loads is "
                f"{core.cpu.staging / _MIB:.1f} MiB (what lies above storage.cpu.eviction_threshold)"
            )
        if problems:
            raise DoesNotFit(
                [
                    *problems,
                    "set KVTIERS_STORAGE__CPU__BUFFER_SIZE higher, or KVTIERS_STORAGE__CHUNK_TOKENS lower",
                ],
                source="the model's chunks do not fit the cache",
            )

    def check_slots_fit(self, parts: Parts, largest: int) -> None:
        """Raises DoesNotFit if a slot is larger than the `largest` segment of the arena: none crosses from one NUMA node to another."""
        if any(part.slot_bytes > largest for part in parts):
            raise DoesNotFit(
                [
                    f"a slot of {max(part.slot_bytes for part in parts)} bytes lies on one NUMA node, and each has {largest} of the arena",
                    "set KVTIERS_STORAGE__CPU__NUMA_AWARE=false, or KVTIERS_STORAGE__CPU__BUFFER_SIZE higher",
                ],
                source="the model's chunks do not fit the cache",
            )


def plan_node(config: CacheConfig, machine: Machine | None = None) -> NodePlan:
    """Fit the configuration to the machine. Raises DoesNotFit with every problem; touches nothing yet."""
    fitted = fit(config, machine)
    storage, work = config.storage, config.async_
    if storage.remote.enabled:
        _log.warning(
            "the remote backend %r is not part of this version of kvtiers; the cache runs without a remote tier",
            storage.remote.backend,
        )
    cpu = _memory(fitted.cpu, storage.cpu.eviction_policy, storage.cpu.probation_share)
    gpu = None
    if fitted.gpu is not None:
        gpu = _memory(
            fitted.gpu, storage.cpu.eviction_policy, storage.cpu.probation_share, storage.gpu.idle_after_s
        )
    stores = {Tier.DISK: _disk_plan(config, fitted)} if fitted.disk is not None else {}
    return NodePlan(
        core=CoreSettings(
            cpu=cpu,
            gpu=gpu,
            disk=_disk_settings(config, fitted),
            write_lease_share=storage.cpu.write_lease_share,
        ),
        stores=stores,
        device_pool=_device_pool(config, fitted),
        huge_pages=HugePages(storage.cpu.huge_pages),
        lock_memory=LockMemory.WHERE_ALLOWED if storage.cpu.lock_memory else LockMemory.OFF,
        numa=Numa.PER_NODE if storage.cpu.numa_aware else Numa.OFF,
        load_timeout_s=work.load_timeout_ms / 1000,
        close_timeout_s=work.close_timeout_s,
        health_check_s=config.observability.health_check_interval,
        verify_on_hit=storage.cpu.verify_on_hit,
    )


def _memory(
    size: TierSize, policy: str, probation: float, idle_after_s: float | None = None
) -> MemorySettings:
    return MemorySettings(
        capacity=size.capacity,
        ceiling=size.ceiling,
        low=size.low,
        policy=policy,
        probation_share=probation,
        idle_after_s=idle_after_s,
        whole=size.whole,
    )


def _device_pool(config: CacheConfig, fitted: Fitted) -> Callable[[], DevicePool] | None:
    size = fitted.gpu
    if size is None:
        return None

    def make() -> DevicePool:
        from kvtiers.memory.cuda import DevicePool

        return DevicePool(size.capacity, config.storage.gpu.device)

    return make


def _disk_settings(config: CacheConfig, fitted: Fitted) -> StoreSettings | None:
    disk, size = config.storage.disk, fitted.disk
    if size is None:
        return None
    return StoreSettings(
        capacity=size.capacity,
        ceiling=size.ceiling,
        low=size.low,
        policy=disk.eviction_policy,
        write_policy=WritePolicy(disk.write_policy),
        admission=disk.admission,
        max_queued=config.async_.queue_size,
        max_queued_bytes=disk.max_queue_bytes,
    )


def _disk_plan(config: CacheConfig, fitted: Fitted) -> StorePlan:
    disk, work = config.storage.disk, config.async_
    options = {"level": disk.compression_level} if disk.compression == "zstd" else {}
    codec = codec_for(disk.compression, **options)
    if codec.lossy:
        problem = (
            f"storage.disk.compression = {disk.compression}: a lossy codec changes the KV, and its parameters are not part of "
            "the namespace yet; use none or zstd"
        )
        raise ConfigError([problem])
    store = DiskStore(
        DiskSettings(
            paths=tuple(str(path) for path in fitted.disk_paths),
            durability=Durability(disk.durability),
            direct_io=DirectIO(disk.direct_io),
            codec=codec,
            min_free_bytes=disk.min_free_space,
            scratch_buffers=2 * work.max_workers,
        )
    )
    guard = GuardPolicy(
        max_retries=work.retry_policy.max_retries,
        backoff_factor=work.retry_policy.backoff_factor,
        read_deadline_s=disk.read_timeout_ms / 1000,
        write_deadline_s=disk.write_timeout_ms / 1000,
    )
    return StorePlan(
        store=store,
        guard=guard,
        workers=work.max_workers,
        max_queued=work.queue_size,
        min_free_bytes=disk.min_free_space,
    )
