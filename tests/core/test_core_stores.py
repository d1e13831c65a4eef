"""What a store promises, and what happens to it in the background. Every step is also checked by the oracle."""

from __future__ import annotations

import pytest

from kvtiers.core.eviction import Evicted
from kvtiers.core.messages import (
    Copy,
    Delete,
    Outcome,
    Priority,
    Seal,
    SpaceReport,
    StoreDown,
    StoreUp,
    Write,
)
from kvtiers.core.settings import StoreSettings, WritePolicy
from kvtiers.core.tickets import StoreTicket
from kvtiers.model.errors import InvariantBroken, KvtiersError, LayoutMismatch
from kvtiers.model.parts import Part, Parts
from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.model.tiers import Tier
from kvtiers.testing.small_core import NAMESPACE, SmallCore, keys_of, memory_of, store_of

CPU, DISK, GPU, REMOTE = Tier.CPU, Tier.DISK, Tier.GPU, Tier.REMOTE
ON_EVICT = WritePolicy.WRITE_ON_EVICT


def refusals(ticket: StoreTicket) -> list[Refusal]:
    return [refusal for _, refusal in ticket.refused]


def accepted(ticket: StoreTicket) -> list[int]:
    return [slot.index for slot in ticket.accepted]


# --- accepted or refused ------------------------------------------------------------------------------------------------


def test_what_was_committed_is_found() -> None:
    core = SmallCore(memory_of(8))
    ticket = core.begin_store("abc")
    assert core.find("abc").tiers == ()
    core.end_store(ticket)
    assert core.find("abc").tiers == (CPU, CPU, CPU)


def test_chunks_can_be_committed_one_by_one_in_any_order() -> None:
    core = SmallCore(memory_of(8))
    ticket = core.begin_store("abc")
    core.commit(ticket, [2])
    assert core.find("abc").tiers == ()
    core.commit(ticket, [0])
    assert core.find("abc").tiers == (CPU,)
    core.commit(ticket, [1])
    assert core.find("abc").tiers == (CPU, CPU, CPU)


def test_committing_what_is_not_open_commits_nothing() -> None:
    core = SmallCore(memory_of(8))
    ticket = core.begin_store("ab")
    with pytest.raises(InvariantBroken, match="not open"):
        core.driver.core.commit(ticket, 0.0, [0, 7])
    assert core.find("ab").tiers == ()
    core.end_store(ticket)


def test_a_chunk_that_is_present_is_refused() -> None:
    core = SmallCore(memory_of(8), disk=store_of(100))
    core.store("abc")
    assert refusals(core.begin_store("abc")) == [Refusal.PRESENT] * 3
    core.empty(CPU)
    assert refusals(core.begin_store("abc")) == [Refusal.PRESENT] * 3  # it lies on disk


def test_second_store_of_a_chunk_is_refused_in_flight() -> None:
    core = SmallCore(memory_of(8))
    core.begin_store("ab")
    second = core.begin_store("abc")
    assert second.refused == [(0, Refusal.IN_FLIGHT), (1, Refusal.IN_FLIGHT)]
    assert accepted(second) == [2]


def test_refusal_breaks_the_chain() -> None:
    core = SmallCore(memory_of(2))
    ticket = core.begin_store("abcd")
    assert accepted(ticket) == [0, 1]
    assert ticket.refused == [(2, Refusal.NO_SLOT), (3, Refusal.CHAIN_BROKEN)]
    assert core.driver.core.stats()["refusals"] == {Refusal.NO_SLOT: 1, Refusal.CHAIN_BROKEN: 1}


def test_a_tail_without_its_beginning_is_refused() -> None:
    core = SmallCore(memory_of(8))
    ticket = core.begin_store("abcd", first=2)
    assert ticket.refused == [(2, Refusal.CHAIN_BROKEN), (3, Refusal.CHAIN_BROKEN)]
    core.store("ab")
    assert accepted(core.begin_store("abcd", first=2)) == [2, 3]


