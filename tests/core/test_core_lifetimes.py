"""Who may still write to a slot, what an earlier run left, and what can't be reached. Every step is checked by the oracle."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest

from kvtiers.core.core import Core
from kvtiers.core.messages import (
    Chunkmark,
    Damaged,
    Delete,
    MappersGone,
    Outcome,
    Read,
    Recovered,
    RecoveryEnded,
    Seal,
    SealDone,
    SessionDied,
    SpaceLow,
    SpaceReport,
    Vanished,
    Write,
)
from kvtiers.core.settings import CoreSettings, MemorySettings, StoreSettings
from kvtiers.core.slots import SlotPool
from kvtiers.core.tickets import LoadState
from kvtiers.model.errors import InvariantBroken, KvtiersError, TierDisabled
from kvtiers.model.keys import ChunkKey
from kvtiers.model.layout import PAGE_BYTES
from kvtiers.model.parts import Part, Parts, RecordRef
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier
from kvtiers.testing.small_core import NAMESPACE, SmallCore, keys_of, memory_of, store_of

CPU, DISK, GPU = Tier.CPU, Tier.DISK, Tier.GPU


# --- sessions -----------------------------------------------------------------------------------------------------------


def test_dead_clients_slots_stay_in_quarantine() -> None:
    core = SmallCore(memory_of(3))
    ticket = core.begin_store("ab")
    slots = {offset for slot in ticket.accepted for offset in slot.slots}
    core.die(core.session)
    other = core.open_session()
    taken = core.open_store(other, 0, ChunkKey(NAMESPACE), keys_of("xyz"), 0)
    core.driver.scribble(core.session)  # the watch of the driver would see it if these were somebody's
    core.check()
    assert len(taken.accepted) == 1
    assert not slots & {offset for slot in taken.accepted for offset in slot.slots}
    core.unmap(core.session)
    core.check()
    later = core.open_store(other, 0, ChunkKey(NAMESPACE), keys_of("vw"), 0)
    assert {offset for slot in later.accepted for offset in slot.slots} == slots


def test_a_dead_clients_loads_are_given_back_at_once() -> None:
    core = SmallCore(memory_of(4, 4), disk=store_of(100))
    core.store("abc")
    core.empty(CPU)
    waiting = core.load("ab")
    core.work()
    reading = core.load("abc")
    core.die(core.session)
    core.check()
    assert (waiting.state, reading.state) == (LoadState.RELEASED, LoadState.RELEASED)
    core.work()
    assert core.driver.core.stats()["tiers"][CPU]["leased_chunks"] == 0


def test_what_a_dead_client_had_committed_stays() -> None:
    core = SmallCore(memory_of(4))
    core.store("a")
    core.unmap(core.session)
    core.session = core.open_session()
    assert core.find("a").tiers == (CPU,)


def test_a_dead_client_can_neither_commit_nor_store_nor_load() -> None:
    core = SmallCore(memory_of(4))
    ticket = core.begin_store("a")
    core.die(core.session)
    for call in (
        lambda: core.driver.core.commit(ticket, 0.0),
        lambda: core.driver.core.open_load(core.session, core.spaces[0], keys_of("a"), 0.0, 1.0),
        lambda: core.driver.core.open_store(core.session, core.spaces[0], ChunkKey(b""), keys_of("a"), 0.0),
    ):
        with pytest.raises(InvariantBroken, match="not open"):
            call()
    core.driver.core.abort(ticket, 0.0)  # its slots stay in quarantine
    core.check()


def test_news_of_unknown_sessions_changes_nothing() -> None:
    core = SmallCore(memory_of(4))
    session = core.open_session()
    for _ in range(2):
        core.driver.tell(SessionDied(session))
        core.driver.tell(MappersGone(session))
    core.sessions.remove(session)
    core.check()


def test_releasing_twice_is_harmless() -> None:
    core = SmallCore(memory_of(4))
    core.store("a")
    ticket = core.load("a")
    core.done(ticket)
    core.driver.release(ticket)
    core.check()


# --- completions --------------------------------------------------------------------------------------------------------


def test_an_operation_completes_exactly_once() -> None:
    core = SmallCore(memory_of(4))
    core.end_store(core.begin_store("a"))
    (seal,) = core.waiting(Seal)
    core.end(seal)
    with pytest.raises(InvariantBroken, match="twice"):
        core.driver.core.complete(SealDone(seal.op, Outcome.OK, (b"s" * 16,)), 0.0)


def test_a_completion_of_the_wrong_kind_is_a_bug() -> None:
    core = SmallCore(memory_of(4, 4), disk=store_of(100))
    core.store("a")
    core.empty(CPU)
    core.load("a")
    (read,) = core.waiting(Read)
    with pytest.raises(InvariantBroken, match="does not answer"):
        core.driver.core.complete(SealDone(read.op, Outcome.OK), 0.0)


# --- what an earlier run left -------------------------------------------------------------------------------------------


def test_chunks_of_an_earlier_run_are_found_in_whatever_order_they_are_told() -> None:
    for order in permutations(range(3)):
        core = SmallCore(memory_of(8, 4), disk=store_of(100))
        core.store("abc")

        def arrange(refs: list[RecordRef], order: tuple[int, ...] = order) -> None:
            refs[:] = [refs[place] for place in order]

        core.restart(core.settings, arrange)
        core.session = core.open_session()
        core.recover(3)
        core.check()
        assert core.find("abc").tiers == (DISK,) * 3
        core.use("abc")
        assert core.held(CPU, "abc") == "abc"


def test_recovery_keeps_the_order_of_use() -> None:
    core = SmallCore(memory_of(8, 4), disk=store_of(4))
    core.store("a", "b", "c")
    core.use("a")
    order = list(core.driver.core.order_of_use(DISK))
    assert [key for _, key, _ in order] == [*keys_of("b"), *keys_of("c"), *keys_of("a")]
    wanted = [RecordRef(namespace, key, 0) for namespace, key, _ in order]

    def by_use(refs: list[RecordRef]) -> None:
        refs[:] = wanted[::-1]  # the oracle tells from the end

    core.restart(core.settings, by_use)
    core.session = core.open_session()
    core.recover(9)
    core.store("x", "y")
    assert [core.held(DISK, word) for word in "abcxy"] == ["a", "", "c", "x", "y"]


def test_partial_chunk_of_an_earlier_run_is_deleted() -> None:
    core = SmallCore(memory_of(8, 4, parts=2), disk=store_of(100, parts=2), parts=2)
    core.store("ab")
    del core.driver.records[DISK][RecordRef(NAMESPACE, keys_of("ab")[1], 0)]
    core.restart(core.settings, lambda refs: None)
    core.session = core.open_session()
    core.recover(1)
    assert core.find("ab").stopped_by in (MissReason.GROUP_STATE_MISSING, MissReason.NEVER_SEEN)
    core.recover(9)
    assert core.find("ab") == ((DISK,), 0, MissReason.GROUP_STATE_MISSING)
    core.work()
    assert {ref.key for ref in core.driver.records[DISK]} == {keys_of("ab")[0]}
    core.store("ab")
    assert core.held(DISK, "ab") == "ab"


def test_a_partial_chunk_that_can_not_be_deleted_is_tried_again_first() -> None:
    core = SmallCore(memory_of(8, 4, parts=2), disk=store_of(2, parts=2), parts=2)
    core.store("a")
    del core.driver.records[DISK][RecordRef(NAMESPACE, keys_of("a")[0], 1)]
    core.restart(core.settings, lambda refs: None)
    core.session = core.open_session()
    core.recover(9)
    core.end(core.waiting(Delete)[0], Outcome.FAILED)
    core.wait(1.0)
    core.store("x", "y")
    assert [core.held(DISK, word) for word in "axy"] == ["", "x", "y"]


def test_a_record_told_twice_counts_once() -> None:
    core = SmallCore(memory_of(8, 4), disk=store_of(100))
    mark = Chunkmark(NAMESPACE, keys_of("a")[0], ChunkKey(NAMESPACE), 1, 0, 16)
    for _ in range(3):
        core.driver.tell(Recovered(DISK, mark, 0, 8192))
    assert core.driver.core.stored_bytes(DISK) == 8192
    assert core.driver.core.check_integrity() == []


def test_a_record_with_more_parts_than_the_namespace_has_is_not_whole() -> None:
    core = SmallCore(memory_of(8, 4, parts=2), disk=store_of(100, parts=2), parts=2)
    mark = Chunkmark(NAMESPACE, keys_of("a")[0], ChunkKey(NAMESPACE), 1, 0, 16)
    core.driver.tell(Recovered(DISK, mark, 0, 8192))
    assert core.find("a").stopped_by is MissReason.GROUP_STATE_MISSING


def test_a_record_that_names_itself_as_its_parent_does_no_harm() -> None:
    core = SmallCore(memory_of(8, 4), disk=store_of(100))
    key = keys_of("a")[0]
    core.driver.tell(Recovered(DISK, Chunkmark(NAMESPACE, key, key, 1, 16, 16), 0, 8192))
    core.driver.tell(RecoveryEnded(DISK))
    assert core.driver.core.check_integrity() == []
    core.empty(DISK)
    assert core.driver.core.stored_bytes(DISK) == 0


def test_what_an_earlier_run_left_without_its_beginning_goes_first() -> None:
    core = SmallCore(memory_of(8, 4), disk=store_of(4))
    core.store("ab", "x")
    del core.driver.records[DISK][RecordRef(NAMESPACE, keys_of("ab")[0], 0)]
    core.restart(core.settings, lambda refs: refs.sort(key=lambda ref: ref.key == keys_of("x")[0]))
    core.session = core.open_session()
    core.recover(9)  # x is told first, so it is the oldest
    core.store("y", "z", "w")
    assert [core.held(DISK, word) for word in ("ab", "x", "y", "z", "w")] == ["", "x", "y", "z", "w"]


def test_a_smaller_disk_than_before_is_brought_below_its_ceiling() -> None:
    core = SmallCore(memory_of(8, 4), disk=store_of(100), max_hold=2)
    core.store("abcdefgh")
    smaller = SmallCore(memory_of(8, 4), disk=store_of(3), max_hold=2).settings
    core.restart(smaller, lambda refs: None)
    core.recover(99)
    for _ in range(4):
        core.wait(1.0)
        core.work()
    assert core.driver.core.stored_bytes(DISK) <= 3 * 8192


def test_chunks_that_claim_to_continue_each_other_make_no_ring() -> None:
    """Hashes can't, whoever sends keys as it likes can: a ring would never be evicted, and a walk along it never end."""
    first, child, parent = keys_of("xcp")
    core = Core(CoreSettings(cpu=memory_of(8, 4), gpu=None, disk=store_of(50), max_hold=256))
    session = core.open_session()
    space = core.attach(NAMESPACE, Parts([Part(0, 0, PAGE_BYTES)]), 16, session)
    core.tell(Recovered(DISK, Chunkmark(NAMESPACE, child, parent, 1, 16, 16), 0, 8192), 0.0)
    ticket = core.open_store(session, space, ChunkKey(b"r" * 32), [first, child, parent], 1.0)
    assert [slot.index for slot in ticket.accepted] == [0, 2]
    core.commit(ticket, 1.0)
    chunks = core._space(space).chunks
    assert chunks[child].parent is chunks[parent]
    assert chunks[parent].parent is None
    assert core.check_integrity() == []


