"""The four tiers, nearest first."""

from __future__ import annotations

from enum import StrEnum


class Tier(StrEnum):
    """Where KV lies. Iteration order is nearest first, the order in which tiers are consulted."""

    GPU = "gpu"
    CPU = "cpu"
    DISK = "disk"
    REMOTE = "remote"
