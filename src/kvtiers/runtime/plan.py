"""From what the operator wrote to what a node is made of, in bytes, seconds and threads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from kvtiers.config import CacheConfig, Fitted, Machine, TierSize, fit
from kvtiers.core.policies import policy_for
from kvtiers.core.settings import CoreSettings, MemorySettings, StoreSettings, WritePolicy
from kvtiers.memory.arena import HugePages, LockMemory
from kvtiers.memory.numa import Numa
from kvtiers.model.errors import ConfigError, DoesNotFit, KvtiersError
from kvtiers.model.layout import PAGE_BYTES
from kvtiers.model.parts import Parts
from kvtiers.model.tiers import Tier
from kvtiers.records.codecs.base import Codec
from kvtiers.records.codecs.registry import codec_for
from kvtiers.runtime.remote_plan import (
    remote_codec,
    remote_settings,
    remote_store,
    what_is_missing,
    without_effect,
)
from kvtiers.stores.base import RecordStore
from kvtiers.stores.disk.settings import DirectIO, DiskSettings, Durability
from kvtiers.stores.disk.store import DiskStore
from kvtiers.stores.guard import GuardPolicy

if TYPE_CHECKING:
    from kvtiers.memory.cuda import DevicePool

_log = logging.getLogger(__name__)
_DISK_OVERHEAD_BYTES: Final = 9 * PAGE_BYTES
"""Of a disk directory with one record: itself, its lock, its log, `tmp/` and the directories down to the record."""
_UNLOADABLE = (KvtiersError, ImportError, AttributeError)
"""What asking for another package's policy or codec may raise."""
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

    @property
    def shared(self) -> frozenset[Tier]:
        """Tiers whose stores other nodes write to as well."""
        stores = ((Tier.DISK, self.core.disk), (Tier.REMOTE, self.core.remote))
        return frozenset(tier for tier, store in stores if store is not None and store.remember is not None)

    def check_chunk_fits(self, parts: Parts) -> None:
        """Raises DoesNotFit if a chunk is too large for a tier that is to keep or stage it."""
        core, slot = self.core, parts.slot_bytes
        record = slot + len(parts) * PAGE_BYTES + _DISK_OVERHEAD_BYTES
        tiers: list[tuple[int, int | None, str, str]] = []
        if core.cpu.ceiling:
            tiers.append((slot, core.cpu.ceiling, "the CPU tier keeps", "CPU__BUFFER_SIZE"))
        if self.stores:
            above = "what lies above storage.cpu.eviction_threshold, for staging loads, is"
            tiers.append((slot, core.cpu.staging, above, "CPU__BUFFER_SIZE"))
        if core.gpu is not None:
            tiers.append((slot, core.gpu.ceiling, "the GPU tier keeps", "GPU__CAPACITY"))
        if core.disk is not None:
            tiers.append((record, core.disk.ceiling, "the disk tier keeps", "DISK__MAX_SIZE"))
        short = [one for one in tiers if one[1] is not None and one[0] > one[1]]
        if short:
            keys = sorted({f"KVTIERS_STORAGE__{key}" for *_, key in short})
            raise DoesNotFit(
                [
                    *(f"one chunk takes {takes:,} bytes, {what} {has:,}" for takes, has, what, _ in short),
                    f"set {' and '.join(keys)} higher, or KVTIERS_STORAGE__CHUNK_TOKENS lower",
                ],
                source="the model's chunks do not fit the cache",
            )

    def capacity(self, tier: Tier) -> int | None:
        """Bytes of a tier; 0 for one that is disabled, None for a store that bounds itself."""
        core = self.core
        if tier in (Tier.GPU, Tier.CPU):
            memory = core.gpu if tier is Tier.GPU else core.cpu
            return 0 if memory is None else memory.nominal
        store = core.disk if tier is Tier.DISK else core.remote
        return 0 if store is None else store.capacity

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
    """Fit the configuration to the machine. Raises ConfigError, DoesNotFit with every problem; touches nothing yet."""
    problems = refusals(config)
    if problems:
        raise ConfigError(problems)
    fitted = fit(config, machine)
    storage, work = config.storage, config.async_
    remote = _remote_plan(config)
    cpu = _memory(fitted.cpu, storage.cpu.eviction_policy, storage.cpu.probation_share)
    gpu = None
    if fitted.gpu is not None:
        gpu = _memory(
            fitted.gpu, storage.cpu.eviction_policy, storage.cpu.probation_share, storage.gpu.idle_after_s
        )
    stores: dict[Tier, StorePlan] = {}
    if fitted.disk is not None:
        stores[Tier.DISK] = _disk_plan(
            config, fitted, workers=max(1, work.max_workers - (_remote_workers(config) if remote else 0))
        )
    if remote is not None:
        stores[Tier.REMOTE] = remote
    return NodePlan(
        core=CoreSettings(
            cpu=cpu,
            gpu=gpu,
            disk=_disk_settings(config, fitted),
            remote=remote_settings(config) if remote is not None else None,
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


def refusals(config: CacheConfig) -> list[str]:
    """What no machine starts with, although it parses. `kvtiers config check` asks the same."""
    storage = config.storage
    policies = {"storage.cpu.eviction_policy": storage.cpu.eviction_policy}
    if storage.disk.enabled:
        policies["storage.disk.eviction_policy"] = storage.disk.eviction_policy
    problems = []
    for key, name in policies.items():
        try:
            policy_for(name)
        except _UNLOADABLE as error:
            problems.append(f"{key} = {name} ({config.source_of(key)}): can't be loaded: {error}")
    if storage.disk.enabled:
        key = "storage.disk.compression"
        here = f"{key} = {storage.disk.compression} ({config.source_of(key)})"
        try:
            if _disk_codec(config).lossy:
                problems.append(
                    f"{here}: a lossy codec changes the KV, and its parameters are not part of the namespace yet; use none or zstd"
                )
        except _UNLOADABLE as error:
            problems.append(f"{here}: can't be loaded: {error}")
    if storage.remote.enabled:
        problems += _remote_refusals(config)
    return problems


def _remote_refusals(config: CacheConfig) -> list[str]:
    remote, key = config.storage.remote, "storage.remote.compression"
    problems = []
    try:
        if remote_codec(config).lossy:
            problems.append(
                f"{key} = {remote.compression} ({config.source_of(key)}): a lossy codec changes the KV, and its parameters are not "
                "part of the namespace yet; use none or zstd"
            )
    except _UNLOADABLE as error:
        problems.append(f"{key} = {remote.compression} ({config.source_of(key)}): can't be loaded: {error}")
    try:
        if not problems and what_is_missing(remote) is None:
            remote_store(config)
    except ConfigError as error:
        problems += [f"storage.remote: {one}" for one in error.problems]
    return problems


def _disk_codec(config: CacheConfig) -> Codec:
    disk = config.storage.disk
    options = {"level": disk.compression_level} if disk.compression == "zstd" else {}
    return codec_for(disk.compression, **options)


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


def _disk_plan(config: CacheConfig, fitted: Fitted, workers: int) -> StorePlan:
    disk, work = config.storage.disk, config.async_
    store = DiskStore(
        DiskSettings(
            paths=tuple(str(path) for path in fitted.disk_paths),
            durability=Durability(disk.durability),
            direct_io=DirectIO(disk.direct_io),
            codec=_disk_codec(config),
            min_free_bytes=disk.min_free_space,
            scratch_buffers=2 * workers,
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
        workers=workers,
        max_queued=work.queue_size,
        min_free_bytes=disk.min_free_space,
    )


def _remote_workers(config: CacheConfig) -> int:
    """Of async.max_workers: half of them where there is a disk too. With a single one, each store gets one all the same."""
    remote, disk, workers = config.storage.remote, config.storage.disk, config.async_.max_workers
    if not remote.enabled:
        return 0
    return max(1, workers // 2) if disk.enabled else workers


def _remote_plan(config: CacheConfig) -> StorePlan | None:
    remote, work = config.storage.remote, config.async_
    if not remote.enabled:
        return None
    missing = what_is_missing(remote)
    if missing is not None:
        _log.warning("%s. The cache runs without a remote tier", missing)
        return None
    for told in without_effect(config):
        _log.warning("%s", told)
    timeout = remote.timeout_ms / 1000
    guard = GuardPolicy(
        max_retries=work.retry_policy.max_retries,
        backoff_factor=work.retry_policy.backoff_factor,
        read_deadline_s=timeout,
        write_deadline_s=timeout,
        slow_s=min(timeout, work.load_timeout_ms / 1000),
    )
    return StorePlan(
        store=remote_store(config),
        guard=guard,
        workers=min(_remote_workers(config), remote.connection_pool_size),
        max_queued=work.queue_size,
    )
