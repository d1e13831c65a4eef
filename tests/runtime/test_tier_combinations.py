"""Every combination of tiers, write policies and codecs: bit-exact from each tier that has the chunks, and after a restart."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

from kvtiers.config.plugins import installed_names
from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.model.tiers import Tier

if TYPE_CHECKING:
    from tests.runtime.conftest import MakeCache

    from kvtiers.runtime.cache import TieredCache
    from kvtiers.testing.cache_oracle import CacheOracle

TOKENS = list(range(7000, 7100))
CHUNKS = 6
DISKS = [None, *product(("write_through", "write_on_evict"), ("none", "zstd"))]
COMBINATIONS = [(gpu, cpu, disk) for gpu in (False, True) for cpu in (False, True) for disk in DISKS]


def name_of(combination: tuple[bool, bool, tuple[str, str] | None]) -> str:
    gpu, cpu, disk = combination
    tiers = [
        *(["gpu"] if gpu else []),
        *(["cpu"] if cpu else []),
        *([f"disk {' '.join(disk)}"] if disk else []),
    ]
    return " + ".join(tiers) or "nothing"


def settings(gpu: bool, cpu: bool, disk: tuple[str, str] | None) -> dict[str, Any]:
    values: dict[str, Any] = {"cpu.enabled": cpu}
    if gpu:
        values |= {"gpu.capacity": "1Mi", "gpu.device": "cpu"}
    if disk:
        values |= {"disk.write_policy": disk[0], "disk.compression": disk[1]}
    return values


def load(cache: TieredCache, oracle: CacheOracle, tier: Tier) -> None:
    loaded = cache.load(TOKENS).result()
    assert loaded.tiers == (tier,) * CHUNKS
    assert loaded.stopped_by is MissReason.PARTIAL_CHUNK
    oracle.check(TOKENS, loaded.num_tokens, loaded.kv)
    cache.flush()


def empty(cache: TieredCache, tier: Tier) -> None:
    for _ in range(CHUNKS):  # a chunk that has to be brought down first leaves only after its continuation
        cache.evict(tier)
        cache.flush()
    assert cache.stats()["tiers"][tier]["entries"] == 0


@pytest.mark.parametrize("combination", COMBINATIONS, ids=name_of)
def test_chunks_are_hit_where_they_should_lie_bit_for_bit(
    combination: tuple[bool, bool, tuple[str, str] | None], make_cache: MakeCache, oracle: CacheOracle
) -> None:
    gpu, cpu, disk = combination
    tiers = [tier for tier, there in ((Tier.GPU, gpu), (Tier.CPU, cpu), (Tier.DISK, disk)) if there]
    cache = make_cache(settings(*combination), disk=disk is not None)
    receipt = cache.store(TOKENS, oracle.kv(TOKENS))
    if not tiers:
        assert receipt.accepted == 0
        assert receipt.refusal is Refusal.DISABLED
        assert cache.lookup(TOKENS).stopped_by is MissReason.DISABLED
        assert cache.load(TOKENS).result().stopped_by is MissReason.DISABLED
        assert cache.stats()["misses"] == {"disabled": 1}
        return
    assert receipt.accepted == CHUNKS
    cache.flush()
    for nearest, next_one in zip(tiers, [*tiers[1:], None], strict=True):
        load(cache, oracle, nearest)
        for above in tiers[: tiers.index(nearest)]:  # what was hit came up again
            empty(cache, above)
        load(cache, oracle, nearest)
        for tier in tiers[: tiers.index(nearest) + 1]:
            empty(cache, tier)
        assert cache.check_integrity() == []
        if next_one is None:
            assert cache.lookup(TOKENS).num_tokens == 0
            assert cache.lookup(TOKENS).stopped_by is MissReason.EVICTED


@pytest.mark.parametrize("combination", [c for c in COMBINATIONS if c[2]], ids=name_of)
def test_a_restart_finds_everything_on_the_disk(
    combination: tuple[bool, bool, tuple[str, str] | None], make_cache: MakeCache, oracle: CacheOracle
) -> None:
    cache = make_cache(settings(*combination))
    assert cache.store(TOKENS, oracle.kv(TOKENS)).accepted == CHUNKS
    assert cache.close()
    again = make_cache(settings(*combination))
    assert again.lookup(TOKENS).tiers == (Tier.DISK,) * CHUNKS
    load(again, oracle, Tier.DISK)
    assert again.check_integrity() == []


@pytest.mark.parametrize("write_policy", ["write_through", "write_on_evict"])
@pytest.mark.parametrize("policy", installed_names("kvtiers.policies"))
def test_every_eviction_policy_serves_true_bytes_from_tiers_that_are_too_small(
    policy: str, write_policy: str, make_cache: MakeCache, oracle: CacheOracle
) -> None:
    values = {
        "gpu.capacity": "1Mi",
        "gpu.device": "cpu",
        "gpu.max_utilization": 0.25,
        "gpu.eviction_threshold": 0.25,
        "cpu.eviction_policy": policy,
        "disk.eviction_policy": policy,
        "disk.write_policy": write_policy,
        "disk.max_size": "3Mi",  # of records of 16 KiB a third is directories, counted once a second
    }
    cache = make_cache(values)
    prompts = [
        [family, *range(16 * 8), number, *range(16 * 6)] for family in range(3) for number in range(12)
    ]
    for prompt in (*prompts, *reversed(prompts)):
        loaded = cache.load(prompt).result()
        oracle.check(prompt, loaded.num_tokens, loaded.kv)
        cache.store(prompt, oracle.kv(prompt))
        cache.flush()
    counted = cache.stats()["tiers"]
    for tier in (Tier.GPU, Tier.CPU, Tier.DISK):
        assert counted[tier]["evicted"], tier
        assert counted[tier]["hits"], tier
    assert cache.check_integrity() == []
    assert cache.close()
    again = make_cache(values)
    found = 0
    for prompt in prompts:
        loaded = again.load(prompt).result()
        oracle.check(prompt, loaded.num_tokens, loaded.kv)
        found += loaded.num_tokens
    assert found


@pytest.mark.parametrize("before", ["none", "zstd"])
def test_records_of_another_codec_are_read_as_well(
    before: str, make_cache: MakeCache, oracle: CacheOracle
) -> None:
    cache = make_cache({"disk.compression": before})
    cache.store(TOKENS, oracle.kv(TOKENS))
    cache.close()
    again = make_cache({"disk.compression": "zstd" if before == "none" else "none"})
    load(again, oracle, Tier.DISK)


def test_a_gpu_pool_smaller_than_the_prompt_takes_its_beginning_and_the_arena_the_rest(
    make_cache: MakeCache, oracle: CacheOracle
) -> None:
    tokens = list(range(16 * 70))
    cache = make_cache(
        {
            "gpu.capacity": "1Mi",
            "gpu.device": "cpu",
            "gpu.max_utilization": 0.25,
            "gpu.eviction_threshold": 0.25,
        }
    )
    assert cache.store(tokens, oracle.kv(tokens)).accepted == 70
    cache.flush()
    loaded = cache.load(tokens).result()
    assert loaded.num_tokens == len(tokens)
    assert {Tier.GPU, Tier.CPU} <= set(loaded.tiers)
    oracle.check(tokens, loaded.num_tokens, loaded.kv)
