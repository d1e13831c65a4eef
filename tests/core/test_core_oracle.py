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
    precondition,
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
PATHS = ("aaaaaa", "aaabbb", "aacc", "bb", "bcdefg")
"""Chains that share prefixes: each letter is a chunk."""

pick = st.integers(0, 10_000)
mostly = st.integers(0, 9)


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
        disk=draw(st.none() | store_settings(record)) if draw(mostly) < 3 else draw(store_settings(record)),
        remote=draw(st.none() | store_settings(record)),
        write_lease_share=draw(st.sampled_from((0.1, 0.25, 1.0))),
        ghosts=draw(st.sampled_from((0, 3, 100))),
        max_hold=draw(st.sampled_from((2, 256))),
    )


class CoreMachine(RuleBasedStateMachine):
    """Steps of engines, stores and clocks, in any order."""

    oracle: CoreOracle

    @initialize(
        data=st.data(),
        shapes=st.sampled_from([(a, b) for a, b in product(SHAPES, SHAPES) if a is b or a is SHAPES[0]]),
    )
    def begin(self, data: st.DataObject, shapes: tuple[Parts, Parts]) -> None:
        self.shapes = shapes
        specs = [SpaceSpec(bytes([n]) * 32, parts) for n, parts in enumerate(shapes)]
        self.oracle = CoreOracle(data.draw(core_settings(shapes)), specs)

    # --- engines ---

    @rule(space=pick, path=st.sampled_from(PATHS), length=st.integers(0, 6), first=st.integers(0, 2), who=pick)
    def store(self, space: int, path: str, length: int, first: int, who: int) -> None:
        space %= len(self.oracle.specs)
        namespace = self.oracle.specs[space].namespace
        keys = chain_of(namespace, path[:length])
        self.oracle.open_store(self._session(who), space, key_of(namespace, ""), keys, min(first, len(keys)))

    @rule(space=pick, path=st.sampled_from(PATHS), who=pick)
    def store_well(self, space: int, path: str, who: int) -> None:
        space %= len(self.oracle.specs)
        namespace = self.oracle.specs[space].namespace
        keys = chain_of(namespace, path)
        ticket = self.oracle.open_store(self._session(who), space, key_of(namespace, ""), keys, 0)
        if ticket.copies:
            self.oracle.commit(ticket, sorted(ticket.copies))
        self.oracle.driver.run()

    @precondition(lambda self: self.oracle.stores)
    @rule(which=pick, mask=st.integers(0, 63) | st.just(63))
    def commit(self, which: int, mask: int) -> None:
        ticket = self._choose(list(self.oracle.stores.values()), which)
        self.oracle.commit(ticket, [index for index in sorted(ticket.copies) if mask >> index & 1])

    @precondition(lambda self: self.oracle.stores)
    @rule(which=pick)
    def abort(self, which: int) -> None:
        self.oracle.abort(self._choose(list(self.oracle.stores.values()), which))

    @rule(space=pick, path=st.sampled_from(PATHS), length=st.integers(0, 6), who=pick, timeout=st.sampled_from((0.0, 1.0, 5.0)))
    def load(self, space: int, path: str, length: int, who: int, timeout: float) -> None:
        space %= len(self.oracle.specs)
        keys = chain_of(self.oracle.specs[space].namespace, path[:length])
        self.oracle.open_load(self._session(who), space, keys, timeout)

    @rule(space=pick, paths=st.lists(st.sampled_from(PATHS), min_size=1, max_size=3), who=pick)
    def load_after_eviction(self, space: int, paths: list[str], who: int) -> None:
        self.oracle.driver.run()
        for tier in (Tier.GPU, Tier.CPU):
            self.evict(tier, 0)
            self.oracle.driver.run()
        for delay, path in enumerate(paths):
            self.load(space, path, len(path), who, 1.0 + delay)

    @precondition(lambda self: self.oracle.loads)
    @rule(which=pick)
    def release(self, which: int) -> None:
        self.oracle.release(self._choose(list(self.oracle.loads.values()), which))

    @precondition(lambda self: self._answered())
    @rule(which=pick, index=pick)
    def find_damage_on_hit(self, which: int, index: int) -> None:
        ticket = self._choose(self._answered(), which)
        self.oracle.cut(ticket, index % ticket.num_chunks)

    @precondition(lambda self: self.oracle.sessions)
    @rule(who=pick)
    def die(self, who: int) -> None:
        session = self._choose(self.oracle.sessions, who)
        self.oracle.die(session)
        self.oracle.driver.scribble(session)

    @precondition(lambda self: self.oracle.dead or self.oracle.sessions)
    @rule(who=pick)
    def unmap(self, who: int) -> None:
        session = self._choose([*self.oracle.dead, *self.oracle.sessions], who)
        self.oracle.driver.scribble(session)
        self.oracle.unmap(session)

    # --- operations ---

    @precondition(lambda self: self.oracle.driver.pending)
    @rule(which=pick, outcome=st.sampled_from(Outcome), well=mostly, parts_done=st.integers(0, 3))
    def complete(self, which: int, outcome: Outcome, well: int, parts_done: int) -> None:
        op = self._choose(list(self.oracle.driver.pending), which)
        self.oracle.complete(op, Outcome.OK if well < 6 else outcome, parts_done)

    @precondition(lambda self: self.oracle.driver.cancelled)
    @rule(which=pick)
    def honour_a_cancel(self, which: int) -> None:
        op = self._choose(sorted(self.oracle.driver.cancelled), which)
        self.oracle.complete(op, Outcome.CANCELLED)

    @precondition(lambda self: self.oracle.driver.pending)
    @rule()
    def complete_everything(self) -> None:
        self.oracle.driver.run()

    # --- time and news ---

    @rule(seconds=st.sampled_from((0.0, 0.1, 1.0, 6.0)))
    def pass_time(self, seconds: float) -> None:
        self.oracle.driver.advance(seconds)
        self.oracle.check_deadlines()

    @rule(space=pick, path=st.sampled_from(PATHS))
    def look_up(self, space: int, path: str) -> None:
        space %= len(self.oracle.specs)
        self.oracle.lookup(space, chain_of(self.oracle.specs[space].namespace, path))

    @rule(tier=st.sampled_from(Tier), down_to=st.integers(0, 200_000) | st.just(0))
    def evict(self, tier: Tier, down_to: int) -> None:
        if tier in (*self._stores(), Tier.CPU) or (tier is Tier.GPU and self.oracle.settings.gpu):
            self.oracle.driver.call(lambda core, now: core.evict(tier, down_to, now))

    @rule(space=pick)
    def forget(self, space: int) -> None:
        number = self.oracle.spaces[space % len(self.oracle.specs)]
        self.oracle.driver.call(lambda core, now: core.forget(number, now))

    @rule()
    def drain(self) -> None:
        self.oracle.driver.call(lambda core, now: core.drain(now))

    @rule(which=pick, kind=st.sampled_from(("down", "up", "low", "report")), nbytes=st.integers(0, 100_000))
    def tell_of_a_store(self, which: int, kind: str, nbytes: int) -> None:
        stores = self._stores()
        if not stores:
            return
        tier = self._choose(stores, which)
        if kind == "report":
            self.oracle.roomy = False
        self.oracle.driver.tell(
            {
                "down": StoreDown(tier),
                "up": StoreUp(tier),
                "low": SpaceLow(tier, nbytes),
                "report": SpaceReport(tier, nbytes),
            }[kind]
        )

    @rule(which=pick)
    def lose_a_record(self, which: int) -> None:
        records = [(tier, ref) for tier in self._stores() for ref in self.oracle.driver.records[tier]]
        if records:
            tier, ref = self._choose(records, which)
            del self.oracle.driver.records[tier][ref]
            self.oracle.driver.tell(Vanished(tier, ref.namespace, ref.key))

    @rule(space=pick, path=st.sampled_from(PATHS), length=st.integers(1, 6), tier=st.sampled_from(Tier))
    def find_damage(self, space: int, path: str, length: int, tier: Tier) -> None:
        if tier in (Tier.GPU, Tier.CPU) or tier in self._stores():
            namespace = self.oracle.specs[space % len(self.oracle.specs)].namespace
            self.oracle.driver.tell(Damaged(tier, namespace, key_of(namespace, path[:length])))

    @rule(data=st.data(), randoms=st.randoms(use_true_random=False), smaller=st.booleans())
    def restart(self, data: st.DataObject, randoms: Any, smaller: bool) -> None:
        chosen = data.draw(core_settings(self.shapes)) if smaller else self.oracle.settings
        self.oracle.restart(chosen, randoms.shuffle)

    @precondition(lambda self: self.oracle.recovering)
    @rule(count=st.integers(1, 20))
    def recover(self, count: int) -> None:
        self.oracle.recover(count)

    # --- what must hold ---

    @invariant()
    def nothing_is_wrong(self) -> None:
        self.oracle.check()

    def teardown(self) -> None:
        if hasattr(self, "oracle"):
            self.oracle.finish()

    def _session(self, who: int) -> Any:
        if len(self.oracle.sessions) < 2:
            self.oracle.open_session()
        return self._choose(self.oracle.sessions, who)

    def _answered(self) -> list[LoadTicket]:
        return [t for t in self.oracle.loads.values() if t.state is LoadState.SETTLED and t.num_chunks]

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