# --- disk space ---------------------------------------------------------------------------------------------------------


def test_a_delete_that_fails_is_still_counted_and_goes_first() -> None:
    core = SmallCore(memory_of(8, 4), disk=store_of(2))
    core.store("a", "b")
    core.use("a")
    core.end_store(core.begin_store("c"))
    core.end(core.waiting(Seal)[0])
    (delete,) = core.waiting(Delete)
    assert delete.mark.key == keys_of("b")[0]
    core.end(delete, Outcome.FAILED)
    assert core.driver.core.stored_bytes(DISK) == 2 * 8192
    assert core.waiting(Delete) == []  # no spinning
    core.wait(1.0)
    assert [again.mark.key for again in core.waiting(Delete)] == keys_of("b")
    core.work()
    assert core.held(DISK, "c") == "c"


@pytest.mark.parametrize("outcome", [Outcome.CORRUPT, Outcome.MISSING])
def test_what_was_found_bad_is_not_to_be_had_also_if_it_cant_be_deleted(outcome: Outcome) -> None:
    core = SmallCore(memory_of(8, 4), disk=store_of(4))
    core.store("a", "b")
    core.empty(CPU)
    core.load("a")
    core.end(core.waiting(Read)[0], outcome)
    core.end(core.waiting(Delete)[0], Outcome.FAILED)
    assert core.held(DISK, "a") == ""
    assert core.driver.core.stored_bytes(DISK) == 2 * 8192  # some of it may still lie there
    assert core.driver.core.check_integrity() == []
    assert sum(core.driver.core.parts_in_doubt(DISK)) == 1
    core.wait(1.0)
    core.store("a")  # what lies there is deleted first
    core.work()
    assert core.held(DISK, "a") == "a"
    assert sum(core.driver.core.parts_in_doubt(DISK)) == 0


