"""The second step after parsing: does the configuration fit this machine, and how many bytes are its "auto"s?

Pure given a `Machine`. Refuses with one `DoesNotFit` that lists every problem with the numbers and the override to set.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvtiers.config.fields import AUTO
from kvtiers.config.keys import env_name
from kvtiers.config.machine import Machine, PathSpace
from kvtiers.config.schema import CacheConfig
from kvtiers.config.sizes import GIB, MIB, format_exact, format_size
from kvtiers.model.errors import DoesNotFit

AUTO_CPU_SHARE: Final = 4  # a quarter of what is available
AUTO_CPU_LEAST: Final = 64 * MIB
AUTO_CPU_MOST: Final = 8 * GIB
STAGING_ONLY: Final = 256 * MIB
"""The arena when the CPU tier is disabled: a few chunks of a large model."""


@dataclass(frozen=True, slots=True)
class TierSize:
    """Bytes: of the tier, of what is kept as cache in it, and where eviction stops."""

    capacity: int
    ceiling: int
    low: int
    whole: int | None = None
    """What the shares and the usage are of, where the tier takes only a part of it (`storage.gpu.max_utilization`)."""

    @classmethod
    def of(cls, capacity: int, threshold: float, low: float, *, share: float = 1.0) -> TierSize:
        """Shares are of `capacity`, of which only `share` is taken."""
        whole = capacity if share < 1 else None
        return cls(int(capacity * share), int(capacity * threshold), int(capacity * low), whole)


@dataclass(frozen=True, slots=True)
class Fitted:
    """What each tier gets on this machine. `gpu`, `disk`: None where there is no such tier."""

    cpu: TierSize
    """With the CPU tier disabled: a ceiling of 0, all of it is staging."""
    gpu: TierSize | None
    disk: TierSize | None
    """All paths together."""
    disk_paths: tuple[Path, ...]
    """Absolute, in the order of the configuration; not made yet."""

    @property
    def cpu_bytes(self) -> int:
        return self.cpu.capacity

    @property
    def gpu_bytes(self) -> int:
        return self.gpu.capacity if self.gpu else 0

    @property
    def disk_bytes(self) -> int:
        return self.disk.capacity if self.disk else 0


def fit(config: CacheConfig, machine: Machine | None = None) -> Fitted:
    """Sizes in bytes. `machine` None: the one this runs on. Raises DoesNotFit."""
    machine = machine_for(config) if machine is None else machine
    problems: list[str] = []
    cpu = _cpu_bytes(config, machine, problems)
    gpu = _gpu(config, machine, cpu, problems)
    disk_bytes = _disk_bytes(config, machine, problems)
    if problems:
        raise DoesNotFit(problems, source="the configuration does not fit this machine")
    storage = config.storage
    return Fitted(
        cpu=TierSize.of(cpu, storage.cpu.eviction_threshold, storage.cpu.low_watermark)
        if storage.cpu.enabled
        else TierSize(cpu, 0, 0),
        gpu=gpu,
        disk=TierSize.of(disk_bytes, storage.disk.eviction_threshold, storage.disk.low_watermark)
        if storage.disk.enabled
        else None,
        disk_paths=tuple(space.path for space in machine.paths) if storage.disk.enabled else (),
    )


def machine_for(config: CacheConfig) -> Machine:
    """This machine, as far as `config` asks. Files of earlier runs are counted only where the answer depends on them."""
    disk = config.storage.disk
    if not disk.enabled:
        return Machine.probe()
    machine = Machine.probe(disk.path, count_own=False)
    if disk.max_size == AUTO or disk.max_size > _room(machine.paths):
        machine = Machine.probe(disk.path)
    return machine


def memory_limit(machine: Machine) -> int:
    """Bytes an arena may take: what is available, less what the process needs itself (2 %, at least 256 MiB)."""
    return max(0, machine.memory_available - max(256 * MIB, machine.memory_available // 50))


def _cpu_bytes(config: CacheConfig, machine: Machine, problems: list[str]) -> int:
    cpu = config.storage.cpu
    limit = memory_limit(machine)
    if cpu.buffer_size == AUTO:
        auto = min(machine.memory_available // AUTO_CPU_SHARE, AUTO_CPU_MOST, limit)
        nbytes = max(auto // MIB * MIB, AUTO_CPU_LEAST)
    else:
        nbytes = cpu.buffer_size
    if not cpu.enabled:
        nbytes = min(nbytes, STAGING_ONLY)
    in_reserved_pages = cpu.huge_pages == "hugetlb" and nbytes <= machine.hugetlb_free
    if nbytes > limit and not in_reserved_pages:
        problems.append(
            f"{_named(config, 'storage.cpu.buffer_size', nbytes)}: {_memory(machine)}. "
            + _remedy("storage.cpu.buffer_size", limit, "Free memory")
        )
    return nbytes


def _gpu(config: CacheConfig, machine: Machine, cpu_bytes: int, problems: list[str]) -> TierSize | None:
    gpu = config.storage.gpu
    if gpu.capacity is None:
        return None
    size = TierSize.of(gpu.capacity, gpu.eviction_threshold, gpu.low_watermark, share=gpu.max_utilization)
    name = _named(config, "storage.gpu.capacity", gpu.capacity)
    if gpu.device == "cpu":
        limit = memory_limit(machine)
        left = max(0, limit - cpu_bytes)
        if size.capacity > left and cpu_bytes <= limit:
            problems.append(
                f"{name}: a simulated GPU pool lies in host memory, and {_memory(machine)}, "
                + f"{format_size(cpu_bytes)} of it for storage.cpu. "
                + _remedy("storage.gpu.capacity", left, "Free memory")
            )
    elif machine.gpu_free is not None and size.capacity > machine.gpu_free:
        problems.append(
            f"{name}: max_utilization makes it {format_size(size.capacity)}, and {gpu.device} has "
            + f"{format_size(machine.gpu_free)} free. "
            + _remedy("storage.gpu.capacity", machine.gpu_free, "Free GPU memory")
        )
    return size


def _disk_bytes(config: CacheConfig, machine: Machine, problems: list[str]) -> int:
    disk = config.storage.disk
    if not disk.enabled:
        return 0
    unusable = [space for space in machine.paths if space.problem]
    problems += [
        f"storage.disk.path = {space.path}{_where(config, 'storage.disk.path')}: {space.problem}. "
        + f"Choose another: {env_name(('storage', 'disk', 'path'))}=/a/directory"
        for space in unusable
    ]
    if unusable:  # how much room there is can't be told without them
        return 0
    room = _room(machine.paths)
    usable = max(0, room - disk.min_free_space)
    if disk.max_size == AUTO:
        nbytes = min(room // 2, usable) // MIB * MIB
        if nbytes < MIB:
            problems.append(
                f"storage.disk.max_size = auto: {_space(machine)}, and min_free_space keeps {format_size(disk.min_free_space)} of it. "
                + "Free space there, choose another path, or set storage.disk.min_free_space lower"
            )
        return nbytes
    if disk.max_size > room:
        problems.append(
            f"{_named(config, 'storage.disk.max_size', disk.max_size)}: {_space(machine)}. "
            + _remedy("storage.disk.max_size", usable, "Free space there, or choose another path")
        )
    return disk.max_size


def _room(paths: tuple[PathSpace, ...]) -> int:
    """What the cache may have in all: free on each device, once, and what it has already."""
    free = {space.device: space.free for space in paths}
    return sum(free.values()) + sum(space.own for space in paths)


def _memory(machine: Machine) -> str:
    return (
        f"this machine has {format_size(machine.memory_total)} of memory, "
        + f"{format_size(machine.memory_available)} of it available (bound by {machine.memory_bound_by})"
    )


def _space(machine: Machine) -> str:
    free = format_size(sum({space.device: space.free for space in machine.paths}.values()))
    own = sum(space.own for space in machine.paths)
    where = ", ".join(str(space.path) for space in machine.paths)
    return f"{where} has {free} free" + (f" and {format_size(own)} in files of the cache" if own else "")


def _named(config: CacheConfig, key: str, nbytes: int) -> str:
    value = next(item.value for item in config.effective() if item.setting.key == key)
    written = AUTO if value == AUTO else format_exact(nbytes)
    return f"{key} = {written}{_where(config, key)}"


def _where(config: CacheConfig, key: str) -> str:
    return f" ({config.source_of(key)})"


def _remedy(key: str, limit: int, otherwise: str) -> str:
    """The override that will still fit after some movement: three quarters of the limit, rounded down."""
    suggested = limit * 3 // 4
    suggested = suggested // GIB * GIB if suggested >= GIB else suggested // MIB * MIB
    if not suggested:
        return f"{otherwise}"
    return f"Make it smaller, for example {env_name(tuple(key.split('.')))}={format_exact(suggested)}"
