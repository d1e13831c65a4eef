"""The LMCache-compatible interface: familiar classes and signatures as thin facades over the cache's own parts.

Imported when first used, so that a program that wants one class does not load the others. `docs/compat.md` maps each name to
what stands behind it, and says what differs and why.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "AsyncOffloadEngine": "kvtiers.compat.offload",
    "BackendStore": "kvtiers.compat.backend_store",
    "CPUPtr": "kvtiers.compat.pointers",
    "DiskBackend": "kvtiers.compat.disk_backend",
    "GPUPtr": "kvtiers.compat.pointers",
    "InvalidPointer": "kvtiers.compat.errors",
    "KVCacheEngine": "kvtiers.compat.kv_cache",
    "KVData": "kvtiers.compat.kv_cache",
    "MemoryAllocator": "kvtiers.compat.allocator",
    "MemoryBackend": "kvtiers.compat.memory_backend",
    "MemoryObj": "kvtiers.compat.payload",
    "NoBackend": "kvtiers.compat.errors",
    "OffloadMetrics": "kvtiers.compat.metrics",
    "OffloadQueueFull": "kvtiers.compat.errors",
    "OffloadRetryableError": "kvtiers.compat.errors",
    "OutOfMemoryError": "kvtiers.model.errors",
    "StorageBackend": "kvtiers.compat.backend",
    "TieredLRUPolicy": "kvtiers.compat.lru",
    "UnknownTask": "kvtiers.compat.errors",
    "UnknownTier": "kvtiers.model.errors",
    "with_backend_tier": "kvtiers.compat.backend_tier",
}

if TYPE_CHECKING:
    from kvtiers.compat.allocator import MemoryAllocator as MemoryAllocator
    from kvtiers.compat.backend import StorageBackend as StorageBackend
    from kvtiers.compat.backend_store import BackendStore as BackendStore
    from kvtiers.compat.backend_tier import with_backend_tier as with_backend_tier
    from kvtiers.compat.disk_backend import DiskBackend as DiskBackend
    from kvtiers.compat.errors import InvalidPointer as InvalidPointer
    from kvtiers.compat.errors import NoBackend as NoBackend
    from kvtiers.compat.errors import OffloadQueueFull as OffloadQueueFull
    from kvtiers.compat.errors import OffloadRetryableError as OffloadRetryableError
    from kvtiers.compat.errors import UnknownTask as UnknownTask
    from kvtiers.compat.kv_cache import KVCacheEngine as KVCacheEngine
    from kvtiers.compat.kv_cache import KVData as KVData
    from kvtiers.compat.lru import TieredLRUPolicy as TieredLRUPolicy
    from kvtiers.compat.memory_backend import MemoryBackend as MemoryBackend
    from kvtiers.compat.metrics import OffloadMetrics as OffloadMetrics
    from kvtiers.compat.offload import AsyncOffloadEngine as AsyncOffloadEngine
    from kvtiers.compat.payload import MemoryObj as MemoryObj
    from kvtiers.compat.pointers import CPUPtr as CPUPtr
    from kvtiers.compat.pointers import GPUPtr as GPUPtr
    from kvtiers.model.errors import OutOfMemoryError as OutOfMemoryError
    from kvtiers.model.errors import UnknownTier as UnknownTier

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'kvtiers.compat' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
