"""LeafFirstLRU: the contract, and exactly which key it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random
from typing import Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtiers.core.policies import UnknownPolicy, policy_for
from kvtiers.core.policies.base import EvictionPolicy, Standing
from kvtiers.core.policies.lru import LeafFirstLRU
from kvtiers.testing.policy_kit import KEYS, EvictionPolicyContract, Step, steps

ESTABLISHED, PROBATION = Standing.ESTABLISHED, Standing.PROBATION


class TestLeafFirstLRU(EvictionPolicyContract):
    def make(self) -> EvictionPolicy[str]:
        return LeafFirstLRU()


def anything(_: object) -> bool:
    return True


def filled(*keys: str, standing: Standing = ESTABLISHED, now: float = 0.0) -> LeafFirstLRU[str]:
    policy: LeafFirstLRU[str] = LeafFirstLRU()
    policy.set_limits(probation_bytes=2, idle_after_s=None)
    for key in keys:
        policy.insert(key, None, 1, now, standing)
    return policy


def insert_chain(
    policy: EvictionPolicy[str], keys: str, standing: Standing = ESTABLISHED, now: float = 0.0
) -> None:
    """From last to first, as the core does."""
    for index in range(len(keys) - 1, -1, -1):
        policy.insert(keys[index], keys[index - 1] if index else None, 1, now, standing)


def evicted(
    policy: EvictionPolicy[str], count: int, now: float = 0.0, may_go: Callable[[str], bool] = anything
) -> str:
    order = ""
    for _ in range(count):
        victim = policy.victim(now, may_go)
        if victim is None:
            break
        order += victim
        policy.remove(victim)
    return order


# --- recency ----------------------------------------------------------------------------------------------------------


def test_the_longest_unused_goes_first() -> None:
    policy = filled("a", "b", "c", "d")
    policy.touch("a", 1.0)
    policy.touch("c", 2.0)
    assert evicted(policy, 4) == "bdac"


def test_coldest_first_is_the_order_of_use() -> None:
    policy = filled("a", "b", "c")
    policy.touch("a", 1.0)
    assert list(policy.coldest_first()) == ["b", "c", "a"]


def test_what_may_not_go_counts_as_used() -> None:
    policy = filled("a", "b", "c")
    assert policy.victim(0.0, lambda key: key != "a") == "b"
    assert evicted(policy, 3) == "bca"


# --- leaves first -----------------------------------------------------------------------------------------------------


def test_a_chain_dies_from_its_end() -> None:
    policy = filled()
    insert_chain(policy, "abcd")
    assert evicted(policy, 4) == "dcba"


def test_a_chain_dies_from_its_end_whatever_the_order_it_came_in() -> None:
    policy = filled()
    for key, parent in (("a", None), ("b", "a"), ("c", "b")):
        policy.insert(key, parent, 1, 0.0, ESTABLISHED)
    assert evicted(policy, 3) == "cba"


def test_a_shared_prefix_outlives_its_branches() -> None:
    policy = filled()
    insert_chain(policy, "ab")
    policy.insert("x", "b", 1, 1.0, ESTABLISHED)
    policy.insert("y", "b", 1, 2.0, ESTABLISHED)
    policy.insert("z", None, 1, 3.0, ESTABLISHED)
    assert evicted(policy, 5) == "xybaz"


def test_a_leased_leaf_protects_its_ancestors() -> None:
    policy = filled()
    insert_chain(policy, "abc")
    policy.insert("z", None, 1, 5.0, ESTABLISHED)
    assert evicted(policy, 4, may_go=lambda key: key != "c") == "z"


def test_a_parent_that_lost_its_last_child_goes_in_its_old_order() -> None:
    policy = filled()
    policy.insert("old", None, 1, 0.0, ESTABLISHED)
    policy.insert("older child", "old", 1, 1.0, ESTABLISHED)
    policy.insert("new", None, 1, 2.0, ESTABLISHED)
    policy.touch("older child", 3.0)
    assert policy.victim(4.0, anything) == "new"
    policy.remove("older child")
    assert policy.victim(4.0, anything) == "old"


class Simple(Protocol):
    """What both sides of the comparison can do."""

    def insert(self, key: str, parent: str | None) -> None: ...
    def use(self, key: str) -> None: ...
    def remove(self, key: str) -> None: ...
    def victim(self, may_go: Callable[[str], bool]) -> str | None: ...
    def __contains__(self, key: str) -> bool: ...
    def __len__(self) -> int: ...


class BruteForce:
    """Leaf-first LRU in its simplest form: look at everything each time. What may not go becomes the most recent."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.parents: dict[str, str | None] = {}

    def insert(self, key: str, parent: str | None) -> None:
        self.remove(key)
        self.order.append(key)
        self.parents[key] = parent

    def use(self, key: str) -> None:
        if key in self.parents:
            self.order.remove(key)
            self.order.append(key)

    def remove(self, key: str) -> None:
        if key in self.parents:
            del self.parents[key]
            self.order.remove(key)

    def victim(self, may_go: Callable[[str], bool]) -> str | None:
        for key in list(self.order):
            if key not in self.parents.values():
                if may_go(key):
                    return key
                self.use(key)
        return None

    def __contains__(self, key: str) -> bool:
        return key in self.parents

    def __len__(self) -> int:
        return len(self.order)


