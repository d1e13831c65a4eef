"""An eviction that somebody asked for loses nothing that a slower tier takes, now or later."""

from __future__ import annotations

import pytest

from kvtiers.core.eviction import Evicted
from kvtiers.core.messages import Copy, Delete, Outcome, Read, Seal, SpaceReport, StoreDown, Write
from kvtiers.core.settings import WritePolicy
from kvtiers.model.tiers import Tier
from kvtiers.testing.small_core import SmallCore, memory_of, store_of

GPU, CPU, DISK = Tier.GPU, Tier.CPU, Tier.DISK
CHUNK = 4096


def evict(core: SmallCore, tier: Tier, chunks: int) -> Evicted:
    """Down to so many chunks."""
    done = core.driver.call(lambda c, now: c.evict(tier, chunks * CHUNK, now))
    core.check()
    return done


def dropped_dirty(core: SmallCore, tier: Tier = CPU) -> int:
    dropped: int = core.driver.core.stats()["tiers"][tier]["dropped_dirty"]
    return dropped


def slow_core(policy: WritePolicy, *, chunks: int = 8, disk: int = 100) -> SmallCore:
    """Two writes at a time; "abcdef" lies sealed in the arena and has not been written."""
    core = SmallCore(memory_of(chunks), disk=store_of(disk, write=policy), write_lease_share=2 / chunks)
    core.end_store(core.begin_store("abcdef"))
    for seal in core.waiting(Seal):
        core.end(seal)
    return core


@pytest.mark.parametrize("policy", list(WritePolicy))
def test_what_waits_for_a_slow_disk_stays_until_it_is_there(policy: WritePolicy) -> None:
    core = slow_core(policy)
    assert evict(core, CPU, 0) == Evicted(0, 0, demoting=6)
    assert core.held(CPU, "abcdef") == "abcdef"
    core.work()
    assert (core.held(DISK, "abcdef"), core.held(CPU, "abcdef")) == ("abcdef", "")
    assert dropped_dirty(core) == 0


@pytest.mark.parametrize("policy", list(WritePolicy))
def test_no_more_leaves_than_was_asked_for(policy: WritePolicy) -> None:
    core = slow_core(policy)
    assert evict(core, CPU, 2).demoting == 4
    core.work()
    assert core.held(CPU, "abcdef") == "ab"
    assert dropped_dirty(core) == 0


@pytest.mark.parametrize("policy", list(WritePolicy))
def test_what_can_go_all_at_once_goes_by_and_by(policy: WritePolicy) -> None:
    """A leaf that was waited for held up more than one call may evict: the core asks to be called again, until it is done."""
    core = SmallCore(memory_of(8), disk=store_of(100, write=policy), write_lease_share=0.25, max_hold=2)
    core.end_store(core.begin_store("abcdef"))
    for seal in core.waiting(Seal):
        core.end(seal)
    while evict(core, CPU, 0).more:
        pass
    core.work()
    while (wanted := core.wait(0.0)) is not None:
        assert wanted == core.driver.now
        core.work()
    assert (core.held(DISK, "abcdef"), core.held(CPU, "abcdef")) == ("abcdef", "")


@pytest.mark.parametrize("policy", list(WritePolicy))
def test_what_is_stored_after_it_stays(policy: WritePolicy) -> None:
    core = slow_core(policy)
    evict(core, CPU, 0)
    store = core.begin_store("xy")
    core.end_store(store)
    core.work()
    assert (core.held(CPU, "abcdef"), core.held(CPU, "xy")) == ("", "xy")
    core.store("zz")
    assert core.held(CPU, "zz") == "zz"


def test_a_store_need_not_wait_for_what_is_to_leave() -> None:
    core = slow_core(WritePolicy.WRITE_THROUGH, chunks=6)
    evict(core, CPU, 0)
    assert [slot.index for slot in core.begin_store("xy").accepted] == [0, 1]
    assert dropped_dirty(core) == 2


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.REFUSED, Outcome.FULL])
def test_what_fails_to_be_written_stays(outcome: Outcome) -> None:
    core = slow_core(WritePolicy.WRITE_ON_EVICT)
    evict(core, CPU, 0)
    for write in core.waiting(Write):
        core.end(write, outcome)
    core.work()
    stays = [letter for letter in "abcdef" if letter not in core.held(DISK, "abcdef")]
    assert all(letter in core.held(CPU, "abcdef") for letter in stays)
    assert len(core.held(CPU, "abcdef")) >= 2
    assert dropped_dirty(core) == 0