def test_a_beginning_on_a_store_that_is_down_does_not_count() -> None:
    core = SmallCore(memory_of(8), disk=store_of(100))
    core.store("ab")
    core.empty(CPU)
    core.driver.tell(StoreDown(DISK))
    assert refusals(core.begin_store("abc", first=2)) == [Refusal.CHAIN_BROKEN]
    assert accepted(core.begin_store("ab")) == [0, 1]


def test_with_everything_leased_a_store_is_refused_at_once() -> None:
    core = SmallCore(memory_of(3))
    core.store("abc")
    held = core.load("abc")
    assert refusals(core.begin_store("x")) == [Refusal.NO_SLOT]
    core.done(held)
    assert accepted(core.begin_store("x")) == [0]


def test_a_store_does_not_evict_the_chain_it_builds_on() -> None:
    core = SmallCore(memory_of(3, low=1))
    core.store("ab", "x")
    core.use("x")
    ticket = core.begin_store("abcd")
    assert accepted(ticket) == [2]
    core.end_store(ticket)
    assert core.held(CPU, "abcd") == "abc"


def test_a_chunk_being_stored_protects_its_ancestors() -> None:
    core = SmallCore(memory_of(4, low=2))
    core.store("ab")
    ticket = core.begin_store("abc")
    core.store("x", "y", "z")
    core.end_store(ticket)
    assert core.find("abc").tiers == (CPU, CPU, CPU)


def test_aborted_chunks_are_never_found_and_their_slots_come_back() -> None:
    core = SmallCore(memory_of(2))
    core.abort(core.begin_store("ab"))
    core.check()
    assert core.find("a").stopped_by is MissReason.NEVER_SEEN
    assert accepted(core.begin_store("xy")) == [0, 1]


def test_what_is_stored_behind_an_aborted_chunk_goes_first() -> None:
    core = SmallCore(memory_of(4))
    core.store("x")
    ticket = core.begin_store("abc")
    core.commit(ticket, [0, 2])
    core.abort(ticket)
    core.work()
    core.use("x")
    core.store("y", "z")
    assert [core.held(CPU, word) for word in ("abc", "x", "y", "z")] == ["a", "x", "y", "z"]


def test_a_chunk_without_checksums_is_not_kept() -> None:
    core = SmallCore(memory_of(4), disk=store_of(100))
    core.end_store(core.begin_store("ab"))
    seal, _ = core.waiting(Seal)
    core.end(seal, Outcome.FAILED)
    core.work()
    assert core.driver.core.stats()["tiers"][CPU]["failed"] == 1
    assert core.held(CPU, "ab") == "b"
    assert core.find("ab").stopped_by is MissReason.EVICTED


def test_a_commit_makes_its_chunks_the_most_recent() -> None:
    core = SmallCore(memory_of(4))
    ticket = core.begin_store("a")
    core.store("x", "y", "z")
    core.end_store(ticket)
    core.work()
    core.store("w")
    assert [core.held(CPU, word) for word in "axyzw"] == ["a", "", "y", "z", "w"]


def test_loads_outrank_stores() -> None:
    assert (
        Priority.LOAD < Priority.SEAL < Priority.STORE < Priority.DEMOTE < Priority.PROMOTE < Priority.DELETE
    )


def test_a_namespace_keeps_its_shape() -> None:
    core = SmallCore(memory_of(4))
    other = Parts((Part(0, 0, 1),))
    with pytest.raises(LayoutMismatch):
        core.driver.core.attach(NAMESPACE, other, 16)
    with pytest.raises(LayoutMismatch):
        core.driver.core.attach(NAMESPACE, core.specs[0].parts, 32)
    assert core.driver.core.attach(NAMESPACE, core.specs[0].parts, 16) == core.spaces[0]


# --- write-through ------------------------------------------------------------------------------------------------------


