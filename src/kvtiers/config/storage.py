"""`storage:` of the configuration, one class a tier. Each setting says its unit and what it does; `config reference` prints that."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from kvtiers.config.fields import (
    AUTO,
    SIZE_FORMS,
    Codec,
    Count,
    Number,
    Policy,
    PoolSize,
    Share,
    Size,
    SizeOrAuto,
    SwitchedOff,
    problem,
    setting,
)
from kvtiers.config.remote import RemoteConfig
from kvtiers.config.section import Section
from kvtiers.config.sizes import GIB

_BELOW = "eviction_threshold - 0.05"
_SIZE_OR_AUTO = f'{SIZE_FORMS}, or "auto"'


def _low(values: Mapping[str, Any]) -> float:
    threshold: float = values["eviction_threshold"]
    return round(threshold - 0.05, 6) if threshold > 0.1 else round(threshold / 2, 6)


def _gpu_threshold(values: Mapping[str, Any]) -> float:
    utilization: float = values["max_utilization"]
    return min(0.75, utilization)


class _Bounded(Section):
    """A tier that evicts. It declares no fields: a default may only depend on fields before it, and a base's come first."""

    if TYPE_CHECKING:
        eviction_threshold: float
        low_watermark: float

    @model_validator(mode="after")
    def _low_is_below_the_threshold(self) -> Self:
        if self.low_watermark >= self.eviction_threshold:
            raise problem(
                f"must be below eviction_threshold, which is {self.eviction_threshold}",
                "low_watermark",
                "eviction_threshold",
            )
        return self


class GpuConfig(_Bounded):
    """Our own pool on a device. An engine such as vLLM manages GPU memory itself and needs none."""

    capacity: PoolSize | None = setting(
        None,
        "GPU memory for a pool of our own. Without it there is no GPU tier of ours; under vLLM the engine's own prefix cache is it.",
        unit="size",
        allowed=SIZE_FORMS,
        shown_default="no pool",
    )
    device: str = setting(
        "cuda",
        'Where the pool lies: a torch device. "cpu" runs the same code in host memory: the tier is then simulated, and says so.',
        allowed='"cuda", "cuda:1", … or "cpu"',
        pattern=r"^(cuda(:[0-9]{1,3})?|cpu)$",
    )
    max_utilization: Share = setting(
        0.80,
        "Share of capacity the pool takes. The rest is left to the engine for bursts.",
        unit="share of capacity",
    )
    eviction_threshold: Share = setting(
        _gpu_threshold,
        "Above this share chunks are offloaded to the CPU tier, coldest first. Not above max_utilization.",
        unit="share of capacity",
        shown_default="0.75, or max_utilization if that is lower",
    )
    low_watermark: Share = setting(
        _low,
        "Offloading, once begun, goes down to this share.",
        unit="share of capacity",
        shown_default=_BELOW,
    )
    idle_after_s: Number = setting(
        300.0,
        "A chunk not used for so long counts as offloadable: it is reported, and goes first.",
        unit="seconds",
        gt=0,
    )

    @model_validator(mode="after")
    def _threshold_within_utilization(self) -> Self:
        if self.eviction_threshold > self.max_utilization:
            raise problem(
                f"must not be above max_utilization, which is {self.max_utilization}",
                "eviction_threshold",
                "max_utilization",
            )
        return self


class CpuConfig(_Bounded):
    """One preallocated arena of host memory."""

    enabled: bool = setting(
        True,
        "Keep KV in host memory. If false only a small arena for staging loads is taken (at most 256 MiB).",
    )
    buffer_size: SizeOrAuto = setting(
        AUTO,
        "Size of the arena, taken as a whole at start. auto: a quarter of the available memory, at least 64 MiB, at most 8 GiB.",
        unit="size",
        allowed=_SIZE_OR_AUTO,
    )
    numa_aware: bool = setting(
        True,
        "Bind an equal part of the arena to each NUMA node, and give an engine that runs on one of them slots there. No effect with one node.",
    )
    eviction_policy: Policy = setting(
        "lru",
        "Which chunk goes first, never one before its continuation; of the GPU pool too. lru: the least recently used. lfu: the least often used, older uses counting for less. fifo: the one stored first.",
        allowed="lru, lfu, fifo, or an installed policy",
    )
    eviction_threshold: Share = setting(
        0.90,
        "Ceiling: the share of the arena that is kept as cache. What lies above it is where loads from disk and remote are staged.",
        unit="share of buffer_size",
        allowed="greater than 0, less than 1",
    )
    low_watermark: Share = setting(
        _low,
        "Eviction, once begun, goes down to this share.",
        unit="share of buffer_size",
        shown_default=_BELOW,
    )
    probation_share: Share = setting(
        0.20,
        "Chunks loaded from disk or remote may hold this much before they evict each other, until they are used again. Keeps one large load from flushing the hot set.",
        unit="share of the ceiling",
    )
    write_lease_share: Share = setting(
        0.25,
        "Chunks being written to disk or remote may hold this much of the arena. Those beyond it hold nothing, and are written in turn as soon as there is room, or as they leave memory.",
        unit="share of buffer_size",
    )
    verify_on_hit: bool = setting(
        False, "Check a chunk's checksum also when it is served from memory. Costs a pass over its bytes."
    )
    huge_pages: Annotated[Literal["advise", "hugetlb", "off"], SwitchedOff] = setting(
        "advise",
        "advise: huge pages where the kernel makes them (made at once from Linux 6.1 on, asked for before). hugetlb: use reserved ones (vm.nr_hugepages), else as advise. What was obtained is logged.",
    )
    lock_memory: bool = setting(
        False,
        "Lock the arena in memory (mlock), so that it is never swapped. Where RLIMIT_MEMLOCK forbids it, it says so and goes on.",
    )

    @field_validator("eviction_threshold")
    @classmethod
    def _staging_is_left(cls, value: float) -> float:
        if value >= 1:
            raise problem("must be less than 1: what lies above it is where loads are staged")
        return value


