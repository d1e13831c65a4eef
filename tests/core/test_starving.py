"""Models of different chunk sizes share a memory: none starves another, however the room was divided before."""

from __future__ import annotations

import hashlib

import pytest

from kvtiers.core.messages import Write
from kvtiers.core.settings import CoreSettings, StoreSettings, WritePolicy
from kvtiers.model.keys import ChunkKey
from kvtiers.model.parts import Part, Parts
from kvtiers.model.reasons import Refusal
from kvtiers.model.tiers import Tier
from kvtiers.testing.oracle import CoreOracle, SpaceSpec
from kvtiers.testing.small_core import memory_of, store_of

PAGE = 4096
SMALL, LARGE = 0, 1
NAMES = (b"s" * 32, b"l" * 32)
SHAPES = (Parts([Part(0, 0, PAGE)]), Parts([Part(0, 0, 7 * PAGE), Part(0, 1, 2 * PAGE)]))


class Shared(CoreOracle):
    """48 pages kept, evicted down to 40, some more to stage; small chunks take one, large ones nine in two parts."""

    def __init__(self, disk: StoreSettings | None = None, *, write_lease_share: float = 1.0) -> None:
        settings = CoreSettings(
            cpu=memory_of(48, staging=18, low=40), disk=disk, ghosts=100, write_lease_share=write_lease_share
        )
        super().__init__(settings, [SpaceSpec(n, s) for n, s in zip(NAMES, SHAPES, strict=True)])
        self.session = self.open_session()

    def store(self, space: int, name: str, chunks: int = 1, *, work: bool = True) -> list[Refusal]:
        """A chain of a new prompt; returns what was refused."""
        keys = chain(space, name, chunks)
        ticket = self.open_store(self.session, space, ChunkKey(NAMES[space]), keys, 0)
        if ticket.copies:
            self.commit(ticket, sorted(ticket.copies))
        if work:
            self.driver.run()
        self.check()
        usage = self.driver.core.stats()["tiers"][Tier.CPU]
        assert usage["usage_bytes"] <= usage["ceiling_bytes"]
        return [refusal for _, refusal in ticket.refused]

    def hit(self, space: int, name: str, chunks: int = 1) -> int:
        """How many chunks of a prompt a load brings."""
        ticket = self.open_load(self.session, space, chain(space, name, chunks), 10.0)
        self.driver.run()
        self.check()
        found = ticket.num_chunks
        self.release(ticket)
        self.check()
        return found


def chain(space: int, name: str, chunks: int) -> list[ChunkKey]:
    return [ChunkKey(hashlib.sha256(f"{space} {name} {n}".encode()).digest()) for n in range(chunks)]


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize(("first", "second"), [(SMALL, LARGE), (LARGE, SMALL)])
def test_a_memory_full_of_one_size_makes_room_for_another(first: int, second: int, *, disk: bool) -> None:
    core = Shared(store_of(1000) if disk else None)
    for number in range(60):
        core.store(first, f"old {number}")
    assert core.store(second, "new", 2) == []
    assert core.hit(second, "new", 2) == 2


@pytest.mark.parametrize("policy", list(WritePolicy))
def test_two_sizes_that_store_in_turns_both_get_hits(policy: WritePolicy) -> None:
    core = Shared(store_of(8, write=policy))
    hits = [0, 0]
    for number in range(60):
        for space in (SMALL, LARGE):
            core.store(space, f"prompt {number}")
            hits[space] += core.hit(space, f"prompt {number}")
    # what has to be written before it leaves makes room later: a store that comes too early is refused, not delayed
    assert min(hits) >= (55 if policy is WritePolicy.WRITE_THROUGH else 30), hits


def test_one_that_stores_seldom_beside_one_that_stores_all_the_time_is_served() -> None:
    core = Shared()
    refused = 0
    for number in range(300):
        core.store(SMALL, f"steady {number}")
        if number % 20 == 19:
            refused += len(core.store(LARGE, f"seldom {number}"))
            assert core.hit(LARGE, f"seldom {number}") == 1
    assert refused == 0


def test_what_is_held_is_not_taken_and_what_finds_no_slot_is_refused() -> None:
    core = Shared()
    for number in range(48):
        core.store(SMALL, f"held {number}")
    tickets = [core.open_load(core.session, SMALL, chain(SMALL, f"held {n}", 1), 10.0) for n in range(48)]
    assert core.store(LARGE, "new") == [Refusal.NO_SLOT]
    for ticket in tickets:
        assert ticket.num_chunks == 1
        core.release(ticket)
    assert core.store(LARGE, "new") == []


def test_chunks_that_only_memory_has_are_written_before_they_make_room() -> None:
    """The first try is refused and stakes its claim; what leaves is kept from the others until it comes back."""
    core = Shared(store_of(1000, write=WritePolicy.WRITE_ON_EVICT))
    for number in range(48):
        core.store(SMALL, f"dirty {number}")
    for turn in range(10):
        if not core.store(LARGE, "new", work=False):
            break
        core.driver.run()
        core.store(SMALL, f"rival {turn}", work=False)
    assert turn < 9
    assert not [one for one in core.driver.pending.values() if isinstance(one, Write)] or core.driver.run()
    assert core.hit(LARGE, "new") == 1
    lost = [number for number in range(48) if core.hit(SMALL, f"dirty {number}") != 1]
    assert lost == []


def test_a_claim_that_nobody_comes_back_for_lapses() -> None:
    core = Shared(store_of(1000, write=WritePolicy.WRITE_ON_EVICT))
    for number in range(48):
        core.store(SMALL, f"dirty {number}")
    core.store(LARGE, "gone away", work=False)
    core.driver.advance(6.0)
    core.driver.run()
    for number in range(48):
        core.store(SMALL, f"later {number}")
    assert sum(core.hit(SMALL, f"later {number}") for number in range(48)) >= 40