def test_what_is_committed_is_written_through_parents_first() -> None:
    core = SmallCore(memory_of(8), disk=store_of(100), remote=store_of(None))
    core.end_store(core.begin_store("abc"))
    core.work()
    assert core.held(DISK, "abc") + core.held(REMOTE, "abc") == "abcabc"
    assert [ref.key for ref in core.driver.records[DISK]] == keys_of("abc")
    assert core.driver.core.stats()["tiers"][DISK]["stored"] == 3


def test_nothing_is_written_before_it_has_its_checksums() -> None:
    core = SmallCore(memory_of(8), disk=store_of(100))
    core.end_store(core.begin_store("ab"))
    assert core.waiting(Write) == []
    core.end(core.waiting(Seal)[0])
    assert len(core.waiting(Write)) == 1


def test_write_through_leases_at_most_its_share() -> None:
    core = SmallCore(memory_of(8), disk=store_of(100), write_lease_share=0.25)
    core.end_store(core.begin_store("abcdef"))
    for seal in core.waiting(Seal):
        core.end(seal)
    assert len(core.waiting(Write)) == 2
    assert core.driver.core.stats()["tiers"][CPU]["write_leased_bytes"] == 2 * 4096
    assert core.driver.core.unfinished == 6
    core.work()
    assert core.held(DISK, "abcdef") == "abcdef"


def test_at_most_so_many_writes_are_under_way() -> None:
    core = SmallCore(memory_of(8), disk=store_of(100, max_queued=3))
    core.end_store(core.begin_store("abcdef"))
    for seal in core.waiting(Seal):
        core.end(seal)
    assert len(core.waiting(Write)) == 3
    assert core.driver.core.stats()["deferred_writes"] == {Refusal.QUEUE_FULL: 1}  # the first in line, once
    core.work()
    assert core.held(DISK, "abcdef") == "abcdef"


def test_at_most_so_many_bytes_are_being_written() -> None:
    disk = StoreSettings(capacity=None, ceiling=None, low=None, max_queued_bytes=2 * 4096)
    core = SmallCore(memory_of(8), disk=disk)
    core.end_store(core.begin_store("abcdef"))
    for seal in core.waiting(Seal):
        core.end(seal)
    assert len(core.waiting(Write)) == 2


def test_a_chunk_whose_old_record_is_being_deleted_waits_and_holds_up_nobody() -> None:
    core = SmallCore(memory_of(8), disk=store_of(100))
    core.store("a")
    core.driver.call(lambda core, now: core.evict(DISK, 0, now))
    core.done(core.load("a"))
    core.end_store(core.begin_store("b"))
    core.end(core.waiting(Seal)[0])
    assert [write.mark.key for write in core.waiting(Write)] == keys_of("b")
    core.work()
    assert core.held(DISK, "a") + core.held(DISK, "b") == "ab"


def test_failed_write_is_retried_at_next_touch() -> None:
    core = SmallCore(memory_of(8), disk=store_of(100))
    core.end_store(core.begin_store("a"))
    core.end(core.waiting(Seal)[0])
    core.end(core.waiting(Write)[0], Outcome.FAILED)
    core.wait(100.0)
    assert core.waiting(Write) == []
    core.use("a")
    core.work()
    assert core.held(DISK, "a") == "a"


@pytest.mark.parametrize("outcome", [Outcome.REFUSED, Outcome.UNAVAILABLE, Outcome.CANCELLED])
def test_a_write_that_was_not_begun_is_tried_again_after_a_pause(outcome: Outcome) -> None:
    core = SmallCore(memory_of(8), disk=store_of(100))
    core.end_store(core.begin_store("a"))
    core.end(core.waiting(Seal)[0])
    core.end(core.waiting(Write)[0], outcome)
    assert core.waiting(Write) == []
    wanted = core.wait(0.0)
    assert wanted is not None
    core.wait(wanted - core.driver.now)
    assert len(core.waiting(Write)) == 1


