"""What a load promises, one story each. Every step is also checked by the oracle."""

from __future__ import annotations

import pytest

from kvtiers.core.core import Core
from kvtiers.core.messages import Outcome, Read, SpaceLow, StoreDown, StoreUp
from kvtiers.core.settings import CoreSettings
from kvtiers.core.tickets import LoadState, LoadTicket
from kvtiers.model.errors import InvariantBroken
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier
from kvtiers.testing.small_core import SmallCore, keys_of, memory_of, store_of

CPU, DISK, GPU, REMOTE = Tier.CPU, Tier.DISK, Tier.GPU, Tier.REMOTE
QUEUED, STAGING, SETTLED = LoadState.QUEUED, LoadState.STAGING, LoadState.SETTLED


def on_disk(*words: str, cpu: int = 8, staging: int = 4) -> SmallCore:
    """Chains that lie on disk only."""
    core = SmallCore(memory_of(cpu, staging), disk=store_of(100))
    core.store(*words)
    core.empty(CPU)
    return core


def answer(ticket: LoadTicket) -> tuple[LoadState, int, MissReason | None]:
    return ticket.state, ticket.num_chunks, ticket.stopped_by


# --- lookup -----------------------------------------------------------------------------------------------------------


def test_lookup_is_pure() -> None:
    core = on_disk("abc")
    core.store("abcd")
    core.load("abc")
    for word in ("", "abc", "abcdef", "xyz"):
        core.lookup(0, keys_of(word))  # compares everything before and after


def test_lookup_tells_the_nearest_tier_of_each_chunk_and_why_it_stopped() -> None:
    core = SmallCore(memory_of(4, 2), disk=store_of(100))
    core.store("abcd")
    core.empty(CPU)
    core.use("ab")
    match = core.find("abcdx")
    assert match.tiers == (CPU, CPU, DISK, DISK)
    assert match.stopped_by is MissReason.NEVER_SEEN


def test_lookup_counts_what_is_on_its_way_as_pending() -> None:
    core = on_disk("abc")
    core.load("ab")
    match = core.find("abc")
    assert match.tiers == (DISK, DISK, DISK)
    assert match.pending == 2


def test_a_chunk_being_stored_is_in_flight() -> None:
    core = SmallCore(memory_of(8))
    core.begin_store("ab")
    assert core.find("ab").stopped_by is MissReason.IN_FLIGHT
    assert answer(core.load("ab")) == (SETTLED, 0, MissReason.IN_FLIGHT)


def test_without_any_tier_everything_is_disabled() -> None:
    core = SmallCore(memory_of(0, 4))
    assert answer(core.load("ab")) == (SETTLED, 0, MissReason.DISABLED)
    assert core.find("ab").stopped_by is MissReason.DISABLED


def test_what_was_evicted_is_told_from_what_was_never_seen() -> None:
    core = SmallCore(memory_of(8), ghosts=2)
    core.store("abc")
    core.empty(CPU)
    assert core.find("a").stopped_by is MissReason.EVICTED
    assert core.find("x").stopped_by is MissReason.NEVER_SEEN


def test_only_so_many_evicted_chunks_are_remembered() -> None:
    core = SmallCore(memory_of(8), ghosts=2)
    core.store("a", "b", "c")
    core.empty(CPU)
    reasons = [core.find(word).stopped_by for word in "abc"]
    assert reasons == [MissReason.NEVER_SEEN, MissReason.EVICTED, MissReason.EVICTED]
    assert core.driver.core.stats()["ghosts"] == 2


# --- staging ----------------------------------------------------------------------------------------------------------


def test_a_hit_in_memory_is_answered_at_once() -> None:
    core = SmallCore(memory_of(8))
    core.store("abc")
    assert answer(core.load("abc")) == (SETTLED, 3, None)


def test_a_load_is_answered_only_when_all_of_it_lies_in_memory() -> None:
    core = on_disk("abc")
    ticket = core.load("abc")
    reads = core.waiting(Read)
    for read in reads[::-1]:
        assert ticket.state is STAGING
        core.end(read)
    assert answer(ticket) == (SETTLED, 3, None)
    assert ticket.tiers == [DISK, DISK, DISK]


def test_at_the_deadline_the_finished_prefix_counts() -> None:
    core = on_disk("abc")
    ticket = core.load("abc", timeout=5.0)
    first, _, third = core.waiting(Read)
    core.end(first)
    core.end(third)
    core.wait(4.9)
    assert ticket.state is STAGING
    core.wait(0.2)
    assert answer(ticket) == (SETTLED, 1, MissReason.STAGING_TIMEOUT)


