"""Whatever lies on the disk instead of what was stored: a miss with its reason, counted, healed by the next store. Never wrong bytes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier
from kvtiers.runtime.cache import TieredCache
from kvtiers.stores.disk.entry import ENTRY_BYTES
from kvtiers.stores.disk.names import LOG_NAME
from kvtiers.testing.cache_oracle import SMALL_LAYOUT, CacheOracle
from kvtiers.testing.chaos import namespace, small_config, wait_until
from kvtiers.testing.disk_damage import damage_file, du, flip_bit, record_file, record_files
from kvtiers.testing.store_kit import Damage

pytestmark = pytest.mark.slow

TOKENS = list(range(100))
BAD = 2
"""The chunk that is damaged, of six."""


class Bench:
    """One directory, opened as often as the test likes, and the file of the chunk that is damaged."""

    def __init__(self, path: Path, codec: str) -> None:
        self.path = path
        self.config = small_config(path, {"disk.compression": codec})
        self.oracle = CacheOracle(namespace())

    def open(self, name: str = "a-model") -> TieredCache:
        return TieredCache(self.config, SMALL_LAYOUT, namespace(name))

    def fill(self) -> None:
        with self.open() as cache:
            assert cache.store(TOKENS, self.oracle.kv(TOKENS)).accepted == 6

    def file(self, index: int = BAD) -> Path:
        key = self.oracle.keys(TOKENS)[index]
        (found,) = [file for ref, file in record_files(self.path).items() if ref.key == key]
        return found

    def load(self, cache: TieredCache) -> tuple[int, MissReason | None]:
        loaded = cache.load(TOKENS).result()
        self.oracle.check(TOKENS, loaded.num_tokens, loaded.kv)
        return loaded.num_tokens // 16, loaded.stopped_by

    def is_healed_by_the_next_store(self, cache: TieredCache) -> None:
        assert cache.node.wait_settled(20)
        cache.store(TOKENS, self.oracle.kv(TOKENS))
        cache.flush()
        assert self.load(cache) == (6, MissReason.PARTIAL_CHUNK)
        cache.evict("cpu")
        loaded = cache.load(TOKENS).result()
        assert loaded.tiers == (Tier.DISK,) * 6
        self.oracle.check(TOKENS, loaded.num_tokens, loaded.kv)
        assert cache.check_integrity() == []
        assert cache.node.guards[Tier.DISK].usage().used_bytes == du(self.path)


@pytest.fixture(params=["none", "zstd"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    return Bench(tmp_path / "cache", request.param)


def swap(bench: Bench) -> None:
    damage_file(bench.file(), Damage.SWAP, other=bench.file(4))


def damage(how: Damage) -> Callable[[Bench], None]:
    return lambda bench: damage_file(bench.file(), how)


def other_version(bench: Bench) -> None:
    data = bytearray(bench.file().read_bytes())
    data[8:12] = (99).to_bytes(4, "little")
    bench.file().write_bytes(data)


def foreign(bench: Bench) -> None:
    bench.file().write_bytes(b"somebody's holiday picture" * 400)


def make_directory(bench: Bench) -> None:
    file = bench.file()
    file.unlink()
    file.mkdir()


def make_link(bench: Bench) -> None:
    file = bench.file()
    elsewhere = bench.path.parent / "elsewhere"
    shutil.move(file, elsewhere)
    file.symlink_to(elsewhere)


def make_fifo(bench: Bench) -> None:
    file = bench.file()
    file.unlink()
    os.mkfifo(file)


def grow(bench: Bench) -> None:
    with bench.file().open("ab") as file:
        file.write(bytes(4096))


DAMAGES: dict[str, tuple[Callable[[Bench], None], MissReason]] = {
    "a flipped bit in the header": (damage(Damage.FLIP_HEADER), MissReason.CORRUPT),
    "a flipped bit in the payload": (damage(Damage.FLIP_PAYLOAD), MissReason.CORRUPT),
    "a flipped bit in the padding": (damage(Damage.FLIP_PADDING), MissReason.CORRUPT),
    "truncated": (damage(Damage.TRUNCATE), MissReason.CORRUPT),
    "empty": (damage(Damage.EMPTY), MissReason.CORRUPT),
    "too long": (grow, MissReason.CORRUPT),
    "another chunk's record": (swap, MissReason.CORRUPT),
    "another format version": (other_version, MissReason.CORRUPT),
    "foreign": (foreign, MissReason.CORRUPT),
    "deleted": (damage(Damage.REMOVE), MissReason.EVICTED),
}
NOT_FILES: dict[str, Callable[[Bench], None]] = {
    "a directory": make_directory,
    "a link": make_link,
    "a FIFO": make_fifo,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_while_the_cache_runs(bench: Bench, name: str) -> None:
    hurt, reason = DAMAGES[name]
    bench.fill()
    with bench.open() as cache:
        assert cache.node.wait_settled(20)
        hurt(bench)
        assert bench.load(cache) == (BAD, reason)
        stats = cache.stats()
        assert stats["misses"] == {str(reason): 1}
        assert stats["tiers"]["disk"]["failed"] == 1
        assert stats["tiers"]["disk"]["corrupt"] == (reason is MissReason.CORRUPT)
        assert cache.lookup(TOKENS).num_tokens == 16 * BAD
        bench.is_healed_by_the_next_store(cache)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_between_two_runs(bench: Bench, name: str) -> None:
    hurt, _ = DAMAGES[name]
    bench.fill()
    hurt(bench)
    with (
        bench.open() as cache
    ):  # the load may come before or after the walk that compares the disk with its log
        found, reason = bench.load(cache)
        assert found == BAD
        assert reason in {MissReason.CORRUPT, MissReason.EVICTED}
        bench.is_healed_by_the_next_store(cache)


@pytest.mark.parametrize("name", NOT_FILES)
def test_what_is_no_file_is_a_miss_and_left_alone(bench: Bench, name: str) -> None:
    bench.fill()
    with bench.open() as cache:
        assert cache.node.wait_settled(20)
        file = bench.file()
        NOT_FILES[name](bench)
        assert bench.load(cache) == (BAD, MissReason.EVICTED)
        assert os.path.lexists(file)
        cache.store(TOKENS, bench.oracle.kv(TOKENS))
        cache.flush()
        assert bench.load(cache) == (6, MissReason.PARTIAL_CHUNK)


def test_all_files_gone_at_once(bench: Bench) -> None:
    bench.fill()
    with bench.open() as cache:
        for file in record_files(bench.path).values():
            file.unlink()
        assert bench.load(cache) == (0, MissReason.EVICTED)
        for _ in range(
            6
        ):  # the reads behind a miss are given up, so each load finds out about one chunk or more
            assert cache.node.wait_settled(20)
            cache.store(TOKENS, bench.oracle.kv(TOKENS))
            cache.flush()
            bench.load(cache)
        bench.is_healed_by_the_next_store(cache)


def test_a_flipped_bit_in_the_index_log_is_ignored_and_the_entry_comes_back(bench: Bench) -> None:
    bench.fill()
    log = bench.path / LOG_NAME
    assert log.stat().st_size >= 6 * ENTRY_BYTES
    for entry in range(3):
        flip_bit(log, entry * ENTRY_BYTES + 40)
    with bench.open() as cache:
        assert wait_until(lambda: cache.lookup(TOKENS).num_tokens == 96)
        assert bench.load(cache) == (6, MissReason.PARTIAL_CHUNK)
        assert cache.check_integrity() == []


def test_a_lost_index_log_costs_nothing_but_the_walk(bench: Bench) -> None:
    bench.fill()
    (bench.path / LOG_NAME).unlink()
    with bench.open() as cache:
        assert cache.node.wait_settled(20)
        assert bench.load(cache) == (6, MissReason.PARTIAL_CHUNK)
        assert cache.check_integrity() == []


def test_the_directory_of_another_model_is_kept_counted_and_never_served(bench: Bench) -> None:
    bench.fill()
    theirs = CacheOracle(namespace("another"))
    with bench.open("another") as cache:
        assert cache.node.wait_settled(20)
        assert cache.lookup(TOKENS).stopped_by is MissReason.NEVER_SEEN
        loaded = cache.load(TOKENS).result()
        assert (loaded.num_tokens, loaded.stopped_by) == (0, MissReason.NEVER_SEEN)
        assert cache.stats()["tiers"]["disk"]["entries"] == 6
        cache.store(TOKENS, theirs.kv(TOKENS))
        cache.flush()
        cache.evict("cpu")
        theirs.check(TOKENS, 96, cache.load(TOKENS).result().kv)
        assert cache.check_integrity() == []
    with bench.open() as cache:
        assert bench.load(cache) == (6, MissReason.PARTIAL_CHUNK)


def test_a_record_moved_to_another_models_directory_is_not_served(bench: Bench) -> None:
    bench.fill()
    theirs = CacheOracle(namespace("another"))
    for ref, file in record_files(bench.path).items():
        there = record_file(bench.path, ref._replace(namespace=theirs.digest, key=theirs.keys(TOKENS)[BAD]))
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, there)
    with bench.open("another") as cache:
        assert cache.node.wait_settled(20)
        assert cache.load(TOKENS).result().num_tokens == 0
        assert cache.check_integrity() == []


def test_after_a_restart_the_coldest_goes_first(tmp_path: Path, oracle: CacheOracle) -> None:
    path = tmp_path / "cache"
    prompts = [list(range(number * 1000, number * 1000 + 16)) for number in range(10)]
    order = [3, 7, 0, 9, 4, 1, 8, 2, 6, 5]
    with TieredCache(small_config(path), SMALL_LAYOUT, namespace()) as cache:
        for tokens in prompts:
            cache.store(tokens, oracle.kv(tokens))
        cache.flush()
        for number in order:
            assert cache.load(prompts[number]).result().num_tokens == 16
    with TieredCache(small_config(path), SMALL_LAYOUT, namespace()) as cache:
        assert cache.node.wait_settled(20)
        capacity = cache.stats()["tiers"]["disk"]["capacity_bytes"]
        usage = cache.stats()["tiers"]["disk"]["usage_bytes"]
        for gone in range(1, 10):
            cache.evict("disk", (usage - gone * 16_384) / capacity)
            assert cache.node.wait_settled(20)
            left = [number for number in order if cache.lookup(prompts[number]).num_tokens]
            assert left == order[gone:]
