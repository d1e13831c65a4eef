"""What an operator writes: the YAML file, overrides of the environment, and whether it fits this machine.

Parsing (`CacheConfig`) and fitting (`fit`) are two steps. Read by `runtime` and the edge, by nothing below.
"""

from __future__ import annotations

from kvtiers.config.fit import Fitted, TierSize, fit
from kvtiers.config.machine import Machine, PathSpace
from kvtiers.config.remote import RemoteConfig
from kvtiers.config.schema import (
    AsyncConfig,
    CacheConfig,
    EffectiveValue,
    ObservabilityConfig,
    RetryPolicy,
)
from kvtiers.config.sizes import format_size, parse_size
from kvtiers.config.storage import CpuConfig, DiskConfig, GpuConfig, StorageConfig

__all__ = [
    "AsyncConfig",
    "CacheConfig",
    "CpuConfig",
    "DiskConfig",
    "EffectiveValue",
    "Fitted",
    "GpuConfig",
    "Machine",
    "ObservabilityConfig",
    "PathSpace",
    "RemoteConfig",
    "RetryPolicy",
    "StorageConfig",
    "TierSize",
    "fit",
    "format_size",
    "parse_size",
]
