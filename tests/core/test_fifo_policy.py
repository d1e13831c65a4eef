"""LeafFirstFIFO: the contract, and exactly which key it takes."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from kvtiers.core.policies import policy_for
from kvtiers.core.policies.base import EvictionPolicy, Standing
from kvtiers.core.policies.fifo import LeafFirstFIFO
from kvtiers.testing.policy_kit import KEYS, EvictionPolicyContract, Step, steps

ESTABLISHED, PROBATION = Standing.ESTABLISHED, Standing.PROBATION


class TestLeafFirstFIFO(EvictionPolicyContract):
    def make(self) -> EvictionPolicy[str]:
        return LeafFirstFIFO()


def filled(*keys: str) -> LeafFirstFIFO[str]:
    policy: LeafFirstFIFO[str] = LeafFirstFIFO()
    policy.set_limits(probation_bytes=2, idle_after_s=None)
    for key in keys:
        policy.insert(key, None, 1, 0.0, ESTABLISHED)
    return policy


def evicted(policy: EvictionPolicy[str], now: float = 0.0) -> str:
    order = ""
    while (victim := policy.victim(now, lambda _: True)) is not None:
        order += victim
        policy.remove(victim)
    return order


def test_the_name_in_a_configuration_makes_one() -> None:
    assert isinstance(policy_for("fifo"), LeafFirstFIFO)


def test_what_came_first_goes_first_however_often_it_was_used() -> None:
    policy = filled(*"abc")
    for now in range(5):
        policy.touch("a", float(now))
    assert list(policy.coldest_first()) == ["a", "b", "c"]
    assert evicted(policy) == "abc"


def test_a_chain_dies_from_its_end_whatever_the_order_it_came_in() -> None:
    policy = filled("a")
    for key, parent in (("b", "a"), ("c", "b")):
        policy.insert(key, parent, 1, 1.0, ESTABLISHED)
    policy.insert("z", None, 1, 2.0, ESTABLISHED)
    assert evicted(policy) == "cbaz"


def test_a_parent_that_lost_its_last_child_goes_in_its_old_order() -> None:
    policy = filled("a", "z")
    policy.insert("b", "a", 1, 1.0, ESTABLISHED)
    assert policy.victim(2.0, lambda _: True) == "z"
    policy.remove("b")
    assert policy.victim(2.0, lambda _: True) == "a"


def test_what_may_not_go_counts_as_arrived_now() -> None:
    policy = filled(*"abc")
    assert policy.victim(0.0, lambda key: key != "a") == "b"
    assert evicted(policy) == "bca"


def test_probation_gives_the_victims_only_above_its_share() -> None:
    policy = filled("h")
    for key in "pq":
        policy.insert(key, None, 1, 1.0, PROBATION)
    assert policy.victim(1.0, lambda _: True) == "h"
    policy.insert("r", None, 1, 1.0, PROBATION)
    assert policy.victim(1.0, lambda _: True) == "p"
    policy.touch("p", 2.0)
    assert evicted(policy, 2.0) == "hqrp"


def test_what_is_idle_goes_first_though_it_came_last() -> None:
    policy = filled(*"abc")
    policy.set_limits(probation_bytes=2, idle_after_s=10.0)
    policy.touch("a", 5.0)
    policy.touch("b", 6.0)
    assert policy.idle_bytes(10.0) == 1
    assert policy.victim(10.0, lambda _: True) == "c"
    policy.touch("c", 11.0)
    assert policy.idle_bytes(11.0) == 0
    assert evicted(policy, 11.0) == "abc"
    assert policy.check_integrity() == []


def test_unreachable_keys_go_first() -> None:
    policy = filled(*"abc")
    policy.expedite("c")
    assert evicted(policy) == "cab"


class BruteForce:
    """Leaf-first FIFO in its simplest form: look at everything each time. What may not go arrives anew."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.parents: dict[str, str | None] = {}

    def insert(self, key: str, parent: str | None) -> None:
        self.remove(key)
        self.order.append(key)
        self.parents[key] = parent

    def remove(self, key: str) -> None:
        if key in self.parents:
            del self.parents[key]
            self.order.remove(key)

    def victim(self, may_go: Callable[[str], bool]) -> str | None:
        for key in list(self.order):
            if key not in self.parents.values():
                if may_go(key):
                    return key
                self.order.remove(key)
                self.order.append(key)
        return None


@settings(deadline=None, max_examples=300)
@given(st.lists(steps, max_size=80))
def test_takes_what_a_search_through_everything_takes(history: list[Step]) -> None:
    policy, model = filled(), BruteForce()
    for step in history:
        key, parent = step.key, step.parent
        if step.action == "insert" and (parent is None or KEYS.index(parent) < KEYS.index(key)):
            policy.insert(key, parent, step.nbytes, 0.0, ESTABLISHED)
            model.insert(key, parent)
        elif step.action == "touch":
            policy.touch(key, 0.0)
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
        assert list(policy.coldest_first()) == model.order
