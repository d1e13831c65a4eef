"""The core against a dictionary, under every order of events and every fault hypothesis thinks of."""

from __future__ import annotations

import hashlib
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from kvtiers.core.messages import (
    Damaged,
    Outcome,
    SpaceLow,
    SpaceReport,
    StoreDown,
    StoreUp,
    Vanished,
)
from kvtiers.core.settings import CoreSettings, MemorySettings, StoreSettings, WritePolicy
from kvtiers.core.tickets import LoadState, LoadTicket
from kvtiers.model.keys import ChunkKey
from kvtiers.model.layout import PAGE_BYTES
from kvtiers.model.parts import Part, Parts
from kvtiers.model.tiers import Tier
from kvtiers.testing.oracle import CoreOracle, SpaceSpec

SHAPES = (
    Parts((Part(0, 0, PAGE_BYTES),)),
    Parts((Part(0, 0, 10_240),)),
    Parts((Part(0, 0, 100), Part(0, 1, 5_000), Part(1, 0, 4_096))),
)
PATHS = ("aaaaaa", "aaabbb", "aacc", "bb")
"""Chains that share prefixes: each letter is a chunk."""

pick = st.integers(0, 10_000)
spaces = st.sampled_from((0, 0, 0, 1))
paths = st.sampled_from(PATHS)
lengths = st.just(6) | st.integers(0, 6)
outcomes = st.just(Outcome.OK) | st.just(Outcome.OK) | st.sampled_from(Outcome)


def key_of(namespace: bytes, path: str) -> ChunkKey:
    return ChunkKey(hashlib.sha256(namespace + path.encode()).digest())


def chain_of(namespace: bytes, path: str) -> list[ChunkKey]:
    return [key_of(namespace, path[: end + 1]) for end in range(len(path))]


@st.composite
def memory_settings(draw: st.DrawFn, chunk: int, *, largest: int) -> MemorySettings:
    chunks = draw(st.integers(1, largest))
    staging = draw(st.sampled_from((0, 1, 2, 3, 4)))  # chunks
    kept = max(0, chunks - staging)
    odd = draw(st.sampled_from((0, 0, PAGE_BYTES, PAGE_BYTES - 1)))
    return MemorySettings(
        capacity=chunks * chunk + odd,
        ceiling=kept * chunk,
        low=draw(st.integers(0, kept)) * chunk,
        probation_share=draw(st.sampled_from((0.0, 0.2, 0.5, 1.0))),
        idle_after_s=draw(st.sampled_from((None, None, 3.0))),
    )


@st.composite
def store_settings(draw: st.DrawFn, record: int) -> StoreSettings:
    bounded = draw(st.booleans())
    chunks = draw(st.integers(0, 3) | st.integers(6, 20))
    kept = draw(st.integers(0, chunks))
    return StoreSettings(
        capacity=chunks * record if bounded else None,
        ceiling=kept * record if bounded else None,
        low=draw(st.integers(0, kept)) * record if bounded else None,
        write_policy=draw(st.sampled_from(WritePolicy)),
        admission=draw(st.sampled_from(("always", "always", "second_touch"))),
        max_queued=draw(st.sampled_from((1, 2, 100))),
        max_queued_bytes=draw(st.sampled_from((1, 1 << 30))),
    )


@st.composite
def core_settings(draw: st.DrawFn, shapes: tuple[Parts, ...]) -> CoreSettings:
    chunk = max(parts.slot_bytes for parts in shapes)
    record = max(parts.slot_bytes + PAGE_BYTES * len(parts) for parts in shapes)
    return CoreSettings(
        cpu=draw(memory_settings(chunk, largest=8)),
        gpu=draw(st.none() | memory_settings(chunk, largest=4)),
        disk=draw(store_settings(record) | store_settings(record) | st.none()),
        remote=draw(st.none() | store_settings(record)),
        write_lease_share=draw(st.sampled_from((0.1, 0.25, 1.0))),
        ghosts=draw(st.sampled_from((0, 3, 100))),
        max_hold=draw(st.sampled_from((2, 256))),
    )