def test_a_disk_that_goes_down_on_the_way_loses_nothing() -> None:
    core = slow_core(WritePolicy.WRITE_ON_EVICT)
    evict(core, CPU, 0)
    core.driver.tell(StoreDown(DISK))
    for write in core.waiting(Write):
        core.end(write, Outcome.UNAVAILABLE)
    core.work()
    assert core.held(CPU, "abcdef") == "abcdef"
    assert dropped_dirty(core) == 0


def test_without_a_tier_that_could_take_it_a_chunk_is_dropped() -> None:
    alone = SmallCore(memory_of(8))
    alone.store("abc")
    assert evict(alone, CPU, 0).chunks == 3
    down = slow_core(WritePolicy.WRITE_ON_EVICT)
    down.driver.tell(StoreDown(DISK))
    assert evict(down, CPU, 0) == Evicted(6, 6 * CHUNK, 0)
    full = slow_core(WritePolicy.WRITE_ON_EVICT)
    full.driver.tell(SpaceReport(DISK, 100 * 2 * CHUNK))
    assert evict(full, CPU, 0) == Evicted(6, 6 * CHUNK, 0)
    assert [dropped_dirty(core) for core in (alone, down, full)] == [3, 6, 6]


def test_a_disk_that_first_has_to_make_room_is_waited_for() -> None:
    core = SmallCore(memory_of(8), disk=store_of(4, low=2, write=WritePolicy.WRITE_ON_EVICT))
    core.store("wxyz")
    core.empty(CPU)
    assert core.held(DISK, "wxyz") == "wxyz"
    core.store("ab")
    done = evict(core, CPU, 0)
    assert (done.chunks, done.demoting) == (0, 2)
    core.work()
    core.wait(1.0)
    core.work()
    assert (core.held(DISK, "ab"), core.held(CPU, "ab"), dropped_dirty(core)) == ("ab", "", 0)


def test_an_eviction_is_unfinished_while_the_disk_pauses() -> None:
    """So that `flush` behind it waits for what it demotes."""
    core = slow_core(WritePolicy.WRITE_ON_EVICT)
    core.store("z")
    evict(core, CPU, 6)
    core.work()
    assert evict(core, DISK, 0).chunks == 1
    core.complete(next(iter(core.driver.pending)), Outcome.FAILED)  # a delete that fails makes it pause
    assert evict(core, CPU, 0) == Evicted(0, 0, demoting=6)
    assert core.driver.core.unfinished == 1
    core.wait(1.0)
    core.work()
    assert core.driver.core.unfinished == 0
    assert (core.held(DISK, "abcdef"), core.held(CPU, "abcdef")) == ("abcdef", "")


def test_the_gpu_pool_waits_for_a_slow_arena_and_a_slow_disk() -> None:
    core = SmallCore(
        memory_of(4),
        gpu=memory_of(8),
        disk=store_of(100, write=WritePolicy.WRITE_ON_EVICT),
        write_lease_share=0.25,
    )
    core.end_store(core.begin_store("abcdefgh"))
    assert evict(core, GPU, 0).demoting == 8
    core.work()
    assert (core.held(GPU, "abcdefgh"), dropped_dirty(core), dropped_dirty(core, GPU)) == ("", 0, 0)
    assert sorted({*core.held(DISK, "abcdefgh"), *core.held(CPU, "abcdefgh")}) == list("abcdefgh")


def test_a_delete_that_fails_has_evicted_nothing() -> None:
    core = SmallCore(memory_of(8), disk=store_of(100))
    core.store("ab")
    assert evict(core, DISK, 0).chunks == 2
    first, second = core.driver.pending
    core.complete(first, Outcome.FAILED)
    core.complete(second, Outcome.OK)
    stats = core.driver.core.stats()["tiers"][DISK]
    assert (stats["evicted"], stats["failed"]) == (1, 1)


def test_writes_that_can_never_fit_are_given_up() -> None:
    """A disk that foreign files fill above the ceiling: nothing waits for it, and the counter says why."""
    core = SmallCore(memory_of(8), disk=store_of(100), write_lease_share=0.25)
    core.end_store(core.begin_store("abcd"))
    for seal in core.waiting(Seal):
        core.end(seal)
    core.driver.tell(SpaceReport(DISK, 100 * 2 * CHUNK))  # two are being written, two wait
    core.work()
    core.store("xy")
    assert core.driver.core.unfinished == 0
    assert core.driver.core.stats()["abandoned_writes"] == {"no_slot": 4}
    core.driver.tell(SpaceReport(DISK, 0))
    core.use("xy")  # there is room again: the next use writes them
    assert core.held(DISK, "xy") == "xy"


