"""LeafFirstLFU: the contract, and exactly which key it takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtiers.core.policies import policy_for
from kvtiers.core.policies.base import EvictionPolicy, Standing
from kvtiers.core.policies.lfu import LeafFirstLFU
from kvtiers.testing.policy_kit import KEYS, EvictionPolicyContract, Step, steps

ESTABLISHED, PROBATION = Standing.ESTABLISHED, Standing.PROBATION


class TestLeafFirstLFU(EvictionPolicyContract):
    def make(self) -> EvictionPolicy[str]:
        return LeafFirstLFU()


def anything(_: object) -> bool:
    return True


def filled(*keys: str) -> LeafFirstLFU[str]:
    policy: LeafFirstLFU[str] = LeafFirstLFU()
    policy.set_limits(probation_bytes=2, idle_after_s=None)
    for key in keys:
        policy.insert(key, None, 1, 0.0, ESTABLISHED)
    return policy


def use(policy: EvictionPolicy[str], keys: str) -> None:
    for key in keys:
        policy.touch(key, 0.0)


def evicted(policy: EvictionPolicy[str], now: float = 0.0) -> str:
    order = ""
    while (victim := policy.victim(now, anything)) is not None:
        order += victim
        policy.remove(victim)
    return order


def test_the_name_in_a_configuration_makes_one() -> None:
    assert isinstance(policy_for("lfu"), LeafFirstLFU)


def test_the_least_used_goes_first_and_of_equals_the_longest_unused() -> None:
    policy = filled(*"abcd")
    use(policy, "aaabdb")
    assert list(policy.coldest_first()) == ["c", "d", "b", "a"]
    assert evicted(policy) == "cdba"


def test_a_scan_does_not_flush_what_is_used_often() -> None:
    policy = filled(*"hot")
    use(policy, "hothothot")
    for number in range(1_000):
        policy.insert(f"{number}", None, 1, 0.0, ESTABLISHED)
        if number % 50 == 0:
            use(policy, "hot")
        if len(policy) > 30:
            victim = policy.victim(0.0, anything)
            assert victim is not None
            policy.remove(victim)
    assert all(key in policy for key in "hot")


@pytest.mark.parametrize("uses", [1, 5, 50, 100_000])
def test_what_was_hot_once_does_not_stay_for_ever(uses: int) -> None:
    """It goes after about as many turnovers of the others as it has uses, and after a few at most."""
    policy = filled("once hot")
    for _ in range(uses):
        policy.touch("once hot", 0.0)
    for generation in range(100):
        names = [f"{generation}.{n}" for n in range(3)]
        for name in names:
            policy.insert(name, None, 1, 0.0, ESTABLISHED)
            policy.touch(name, 0.0)
        while len(policy) > 4:
            victim = policy.victim(0.0, anything)
            assert victim is not None
            policy.remove(victim)
        if "once hot" not in policy:
            break
    assert "once hot" not in policy
    assert generation <= min(uses, 15) + 1


def test_a_used_chain_dies_from_its_end() -> None:
    policy = filled("a")
    for key, parent in (("b", "a"), ("c", "b")):
        policy.insert(key, parent, 1, 1.0, ESTABLISHED)
    policy.insert("z", None, 1, 2.0, ESTABLISHED)
    use(policy, "cba")
    assert evicted(policy) == "zcba"


def test_a_leaf_used_often_keeps_a_parent_used_rarely() -> None:
    policy = filled("a", "z")
    policy.insert("b", "a", 1, 1.0, ESTABLISHED)
    use(policy, "bbbz")
    assert policy.victim(2.0, anything) == "z"
    policy.remove("b")
    assert evicted(policy) == "az"


def test_what_may_not_go_counts_as_used() -> None:
    policy = filled(*"abc")
    assert policy.victim(0.0, lambda key: key != "a") == "b"
    assert evicted(policy) == "bca"


def test_what_is_held_for_long_is_asked_about_ever_more_rarely() -> None:
    """Leases outlive many evictions, each of another rank: the same few keys must not be asked about each time."""
    policy = filled(*(f"held {number}" for number in range(100)))
    asked = 0

    def may_go(key: str) -> bool:
        nonlocal asked
        asked += 1
        return not key.startswith("held")

    evictions = 2_000
    for number in range(evictions):
        policy.insert(f"{number}", None, 1, 0.0, ESTABLISHED)
        victim = policy.victim(0.0, may_go)
        assert victim == f"{number}"
        policy.remove(victim)
    assert asked <= 100 * evictions / 10


def test_probation_gives_the_victims_only_above_its_share() -> None:
    policy = filled("h")
    for key in "pq":
        policy.insert(key, None, 1, 1.0, PROBATION)
    assert policy.victim(1.0, anything) == "h"
    use(policy, "h")
    assert policy.victim(1.0, anything) == "p"
    policy.insert("r", None, 1, 1.0, PROBATION)
    policy.touch("p", 2.0)
    policy.insert("s", None, 1, 2.0, PROBATION)
    assert policy.victim(2.0, anything) == "q"
    assert evicted(policy, 2.0) == "qhrsp"


def test_what_is_idle_goes_first_however_often_it_was_used() -> None:
    policy = filled(*"abc")
    policy.set_limits(probation_bytes=2, idle_after_s=10.0)
    use(policy, "aaaa")
    policy.touch("b", 5.0)
    policy.touch("c", 6.0)
    assert policy.idle_bytes(10.0) == 1
    assert policy.victim(10.0, anything) == "a"
    policy.touch("a", 11.0)
    assert policy.idle_bytes(11.0) == 0
    assert evicted(policy, 11.0) == "bca"
    assert policy.check_integrity() == []


def test_unreachable_keys_go_first() -> None:
    policy = filled(*"abc")
    use(policy, "ccc")
    policy.expedite("c")
    assert evicted(policy) == "cab"


def test_the_order_outlives_a_restart_though_the_counts_do_not() -> None:
    before = filled(*"abcd")
    use(before, "ddddbb")
    after = filled(*before.coldest_first())
    assert list(after.coldest_first()) == list(before.coldest_first()) == ["a", "c", "b", "d"]
    use(after, "a")
    assert evicted(after) == "cbda"


class BruteForce:
    """LFU-DA, leaves first, in its simplest form: look at everything each time. What may not go counts as used."""

    def __init__(self) -> None:
        self.parents: dict[str, str | None] = {}
        self.uses: dict[str, int] = {}
        self.order: dict[str, tuple[int, int]] = {}
        self.age = 0
        self.clock = 0

    def insert(self, key: str, parent: str | None) -> None:
        self.remove(key)
        self.parents[key] = parent
        self.uses[key] = 0
        self.use(key)

    def use(self, key: str) -> None:
        if key in self.parents:
            self.clock += 1
            self.uses[key] += 1
            self.order[key] = (self.age + self.uses[key], self.clock)

    def remove(self, key: str) -> None:
        self.parents.pop(key, None)
        self.order.pop(key, None)

    def victim(self, may_go: Callable[[str], bool]) -> str | None:
        in_use = []
        victim = None
        for key in sorted(self.parents, key=self.order.__getitem__):
            if key not in self.parents.values():
                self.age = max(self.age, self.order[key][0])
                if may_go(key):
                    victim = key
                    break
                in_use.append(key)
        for key in in_use:
            self.use(key)
        return victim


@settings(deadline=None, max_examples=500)
@given(st.lists(steps, max_size=100))
def test_takes_what_a_search_through_everything_takes(history: list[Step]) -> None:
    policy, model = filled(), BruteForce()
    for step in history:
        key, parent = step.key, step.parent
        if step.action == "insert" and (parent is None or KEYS.index(parent) < KEYS.index(key)):
            policy.insert(key, parent, step.nbytes, 0.0, ESTABLISHED)
            model.insert(key, parent)
        elif step.action == "touch":
            policy.touch(key, 0.0)
            model.use(key)
        elif step.action == "remove":
            policy.remove(key)
            model.remove(key)
        elif step.action in ("victim", "evict"):
            fit = set(KEYS) - step.denied
            victim = policy.victim(0.0, fit.__contains__)
            assert victim == model.victim(fit.__contains__)
            if victim is not None and step.action == "evict":
                policy.remove(victim)
                model.remove(victim)
        assert list(policy.coldest_first()) == sorted(model.parents, key=model.order.__getitem__)