def test_tick_says_when_the_next_deadline_is() -> None:
    core = on_disk("abc")
    core.load("a", timeout=7.0)
    core.load("b", timeout=3.0)
    core.load("ab", timeout=5.0)
    assert core.wait(1.0) == 5.0
    assert core.wait(5.0) == 7.0


def test_two_loads_share_one_read() -> None:
    core = on_disk("abc")
    first, second = core.load("abc"), core.load("ab")
    assert len(core.waiting(Read)) == 3
    core.work()
    assert answer(first) == (SETTLED, 3, None)
    assert answer(second) == (SETTLED, 2, None)
    assert second.tiers == [DISK, DISK]


def test_load_is_cut_to_what_the_staging_share_can_give() -> None:
    core = on_disk("abcdef", staging=4)
    ticket = core.load("abcdef")
    core.work()
    assert answer(ticket) == (SETTLED, 4, MissReason.NO_SLOT)


def test_what_lies_in_memory_takes_no_staging_share() -> None:
    core = on_disk("abcdef", staging=4)
    core.use("abcd")
    ticket = core.load("abcdef")
    core.work()
    assert answer(ticket) == (SETTLED, 6, None)


def test_waiting_load_holds_no_staging() -> None:
    core = on_disk("abcd", "xyz", staging=4)
    first = core.load("abcd")
    second = core.load("abcd")
    third = core.load("xyz")
    assert (first.state, second.state, third.state) == (STAGING, STAGING, QUEUED)
    assert third.copies == [None, None, None]
    assert core.driver.core.stats()["tiers"][CPU]["leased_chunks"] == 4
    core.work()
    core.done(first)
    core.done(second)
    core.work()
    assert answer(third) == (SETTLED, 3, None)


def test_waiting_loads_are_served_in_order_of_arrival() -> None:
    core = on_disk("abcd", "xyz", "k", staging=4)
    first, big, small = core.load("abcd"), core.load("xyz"), core.load("k")
    core.end(core.waiting(Read)[0], Outcome.FAILED)
    assert first.state is SETTLED
    core.done(first)
    core.work()
    assert big.state is SETTLED
    assert small.state is SETTLED
    assert [t.id for t in (big, small)] == sorted([big.id, small.id])


def test_a_small_load_does_not_overtake_a_big_one() -> None:
    core = on_disk("abc", "xyz", "k", staging=4)
    core.load("abc")
    big, small = core.load("xyz"), core.load("k")  # the share has room for the small one
    assert (big.state, small.state) == (QUEUED, QUEUED)


def test_a_hit_in_memory_waits_behind_nobody() -> None:
    core = on_disk("abcd", "xyz", staging=4)
    core.store("m")
    core.load("abcd")
    core.load("xyz")
    assert answer(core.load("m")) == (SETTLED, 1, None)


def test_loads_that_share_staged_chunks_do_not_wait_for_each_other() -> None:
    core = on_disk("abcd", "abef", "abgh", cpu=8, staging=4)
    tickets = [core.load(word) for word in ("abcd", "abef", "abgh", "abcd")]
    for _ in range(8):
        core.work()
        for ticket in tickets:
            if ticket.state is SETTLED:
                core.done(ticket)
    assert all(ticket.state is LoadState.RELEASED for ticket in tickets)


def test_a_popular_chunk_does_not_occupy_the_staging_share() -> None:
    core = on_disk("abcd", "wxyz", staging=4)
    first = core.load("abcd")
    core.work()
    second = core.load("abcd")  # while the first still holds it
    core.done(first)
    other = core.load("wxyz")
    core.work()
    assert second.state is SETTLED
    assert answer(other) == (SETTLED, 4, None)


def test_a_load_that_waited_takes_what_others_have_staged_at_its_deadline() -> None:
    core = on_disk("abcd", "abef", staging=4)
    core.load("abcd", timeout=50.0)
    late = core.load("abef", timeout=1.0)
    core.work()
    assert late.state is QUEUED
    core.wait(2.0)
    assert answer(late) == (SETTLED, 2, MissReason.STAGING_TIMEOUT)
    assert late.tiers == [CPU, CPU]