def test_bytes_count_until_they_are_really_gone() -> None:
    core = SmallCore(memory_of(8, 4), disk=store_of(2))
    core.store("a", "b")
    core.end_store(core.begin_store("c"))
    core.end(core.waiting(Seal)[0])
    assert core.waiting(Write) == []
    assert core.driver.core.stored_bytes(DISK) == 2 * 8192
    core.end(core.waiting(Delete)[0])
    assert len(core.waiting(Write)) == 1


def test_what_is_being_read_is_not_deleted() -> None:
    core = SmallCore(memory_of(8, 4), disk=store_of(2))
    core.store("a", "b")
    core.empty(CPU)
    core.load("a")
    core.driver.call(lambda core, now: core.evict(DISK, 0, now))
    assert [delete.mark.key for delete in core.waiting(Delete)] == keys_of("b")


def test_low_space_gives_back_and_stops_writing_for_a_while() -> None:
    core = SmallCore(memory_of(8, 4), disk=store_of(100))
    core.store("a", "b", "c")
    core.driver.tell(SpaceLow(DISK, 10_000))
    core.work()
    assert core.driver.core.stored_bytes(DISK) == 8192
    assert core.driver.core.stats()["tiers"][DISK]["evicted"] == 2
    core.store("d")
    assert core.held(DISK, "d") == ""
    core.wait(5.0)
    core.work()
    assert core.held(DISK, "d") == "d"


