"""What somebody asks to be evicted is on the disk afterwards, however slow the disk is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtiers.model.errors import InvalidArgument, TierDisabled
from kvtiers.model.tiers import Tier
from kvtiers.runtime.node import CacheNode
from kvtiers.runtime.plan import plan_node
from kvtiers.stores.guard import Operation
from kvtiers.testing.chaos import small_config, wait_until
from kvtiers.testing.faulty_store import Delay

if TYPE_CHECKING:
    from tests.runtime.conftest import MakeCache, MakeChaos

NUM_CHUNKS = 16


@pytest.mark.parametrize("policy", ["write_through", "write_on_evict"])
def test_a_slow_disk_gets_everything(make_chaos: MakeChaos, policy: str) -> None:
    one = make_chaos({"disk.write_policy": policy}, disk={"max_queued": 2})
    one.disk.inject(Delay(0.02), Operation.WRITE, times=None)
    prompt = list(range(NUM_CHUNKS * one.cache.chunk_tokens))
    assert one.cache.store(prompt, one.oracle.kv(prompt)).accepted == NUM_CHUNKS
    assert wait_until(lambda: one.cache.stats()["tiers"]["cpu"]["leased_chunks"] <= 2)  # all are sealed
    done = one.cache.evict("cpu")
    assert done.chunks + done.demoting <= NUM_CHUNKS
    assert done.demoting > 0

    def moved() -> bool:
        tiers = one.cache.stats()["tiers"]
        return bool(tiers["cpu"]["usage_bytes"] == 0 and tiers["disk"]["entries"] == NUM_CHUNKS)

    assert wait_until(moved)
    assert one.cache.stats()["tiers"]["cpu"]["dropped_dirty"] == 0
    loaded = one.cache.load(prompt).result(timeout=30)
    assert loaded.tiers == (Tier.DISK,) * NUM_CHUNKS
    one.oracle.check(prompt, loaded.num_tokens, loaded.kv)


def test_usage_of_the_gpu_pool_is_a_share_of_its_configured_capacity(make_cache: MakeCache) -> None:
    """A pool of 1 MiB of which 80 % are taken and 75 % kept as cache: full, it stands at 75 %, not at 94 %."""
    cache = make_cache({"gpu.capacity": "1Mi", "gpu.device": "cpu"})
    gpu = cache.stats()["tiers"]["gpu"]
    assert (gpu["capacity_bytes"], gpu["slot_bytes"]) == (1 << 20, int(0.8 * (1 << 20)))
    assert gpu["ceiling_bytes"] == 0.75 * (1 << 20)
    assert cache.node.capacity(Tier.GPU) == 1 << 20


def test_a_share_of_a_tier_that_bounds_itself_is_refused_and_empties_nothing(tmp_path: Path) -> None:
    plan = plan_node(small_config(tmp_path))
    assert plan.core.disk is not None
    boundless = replace(plan.core.disk, capacity=None, ceiling=None, low=None)
    node = CacheNode(replace(plan, core=replace(plan.core, disk=boundless)))
    try:
        with pytest.raises(InvalidArgument, match="bounds itself"):
            node.evict_down_to(Tier.DISK, 0.7)
        assert node.evict_down_to(Tier.DISK, 0.0).chunks == 0
        with pytest.raises(TierDisabled):
            node.evict_down_to(Tier.REMOTE, 0.7)
    finally:
        node.close()
