"""Several directories: records go where their keys prefer and where there is room, and are found wherever they lie."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtiers.model.errors import ConfigError, StoreFull, StoreUnavailable
from kvtiers.model.keys import ChunkKey
from kvtiers.model.parts import RecordRef
from kvtiers.stores.base import StoredRecord
from kvtiers.stores.disk import DiskSettings, DiskStore
from kvtiers.stores.disk.names import by_preference, parse_record_name, record_name
from kvtiers.testing.disk_damage import du, record_files
from kvtiers.testing.store_kit import NAMESPACE, key_of, make_part, reads_back

if TYPE_CHECKING:
    from tests.stores.disk.conftest import Disk

PARTS = [make_part(number, 3000) for number in range(40)]


@pytest.fixture
def paths(tmp_path: Path) -> tuple[str, str, str]:
    return str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "c")


def test_names_are_told_from_everything_else() -> None:
    ref = RecordRef(NAMESPACE, key_of(1), 65_535)
    assert parse_record_name(record_name(ref)) == ref
    name = record_name(ref)
    for other in (
        name.upper(),
        name + "x",
        "x/" + name,
        name.replace("65535", "65536"),
        name.replace(".kv", ".kV"),
    ):
        assert parse_record_name(other) is None


def test_keys_spread_evenly_and_a_new_disk_takes_only_its_share() -> None:
    keys = [key_of(number) for number in range(3000)]
    two = ["/a", "/b"]
    three = ["/c", "/b", "/a"]
    before = {key: two[by_preference(two, key)[0]] for key in keys}
    after = {key: three[by_preference(three, key)[0]] for key in keys}
    assert all(abs(count - 1500) < 150 for count in Counter(before.values()).values())
    assert all(abs(count - 1000) < 150 for count in Counter(after.values()).values())
    assert all(after[key] in (before[key], "/c") for key in keys)
    assert all(sorted(by_preference(three, ChunkKey(key))) == [0, 1, 2] for key in keys[:10])


def test_records_are_found_whatever_the_order_of_the_paths(disk: Disk, paths: tuple[str, str, str]) -> None:
    store = disk.open(paths=paths)
    for part in PARTS:
        store.write(part)
    assert all(len(record_files(Path(path))) > 3 for path in paths)
    for order in (paths[::-1], (paths[1], paths[2], paths[0])):
        store = disk.open(paths=order)
        assert {record.ref for record in store.recover()} == {part.ref for part in PARTS}
        assert all(reads_back(store, part) for part in PARTS)
        assert list(store.reconcile()) == []
        assert store.usage().used_bytes == du(*map(Path, paths))


def test_a_disk_added_later_leaves_old_records_where_they_are(
    disk: Disk, paths: tuple[str, str, str]
) -> None:
    store = disk.open(paths=paths[:1])
    for part in PARTS:
        store.write(part)
    store = disk.open(paths=paths[:2])
    assert all(reads_back(store, part) for part in PARTS)
    for part in PARTS:
        store.write(part)  # replaced in place: never twice
    assert len(record_files(Path(paths[0]))) == 40
    assert len(record_files(Path(paths[1]))) == 0
    store.write(make_part(100, 3000))
    assert all(store.delete(part.ref) for part in PARTS)
    assert store.usage().records == 1


def test_a_disk_taken_away_takes_only_its_records(disk: Disk, paths: tuple[str, str, str]) -> None:
    store = disk.open(paths=paths[:2])
    for part in PARTS:
        store.write(part)
    left = set(record_files(Path(paths[1])))
    store = disk.open(paths=paths[1:2])
    assert {record.ref for record in store.recover()} == left
    assert list(store.reconcile()) == []


def test_records_moved_to_another_path_by_hand_are_found(disk: Disk, paths: tuple[str, str, str]) -> None:
    store = disk.open(paths=paths[:2])
    for part in PARTS:
        store.write(part)
    disk.close()
    for ref, file in record_files(Path(paths[0])).items():
        target = Path(paths[1]) / record_name(ref)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(file, target)
    store = disk.open(paths=paths[:2])
    news = list(store.reconcile())
    found = {one.ref for one in news if isinstance(one, StoredRecord)}
    assert found == set() or found <= {part.ref for part in PARTS}
    list(store.reconcile())
    assert all(store.exists([part.ref for part in PARTS]))
    assert all(reads_back(store, part) for part in PARTS)
    assert list(store.check()) == []


@pytest.mark.parametrize("logs_are_lost", [False, True])
def test_a_record_on_two_paths_is_kept_once(
    disk: Disk, paths: tuple[str, str, str], *, logs_are_lost: bool
) -> None:
    for path in paths[:2]:
        store = disk.open(paths=(path,))
        for part in PARTS[:5]:
            store.write(part)
    disk.close()
    if logs_are_lost:
        for path in paths[:2]:
            (Path(path) / "index-v1.log").unlink()
    store = disk.open(paths=paths[:2])
    news = list(store.reconcile())
    assert len(news) == (5 if logs_are_lost else 0)
    assert store.usage().records == 5
    assert sum(len(record_files(Path(path))) for path in paths[:2]) == 5
    assert store.stats()["duplicates"] == 5
    assert all(reads_back(store, part) for part in PARTS[:5])
    assert list(store.check()) == []
    assert store.usage().used_bytes == du(*map(Path, paths[:2]))


@pytest.fixture
def small_path(tmp_path: Path) -> Iterator[str]:
    mountpoint = tmp_path / "small"
    mountpoint.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mountpoint)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a tmpfs is not permitted here: {mounted.stderr.strip()}")
    yield str(mountpoint)
    subprocess.run(["umount", "--lazy", str(mountpoint)], check=True)


def test_a_full_path_passes_its_records_on(disk: Disk, small_path: str, paths: tuple[str, str, str]) -> None:
    store = disk.open(paths=(small_path, paths[0]))
    parts = [make_part(number, 20_000) for number in range(40)]
    for part in parts:
        store.write(part)
    assert all(reads_back(store, part) for part in parts)
    preferred_small = [part for part in parts if by_preference([small_path, paths[0]], part.ref.key)[0] == 0]
    assert 0 < len(record_files(Path(small_path))) < len(preferred_small)
    # A record that no longer fits where it lies moves, and is not left behind.
    lying_small = next(part for part in parts if part.ref in record_files(Path(small_path)))
    number = parts.index(lying_small)
    larger = make_part(number, 250_000)
    store.write(larger)
    assert reads_back(store, larger)
    assert lying_small.ref not in record_files(Path(small_path))
    assert lying_small.ref in record_files(Path(paths[0]))
    list(store.reconcile())
    assert list(store.check()) == []
    assert store.usage().records == 40


def test_when_all_paths_are_full_it_says_so(disk: Disk, paths: tuple[str, str, str]) -> None:
    store = disk.open(paths=paths, min_free_bytes=1 << 60)
    with pytest.raises(StoreFull):
        store.write(PARTS[0])


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ((), "at least one"),
        (("/x", "/x"), "twice"),
        (("/x/y", "/x"), "inside"),
        (("/x", "/x/y/z/.."), "inside"),
    ],
)
def test_paths_that_make_no_sense_are_refused(given: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        DiskSettings(paths=given)


def test_two_names_of_one_directory_are_noticed(
    disk: Disk, tmp_path: Path, paths: tuple[str, str, str]
) -> None:
    from kvtiers.model.errors import DirectoryInUse

    Path(paths[0]).mkdir()
    Path(paths[1]).symlink_to(paths[0])
    with pytest.raises(DirectoryInUse, match="this process"):
        disk.open(paths=paths[:2])


def test_what_is_not_ours_is_summed_over_all_paths(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    store = DiskStore(DiskSettings(paths=tuple(map(str, paths)), min_free_bytes=0))
    store.open()
    strangers = [path / f"stranger-{number}" for path in paths for number in range(2)]
    for stranger in strangers:
        stranger.write_bytes(b"x" * 10_000)
    list(store.reconcile())
    assert store.stats()["foreign_files"] == 6
    assert store.stats()["foreign_bytes"] == sum(path.lstat().st_blocks * 512 for path in strangers)
    store.close()


def test_paths_that_lie_one_in_the_other_are_refused_also_through_a_link(disk: Disk, tmp_path: Path) -> None:
    outer, link = tmp_path / "outer", tmp_path / "link"
    (outer / "inner").mkdir(parents=True)
    link.symlink_to(outer / "inner")
    for paths in ((outer, link), (link, outer)):
        with pytest.raises(StoreUnavailable, match="one in the other"):
            disk.open(paths=tuple(map(str, paths)))
    disk.open(paths=(str(tmp_path / "out"), str(link)))  # "out" begins like "outer", and is another