def test_writes_under_way_when_a_disk_runs_full_make_it_give_back_only_once() -> None:
    core = SmallCore(memory_of(40), disk=store_of(100))
    core.store("abcdefghijklmnopqrst")  # 20 records
    ticket = core.begin_store("12345678")
    core.end_store(ticket)
    for seal in core.waiting(Seal):
        core.end(seal)
    writes = core.waiting(Write)
    assert len(writes) == 8
    for write in writes:
        core.end(write, Outcome.FULL)
        for delete in core.waiting(
            Delete
        ):  # at once: what is on its way out must not hide what was given back
            core.end(delete)
    kept = core.held(DISK, "abcdefghijklmnopqrst")
    assert len(kept) == 20 - 2  # what four chunks take in memory: two records


def test_a_full_store_gives_back_pauses_and_goes_on() -> None:
    core = SmallCore(memory_of(8), disk=store_of(100))
    core.store("abcd", "x")
    core.end_store(core.begin_store("y"))
    core.end(core.waiting(Seal)[0])
    core.end(core.waiting(Write)[0], Outcome.FULL)
    core.work()
    assert core.held(DISK, "abcd") + core.held(DISK, "x") == "abx"
    assert core.held(DISK, "y") == ""
    core.use("abcdxy"[:4])  # reads go on
    core.wait(5.0)
    core.work()
    assert core.held(DISK, "y") == "y"


def test_a_store_without_room_for_a_chunk_is_not_tried() -> None:
    core = SmallCore(memory_of(8), disk=StoreSettings(capacity=4096, ceiling=4096, low=0))
    core.store("a")
    assert core.driver.core.unfinished == 0


def test_a_disk_full_of_other_files_keeps_what_it_has() -> None:
    core = SmallCore(memory_of(8), disk=store_of(3))
    core.store("ab")
    core.roomy = False
    core.driver.tell(SpaceReport(DISK, 8192))
    core.store("x")
    assert core.held(DISK, "ab") + core.held(DISK, "x") == "ax"
    core.driver.tell(SpaceReport(DISK, 3 * 8192 - 4096))
    core.store("y")  # no delete of ours would make room for it
    assert core.held(DISK, "ab") + core.held(DISK, "x") == "ax"
    assert core.held(DISK, "y") == ""


def test_what_is_on_its_way_to_a_store_can_be_asked_for() -> None:
    core = SmallCore(memory_of(8), gpu=memory_of(8), disk=store_of(100), write_lease_share=0.25)
    keys, space = keys_of("abcdef"), core.spaces[0]
    core.end_store(core.begin_store("abcdef"))
    assert core.driver.core.on_their_way(space, keys) == 6  # two copies run, four wait
    for copy in core.waiting(Copy):
        core.end(copy)
    core.driver.call(lambda core, now: core.tick(now))
    assert core.driver.core.on_their_way(space, keys) == 6
    core.work()
    assert core.driver.core.on_their_way(space, keys) == 0
    assert core.driver.core.on_their_way(space, keys_of("xyz")) == 0


def test_stored_bytes_are_those_the_store_reports() -> None:
    core = SmallCore(memory_of(8), disk=store_of(100))
    core.store("abc")
    assert core.driver.core.stored_bytes(DISK) == 3 * 8192


# --- eviction and demotion ----------------------------------------------------------------------------------------------


def test_eviction_never_waits_for_a_stalled_store() -> None:
    core = SmallCore(memory_of(4), disk=store_of(100), write_lease_share=0.25)
    core.end_store(core.begin_store("abcd"))
    for seal in core.waiting(Seal):
        core.end(seal)
    assert len(core.waiting(Write)) == 1  # and it never ends
    assert accepted(core.begin_store("xyz")) == [0, 1, 2]
    stats = core.driver.core.stats()["tiers"][CPU]
    assert (stats["evicted"], stats["dropped_dirty"], stats["demoted"]) == (3, 3, 0)


