"""The core against a dictionary, under every order of events and every fault there is.

A step is drawn from a seed, so a history is a list of seeds: hypothesis finds and shortens them, a plain loop runs many fast.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from kvtiers.core.messages import (
    Damaged,
    Outcome,
    SessionId,
    SpaceLow,
    SpaceReport,
    StoreDown,
    StoreUp,
    Vanished,
)
from kvtiers.core.remembering import Remember
from kvtiers.core.settings import CoreSettings, MemorySettings, StoreSettings, WritePolicy
from kvtiers.core.tickets import LoadState
from kvtiers.model.keys import ChunkKey
from kvtiers.model.layout import PAGE_BYTES
from kvtiers.model.parts import Part, Parts
from kvtiers.model.tiers import Tier
from kvtiers.testing.oracle import CoreOracle, SpaceSpec

T = TypeVar("T")

SHAPES = (
    Parts((Part(0, 0, PAGE_BYTES),)),
    Parts((Part(0, 0, 10_240),)),
    Parts((Part(0, 0, 100), Part(0, 1, 5_000), Part(1, 0, 4_096))),
)
PATHS = ("aaaaaa", "aaabbb", "aacc", "bb")
"""Chains that share prefixes: each letter is a chunk."""
POLICIES = ("lru", "lfu", "fifo")
FAULTS = [outcome for outcome in Outcome if outcome is not Outcome.PRESENT]  # that is no fault


def key_of(namespace: bytes, path: str) -> ChunkKey:
    return ChunkKey(hashlib.sha256(namespace + path.encode()).digest())


def chain_of(namespace: bytes, path: str) -> list[ChunkKey]:
    return [key_of(namespace, path[: end + 1]) for end in range(len(path))]


def memory_settings(draw: Random, chunk: int, largest: int) -> MemorySettings:
    chunks = draw.randint(1, largest)
    kept = max(0, chunks - draw.choice((0, 1, 2, 2, 3, 4)))
    return MemorySettings(
        capacity=chunks * chunk + draw.choice((0, 0, PAGE_BYTES, PAGE_BYTES - 1)),
        ceiling=kept * chunk,
        low=draw.randint(0, kept) * chunk,
        policy=draw.choice(POLICIES),
        probation_share=draw.choice((0.0, 0.2, 0.5, 1.0)),
        idle_after_s=draw.choice((None, None, 3.0)),
    )


def store_settings(draw: Random, record: int) -> StoreSettings:
    chunks = draw.choice((0, 1, 2, 3, 6, 10, 20))
    kept = draw.randint(0, chunks)
    bounded = draw.random() < 0.7
    return StoreSettings(
        capacity=chunks * record if bounded else None,
        ceiling=kept * record if bounded else None,
        low=draw.randint(0, kept) * record if bounded else None,
        policy=draw.choice(POLICIES),
        write_policy=draw.choice(list(WritePolicy)),
        admission=draw.choice(("always", "always", "second_touch")),
        max_queued=draw.choice((1, 2, 100)),
        max_queued_bytes=draw.choice((1, 1 << 30)),
    )


def shared_settings(draw: Random, record: int) -> StoreSettings:
    """A remote store: bounded by us, or by itself and shared with others."""
    chosen = store_settings(draw, record)
    if chosen.capacity is not None:
        return chosen
    return replace(
        chosen,
        remember=Remember(
            there_s=draw.choice((0.5, 5.0, 60.0)),
            absent_s=draw.choice((0.0, 2.0)),
            most=draw.choice((1, 3, 100)),
        ),
        max_write_bytes_per_s=draw.choice((None, None, 5_000)),
        max_wait_s=draw.choice((None, 3.0)),
    )


def core_settings(draw: Random, shapes: Sequence[Parts]) -> CoreSettings:
    chunk = max(parts.slot_bytes for parts in shapes)
    record = max(parts.slot_bytes + PAGE_BYTES * len(parts) for parts in shapes)
    return CoreSettings(
        cpu=memory_settings(draw, chunk, largest=8),
        gpu=memory_settings(draw, chunk, largest=4) if draw.random() < 0.4 else None,
        disk=store_settings(draw, record) if draw.random() < 0.8 else None,
        remote=shared_settings(draw, record) if draw.random() < 0.4 else None,
        write_lease_share=draw.choice((0.1, 0.25, 1.0)),
        ghosts=draw.choice((0, 3, 100)),
        max_hold=draw.choice((2, 256)),
    )


class Walk:
    """One history of a core: engines, background work, time and the world outside take turns."""

    def __init__(self, draw: Random, tell: Callable[[str], None]) -> None:
        self.shapes = [draw.choice(SHAPES), draw.choice(SHAPES)]
        specs = [SpaceSpec(bytes([n]) * 32, parts) for n, parts in enumerate(self.shapes)]
        self._tell = tell
        chosen = core_settings(draw, self.shapes)
        tell(f"shapes {self.shapes}, {chosen}")
        self.oracle = CoreOracle(chosen, specs)

    def step(self, draw: Random) -> None:
        """One step of any kind."""
        engine = (self.store, self.store, self.commit, self.load, self.load, self.load_cold, self.release)
        background = (self.end, self.end, self.end, self.end_all, self.honour_a_cancel, self.pass_time)
        world = (
            self.abort,
            self.die,
            self.unmap,
            self.evict,
            self.drain,
            self.look_up,
            self.restart,
        )
        trouble = (
            self.damage,
            self.report_damage,
            self.damage_on_hit,
            self.lose_a_record,
            self.store_news,
            self.store_up,
        )
        kind = draw.choices((engine, background, world, trouble), (45, 40, 8, 7))[0]
        draw.choice(kind)(draw)

    # --- engines ---

    def store(self, draw: Random) -> None:
        space, keys = self._chain(draw)
        session, first = self._session(draw), min(draw.choice((0, 0, 0, 1, 2)), len(keys))
        root = key_of(self.oracle.specs[space].namespace, "")
        ticket = self.oracle.open_store(session, space, root, keys, first)
        self._tell(
            f"store {ticket.id}: space {space}, {len(keys)} chunks from {first}: {len(ticket.accepted)} taken"
        )
        if ticket.copies and draw.random() < 0.7:
            self.oracle.commit(ticket, sorted(ticket.copies))
            self._tell("  committed")

    def commit(self, draw: Random) -> None:
        for ticket in self._one_of(draw, list(self.oracle.stores.values())):
            chosen = [index for index in sorted(ticket.copies) if draw.random() < 0.7]
            self._tell(f"commit {chosen} of store {ticket.id}")
            self.oracle.commit(ticket, chosen)

    def load(self, draw: Random) -> None:
        space, keys = self._chain(draw)
        timeout = draw.choice((0.0, 1.0, 5.0, 5.0))
        ticket = self.oracle.open_load(self._session(draw), space, keys, timeout)
        self._tell(
            f"load {ticket.id}: space {space}, {len(keys)} chunks: {ticket.num_chunks}, {ticket.state}"
        )

    def load_cold(self, draw: Random) -> None:
        """What lies in slower tiers only."""
        self.end_all(draw)
        for tier in (Tier.GPU, Tier.CPU, Tier.CPU):
            self._evict(tier, 0)
            self.end_all(draw)
        for _ in range(draw.randint(1, 4)):
            self.load(draw)

    def release(self, draw: Random) -> None:
        loads = list(self.oracle.loads.values())
        for ticket in loads if draw.random() < 0.3 else self._one_of(draw, loads):
            self._tell(f"release load {ticket.id}")
            self.oracle.release(ticket, used=draw.choice((None, None, range(0), range(1, 3))))

    # --- background work and time ---

    def end(self, draw: Random) -> None:
        for _ in range(draw.randint(1, 5)):
            for op in self._one_of(draw, list(self.oracle.driver.pending)):
                outcome = Outcome.OK if draw.random() < 0.7 else draw.choice(FAULTS)
                self._tell(f"{self.oracle.driver.pending[op]} ends: {outcome}")
                self.oracle.complete(op, outcome, draw.randint(0, 3))

    def end_all(self, draw: Random) -> None:
        self._tell(f"{len(self.oracle.driver.pending)} operations and what follows end well")
        self.oracle.driver.run()

    def honour_a_cancel(self, draw: Random) -> None:
        for op in self._one_of(draw, sorted(self.oracle.driver.cancelled)):
            self._tell(f"{self.oracle.driver.pending[op]} is cancelled")
            self.oracle.complete(op, Outcome.CANCELLED)

    def pass_time(self, draw: Random) -> None:
        seconds = draw.choice((0.1, 1.0, 6.0))
        self._tell(f"{seconds} s pass")
        self.oracle.driver.advance(seconds)
        self.oracle.check_deadlines()

    # --- the world outside ---

    def abort(self, draw: Random) -> None:
        for ticket in self._one_of(draw, list(self.oracle.stores.values())):
            self._tell(f"abort store {ticket.id}")
            self.oracle.abort(ticket)

    def die(self, draw: Random) -> None:
        for session in self._one_of(draw, self.oracle.sessions):
            self._tell(f"session {session} dies")
            self.oracle.die(session)
            self.oracle.driver.scribble(session)

    def unmap(self, draw: Random) -> None:
        for session in self._one_of(draw, [*self.oracle.dead, *self.oracle.sessions]):
            self._tell(f"session {session} is gone")
            self.oracle.driver.scribble(session)
            self.oracle.unmap(session)

    def evict(self, draw: Random) -> None:
        self._evict(draw.choice(list(Tier)), draw.choice((0, draw.randint(0, 100_000))))

    def drain(self, draw: Random) -> None:
        self._tell("drain")
        self.oracle.driver.call(lambda core, now: core.drain(now))

    def look_up(self, draw: Random) -> None:
        self.oracle.lookup(*self._chain(draw))

    def restart(self, draw: Random) -> None:
        if not self.oracle.recovering and draw.random() < 0.5:
            changed = core_settings(draw, self.shapes) if draw.random() < 0.3 else self.oracle.settings
            self.oracle.restart(changed, draw.shuffle)
            self._tell(f"restart: {len(self.oracle.recovering)} records, {changed}")
        else:
            self.oracle.recover(draw.choice((1, 5, 100)))
            self._tell(f"{len(self.oracle.recovering)} records still to be told")

    # --- trouble ---

    def damage(self, draw: Random) -> None:
        self._tell("a chunk in the arena is damaged")
        self.oracle.damage(draw.randrange(100))

    def report_damage(self, draw: Random) -> None:
        """Rightly or not."""
        space, keys = self._chain(draw)
        tiers = [Tier.GPU, Tier.CPU, *self.oracle.store_tiers]
        if keys:
            tier = draw.choice(tiers)
            self._tell(f"chunk {len(keys) - 1} of space {space} is damaged in {tier}")
            self.oracle.driver.tell(Damaged(tier, self.oracle.specs[space].namespace, keys[-1]))

    def damage_on_hit(self, draw: Random) -> None:
        answered = [t for t in self.oracle.loads.values() if t.state is LoadState.SETTLED and t.num_chunks]
        for ticket in self._one_of(draw, answered):
            index = draw.randrange(ticket.num_chunks)
            self._tell(f"load {ticket.id} finds chunk {index} damaged")
            self.oracle.cut(ticket, index)

    def lose_a_record(self, draw: Random) -> None:
        records = self.oracle.driver.records
        for tier, ref in self._one_of(draw, [(t, r) for t in self.oracle.store_tiers for r in records[t]]):
            self._tell(f"record {ref.key.hex()[:6]}.{ref.part} vanishes from {tier}")
            del records[tier][ref]
            self.oracle.driver.tell(Vanished(tier, ref.namespace, ref.key))

    def store_news(self, draw: Random) -> None:
        for tier in self._one_of(draw, self.oracle.store_tiers):
            nbytes = draw.choice((0, draw.randint(0, 100_000)))
            news = draw.choice(
                (StoreDown(tier), StoreDown(tier), SpaceLow(tier, nbytes), SpaceReport(tier, nbytes))
            )
            self._tell(f"{news}")
            self.oracle.roomy &= not isinstance(news, SpaceReport)
            self.oracle.driver.tell(news)

    def store_up(self, draw: Random) -> None:
        for tier in self.oracle.store_tiers:
            self._tell(f"{tier} works")
            self.oracle.driver.tell(StoreUp(tier))

    # --- inside ---

    def _evict(self, tier: Tier, down_to: int) -> None:
        if tier in (*self.oracle.store_tiers, Tier.CPU) or (tier is Tier.GPU and self.oracle.settings.gpu):
            done = self.oracle.driver.call(lambda core, now: core.evict(tier, down_to, now))
            self._tell(f"evict {tier} to {down_to}: {done}")

    def _chain(self, draw: Random) -> tuple[int, list[ChunkKey]]:
        space = draw.choice((0, 0, 0, 1))
        length = 6 if draw.random() < 0.6 else draw.randint(0, 6)
        return space, chain_of(self.oracle.specs[space].namespace, draw.choice(PATHS)[:length])

    def _session(self, draw: Random) -> SessionId:
        if len(self.oracle.sessions) < 2:
            self.oracle.open_session()
        return draw.choice(self.oracle.sessions)

    def _one_of(self, draw: Random, items: Sequence[T]) -> list[T]:
        return [draw.choice(items)] if items else []


class CoreMachine(RuleBasedStateMachine):
    """A walk whose seeds hypothesis chooses, and shortens when something is wrong."""

    @initialize(seed=st.integers(0, 1 << 32))
    def begin(self, seed: int) -> None:
        self.walk = Walk(Random(seed), note)

    @rule(seed=st.integers(0, 1 << 32))
    def step(self, seed: int) -> None:
        self.walk.step(Random(seed))

    @invariant()
    def nothing_is_wrong(self) -> None:
        self.walk.oracle.check()

    def teardown(self) -> None:
        if hasattr(self, "walk"):
            self.walk.oracle.finish()


def walk(seed: int, steps: int) -> None:
    """A history from one seed."""
    draw, told = Random(seed), list[str]()
    history = Walk(draw, told.append)
    try:
        for _ in range(steps):
            history.step(draw)
            history.oracle.check()
        history.oracle.finish()
    except Exception as error:
        raise AssertionError("\n".join([f"seed {seed}:", *told, repr(error)])) from error


@pytest.mark.parametrize("seed", [21_208])
def test_histories_that_once_went_wrong(seed: int) -> None:
    """21,208: parts of two writes of one chunk, each sound by itself, were found as one after a restart."""
    walk(seed, 200)


@pytest.mark.parametrize("seed", range(40))
def test_core_agrees_with_a_dictionary_on_fixed_histories(seed: int) -> None:
    walk(seed, 80)


@pytest.mark.slow
def test_core_agrees_with_a_dictionary_on_many_histories() -> None:
    for seed in range(1_000, 1_600):
        walk(seed, 150)


@pytest.mark.slow
def test_core_agrees_with_a_dictionary() -> None:
    run_state_machine_as_test(
        CoreMachine,
        settings=settings(
            max_examples=400,
            stateful_step_count=100,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )


@pytest.mark.nightly
@pytest.mark.timeout(3_600)
def test_core_agrees_with_a_dictionary_all_night() -> None:
    for seed in range(10_000, 60_000):
        walk(seed, 200)