def test_a_load_that_was_released_is_never_answered() -> None:
    core = on_disk("abcd", "xyz", staging=4)
    staging, queued = core.load("abcd", timeout=1.0), core.load("xyz", timeout=1.0)
    core.done(queued)
    core.done(staging)
    core.work()
    core.wait(2.0)
    assert core.driver.core.stats()["requests"] == 0


def test_the_same_key_twice_is_read_once() -> None:
    core = on_disk("a")
    key = keys_of("a")[0]
    ticket = core.open_load(core.session, 0, [key, key], 5.0)
    assert len(core.waiting(Read)) == 1
    core.end(core.waiting(Read)[0], Outcome.FAILED)
    assert answer(ticket) == (SETTLED, 0, MissReason.TIER_OPEN)


def test_a_load_of_a_namespace_nobody_attached_is_a_bug() -> None:
    core = Core(CoreSettings(cpu=memory_of(4)))
    session, space = core.open_session(), core._state.index.space(b"x" * 32)
    with pytest.raises(InvariantBroken, match="attached"):
        core.open_load(session, space.id, keys_of("a"), 0.0, 1.0)


# --- reads that go wrong, or late ---------------------------------------------------------------------------------------


def test_late_read_keeps_its_slot() -> None:
    core = on_disk("abcd", cpu=4, staging=4)
    ticket = core.load("abcd", timeout=1.0)
    core.wait(2.0)
    core.done(ticket)
    reads = core.waiting(Read)
    assert len(reads) == 4
    others = [core.load("wxyz", timeout=1.0), core.load("abcd", timeout=1.0)]
    core.store("wxyz")  # takes every slot that is free
    taken = {slot for copy in core.driver.core.copies(CPU) for slot in copy.slots}
    assert {slot for read in reads for slot in read.slots} <= taken
    core.work()
    assert all(other.state is SETTLED for other in others)


def test_a_late_read_is_kept_when_it_ends_well() -> None:
    core = on_disk("a")
    core.done(core.load("a"))
    assert core.held(CPU, "a") == ""
    core.work()
    assert core.held(CPU, "a") == "a"


def test_a_read_that_nobody_waits_for_is_cancelled() -> None:
    core = on_disk("ab")
    first, second = core.load("ab"), core.load("a")
    reads = core.waiting(Read)
    core.done(first)
    assert core.driver.cancelled == {reads[1].op}
    core.done(second)
    assert core.driver.cancelled == {read.op for read in reads}
    for read in reads:
        core.end(read, Outcome.CANCELLED)
    assert core.driver.core.stats()["tiers"][CPU]["staged_bytes"] == 0


def test_a_cancelled_read_is_begun_anew_for_who_came_later() -> None:
    core = on_disk("a")
    core.done(core.load("a"))
    (read,) = core.waiting(Read)
    ticket = core.load("a")
    core.end(read, Outcome.CANCELLED)
    (again,) = core.waiting(Read)
    assert again.slots == read.slots
    core.end(again, Outcome.CANCELLED)  # nobody asked for that: no third time
    assert answer(ticket) == (SETTLED, 0, MissReason.STAGING_TIMEOUT)


def test_a_read_given_up_at_the_first_loads_deadline_is_begun_anew_for_the_second() -> None:
    core = on_disk("a")
    core.load("a", timeout=1.0)
    patient = core.load("a", timeout=9.0)
    core.wait(2.0)
    (read,) = core.waiting(Read)
    assert read.deadline == 1.0
    core.end(read, Outcome.FAILED)
    (again,) = core.waiting(Read)
    assert again.deadline == 9.0
    core.work()
    assert answer(patient) == (SETTLED, 1, None)


def test_a_read_given_up_is_not_begun_anew_on_a_store_that_is_down() -> None:
    core = on_disk("a")
    core.load("a", timeout=1.0)
    patient = core.load("a", timeout=9.0)
    core.wait(2.0)
    core.driver.tell(StoreDown(DISK))
    core.end(core.waiting(Read)[0], Outcome.FAILED)
    assert core.waiting(Read) == []
    assert answer(patient) == (SETTLED, 0, MissReason.TIER_OPEN)


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome is not Outcome.OK])
def test_a_failed_read_only_makes_the_prefix_shorter(outcome: Outcome) -> None:
    core = on_disk("abcd")
    ticket = core.load("abcd")
    third = core.waiting(Read)[2]
    core.end(third, outcome)
    core.work()
    assert ticket.state is SETTLED
    assert ticket.num_chunks == 2
    assert ticket.stopped_by not in (None, MissReason.NEVER_SEEN)