def test_write_on_evict_writes_when_a_chunk_is_pushed_out() -> None:
    core = SmallCore(memory_of(4, low=2), disk=store_of(100, write=ON_EVICT))
    core.store("abcd")
    assert core.held(DISK, "abcd") == ""
    early = core.begin_store("x")  # room comes when the writes end: this one is too early
    assert refusals(early) == [Refusal.NO_SLOT]
    assert [write.priority for write in core.waiting(Write)] == [Priority.DEMOTE] * 3
    core.work()
    assert core.held(DISK, "abcd") == "bcd"
    assert core.held(CPU, "abcd") == "a"
    assert accepted(core.begin_store("x")) == [0]
    stats = core.driver.core.stats()["tiers"][CPU]
    assert (stats["evicted"], stats["demoted"], stats["dropped_dirty"]) == (3, 3, 0)


def test_a_chunk_is_demoted_to_the_nearest_store_only() -> None:
    core = SmallCore(memory_of(2), disk=store_of(100, write=ON_EVICT), remote=store_of(None, write=ON_EVICT))
    core.store("a")
    done = core.driver.call(lambda core, now: core.evict(CPU, 0, now))
    assert done == Evicted(0, 0, demoting=1)
    core.work()
    assert (core.held(DISK, "a"), core.held(REMOTE, "a")) == ("a", "")


def test_demotions_to_a_store_that_went_down_are_not_waited_for() -> None:
    core = SmallCore(memory_of(4), disk=store_of(100, write=ON_EVICT))
    core.store("a", "b", "c", "d")
    core.driver.call(lambda core, now: core.evict(CPU, 2 * 4096, now))
    assert len(core.waiting(Write)) == 2
    core.driver.tell(StoreDown(DISK))
    assert accepted(core.begin_store("xy")) == [0, 1]
    assert [core.held(CPU, word) for word in "abcd"] == ["a", "b", "", ""]


def test_what_a_store_down_can_not_take_is_dropped() -> None:
    core = SmallCore(memory_of(2), disk=store_of(100, write=ON_EVICT))
    core.store("ab")
    core.driver.tell(StoreDown(DISK))
    assert accepted(core.begin_store("xy")) == [0, 1]
    assert core.driver.core.stats()["tiers"][CPU]["dropped_dirty"] == 2


def test_a_chunk_that_is_hit_while_it_is_demoted_stays() -> None:
    core = SmallCore(memory_of(2, low=0), disk=store_of(100, write=ON_EVICT))
    core.store("ab")
    core.begin_store("x")
    core.done(core.load("ab"))
    core.work()
    assert core.held(CPU, "ab") == "ab"
    assert core.held(DISK, "ab") == "ab"


def test_a_chunk_that_gets_a_child_while_it_is_demoted_stays() -> None:
    core = SmallCore(memory_of(3, low=2), disk=store_of(100, write=ON_EVICT))
    core.store("ab")
    core.driver.call(lambda core, now: core.evict(CPU, 4096, now))
    ticket = core.begin_store("abc")
    core.work()
    core.end_store(ticket)
    assert core.held(CPU, "abc") == "abc"


def test_a_demotion_that_fails_leaves_the_chunk_where_it_is() -> None:
    core = SmallCore(memory_of(2), disk=store_of(100, write=ON_EVICT))
    core.store("ab")
    core.begin_store("x")
    for write in core.waiting(Write):
        core.end(write, Outcome.FAILED)
    assert core.held(CPU, "ab") == "ab"
    assert core.driver.core.stats()["tiers"][CPU]["evicted"] == 0


def test_second_touch_keeps_a_store_from_what_is_used_once() -> None:
    for write in WritePolicy:
        core = SmallCore(memory_of(4), disk=store_of(100, write=write, admission="second_touch"))
        core.store("ab", "x")
        core.use("ab")
        core.work()
        core.empty(CPU)
        assert core.held(DISK, "ab") == "ab", write
        assert core.held(DISK, "x") == "", write
        assert core.find("x").stopped_by is MissReason.NOT_ADMITTED