def test_foreign_files_count_against_the_capacity() -> None:
    core = SmallCore(memory_of(8, 4), disk=store_of(4))
    core.roomy = False
    core.store("a", "b", "c")
    core.driver.tell(SpaceReport(DISK, 3 * 8192))
    core.wait(0.0)
    core.work()
    assert core.driver.core.stored_bytes(DISK) == 8192
    assert core.driver.core.stats()["tiers"][DISK]["usage_bytes"] == 4 * 8192


def test_a_record_that_vanished_is_a_miss_and_is_stored_again() -> None:
    core = SmallCore(memory_of(8, 4), disk=store_of(100))
    core.store("a")
    core.empty(CPU)
    core.driver.records[DISK].clear()
    core.driver.tell(Vanished(DISK, NAMESPACE, keys_of("a")[0]))
    core.work()
    assert core.find("a").stopped_by is MissReason.EVICTED
    core.store("a")
    assert core.held(DISK, "a") == "a"


def test_a_chunk_lost_from_memory_while_its_write_fails_is_gone() -> None:
    core = SmallCore(memory_of(8, 4), disk=store_of(100))
    core.end_store(core.begin_store("a"))
    core.end(core.waiting(Seal)[0])
    core.driver.tell(Damaged(CPU, NAMESPACE, keys_of("a")[0]))
    assert core.find("a").stopped_by is MissReason.IN_FLIGHT
    core.end(core.waiting(Write)[0], Outcome.FAILED)
    assert core.find("a").stopped_by is MissReason.EVICTED
    core.store("a")
    assert core.held(DISK, "a") == "a"


def test_damage_reported_on_disk_deletes_the_chunk() -> None:
    core = SmallCore(memory_of(8, 4), disk=store_of(100))
    core.store("a")
    core.empty(CPU)
    core.driver.tell(Damaged(DISK, NAMESPACE, keys_of("a")[0]))
    assert core.find("a").stopped_by is MissReason.CORRUPT
    core.work()
    assert core.find("a").stopped_by is MissReason.CORRUPT
    assert core.driver.core.stats()["tiers"][DISK]["corrupt"] == 1
    assert not core.driver.records[DISK]


# --- chains -------------------------------------------------------------------------------------------------------------


def test_unreachable_descendants_go_first() -> None:
    core = SmallCore(memory_of(5))
    core.store("x", "abcd")
    core.driver.tell(Damaged(CPU, NAMESPACE, keys_of("ab")[1]))
    core.work()
    core.store("y", "z")
    assert [core.held(CPU, word) for word in ("x", "abcd", "y", "z")] == ["x", "ac", "y", "z"]


def test_what_was_unreachable_and_is_used_again_is_as_good_as_others() -> None:
    core = SmallCore(memory_of(4))
    core.store("x", "abc")
    core.driver.tell(Damaged(CPU, NAMESPACE, keys_of("a")[0]))
    core.store("abc")
    core.store("y")
    assert [core.held(CPU, word) for word in ("x", "abc", "y")] == ["", "abc", "y"]