def test_damaged_chunk_is_a_miss_and_heals() -> None:
    core = on_disk("abc")
    ticket = core.load("abc")
    core.end(core.waiting(Read)[1], Outcome.CORRUPT)
    core.work()
    assert answer(ticket) == (SETTLED, 1, MissReason.CORRUPT)
    assert core.find("abc").stopped_by is MissReason.CORRUPT
    assert core.driver.core.stats()["tiers"][DISK]["corrupt"] == 1
    core.done(ticket)
    core.store("abc")
    assert core.held(DISK, "abc") == "abc"
    core.empty(CPU)
    core.use("abc")
    assert core.held(CPU, "abc") == "abc"


def test_of_a_chunk_with_a_missing_part_nothing_stays() -> None:
    core = SmallCore(memory_of(8, 4, parts=3), disk=store_of(100, parts=3), parts=3)
    core.store("a")
    core.empty(CPU)
    core.load("a")
    core.end(core.waiting(Read)[0], Outcome.MISSING)  # the driver loses one part
    assert len(core.driver.records[DISK]) == 2
    core.work()
    assert not core.driver.records[DISK]
    assert core.driver.core.stored_bytes(DISK) == 0


def test_in_a_shared_store_others_records_are_left_alone() -> None:
    core = SmallCore(memory_of(8, 4, parts=2), remote=store_of(None, parts=2), parts=2)
    core.store("a")
    core.empty(CPU)
    core.load("a")
    core.end(core.waiting(Read)[0], Outcome.MISSING)
    core.work()
    assert len(core.driver.records[REMOTE]) == 1  # somebody may be writing it anew
    assert core.find("a").stopped_by is MissReason.EVICTED


def test_a_store_that_is_down_is_a_miss_with_a_reason() -> None:
    core = on_disk("ab")
    core.driver.tell(StoreDown(DISK))
    assert answer(core.load("ab")) == (SETTLED, 0, MissReason.TIER_OPEN)
    core.driver.tell(StoreUp(DISK))
    ticket = core.load("ab")
    core.work()
    assert answer(ticket) == (SETTLED, 2, None)


def test_waiting_loads_are_cut_when_their_store_goes_down() -> None:
    core = on_disk("abcd", "xyz", staging=4)
    core.load("abcd", timeout=100.0)
    waiting = core.load("xyz", timeout=100.0)
    core.driver.tell(StoreDown(DISK))
    assert answer(waiting) == (SETTLED, 0, MissReason.TIER_OPEN)


# --- counting, recency --------------------------------------------------------------------------------------------------


def test_hits_are_counted_once_for_exactly_one_tier() -> None:
    core = SmallCore(memory_of(8, 4), gpu=memory_of(1), disk=store_of(100), remote=store_of(None))
    core.store("abcd")
    core.empty(GPU, CPU)
    core.use("a")  # from disk, and on up to the GPU
    core.empty(GPU)
    core.use("a")  # from the arena, and up again
    core.use("abx")  # gpu, disk
    tiers = core.driver.core.stats()["tiers"]
    assert {name: (tier["lookups"], tier["hits"]) for name, tier in tiers.items()} == {
        GPU: (1 + 1 + 3, 1),
        CPU: (1 + 1 + 2, 1),
        DISK: (1 + 0 + 2, 1 + 1),
        REMOTE: (0 + 0 + 1, 0),
    }
    assert tiers[DISK]["hit_tokens"] == 2 * 16
    assert core.driver.core.stats()["misses"] == {MissReason.NEVER_SEEN: 1}
    assert core.driver.core.stats()["requests"] == 3


def test_what_was_not_taken_is_no_hit() -> None:
    core = on_disk("abcd")
    core.use("ab")
    before = core.driver.core.stats()
    taken = core.load("abcdx")
    core.work()
    core.release(taken, used=range(1, 3))  # a from memory and d from the disk for nothing
    given_up = core.load("abcd")
    core.work()
    core.release(given_up, used=range(0))
    tiers = core.driver.core.stats()["tiers"]
    counted = {
        name: tuple(tiers[name][what] - before["tiers"][name][what] for what in ("lookups", "hits"))
        for name in (CPU, DISK)
    }
    assert counted == {CPU: (3, 1), DISK: (2, 1)}, "of b, c and x, the last is a miss of both"
    assert core.driver.core.stats()["unused"] == 2 + 4
    assert core.driver.core.stats()["requests"] - before["requests"] == 1