class Ours:
    """LeafFirstLRU, with everything established."""

    def __init__(self) -> None:
        self.policy: LeafFirstLRU[str] = LeafFirstLRU()

    def insert(self, key: str, parent: str | None) -> None:
        self.policy.insert(key, parent, 1, 0.0, ESTABLISHED)

    def use(self, key: str) -> None:
        self.policy.touch(key, 0.0)

    def remove(self, key: str) -> None:
        self.policy.remove(key)

    def victim(self, may_go: Callable[[str], bool]) -> str | None:
        return self.policy.victim(0.0, may_go)

    def __contains__(self, key: str) -> bool:
        return key in self.policy

    def __len__(self) -> int:
        return len(self.policy)


@settings(deadline=None, max_examples=300)
@given(st.lists(steps, max_size=80))
def test_takes_what_a_search_through_everything_takes(history: list[Step]) -> None:
    stores: tuple[Simple, Simple] = (Ours(), BruteForce())
    for step in history:
        key, parent = step.key, step.parent
        victims = []
        for store in stores:
            if step.action == "insert" and (parent is None or KEYS.index(parent) < KEYS.index(key)):
                store.insert(key, parent)
            elif step.action == "touch":
                store.use(key)
            elif step.action == "remove":
                store.remove(key)
            elif step.action in ("victim", "evict"):
                victim = store.victim(lambda k, step=step: k not in step.denied)  # type: ignore[misc]
                victims.append(victim)
                if victim is not None and step.action == "evict":
                    store.remove(victim)
        assert len(set(victims)) <= 1


def conversations(seed: int) -> Iterable[list[str]]:
    """Requests as chains of chunks: turns of some hundred conversations, each longer than the last, on shared beginnings."""
    draw = Random(seed)
    chats: list[list[str]] = []
    for request in range(1_500):
        if not chats or draw.random() < 0.25:
            system = draw.randrange(5)
            chats.append([f"s{system}.{n}" for n in range(4 * (system + 1))])
        chat = chats[max(0, len(chats) - 1 - int(draw.expovariate(1 / 40)))]
        chat += [f"r{request}.{n}" for n in range(draw.randint(1, 6))]
        yield list(chat)


def hits_of(store: Simple, capacity: int) -> int:
    """Chunks found, over all conversations, in a store of so many chunks."""
    hits = 0
    for chain in conversations(7):
        hits += next((n for n, key in enumerate(chain) if key not in store), len(chain))
        for index, key in enumerate(chain):
            if key not in store:
                leased = set(chain[:index])
                while len(store) >= capacity:
                    victim = store.victim(lambda k, leased=leased: k not in leased)  # type: ignore[misc]
                    if victim is None:
                        break
                    store.remove(victim)
                if len(store) >= capacity:
                    break
                store.insert(key, chain[index - 1] if index else None)
        for key in reversed(chain):
            store.use(key)
    return hits


