"""A real disk store in the test's own directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtiers.model.parts import RecordRef
from kvtiers.stores.disk import DiskSettings, DiskStore
from kvtiers.stores.disk.names import LOG_NAME
from kvtiers.testing.disk_damage import du, record_file


class Disk:
    """One directory, and the stores opened on it one after the other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stores: list[DiskStore] = []

    def open(self, **settings: Any) -> DiskStore:
        """A store on the directory; the one before is closed."""
        self.close()
        store = DiskStore(DiskSettings(**{"paths": (str(self.path),), "min_free_bytes": 0, **settings}))
        self.stores.append(store)
        store.open()
        return store

    def close(self) -> None:
        for store in self.stores:
            store.close()

    def file(self, ref: RecordRef) -> Path:
        return record_file(self.path, ref)

    @property
    def log(self) -> Path:
        return self.path / LOG_NAME

    def du(self) -> int:
        return du(self.path)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.close()