class CoreMachine(RuleBasedStateMachine):
    """Steps of engines, stores and clocks, in any order.

    Three rules with weighted actions: with a rule for each action, hypothesis leaves out so many of them in each history that
    hardly any gets as far as a read.
    """

    oracle: CoreOracle
    shapes: tuple[Parts, Parts]

    @initialize(data=st.data(), shapes=st.sampled_from(list(product(SHAPES, SHAPES))))
    def begin(self, data: st.DataObject, shapes: tuple[Parts, Parts]) -> None:
        self.shapes = shapes
        specs = [SpaceSpec(bytes([n]) * 32, parts) for n, parts in enumerate(shapes)]
        self.oracle = CoreOracle(data.draw(core_settings(shapes)), specs)

    @rule(
        action=st.sampled_from(
            ("store", "store", "store", "commit", "load", "load", "load cold", "release", "release all")
        ),
        space=spaces,
        path=paths,
        length=lengths,
        which=pick,
        how=pick,
    )
    def engine(self, action: str, space: int, path: str, length: int, which: int, how: int) -> None:
        oracle = self.oracle
        namespace = oracle.specs[space].namespace
        keys = chain_of(namespace, path[:length])
        if action == "store":
            first = min(how % 7 // 5, len(keys))
            ticket = oracle.open_store(self._session(which), space, key_of(namespace, ""), keys, first)
            if ticket.copies and how % 4:
                oracle.commit(ticket, sorted(ticket.copies))
            if how % 4 == 3:
                oracle.driver.run()
        elif action == "commit" and oracle.stores:
            ticket = self._choose(list(oracle.stores.values()), which)
            oracle.commit(ticket, [index for index in sorted(ticket.copies) if how % 3 or how >> index & 1])
        elif action == "load":
            oracle.open_load(self._session(which), space, keys, (0.0, 1.0, 5.0, 5.0)[how % 4])
        elif action == "load cold":
            oracle.driver.run()
            for tier in (Tier.GPU, Tier.CPU, Tier.CPU):
                self._evict(tier, 0)
                oracle.driver.run()
            for number in range(1 + how % 3):
                other = PATHS[(how + number) % len(PATHS)]
                oracle.open_load(
                    self._session(which + number), space, chain_of(namespace, other), 1.0 + number
                )
        elif action == "release" and oracle.loads:
            oracle.release(self._choose(list(oracle.loads.values()), which))
        elif action == "release all":
            for load in list(oracle.loads.values()):
                oracle.release(load)

    @rule(
        action=st.sampled_from(("end", "end", "end", "end all", "honour a cancel", "pass time")),
        ends=st.lists(st.tuples(pick, outcomes, st.integers(0, 3)), min_size=1, max_size=6),
        seconds=st.sampled_from((0.1, 1.0, 6.0)),
    )
    def background(self, action: str, ends: list[tuple[int, Outcome, int]], seconds: float) -> None:
        oracle, driver = self.oracle, self.oracle.driver
        if action == "end":
            for which, outcome, parts_done in ends:
                if driver.pending:
                    oracle.complete(self._choose(list(driver.pending), which), outcome, parts_done)
        elif action == "end all":
            driver.run()
        elif action == "honour a cancel" and driver.cancelled:
            oracle.complete(self._choose(sorted(driver.cancelled), ends[0][0]), Outcome.CANCELLED)
        elif action == "pass time":
            driver.advance(seconds)
            oracle.check_deadlines()

    @rule(
        data=st.data(),
        action=st.sampled_from(
            (
                "abort",
                "die",
                "unmap",
                "evict",
                "drain",
                "forget",
                "look up",
                "damage",
                "damage on hit",
                "restart",
                "recover",
            )
            + ("store down", "store up", "store up", "space low", "space report", "lost record")
        ),
        space=spaces,
        path=paths,
        length=lengths,
        tier=st.sampled_from(Tier),
        which=pick,
        nbytes=st.just(0) | st.integers(0, 100_000),
    )
    def world(
        self,
        data: st.DataObject,
        action: str,
        space: int,
        path: str,
        length: int,
        tier: Tier,
        which: int,
        nbytes: int,
    ) -> None:
        oracle, driver, stores = self.oracle, self.oracle.driver, self._stores()
        namespace = oracle.specs[space].namespace
        keys = chain_of(namespace, path[:length])
        if action == "abort" and oracle.stores:
            oracle.abort(self._choose(list(oracle.stores.values()), which))
        elif action == "die" and oracle.sessions:
            session = self._choose(oracle.sessions, which)
            oracle.die(session)
            driver.scribble(session)
        elif action == "unmap" and (oracle.dead or oracle.sessions):
            session = self._choose([*oracle.dead, *oracle.sessions], which)
            driver.scribble(session)
            oracle.unmap(session)
        elif action == "evict":
            self._evict(tier, nbytes)
        elif action == "drain":
            driver.call(lambda core, now: core.drain(now))
        elif action == "forget":
            driver.call(lambda core, now: core.forget(oracle.spaces[space], now))
        elif action == "look up":
            oracle.lookup(space, keys)
        elif action == "damage" and keys and tier in (Tier.GPU, Tier.CPU, *stores):
            driver.tell(Damaged(tier, namespace, keys[-1]))
        elif action == "damage on hit":
            answered = [t for t in oracle.loads.values() if t.state is LoadState.SETTLED and t.num_chunks]
            if answered:
                ticket = self._choose(answered, which)
                oracle.cut(ticket, nbytes % ticket.num_chunks)
        elif action == "restart" and which % 3 == 0:
            changed = data.draw(core_settings(self.shapes)) if nbytes else oracle.settings
            oracle.restart(changed, data.draw(st.randoms(use_true_random=False)).shuffle)
        elif action == "recover":
            oracle.recover(which % 20)
        elif action == "lost record":
            records = [(store, ref) for store in stores for ref in driver.records[store]]
            if records:
                store, ref = self._choose(records, which)
                del driver.records[store][ref]
                driver.tell(Vanished(store, ref.namespace, ref.key))
        elif stores:
            store = self._choose(stores, which)
            if action == "store down":
                driver.tell(StoreDown(store))
            elif action == "store up":
                driver.tell(StoreUp(store))
            elif action == "space low":
                driver.tell(SpaceLow(store, nbytes))
            elif action == "space report":
                oracle.roomy = False
                driver.tell(SpaceReport(store, nbytes))

    @invariant()
    def nothing_is_wrong(self) -> None:
        self.oracle.check()

    def teardown(self) -> None:
        if hasattr(self, "oracle"):
            self.oracle.finish()

    def _evict(self, tier: Tier, down_to: int) -> None:
        if tier in (*self._stores(), Tier.CPU) or (tier is Tier.GPU and self.oracle.settings.gpu):
            self.oracle.driver.call(lambda core, now: core.evict(tier, down_to, now))

    def _session(self, which: int) -> Any:
        if len(self.oracle.sessions) < 2:
            self.oracle.open_session()
        return self._choose(self.oracle.sessions, which)

    def _stores(self) -> list[Tier]:
        found = ((Tier.DISK, self.oracle.settings.disk), (Tier.REMOTE, self.oracle.settings.remote))
        return [tier for tier, store in found if store is not None]

    def _choose(self, items: Any, which: int) -> Any:
        return items[which % len(items)]


_UNHURRIED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def test_core_agrees_with_a_dictionary_on_a_few_fixed_histories() -> None:
    run_state_machine_as_test(
        CoreMachine,
        settings=settings(
            max_examples=25,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=_UNHURRIED,
        ),
    )


@pytest.mark.slow
def test_core_agrees_with_a_dictionary() -> None:
    run_state_machine_as_test(
        CoreMachine,
        settings=settings(
            max_examples=200, stateful_step_count=60, deadline=None, suppress_health_check=_UNHURRIED
        ),
    )


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_core_agrees_with_a_dictionary_all_night() -> None:
    run_state_machine_as_test(
        CoreMachine,
        settings=settings(
            max_examples=8_000, stateful_step_count=120, deadline=None, suppress_health_check=_UNHURRIED
        ),
    )