def test_what_no_tier_will_ever_take_is_not_waited_for() -> None:
    core = SmallCore(memory_of(4), gpu=memory_of(4), disk=store_of(0))
    core.end_store(core.begin_store("a"))
    evict(core, CPU, 0)  # the chunk is on its way down, so there is something to wait for
    core.work()
    core.wait(1.0)
    assert core.driver.core.unfinished == 0


# --- of a store -----------------------------------------------------------------------------------------------------


def many_on_disk(chunks: int = 40, *, max_queued: int = 1000) -> SmallCore:
    """That many chains of one chunk, on the disk only."""
    core = SmallCore(memory_of(8, 4), disk=store_of(100, max_queued=max_queued))
    for number in range(chunks):
        core.store(chr(ord("A") + number))
    core.empty(CPU)
    return core


def on_disk(core: SmallCore) -> int:
    entries: int = core.driver.core.stats()["tiers"][DISK]["entries"]
    return entries


def test_more_records_than_the_queue_takes_are_deleted_one_after_the_other() -> None:
    core = many_on_disk(max_queued=10)
    done = evict(core, DISK, 0)
    assert (done.chunks, done.more) == (40, False)
    assert len(core.waiting(Delete)) == 5, "half of the queue"
    assert core.driver.core.unfinished, "so that `flush` behind it waits"
    core.work()
    assert (on_disk(core), core.driver.core.unfinished) == (0, 0)


