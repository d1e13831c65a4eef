"""The disk store passes the conformance kit in every combination of its settings."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from kvtiers.model.parts import RecordRef
from kvtiers.records.codecs.registry import codec_for
from kvtiers.stores.base import RecordStore
from kvtiers.stores.disk import DirectIO, DiskSettings, DiskStore, Durability
from kvtiers.testing.disk_damage import damage_file, record_files
from kvtiers.testing.store_kit import Damage, RecordStoreContract

Variant = tuple[Durability, DirectIO, str, int]

ALL = list(product(Durability, DirectIO, ("none", "zstd"), (1, 2)))
QUICK: set[Variant] = {  # every value occurs; the rest of the 16 is `slow`
    (Durability.RENAME, DirectIO.AUTO, "none", 1),
    (Durability.RENAME, DirectIO.OFF, "zstd", 2),
    (Durability.FSYNC, DirectIO.AUTO, "zstd", 2),
}


def _param(variant: Variant) -> object:
    name = "-".join(map(str, variant)) + "path"
    return pytest.param(variant, id=name, marks=[] if variant in QUICK else [pytest.mark.slow])


class TestDiskStore(RecordStoreContract):
    alone = True

    @pytest.fixture(autouse=True, params=[_param(variant) for variant in ALL])
    def variant(self, request: pytest.FixtureRequest) -> None:
        self.settings_of: Variant = request.param

    def make_store(self, place: Path) -> RecordStore:
        durability, direct_io, codec, paths = self.settings_of
        return DiskStore(
            DiskSettings(
                paths=tuple(str(place / f"disk{number}") for number in range(paths)),
                durability=durability,
                direct_io=direct_io,
                codec=codec_for(codec),
                min_free_bytes=0,
            )
        )

    def damage(self, store: RecordStore, ref: RecordRef, how: Damage) -> None:
        assert isinstance(store, DiskStore)
        files = record_files(*map(Path, store.settings.paths))
        path = files.pop(ref)
        damage_file(path, how, next(iter(files.values()), None))

    def recovered_order_is_right(self, recovered: list[RecordRef], remembered: list[RecordRef]) -> bool:
        """Exact on one path; on two, exact on each (they are interleaved evenly)."""
        if self.settings_of[3] == 1:
            return recovered == remembered
        return sorted(recovered) == sorted(remembered)
