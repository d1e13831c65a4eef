"""Names that a configuration may use for policies and codecs: ours, and those other packages registered as entry points.

Nothing of them is imported here, so a name is checked where it was written and not when the cache starts.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Final

_OURS: Final = {"kvtiers.policies": ("lru", "lfu", "fifo"), "kvtiers.codecs": ("none", "zstd")}


def installed_names(group: str) -> tuple[str, ...]:
    """Every name of the entry point group, ours first."""
    ours = _OURS.get(group, ())
    return (*ours, *sorted(set(entry_points(group=group).names) - set(ours)))