def test_a_dead_client_has_taken_nothing_that_it_does_not_say() -> None:
    core = SmallCore(memory_of(8))
    core.store("abcd")
    core.load("abcd")
    core.die(core.session)
    core.check()
    assert core.driver.core.stats()["tiers"][CPU]["hits"] == 0
    assert core.driver.core.stats()["unused"] == 4


def test_promoted_chunks_enter_on_probation() -> None:
    core = SmallCore(memory_of(6, 6, probation=1 / 3), disk=store_of(100))
    core.store("pqrs")
    core.empty(CPU)
    core.store("h", "i", "j")
    core.use("pqrs")
    assert [core.held(CPU, letter) for letter in "hij"] == list("hij")
    assert core.held(CPU, "pqrs") == "pqr"


def test_promoted_chunks_that_are_used_again_are_as_good_as_others() -> None:
    core = SmallCore(memory_of(4, 4, probation=0.0), disk=store_of(100))
    core.store("pq")
    core.empty(CPU)
    core.use("pq")
    core.use("pq")
    core.store("a", "b")
    core.use("pq")
    core.store("c", "d")
    assert core.held(CPU, "pq") == "pq"


def test_a_promotion_does_not_push_out_what_nobody_else_has() -> None:
    core = SmallCore(memory_of(3, 4), disk=store_of(100))
    core.store("pq")
    core.empty(CPU)
    core.driver.tell(SpaceLow(DISK, 0))  # no writes for a while
    core.store("abc")
    core.use("pq")
    assert core.held(CPU, "abc") == "abc"
    assert core.driver.core.stats()["tiers"][CPU]["dropped_dirty"] == 0


def test_a_chunk_in_use_is_never_evicted() -> None:
    core = SmallCore(memory_of(4), disk=store_of(100))
    core.store("ab", "x")
    held = core.load("ab")
    core.empty(CPU)
    assert core.held(CPU, "ab") == "ab"
    assert core.held(CPU, "x") == ""
    core.done(held)
    core.empty(CPU)
    assert core.held(CPU, "ab") == ""


def test_damage_found_on_a_hit_ends_the_answer_before_it() -> None:
    core = SmallCore(memory_of(4), disk=store_of(100))
    core.store("abc")
    ticket = core.load("abc")
    core.cut(ticket, 1)
    core.check()
    assert (ticket.num_chunks, ticket.stopped_by) == (1, MissReason.CORRUPT)
    assert core.held(CPU, "abc") == "ac"
    assert core.find("abc").tiers == (CPU, DISK, CPU)
    core.done(ticket)
    stats = core.driver.core.stats()
    assert stats["misses"] == {MissReason.CORRUPT: 1}
    assert (stats["tiers"][CPU]["hits"], stats["tiers"][CPU]["hit_tokens"]) == (1, 16)
    assert (stats["tiers"][CPU]["hit_bytes"], stats["tiers"][CPU]["corrupt"]) == (4096, 1)


def test_an_answer_can_be_given_a_better_reason() -> None:
    core = SmallCore(memory_of(4))
    ticket = core.load("a")
    core.driver.call(lambda core, _: core.reattribute(ticket, MissReason.SALT_DIFFERS))
    assert ticket.stopped_by is MissReason.SALT_DIFFERS
    core.done(ticket)
    assert {r: n for r, n in core.driver.core.stats()["misses"].items() if n} == {MissReason.SALT_DIFFERS: 1}


def test_failures_are_counted_but_not_what_never_began() -> None:
    core = on_disk("abcd")
    core.load("abcd")
    outcomes = (Outcome.FAILED, Outcome.CANCELLED, Outcome.REFUSED, Outcome.OK)
    for read, outcome in zip(core.waiting(Read)[::-1], outcomes, strict=True):
        core.end(read, outcome)
    assert core.driver.core.stats()["tiers"][DISK]["failed"] == 1


def test_what_was_copied_from_a_damaged_chunk_is_dropped_too() -> None:
    core = SmallCore(memory_of(4, 4), gpu=memory_of(4), disk=store_of(100))
    core.store("a")
    core.empty(GPU)
    core.done(core.load("a"))  # its copy to the GPU is under way
    core.damage(0)
    core.work()
    assert core.held(CPU, "a") + core.held(GPU, "a") == ""
    core.use("a")
    assert core.held(CPU, "a") == "a"
