"""The core with each eviction policy: what the oracle demands holds whichever chunk goes first."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from kvtiers.config.plugins import installed_names
from kvtiers.core.settings import MemorySettings, StoreSettings
from kvtiers.model.tiers import Tier
from kvtiers.testing.small_core import SmallCore, memory_of, store_of

POLICIES = installed_names("kvtiers.policies")
WORDS = [
    first + second + tail for first in "ab" for second in ("cc", "d") for tail in ("efg", "hi", "jkl", "m")
]


def tiers_with(policy: str) -> tuple[MemorySettings, MemorySettings, StoreSettings]:
    """GPU pool, arena and disk, none of which can hold all words."""
    return (
        replace(memory_of(4, low=3, probation=0.3), policy=policy, idle_after_s=3.0),
        replace(memory_of(9, 6, low=7, probation=0.3), policy=policy),
        replace(store_of(20, low=18), policy=policy),
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("policy", POLICIES)
def test_words_come_and_go_and_nothing_is_wrong(policy: str, seed: int) -> None:
    gpu, cpu, disk = tiers_with(policy)
    core, draw = SmallCore(cpu, gpu=gpu, disk=disk), Random(seed)
    for _ in range(60):
        word = draw.choice(WORDS)
        draw.choice((core.store, core.use))(word)
        if draw.random() < 0.3:
            core.wait(draw.choice((0.5, 5.0)))
    counted = core.driver.core.stats()["tiers"]
    for tier in (Tier.GPU, Tier.CPU, Tier.DISK):
        assert counted[tier]["evicted"], tier
        assert counted[tier]["hits"], tier
    core.finish()


@pytest.mark.parametrize(("policy", "gone"), [("fifo", "x"), ("lru", "y"), ("lfu", "z")])
def test_what_goes_is_what_came_first_or_was_used_longest_ago_or_least(policy: str, gone: str) -> None:
    core = SmallCore(replace(memory_of(3), policy=policy))
    core.store("x", "y", "z")
    core.use("y", "y", "x", "x", "x", "z")
    core.store("n")
    assert [word for word in ("x", "y", "z") if not core.find(word).tiers] == [gone]
    core.finish()