def test_an_unknown_admission_is_refused() -> None:
    with pytest.raises(KvtiersError, match="second_touch"):
        SmallCore(memory_of(4), disk=store_of(100, admission="third_touch"))


# --- the GPU pool and a disabled CPU tier -------------------------------------------------------------------------------


def test_what_is_stored_on_the_gpu_is_copied_down_within_the_budget() -> None:
    core = SmallCore(memory_of(8), gpu=memory_of(8), disk=store_of(100), write_lease_share=0.25)
    ticket = core.begin_store("abcdef")
    assert {slot.tier for slot in ticket.accepted} == {GPU}
    core.end_store(ticket)
    assert len(core.waiting(Copy)) == 2
    core.work()
    assert core.held(GPU, "abcdef") == core.held(CPU, "abcdef") == core.held(DISK, "abcdef") == "abcdef"


def test_a_copy_down_does_not_push_out_what_nobody_else_has() -> None:
    core = SmallCore(memory_of(4), gpu=memory_of(2), disk=store_of(100))
    core.end_store(core.begin_store("abcdef"))  # two in the pool, four in the arena
    assert core.held(GPU, "abcdef") == "ab"
    assert core.waiting(Copy) == []
    core.work()
    assert core.held(DISK, "abcdef") == "abcdef"
    assert core.driver.core.stats()["tiers"][CPU]["dropped_dirty"] == 0
    alone = SmallCore(memory_of(4), gpu=memory_of(2))
    alone.store("abcdef")
    assert alone.find("abcdef").tiers == (GPU, GPU, CPU, CPU, CPU, CPU)
    assert alone.driver.core.unfinished == 0


def test_what_only_the_gpu_has_is_copied_down_before_it_leaves() -> None:
    core = SmallCore(memory_of(8), gpu=memory_of(2))
    core.end_store(core.begin_store("ab"))
    for copy in core.waiting(Copy):
        core.end(copy, Outcome.FAILED)
    assert core.held(CPU, "ab") == ""
    core.driver.call(lambda core, now: core.evict(GPU, 0, now))
    assert core.held(GPU, "ab") == "ab"
    core.work()
    assert (core.held(GPU, "ab"), core.held(CPU, "ab")) == ("", "ab")


def test_a_copy_down_that_fails_leaves_the_chunk_on_the_gpu() -> None:
    core = SmallCore(memory_of(8), gpu=memory_of(2))
    core.end_store(core.begin_store("a"))
    core.end(core.waiting(Copy)[0], Outcome.FAILED)
    core.driver.call(lambda core, now: core.evict(GPU, 0, now))
    core.end(core.waiting(Copy)[0], Outcome.FAILED)
    assert core.held(GPU, "a") == "a"
    core.empty(GPU)
    assert (core.held(GPU, "a"), core.held(CPU, "a")) == ("", "a")


def test_a_hit_in_the_arena_is_brought_to_the_gpu() -> None:
    core = SmallCore(memory_of(8), gpu=memory_of(2))
    core.store("abc")
    assert core.held(GPU, "abc") == "ab"
    core.empty(GPU)
    core.use("abc")
    assert core.held(GPU, "abc") == "ab"
    assert core.find("abc").tiers == (GPU, GPU, CPU)


def test_with_a_disabled_cpu_tier_the_arena_is_only_a_passage() -> None:
    core = SmallCore(memory_of(0, 4), disk=store_of(100))
    core.store("ab", "cd")
    assert core.driver.core.stats()["tiers"][CPU]["staged_bytes"] == 0
    assert core.find("ab").tiers == (DISK, DISK)
    core.use("ab")
    assert core.find("ab").tiers == (DISK, DISK)
    assert core.driver.core.stats()["tiers"][CPU]["dropped_dirty"] == 0


