"""A disk that can fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtiers.stores.disk import DiskStore
from kvtiers.stores.disk.settings import DiskSettings
from kvtiers.testing.faulty_store import FaultyStore


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[FaultyStore]:
    store = FaultyStore(DiskStore(DiskSettings(paths=(str(tmp_path / "disk"),), min_free_bytes=0)))
    store.open()
    yield store
    store.heal()
    store.close()