def test_a_long_unreachable_tail_is_let_go_a_few_at_a_time() -> None:
    word = "abcdefghijklmnop"
    core = SmallCore(memory_of(17), max_hold=4)
    core.store("x", word)
    core.driver.tell(Damaged(CPU, NAMESPACE, keys_of("a")[0]))
    for _ in range(8):
        core.wait(0.1)
    core.use("x")
    core.driver.call(lambda core, now: core.evict(CPU, 13 * 4096, now))
    assert core.held(CPU, "x") == "x"
    assert core.held(CPU, word) == "bcdefghijklm"


def test_many_continuations_are_let_go_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    core = SmallCore(memory_of(16), max_hold=4)
    core.store("x", *("a" + letter for letter in "bcdefghijk"))
    raw, now = core.driver.core, core.driver.now
    policy = type(raw._state.cpu.policy)
    expedite, steps = policy.expedite, [0]

    def counted(self: Any, key: Any) -> None:
        steps[-1] += 1
        expedite(self, key)

    monkeypatch.setattr(policy, "expedite", counted)
    raw.tell(Damaged(CPU, NAMESPACE, keys_of("a")[0]), now)
    for _ in range(4):
        steps.append(0)
        raw.tick(now)
    assert steps == [4, 4, 2, 0, 0]
    core.use("x")
    core.driver.call(lambda core, now: core.evict(CPU, 4096, now))
    core.driver.call(lambda core, now: core.evict(CPU, 4096, now))
    core.driver.call(lambda core, now: core.evict(CPU, 4096, now))
    assert core.held(CPU, "x") == "x"


def test_chains_die_from_their_end_on_disk_too() -> None:
    core = SmallCore(memory_of(8, 4), disk=store_of(4, low=3))
    core.store("abcd", "x")
    assert core.held(DISK, "abcd") == "ab"


def test_idle_chunks_are_counted_and_go_first() -> None:
    idle = MemorySettings(6 * 4096, 2 * 4096, 2 * 4096, probation_share=0.0, idle_after_s=10.0)
    core = SmallCore(idle, disk=store_of(100))
    core.store("p")
    core.empty(CPU)
    core.store("a")
    core.wait(9.0)
    core.use("p")  # on probation, but not idle
    assert core.driver.core.stats()["tiers"][CPU]["offloadable_bytes"] == 0
    core.wait(1.0)
    assert core.driver.core.stats()["tiers"][CPU]["offloadable_bytes"] == 4096
    core.store("b")
    assert [core.held(CPU, word) for word in "pab"] == ["p", "", "b"]


def test_evicting_a_disabled_tier_is_refused() -> None:
    core = SmallCore(memory_of(8))
    for tier in (GPU, DISK):
        with pytest.raises(TierDisabled, match="disabled"):
            core.driver.core.evict(tier, 0, 0.0)


def test_one_call_evicts_at_most_so_many() -> None:
    core = SmallCore(memory_of(8), max_hold=3)
    core.store("abcdefgh")
    done = core.driver.call(lambda core, now: core.evict(CPU, 0, now))
    assert done.chunks == 3
    assert core.held(CPU, "abcdefgh") == "abcde"


# --- settings, slots ----------------------------------------------------------------------------------------------------


def test_watermarks_out_of_order_are_refused() -> None:
    with pytest.raises(KvtiersError, match="low"):
        MemorySettings(capacity=10, ceiling=5, low=6)
    with pytest.raises(KvtiersError, match="low"):
        StoreSettings(capacity=10, ceiling=11, low=0)
    with pytest.raises(KvtiersError, match="None"):
        StoreSettings(capacity=10, ceiling=None, low=None)


def test_slots_of_several_sizes_never_overlap() -> None:
    pool = SlotPool(10 * 4096)
    chunks = [pool.take((4096, 8192)) for _ in range(4)]
    assert chunks[3] is None
    assert pool.check_integrity() == []
    for chunk in chunks[:3]:
        assert chunk is not None
        pool.give(chunk)
    assert pool.taken_bytes == 0
    again = pool.take((8192, 8192, 8192))
    assert again is not None
    assert pool.taken == frozenset(again)
    assert pool.check_integrity() == []


def test_a_chunk_gets_all_its_slots_or_none() -> None:
    pool = SlotPool(3 * 4096)
    assert pool.take((4096, 4096, 8192)) is None
    assert pool.taken_bytes == 0
    assert pool.take((4096, 4096)) is not None


def test_giving_a_slot_back_twice_is_a_bug() -> None:
    pool = SlotPool(4096)
    slots = pool.take((4096,))
    assert slots is not None
    pool.give(slots)
    with pytest.raises(InvariantBroken, match="twice"):
        pool.give(slots)
