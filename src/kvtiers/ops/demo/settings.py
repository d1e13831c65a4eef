"""The demo's caches: what the reader's configuration says, and sizes of our own where it says nothing.

Ours follow from `kv_bytes`, the KV of the longest prompt: four times that for the arena (of which 30 % is where loads from disk
are staged, so one prompt fits there), twice for the GPU pool, four times for the disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kvtiers.config import CacheConfig, fit, format_size
from kvtiers.model.tiers import Tier
from kvtiers.ops.demo.options import BadOption

_MIB: Final = 1 << 20
_CPU_CEILING: Final = 0.7


def explicit_settings(config: CacheConfig) -> dict[str, Any]:
    """What a file or the environment says, as a tree; defaults left out."""
    tree: dict[str, Any] = {}
    for one in config.effective():
        if one.source != "default":
            node = tree
            for step in one.setting.path[:-1]:
                node = node.setdefault(step, {})
            node[one.setting.path[-1]] = one.value
    return tree


def demo_settings(
    said: Mapping[str, Any], *, kv_bytes: int, chunk_tokens: int, device: str, disk_path: Path
) -> dict[str, Any]:
    """The whole configuration as plain values, `said` (from `explicit_settings`) first."""
    storage = dict(said.get("storage", {}))
    gpu, cpu, disk = (dict(storage.get(name, {})) for name in ("gpu", "cpu", "disk"))
    if "capacity" not in gpu:
        gpu |= {"capacity": _mib(2 * kv_bytes), "device": device}
    if "buffer_size" not in cpu:
        cpu["buffer_size"] = _mib(4 * kv_bytes)
        if "eviction_threshold" not in cpu and "low_watermark" not in cpu:
            cpu["eviction_threshold"] = _CPU_CEILING
    disk.setdefault("enabled", True)
    if "path" not in disk:
        disk["path"] = str(disk_path)
        disk.setdefault("max_size", _mib(4 * kv_bytes))
        disk.setdefault("min_free_space", 64 * _MIB)
    storage |= {"chunk_tokens": chunk_tokens, "gpu": gpu, "cpu": cpu, "disk": disk}
    work = dict(said.get("async", {}))
    work.setdefault("load_timeout_ms", 30_000)  # a demo would rather wait for a slow disk than show a miss
    return {**said, "storage": storage, "async": work}


def second_instance(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an instance that shares nothing with the first one but the remote store."""
    storage = settings["storage"]
    return {**settings, "storage": {**storage, "disk": {"enabled": False}}}


def tiers_to_show(config: CacheConfig, kv_bytes: int) -> tuple[Tier, ...]:
    """The tiers this cache has. Raises DoesNotFit, and BadOption for tiers that can't keep one prompt's KV."""
    fitted = fit(config)
    problems = []
    tiers = []
    need = format_size(kv_bytes)
    if fitted.gpu is not None:
        tiers.append(Tier.GPU)
        if fitted.gpu.ceiling < kv_bytes:
            problems.append(
                f"storage.gpu.capacity: {format_size(fitted.gpu.ceiling)} of it are kept as cache, "
                f"but the KV of one prompt takes {need}"
            )
    if config.storage.cpu.enabled:
        tiers.append(Tier.CPU)
        if fitted.cpu.ceiling < kv_bytes:
            problems.append(
                f"storage.cpu.buffer_size: {format_size(fitted.cpu.ceiling)} of it are kept as cache, "
                f"but the KV of one prompt takes {need}"
            )
    if fitted.disk is not None:
        tiers.append(Tier.DISK)
        if fitted.disk.ceiling < kv_bytes:
            problems.append(
                f"storage.disk.max_size: {format_size(fitted.disk.ceiling)} of it are kept, "
                f"but the KV of one prompt takes {need}"
            )
    if config.storage.remote.enabled:
        tiers.append(Tier.REMOTE)
    if fitted.disk is not None or config.storage.remote.enabled:
        staging = fitted.cpu.capacity - fitted.cpu.ceiling
        if staging < kv_bytes:
            problems.append(
                f"storage.cpu: loads from {tiers[-1]} are staged in {format_size(staging)} (what lies above eviction_threshold), "
                f"but the KV of one prompt takes {need}; make buffer_size {format_size(fitted.cpu.capacity * kv_bytes // max(staging, 1))} "
                "or eviction_threshold lower"
            )
    if not tiers:
        problems.append("no tier is enabled: there is nothing to show")
    if problems:
        raise BadOption(problems, source="the configuration is too small for this demo")
    return tuple(tiers)


def _mib(nbytes: int) -> int:
    """Rounded up to MiB, with room for a few small chunks."""
    return (-(-nbytes // _MIB) + 8) * _MIB
