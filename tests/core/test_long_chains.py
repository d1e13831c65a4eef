"""A chain longer than `max_hold` is opened, committed, touched and released in several calls, and others come in between."""

from __future__ import annotations

import pytest

from kvtiers.core.core import Core
from kvtiers.core.messages import MappersGone, SessionDied, Write
from kvtiers.core.settings import WritePolicy
from kvtiers.core.tickets import LoadState, LoadTicket, StoreTicket
from kvtiers.model.errors import InvariantBroken
from kvtiers.model.keys import ChunkKey
from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.model.tiers import Tier
from kvtiers.testing.small_core import NAMESPACE, SmallCore, keys_of, memory_of, store_of

CPU, DISK = Tier.CPU, Tier.DISK
WORD = "abcdefgh"


def long_core(chunks: int = 16, staging: int = 8) -> SmallCore:
    return SmallCore(memory_of(chunks, staging), disk=store_of(100), max_hold=3)


def open_store(core: SmallCore, word: str, first: int = 0) -> StoreTicket:
    """The first call only."""
    raw = core.driver.core
    return raw.open_store(core.session, core.spaces[0], ChunkKey(NAMESPACE), keys_of(word), 0.0, first)


def open_load(core: SmallCore, word: str) -> LoadTicket:
    """The first call only."""
    return core.driver.core.open_load(core.session, core.spaces[0], keys_of(word), 0.0, 10.0)


def sound(core: Core) -> None:
    assert core.check_integrity() == []


def test_one_call_opens_at_most_so_many_chunks() -> None:
    core = long_core()
    raw = core.driver.core
    store = open_store(core, WORD)
    assert len(store.accepted) == 3
    assert raw.extend(store, 0.0)
    assert len(store.accepted) == 6
    sound(raw)
    while raw.extend(store, 0.0):
        pass
    assert [slot.index for slot in store.accepted] == list(range(8))
    for start in (0, 3, 6):
        raw.commit(store, 0.0, [index for index in range(start, start + 3) if index < 8])
    while raw.go_on(0.0):
        sound(raw)
    load = open_load(core, WORD)
    assert (load.num_chunks, load.state) == (3, LoadState.OPENING)
    while raw.extend(load, 0.0):
        sound(raw)
    assert (load.num_chunks, load.state, load.stopped_by) == (8, LoadState.SETTLED, None)
    assert [raw.release(load, 0.0), load.num_chunks] == [True, 5]
    sound(raw)
    assert [raw.release(load, 0.0), raw.release(load, 0.0), load.num_chunks] == [True, False, 0]
    assert raw.stats()["open_tickets"] == 0


def test_a_load_that_is_released_before_it_was_matched_is_never_answered() -> None:
    core = long_core()
    core.store(WORD)
    raw = core.driver.core
    load = open_load(core, WORD)
    while raw.release(load, 0.0):
        pass
    assert not raw.extend(load, 0.0)
    assert raw.answered() == []
    assert raw.stats()["tiers"][CPU]["leased_chunks"] == 0
    sound(raw)


def test_staging_room_is_reserved_in_one_step() -> None:
    """A load that is still being matched holds none of the staging share."""
    core = long_core(staging=6)
    core.store(WORD)
    while core.held(CPU, WORD):
        core.empty(CPU)
    raw = core.driver.core
    load = open_load(core, WORD)
    raw.extend(load, 0.0)
    assert raw.stats()["tiers"][CPU]["staged_bytes"] == 0
    while raw.extend(load, 0.0):
        pass
    assert raw.stats()["tiers"][CPU]["staged_bytes"] == 6 * 4096
    assert (load.num_chunks, load.stopped_by) == (6, MissReason.NO_SLOT)
    sound(raw)


@pytest.mark.parametrize("calls", [1, 2])
def test_a_session_that_dies_between_two_calls_leaves_nothing(calls: int) -> None:
    core = long_core()
    core.store(WORD)
    raw = core.driver.core
    load, store = open_load(core, WORD), open_store(core, WORD + "ijklmnop")
    for _ in range(calls - 1):
        raw.extend(load, 0.0)
        raw.extend(store, 0.0)
    for news in (SessionDied(core.session), MappersGone(core.session)):
        raw.tell(news, 0.0)
        assert not raw.extend(load, 0.0)
        while raw.extend(store, 0.0):
            pass
        sound(raw)
    stats = raw.stats()
    assert (stats["open_tickets"], stats["tiers"][CPU]["leased_chunks"]) == (0, 0)


def test_the_chain_a_store_builds_on_is_not_taken_for_its_room() -> None:
    """Eight chunks are there and eight fit: what is new has to be refused, not to push out its own beginning."""
    core = SmallCore(memory_of(8, 4), max_hold=3)
    core.store(WORD)
    ticket = core.begin_store(WORD + "xy")
    assert [refusal for _, refusal in ticket.refused[-2:]] == [Refusal.NO_SLOT, Refusal.CHAIN_BROKEN]
    assert core.held(CPU, WORD) == WORD
    assert core.driver.core.stats()["tiers"][CPU]["leased_chunks"] == 0


def test_a_chain_that_was_lost_between_two_calls_ends_the_store() -> None:
    core = SmallCore(memory_of(16), max_hold=3)
    core.store("abc")
    raw = core.driver.core
    store = open_store(core, "abcxyz")
    raw.evict(CPU, 0, 0.0)
    while raw.extend(store, 0.0):
        pass
    assert store.refused == [
        *((index, Refusal.PRESENT) for index in range(3)),
        *((index, Refusal.CHAIN_BROKEN) for index in range(3, 6)),
    ]
    assert raw.stats()["open_tickets"] == 0
    sound(raw)


def test_a_long_chain_dies_from_its_end_too() -> None:
    core = SmallCore(memory_of(8), max_hold=2)
    core.store(WORD)
    core.driver.call(lambda c, now: c.evict(CPU, 6 * 4096, now))
    assert core.held(CPU, WORD) == "abcdef"


def test_committing_part_by_part_checks_all_of_it_first() -> None:
    core = long_core()
    ticket = core.begin_store(WORD)
    raw = core.driver.core
    with pytest.raises(InvariantBroken, match="not open"):
        raw.to_commit(ticket, [0, 1, 99])
    assert raw.to_commit(ticket) == list(range(8))
    core.abort(ticket)


def test_a_drain_looks_at_so_many_chunks_a_call_and_at_all_in_the_end() -> None:
    core = SmallCore(
        memory_of(16, 8),
        disk=store_of(100, write=WritePolicy.WRITE_ON_EVICT),
        max_hold=3,
        write_lease_share=1.0,
    )
    core.store(WORD)
    raw = core.driver.core
    core.driver.call(lambda core, now: core.drain(now))
    assert raw.unfinished > 0
    seen = []
    while core.driver.call(lambda core, now: core.go_on(now)):
        seen.append(len(core.waiting(Write)))
    assert seen[0] <= 6, "the call to `drain` looks at three, and so does each that follows"
    core.work()
    assert (core.held(DISK, WORD), raw.unfinished) == (WORD, 0)
    sound(raw)