class DiskConfig(_Bounded):
    """Records in files, kept over restarts."""

    enabled: bool = setting(False, "Keep KV on local disks.")
    path: tuple[str, ...] = setting(
        (),
        "Directory of the cache, or a list of them (one a disk). Made if it is not there, readable by its owner only. One process owns it at a time.",
        allowed="a path or a list of paths; needed when enabled",
        shown_default="none",
    )
    max_size: SizeOrAuto = setting(
        AUTO,
        "Space for records on all paths together. auto: half of what the file systems have free (the cache's own files counted as free).",
        unit="size",
        allowed=_SIZE_OR_AUTO,
    )
    compression: Codec = setting(
        "none",
        "none: as fast as the disk. zstd: lossless on byte planes, smaller, costs CPU.",
        allowed="none, zstd, or an installed codec",
    )
    compression_level: Count = setting(
        3,
        "zstd level. 1 to 15 all mean the fast setting that suits KV; 16 to 22 save a little more and take many times as long.",
        ge=1,
        le=22,
    )
    write_policy: Literal["write_through", "write_on_evict"] = setting(
        "write_through",
        "write_through: in the background as soon as a chunk is stored. write_on_evict: when it leaves memory, and at close; fewer writes, but a kill loses what only memory held.",
    )
    durability: Literal["rename", "fsync"] = setting(
        "rename",
        "rename: survives a killed process. fsync: also a power cut, at the price of slower writes. Torn files are caught by their checksum either way.",
    )
    eviction_policy: Policy = setting(
        "lru",
        "Which chunk goes first, as in memory. A restart keeps the order; lfu begins to count anew.",
        allowed="lru, lfu, fifo, or an installed policy",
    )
    eviction_threshold: Share = setting(
        0.95, "Ceiling: share of max_size that is kept.", unit="share of max_size"
    )
    low_watermark: Share = setting(
        _low, "Eviction, once begun, goes down to this share.", unit="share of max_size", shown_default=_BELOW
    )
    min_free_space: Size = setting(
        GIB,
        "Writing stops, and eviction starts, when the file system has less free than this, whoever filled it. Reads go on.",
        unit="size",
        allowed=f"{SIZE_FORMS}; 0 switches it off",
    )
    admission: Literal["always", "second_touch"] = setting(
        "always",
        "always: every chunk is written. second_touch: only one that was seen before, which saves disk writes for prompts that never return.",
    )
    direct_io: Annotated[Literal["auto", "off"], SwitchedOff] = setting(
        "auto",
        "auto: past the page cache (O_DIRECT) where the file system offers it. off: through the page cache.",
    )
    read_timeout_ms: Number = setting(
        5000.0, "A read that takes longer is a miss.", unit="milliseconds", gt=0
    )
    write_timeout_ms: Number = setting(
        30000.0,
        "A write that takes longer has failed; the chunk stays where it was.",
        unit="milliseconds",
        gt=0,
    )
    max_queue_bytes: PoolSize = setting(
        GIB,
        "Bytes that may be on their way to the disk at a time. Chunks beyond it hold nothing, and are written in turn as soon as there is room, or as they leave memory.",
        unit="size",
        allowed=SIZE_FORMS,
    )

    @field_validator("path", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        several = [value] if isinstance(value, str | PurePath) else value
        if not isinstance(several, list | tuple) or not all(
            isinstance(path, str | PurePath) for path in several
        ):
            raise problem("must be a path or a list of paths")
        paths = tuple(str(path) for path in several)
        if any(not path.strip() or "\0" in path for path in paths):
            raise problem("a path must not be empty")
        pure = [PurePath(path) for path in paths]
        for index, path in enumerate(pure):
            for other in pure[:index]:
                if path == other or path in other.parents or other in path.parents:
                    raise problem(f"{path} and {other} overlap; each path must be a directory of its own")
        return paths

    @model_validator(mode="after")
    def _enabled_needs_a_path(self) -> Self:
        if self.enabled and not self.path:
            raise problem("is needed when the disk tier is enabled", "path", "enabled")
        return self


class StorageConfig(Section):
    """The four tiers."""

    chunk_tokens: Count = setting(
        256,
        "Tokens of a chunk, the unit that is kept and found again. Rounded up to what an engine's blocks allow, and shown at start. Only full chunks are kept.",
        unit="tokens",
        ge=1,
        le=65536,
    )
    gpu: GpuConfig = Field(default_factory=GpuConfig)
    cpu: CpuConfig = Field(default_factory=CpuConfig)
    disk: DiskConfig = Field(default_factory=DiskConfig)
    remote: RemoteConfig = Field(default_factory=RemoteConfig)