def test_a_passage_whose_write_fails_loses_the_chunk_and_counts_it() -> None:
    core = SmallCore(memory_of(0, 4), disk=store_of(100))
    core.end_store(core.begin_store("a"))
    core.end(core.waiting(Seal)[0])
    core.end(core.waiting(Write)[0], Outcome.FAILED)
    assert core.find("a").stopped_by is MissReason.EVICTED
    assert core.driver.core.stats()["tiers"][CPU]["dropped_dirty"] == 1


def test_a_passage_to_a_store_that_is_down_is_refused() -> None:
    core = SmallCore(memory_of(0, 4), disk=store_of(100))
    core.driver.tell(StoreDown(DISK))
    assert refusals(core.begin_store("ab")) == [Refusal.TIER_OPEN, Refusal.CHAIN_BROKEN]
    core.driver.tell(StoreUp(DISK))
    assert accepted(core.begin_store("ab")) == [0, 1]


def test_a_passage_leaves_room_for_loads() -> None:
    core = SmallCore(memory_of(0, 8), disk=store_of(100), write_lease_share=0.25)
    assert accepted(core.begin_store("abcd")) == [0, 1]


def test_without_any_tier_a_store_is_refused() -> None:
    core = SmallCore(memory_of(0, 8))
    assert refusals(core.begin_store("ab")) == [Refusal.DISABLED, Refusal.CHAIN_BROKEN]


# --- drain --------------------------------------------------------------------------------------------------------------


def test_drain_writes_out_what_only_memory_holds_parents_first() -> None:
    core = SmallCore(memory_of(8), gpu=memory_of(8), disk=store_of(100, write=ON_EVICT))
    core.store("ab", "x")
    sealing = core.begin_store("abc")
    core.end_store(sealing)
    core.driver.call(lambda core, now: core.drain(now))
    assert core.driver.core.unfinished > 0
    core.work()
    assert core.driver.core.unfinished == 0
    assert core.held(DISK, "abc") + core.held(DISK, "x") == "abcx"
    order = [ref.key for ref in core.driver.records[DISK]]
    assert [order.index(key) for key in keys_of("abc")] == sorted(order.index(key) for key in keys_of("abc"))


def test_drain_also_saves_what_only_the_gpu_has() -> None:
    core = SmallCore(memory_of(8), gpu=memory_of(8), disk=store_of(100))
    core.end_store(core.begin_store("a"))
    core.end(core.waiting(Copy)[0], Outcome.FAILED)
    core.work()
    assert core.held(DISK, "a") == ""
    core.driver.call(lambda core, now: core.drain(now))
    core.work()
    assert core.held(DISK, "a") == "a"


def test_after_a_drain_write_on_evict_is_what_it_was() -> None:
    core = SmallCore(memory_of(8), disk=store_of(100, write=ON_EVICT))
    core.store("a")
    core.driver.call(lambda core, now: core.drain(now))
    core.work()
    core.store("b")
    assert core.held(DISK, "a") + core.held(DISK, "b") == "a"


@pytest.mark.parametrize("outcome", [Outcome.FULL, Outcome.REFUSED])
def test_without_a_cpu_tier_what_a_paused_store_refuses_stays_in_the_gpu_pool_until_it_takes_it(
    outcome: Outcome,
) -> None:
    core = SmallCore(memory_of(0, staging=4), gpu=memory_of(8), disk=store_of(100, write=ON_EVICT))
    core.end_store(core.begin_store("abcd"))
    while not core.waiting(Write):
        core.end(core.waiting(Copy)[0])
    core.end(core.waiting(Write)[0], outcome)  # the store pauses while the others come down
    core.driver.call(lambda c, now: c.drain(now))
    for _ in range(100):
        core.work()
        if not core.driver.core.unfinished:
            break
        wanted = core.wait(0.0)
        assert wanted is not None, "it wants to be called when the pause ends"
        core.wait(max(0.0, wanted - core.driver.now))
    assert core.held(DISK, "abcd") == "abcd"
    assert core.driver.core.stats()["tiers"][CPU]["dropped_dirty"] == 0
