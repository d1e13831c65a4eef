"""What an operator is told about every slot: state, owner, age. Every step is checked by the oracle."""

from __future__ import annotations

from kvtiers.core.memory_map import MemoryMap, SlotUse
from kvtiers.model.layout import PAGE_BYTES
from kvtiers.model.tiers import Tier
from kvtiers.testing.small_core import SmallCore, keys_of, memory_of, store_of

CPU = Tier.CPU


def begin(core: SmallCore) -> MemoryMap:
    walk = core.driver.core.memory_map(CPU)
    assert walk is not None
    return walk


def slots_of(core: SmallCore) -> dict[str, SlotUse]:
    """By letter of the chain "abcdef"."""
    found = begin(core).take(1000, core.driver.now) or []
    letters = {key.hex(): letter for letter, key in zip("abcdef", keys_of("abcdef"), strict=True)}
    return {letters[use.chunk]: use for use in found}


def test_a_slot_tells_its_state_its_owner_and_its_age() -> None:
    core = SmallCore(memory_of(8))
    core.store("ab")
    core.wait(7.0)
    load = core.load("a")
    store = core.begin_store("abcd")
    used = slots_of(core)
    assert {letter: use.state for letter, use in used.items()} == {
        "a": "ready",
        "b": "ready",
        "c": "storing",
        "d": "storing",
    }
    assert {letter: use.sessions for letter, use in used.items()} == {
        "a": (core.session,),
        "b": (),
        "c": (core.session,),
        "d": (core.session,),
    }
    assert {use.nbytes for use in used.values()} == {PAGE_BYTES}
    assert used["b"].checksummed
    assert used["c"].idle_s == 0.0
    core.end_store(store)
    core.work()
    core.done(load)
    core.wait(5.0)
    assert slots_of(core)["b"].idle_s == 5.0  # the store touched what it continues


def test_what_a_lost_client_may_still_write_to_is_quarantined() -> None:
    core = SmallCore(memory_of(4))
    core.begin_store("ab")
    core.die(core.session)
    core.check()
    used = slots_of(core)
    assert [(use.state, use.leases, use.sessions) for use in used.values()] == [
        ("quarantined", 1, (core.session,))
    ] * 2
    core.unmap(core.session)
    assert slots_of(core) == {}


def test_staged_chunks_are_told_from_kept_ones() -> None:
    core = SmallCore(memory_of(2, 2), disk=store_of(100))
    core.store("ab")
    core.empty(CPU)
    core.load("ab")
    filling = slots_of(core)
    assert {(use.state, use.staged) for use in filling.values()} == {("filling", True)}
    core.work()
    assert {use.state for use in slots_of(core).values()} == {"ready"}


def test_a_walk_goes_on_while_slots_come_and_go() -> None:
    core = SmallCore(memory_of(4))
    core.store("abcd")
    walk = begin(core)
    first = walk.take(1, core.driver.now)
    core.empty(CPU)
    core.store("ef")
    later = [use for step in iter(lambda: walk.take(1, core.driver.now), None) for use in step]
    assert first is not None
    assert [use.chunk for use in first] == [keys_of("abcd")[0].hex()]
    assert {use.chunk for use in later} <= {key.hex() for key in keys_of("ef")}
    assert walk.take(1, core.driver.now) is None


def test_a_tier_that_is_not_there_has_no_map() -> None:
    assert SmallCore(memory_of(1)).driver.core.memory_map(Tier.GPU) is None
    assert SmallCore(memory_of(1)).driver.core.memory_map(Tier.DISK) is None