@pytest.mark.parametrize("capacity", [40, 160, 640])
def test_hits_on_conversations_equal_those_of_a_search_through_everything(capacity: int) -> None:
    assert hits_of(Ours(), capacity) == hits_of(BruteForce(), capacity) > 0


# --- probation --------------------------------------------------------------------------------------------------------


def test_one_big_promotion_does_not_flush_what_is_hot() -> None:
    policy = filled(*"hot")
    for index in range(100):  # limit: 2
        if len(policy) >= 6:
            victim = policy.victim(0.0, anything)
            assert victim is not None
            policy.remove(victim)
        policy.insert(f"p{index}", f"p{index + 1}", 1, 0.0, PROBATION)
    assert all(key in policy for key in "hot")


def test_within_its_share_probation_is_ordinary_lru() -> None:
    policy = filled("a")
    policy.insert("p", None, 1, 1.0, PROBATION)
    policy.insert("b", None, 1, 2.0, ESTABLISHED)
    assert evicted(policy, 3) == "apb"


def test_a_second_use_ends_probation() -> None:
    policy = filled("h")
    for key in "pqr":
        policy.insert(key, None, 1, 1.0, PROBATION)
    policy.touch("p", 2.0)
    policy.touch("q", 3.0)
    assert evicted(policy, 4) == "hrpq"


def test_resizing_counts_for_the_share() -> None:
    policy = filled("h")
    policy.insert("p", None, 1, 1.0, PROBATION)
    policy.resize("p", 3)
    assert policy.victim(1.0, anything) == "p"
    assert policy.check_integrity() == []


def test_promoted_parents_wait_for_their_children() -> None:
    policy = filled("h")
    insert_chain(policy, "pqrs", PROBATION, 1.0)
    policy.insert("new", "s", 1, 2.0, ESTABLISHED)
    assert evicted(policy, 6, may_go=lambda key: key != "new") == "h"
    policy.remove("new")
    assert evicted(policy, 4) == "srqp"


# --- idle, unreachable --------------------------------------------------------------------------------------------------


def test_idle_keys_go_before_probation() -> None:
    policy = filled("h")
    policy.set_limits(probation_bytes=0, idle_after_s=10.0)
    policy.insert("p", None, 1, 9.0, PROBATION)
    assert policy.victim(9.5, anything) == "p"
    assert policy.victim(10.0, anything) == "h"


def test_idle_bytes_counts_what_was_not_touched_for_so_long() -> None:
    policy = filled()
    policy.set_limits(probation_bytes=0, idle_after_s=10.0)
    policy.insert("a", None, 100, 0.0, ESTABLISHED)
    policy.insert("b", None, 20, 0.0, PROBATION)
    policy.insert("c", None, 3, 5.0, ESTABLISHED)
    assert policy.idle_bytes(9.9) == 0
    assert policy.idle_bytes(10.0) == 120
    policy.touch("a", 12.0)
    assert policy.idle_bytes(15.0) == 23


def test_unreachable_keys_go_first_leaves_before_parents() -> None:
    policy = filled("old")
    insert_chain(policy, "abc", now=5.0)
    for key in "abc":
        policy.expedite(key)
    assert evicted(policy, 4, now=6.0) == "cbaold"


def test_a_used_key_is_not_unreachable_any_more() -> None:
    policy = filled("a", "b")
    policy.expedite("b")
    policy.touch("b", 1.0)
    assert evicted(policy, 2) == "ab"


def test_an_unknown_policy_is_refused_with_the_names_there_are() -> None:
    assert isinstance(policy_for("lru"), LeafFirstLRU)
    with pytest.raises(UnknownPolicy, match="lru"):
        policy_for("lru-but-better")
