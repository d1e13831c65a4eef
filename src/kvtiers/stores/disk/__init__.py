"""The disk tier: one file per chunk part, found again by an index log, owned by one process.

`store.py` spreads records over one or more directories; `volume.py` is one directory; the other files are one concern each.
"""

from __future__ import annotations

from kvtiers.stores.disk.settings import DirectIO, DiskSettings, Durability
from kvtiers.stores.disk.store import DiskStore

__all__ = ["DirectIO", "DiskSettings", "DiskStore", "Durability"]
