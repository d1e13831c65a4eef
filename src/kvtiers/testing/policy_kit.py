"""What every eviction policy must do, as a pytest class to subclass.

    class TestMyPolicy(EvictionPolicyContract):
        def make(self) -> EvictionPolicy[str]:
            return MyPolicy()

It says nothing of which key a policy prefers, only what it may never do: break a chain, hand out what is in use, lose count,
or take long. Histories are drawn by hypothesis; keys have parents or none, sizes are arbitrary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar, NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from kvtiers.core.policies.base import EvictionPolicy, Standing

KEYS = [f"k{number}" for number in range(12)]


class Step(NamedTuple):
    """One call; which fields matter depends on the action."""

    action: str
    key: str
    parent: str | None
    nbytes: int
    seconds: float
    standing: Standing
    denied: frozenset[str]


ACTIONS = (
    "insert",
    "insert",
    "insert",
    "touch",
    "touch",
    "resize",
    "remove",
    "expedite",
    "victim",
    "evict",
    "evict",
)

steps = st.builds(
    Step,
    action=st.sampled_from(ACTIONS),
    key=st.sampled_from(KEYS),
    parent=st.none() | st.sampled_from(KEYS),
    nbytes=st.integers(1, 10**12),
    seconds=st.sampled_from((0.0, 0.0, 1.0, 100.0)),
    standing=st.sampled_from(Standing),
    denied=st.frozensets(st.sampled_from(KEYS), max_size=6),
)


class Model:
    """What a policy has been told, in plain dictionaries."""

    def __init__(self, policy: EvictionPolicy[str]) -> None:
        self.policy = policy
        self.parents: dict[str, str | None] = {}
        self.nbytes: dict[str, int] = {}
        self.now = 0.0
        self.victims: list[str | None] = []

    def run(self, step: Step) -> None:
        """Do it, and look at what came out."""
        self.now += step.seconds
        key = step.key
        if step.action == "insert":
            if not self._would_close_a_circle(key, step.parent):
                self.policy.insert(key, step.parent, step.nbytes, self.now, step.standing)
                self.parents[key], self.nbytes[key] = step.parent, step.nbytes
        elif step.action == "touch":
            self.policy.touch(key, self.now)
        elif step.action == "resize":
            self.policy.resize(key, step.nbytes)
            if key in self.nbytes:
                self.nbytes[key] = step.nbytes
        elif step.action == "remove":
            self._forget(key)
        elif step.action == "expedite":
            self.policy.expedite(key)
        else:
            victim = self.victim(lambda candidate: candidate not in step.denied)
            if victim is not None and step.action == "evict":
                self._forget(victim)

    def victim(self, may_go: Callable[[str], bool]) -> str | None:
        """Ask for a victim and check that it may be one."""
        asked: list[str] = []

        def ask(key: str) -> bool:
            asked.append(key)
            return may_go(key)

        victim = self.policy.victim(self.now, ask)
        self.victims.append(victim)
        leaves = set(self.parents) - {parent for parent in self.parents.values() if parent is not None}
        fit = {key for key in leaves if may_go(key)}
        assert set(asked) <= set(self.parents), "asked about a key that is not there"
        if victim is None:
            assert not fit, f"found none of {sorted(fit)}"
        else:
            assert victim in leaves, f"{victim} has a child here, or is not here itself"
            assert victim in fit, f"{victim} may not go"
        return victim

    def check(self) -> None:
        """Books and model agree."""
        policy = self.policy
        assert len(policy) == len(self.parents)
        assert all((key in policy) is (key in self.parents) for key in KEYS)
        assert sorted(policy.coldest_first()) == sorted(self.parents)
        assert policy.check_integrity() == []
        assert 0 <= policy.idle_bytes(self.now) <= sum(self.nbytes.values())

    def _forget(self, key: str) -> None:
        self.policy.remove(key)
        self.parents.pop(key, None)
        self.nbytes.pop(key, None)

    def _would_close_a_circle(self, key: str, parent: str | None) -> bool:
        while parent is not None:
            if parent == key:
                return True
            parent = self.parents.get(parent)
        return False


class EvictionPolicyContract(ABC):
    """Subclass me, override `make`, and call the class `Test…`."""

    MAX_QUESTIONS: ClassVar = 10_000
    """How often one search may ask `may_go`, however many keys there are."""

    @abstractmethod
    def make(self) -> EvictionPolicy[str]:
        """A fresh, empty policy."""

    def test_never_breaks_a_chain_and_never_loses_count(self) -> None:
        @settings(deadline=None)
        @given(st.lists(steps, max_size=60))
        def histories(history: list[Step]) -> None:
            model = Model(self.make())
            model.policy.set_limits(probation_bytes=10**6, idle_after_s=50.0)
            for step in history:
                model.run(step)
                model.check()

        histories()

    def test_same_history_same_victims(self) -> None:
        @settings(deadline=None, max_examples=50)
        @given(st.lists(steps, max_size=60))
        def histories(history: list[Step]) -> None:
            first, second = Model(self.make()), Model(self.make())
            for step in history:
                first.run(step)
                second.run(step)
            assert first.victims == second.victims

        histories()

    def test_everything_can_be_evicted_leaf_by_leaf(self) -> None:
        for name, forest in forests(300).items():
            model = self._filled(forest)
            for _ in range(len(forest)):
                victim = model.victim(lambda _: True)
                assert victim is not None, name
                model._forget(victim)
            assert len(model.policy) == 0, name

    def test_looking_for_a_victim_does_not_remove_it(self) -> None:
        model = self._filled({"a": None, "b": "a"})
        assert model.victim(lambda _: True) == "b"
        assert model.victim(lambda _: True) == "b"
        assert len(model.policy) == 2

    def test_unknown_keys_are_ignored(self) -> None:
        model = self._filled({"a": None})
        for call in (model.policy.remove, model.policy.expedite):
            call("stranger")
        model.policy.touch("stranger", 1.0)
        model.policy.resize("stranger", 7)
        assert "stranger" not in model.policy
        assert list(model.policy.coldest_first()) == ["a"]
        assert model.policy.check_integrity() == []

    def test_the_order_is_a_snapshot_that_outlives_changes(self) -> None:
        """Owners take it under their lock and walk it outside."""
        model = self._filled({"a": None, "b": None, "c": None})
        order = model.policy.coldest_first()
        model.policy.remove("a")
        model.policy.insert("d", None, 1, 9.0, Standing.ESTABLISHED)
        first = next(order)
        model.policy.remove("b")
        model.policy.touch("c", 10.0)
        assert sorted([first, *order]) == ["a", "b", "c"]

    def test_a_parent_may_be_elsewhere_and_may_come_later(self) -> None:
        policy = self.make()
        policy.insert("child", "parent", 1, 0.0, Standing.ESTABLISHED)
        assert policy.victim(0.0, lambda _: True) == "child"
        policy.insert("parent", None, 1, 1.0, Standing.ESTABLISHED)
        assert policy.victim(1.0, lambda key: key != "child") is None

    def test_it_knows_when_a_key_was_used_last(self) -> None:
        policy = self.make()
        policy.insert("a", None, 1, 3.0, Standing.ESTABLISHED)
        policy.insert("b", "a", 1, 4.0, Standing.PROBATION)
        policy.touch("a", 5.0)
        assert [policy.used_at(key) for key in ("a", "b", "stranger")] == [5.0, 4.0, None]
        policy.expedite("b")
        policy.remove("a")
        assert [policy.used_at(key) for key in ("a", "b")] == [None, None]

    def test_inserting_again_replaces(self) -> None:
        policy = self.make()
        policy.insert("child", "one", 1, 0.0, Standing.PROBATION)
        policy.insert("child", "other", 5, 1.0, Standing.ESTABLISHED)
        policy.insert("one", None, 1, 2.0, Standing.ESTABLISHED)
        policy.remove("child")
        assert len(policy) == 1
        assert policy.check_integrity() == []
        assert policy.victim(3.0, lambda _: True) == "one"

    def test_evicting_everything_asks_a_few_times_for_each_key(self) -> None:
        """Steps are counted, not timed: O(1) amortised whatever the order in which the keys came."""
        size = 3_000
        for name, forest in forests(size).items():
            policy, asked = self._filled(forest).policy, 0

            def may_go(_: str) -> bool:
                nonlocal asked
                asked += 1
                return True

            for _ in range(size):
                victim = policy.victim(1.0, may_go)
                assert victim is not None, name
                policy.remove(victim)
            assert asked <= 4 * size, f"{name}: {asked} questions for {size} keys"

    def test_keys_in_use_are_not_asked_about_for_ever(self) -> None:
        """Half of the keys are leased: each eviction may stumble over some, all of them together over each once or twice."""
        size = 3_000
        policy, asked = self._filled(dict.fromkeys((f"{n}" for n in range(size)), None)).policy, 0

        def may_go(key: str) -> bool:
            nonlocal asked
            asked += 1
            return int(key) >= size // 2

        for _ in range(size // 2):
            victim = policy.victim(1.0, may_go)
            assert victim is not None
            policy.remove(victim)
        assert asked <= 4 * size
        assert policy.victim(1.0, may_go) is None

    def test_a_search_that_finds_nothing_is_bounded(self) -> None:
        asked = 0

        def never(_: str) -> bool:
            nonlocal asked
            asked += 1
            return False

        policy = self._filled(dict.fromkeys((f"{n}" for n in range(3 * self.MAX_QUESTIONS)), None)).policy
        assert policy.victim(1.0, never) is None
        assert asked <= self.MAX_QUESTIONS

    def _filled(self, forest: dict[str, str | None]) -> Model:
        model = Model(self.make())
        for key, parent in forest.items():
            model.policy.insert(key, parent, 1, 0.0, Standing.ESTABLISHED)
            model.parents[key], model.nbytes[key] = parent, 1
        return model


def forests(size: int) -> dict[str, dict[str, str | None]]:
    """Key -> parent, in the order of insertion: chains from head to tail and from tail to head, a star, a tree, loose keys."""
    numbers = range(size)
    chain: list[tuple[str, str | None]] = [(f"{n}", f"{n - 1}" if n else None) for n in numbers]
    star: list[tuple[str, str | None]] = [("0", None), *((f"{n}", "0") for n in numbers[1:])]
    tree: list[tuple[str, str | None]] = [(f"{n}", f"{(n - 1) // 3}" if n else None) for n in numbers]
    loose: Iterable[tuple[str, str | None]] = [(f"{n}", None) for n in numbers]
    return {
        "chain, head first": dict(chain),
        "chain, tail first": dict(reversed(chain)),
        "star": dict(star),
        "tree": dict(tree),
        "tree, leaves first": dict(reversed(tree)),
        "loose": dict(loose),
    }