def test_of_a_store_no_more_goes_than_was_asked_for() -> None:
    core = many_on_disk(max_queued=4)
    held = core.driver.core.stored_bytes(DISK)
    done = core.driver.call(lambda c, now: c.evict(DISK, held // 4, now))
    core.work()
    assert (on_disk(core), done.chunks, done.nbytes) == (10, 30, held - held // 4)


def test_what_is_written_while_a_store_is_emptied_stays() -> None:
    core = many_on_disk(max_queued=4)
    evict(core, DISK, 0)
    core.end_store(core.begin_store("z"))
    core.work()
    assert (on_disk(core), core.held(DISK, "z"), core.driver.core.unfinished) == (1, "z", 0)


def test_deletes_that_a_full_queue_refuses_are_tried_again_and_are_no_failures() -> None:
    core = many_on_disk(max_queued=10)
    evict(core, DISK, 0)
    for delete in core.waiting(Delete):
        core.end(delete, Outcome.REFUSED)
    assert on_disk(core) == 40
    for _ in range(3):
        core.wait(1.0)
        core.work()
    assert (on_disk(core), core.driver.core.unfinished) == (0, 0)
    assert core.driver.core.stats()["tiers"][DISK]["failed"] == 0


def test_a_store_that_can_not_delete_is_not_asked_for_ever() -> None:
    core = many_on_disk(max_queued=10)
    evict(core, DISK, 0)
    for delete in core.waiting(Delete):
        core.end(delete, Outcome.FAILED)
    core.wait(1.0)
    assert (on_disk(core), core.driver.core.unfinished) == (40, 0)
    assert core.driver.core.stats()["tiers"][DISK]["failed"] == 5


def test_what_is_being_read_goes_when_that_has_ended() -> None:
    core = many_on_disk(chunks=3)
    load = core.load("A")
    read = core.waiting(Read)[0]
    assert evict(core, DISK, 0).chunks == 3
    for delete in core.waiting(Delete):
        core.end(delete)
    assert (on_disk(core), core.driver.core.unfinished) == (1, 0), "`flush` does not wait for whoever reads"
    core.end(read)
    core.work()
    assert (on_disk(core), core.driver.core.unfinished) == (0, 0)
    core.done(load)


# --- what waits for more than a slow disk ---------------------------------------------------------------------------


def test_an_eviction_outlasts_a_full_disk() -> None:
    """Nothing of ours lies there, so nothing can be deleted for it: what waits goes when somebody else has made room."""
    core = slow_core(WritePolicy.WRITE_ON_EVICT)
    evict(core, CPU, 0)
    for _ in range(3):
        for write in core.waiting(Write):
            core.end(write, Outcome.FULL)
        assert core.held(CPU, "abcdef") == "abcdef"
        assert core.driver.core.unfinished
        core.wait(10.0)
    core.work()
    assert (core.held(DISK, "abcdef"), core.held(CPU, "abcdef"), dropped_dirty(core)) == ("abcdef", "", 0)
    assert core.driver.core.unfinished == 0


def test_a_disk_that_was_full_is_believed_to_have_room_again_after_its_pause() -> None:
    core = slow_core(WritePolicy.WRITE_ON_EVICT)
    evict(core, CPU, 4)
    for write in core.waiting(Write):
        core.end(write, Outcome.FULL)
    core.wait(60.0)
    assert evict(core, CPU, 0).chunks == 0
    core.work()
    assert (core.held(DISK, "abcdef"), dropped_dirty(core)) == ("abcdef", 0)


def test_chunks_that_are_being_sealed_go_when_that_is_done() -> None:
    core = SmallCore(memory_of(8), disk=store_of(100))
    core.end_store(core.begin_store("abcdef"))
    assert len(core.waiting(Seal)) == 6
    assert evict(core, CPU, 0).demoting == 6
    core.work()
    assert (core.held(DISK, "abcdef"), core.held(CPU, "abcdef")) == ("abcdef", "")


def test_chunks_that_are_being_promoted_go_when_that_is_done() -> None:
    core = SmallCore(memory_of(8), gpu=memory_of(8), disk=store_of(100))
    core.store("abc")
    core.empty(GPU)
    core.done(core.load("abc"))
    assert len(core.waiting(Copy)) == 3, "on their way up"
    assert evict(core, CPU, 0).demoting == 3
    core.work()
    assert (core.held(GPU, "abc"), core.held(CPU, "abc")) == ("abc", "")


@pytest.mark.parametrize("outcome", [Outcome.FULL, Outcome.REFUSED])
def test_what_was_on_its_way_and_came_back_goes_later(outcome: Outcome) -> None:
    """All of it could begin to leave at once, so nothing was owed when the writes ended badly."""
    core = SmallCore(
        memory_of(8), disk=store_of(100, write=WritePolicy.WRITE_ON_EVICT), write_lease_share=1.0
    )
    core.end_store(core.begin_store("abcdef"))
    for seal in core.waiting(Seal):
        core.end(seal)
    assert evict(core, CPU, 0).demoting == 6
    for write in core.waiting(Write):
        core.end(write, outcome)
    assert core.held(CPU, "abcdef") == "abcdef"
    assert core.driver.core.unfinished
    for _ in range(3):
        core.wait(10.0)
        core.work()
    assert (core.held(DISK, "abcdef"), core.held(CPU, "abcdef"), dropped_dirty(core)) == ("abcdef", "", 0)
    assert core.driver.core.unfinished == 0


def test_emptying_a_store_that_foreign_files_fill_takes_nothing_that_comes_later() -> None:
    core = many_on_disk(chunks=8)
    core.driver.tell(SpaceReport(DISK, 9 * CHUNK))
    assert evict(core, DISK, 0).chunks == 8
    core.end_store(core.begin_store("z"))
    core.work()
    core.driver.tell(SpaceReport(DISK, 12 * CHUNK))  # grown meanwhile
    core.work()
    assert (on_disk(core), core.held(DISK, "z"), core.driver.core.unfinished) == (1, "z", 0)


def test_a_staged_chunk_that_joins_the_cache_keeps_what_it_continues() -> None:
    """Its parents were on their way out: with a child in the cache they would be stranded between the two."""
    core = SmallCore(memory_of(6, 4, low=2), disk=store_of(100, write=WritePolicy.WRITE_ON_EVICT))
    core.store("y", "w")
    core.empty(CPU)
    core.store("abc")
    evict(core, CPU, 2)
    core.work()
    assert (core.held(CPU, "abc"), core.held(DISK, "abc")) == ("ab", "c")
    core.use("y", "w")
    load = core.load("abc")  # a and b where they lie, c staged
    core.work()
    core.wait(1.0)
    core.store("x", "v")  # colder ones go for these: a and b, which only memory has
    core.use("x", "v")
    core.done(load)
    for _ in range(3):
        core.work()
        core.wait(60.0)
    assert core.driver.core._state.cpu.leaving == 0
    assert evict(core, CPU, 2).chunks + core.driver.core.unfinished > 0
    core.work()
    assert core.driver.core.stats()["tiers"][CPU]["usage_bytes"] == 2 * CHUNK
