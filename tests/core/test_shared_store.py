"""A store that other instances share: asked once for each request, believed for a while, and never waited for beyond a deadline."""

from __future__ import annotations

from dataclasses import replace

from kvtiers.core.messages import (
    Copy,
    Delete,
    Outcome,
    Probe,
    ProbeDone,
    Read,
    Seal,
    StoreDown,
    StoreUp,
    Write,
)
from kvtiers.core.remembering import Remember
from kvtiers.core.settings import StoreSettings
from kvtiers.core.tickets import LoadState
from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.model.tiers import Tier
from kvtiers.testing.small_core import SmallCore, keys_of, memory_of, store_of

REMEMBER = Remember(there_s=60.0, absent_s=2.0, most=100)


def shared(**changes: object) -> StoreSettings:
    return replace(store_of(None), remember=REMEMBER, **changes)  # type: ignore[arg-type]


def node(
    other: SmallCore | None = None, *, disk: StoreSettings | None = None, **changes: object
) -> SmallCore:
    """A core on the remote store of `other`, or on a store of its own."""
    core = SmallCore(memory_of(8, 8), remote=shared(**changes), disk=disk)
    if other is not None:
        core.driver.records[Tier.REMOTE] = other.driver.records[Tier.REMOTE]
        core.truth = other.truth
    return core


def begin_writes(core: SmallCore, word: str) -> list[Write]:
    """Store a chain and seal it; the writes that have begun."""
    core.end_store(core.begin_store(word))
    for seal in core.waiting(Seal):
        core.end(seal)
    found = core.waiting(Write)
    assert len(found) == len(word)
    return found


def test_what_another_instance_has_stored_is_loaded() -> None:
    first = node()
    first.store("abcd")
    second = node(first)
    load = second.load("abcd")
    (probe,) = second.waiting(Probe)
    assert probe.keys == tuple(keys_of("abcd"))
    assert load.state is LoadState.PROBING
    second.work()
    assert load.tiers == [Tier.REMOTE] * 4
    second.done(load)
    assert second.held(Tier.CPU, "abcd") == "abcd"


def test_one_probe_for_a_request_and_for_all_that_stop_at_the_same_chunk() -> None:
    first = node()
    first.store("abcd")
    second = node(first)
    loads = [second.load("abcd"), second.load("abcdx"), second.load("ab")]
    assert len(second.waiting(Probe)) == 1
    second.work()
    assert [load.num_chunks for load in loads] == [4, 4, 2]
    for load in loads:
        second.done(load)


def test_what_is_here_is_not_asked_for() -> None:
    first = node()
    first.store("abcd")
    second = node(first)
    second.store("ab")
    load = second.load("abcd")
    (probe,) = second.waiting(Probe)
    assert probe.keys == tuple(keys_of("abcd")[2:])
    second.work()
    assert load.tiers == [Tier.CPU, Tier.CPU, Tier.REMOTE, Tier.REMOTE]
    second.done(load)


def test_a_miss_is_remembered_briefly() -> None:
    first = node()
    second = node(first)
    second.use("ab")
    load = second.load("ab")
    assert not second.waiting(Probe)
    assert load.state is LoadState.SETTLED
    assert load.stopped_by is MissReason.NEVER_SEEN
    second.done(load)
    first.store("ab")
    second.wait(2.1)
    again = second.load("ab")
    second.work()
    assert again.num_chunks == 2
    second.done(again)


def test_a_slow_answer_costs_no_more_than_the_deadline_and_is_remembered() -> None:
    first = node()
    first.store("ab")
    second = node(first)
    load = second.load("ab", timeout=1.0)
    second.wait(1.0)
    assert load.state is LoadState.SETTLED
    assert (load.num_chunks, load.stopped_by) == (0, MissReason.STAGING_TIMEOUT)
    second.done(load)
    second.work()  # the answer comes after all
    assert second.held(Tier.REMOTE, "ab") == "ab"
    again = second.load("ab")
    assert not second.waiting(Probe)
    second.work()
    assert again.num_chunks == 2
    second.done(again)


def test_a_store_out_of_order_is_not_asked_and_the_miss_says_so() -> None:
    core = node()
    core.store("ab")
    core.driver.tell(StoreDown(Tier.REMOTE))
    load = core.load("abc")
    assert not core.waiting(Probe)
    assert (load.num_chunks, load.stopped_by) == (2, MissReason.TIER_OPEN)
    assert core.find("xyz").stopped_by is MissReason.TIER_OPEN
    core.done(load)
    core.driver.tell(StoreUp(Tier.REMOTE))
    load = core.load("abc")
    core.work()
    assert load.stopped_by is MissReason.NEVER_SEEN
    core.done(load)


def test_a_probe_that_fails_is_a_miss_with_its_reason() -> None:
    for outcome, reason in (
        (Outcome.UNAVAILABLE, MissReason.TIER_OPEN),
        (Outcome.FAILED, MissReason.TIER_OPEN),
        (Outcome.REFUSED, MissReason.STAGING_TIMEOUT),
    ):
        core = node()
        load = core.load("ab")
        (probe,) = core.waiting(Probe)
        core.end(probe, outcome)
        assert load.state is LoadState.SETTLED
        assert load.stopped_by is reason
        core.done(load)


def test_a_chunk_that_vanished_meanwhile_is_a_miss_and_not_believed_in_again() -> None:
    first = node()
    first.store("ab")
    second = node(first)
    load = second.load("ab")
    second.end(second.waiting(Probe)[0])
    second.driver.records[Tier.REMOTE].clear()
    second.work()
    assert (load.num_chunks, load.stopped_by) == (0, MissReason.EVICTED)
    second.done(load)
    again = second.load("ab")
    assert not second.waiting(Read)
    assert not second.waiting(Probe)
    second.done(again)


def test_what_was_learnt_is_forgotten_after_a_while_and_asked_for_anew() -> None:
    first = node()
    first.store("ab")
    second = node(first)
    load = second.load("ab")
    second.end(second.waiting(Probe)[0])
    second.done(load)
    second.work()
    assert second.held(Tier.REMOTE, "ab") == "ab"
    second.empty(Tier.CPU)
    second.wait(61)
    assert second.held(Tier.REMOTE, "ab") == ""
    load = second.load("ab")
    assert len(second.waiting(Probe)) == 1
    second.work()
    assert load.num_chunks == 2
    second.done(load)


def test_believed_chunks_are_bounded() -> None:
    first = SmallCore(memory_of(40, 8), remote=shared())
    first.store("abcdefghijklmnop")
    second = SmallCore(memory_of(8, 16), remote=replace(shared(), remember=Remember(most=5)))
    second.driver.records[Tier.REMOTE] = first.driver.records[Tier.REMOTE]
    second.truth = first.truth
    second.use("abcdefghijklmnop")
    second.wait(0.1)
    assert len(second.held(Tier.REMOTE, "abcdefghijklmnop")) <= 5


def test_what_somebody_else_has_written_is_not_written_again() -> None:
    first = node()
    first.store("ab")
    second = node(first)
    second.store("ab")
    counters = second.driver.core.stats()["tiers"][Tier.REMOTE]
    assert (counters["stored"], counters["present"]) == (0, 2)


def test_a_chunk_that_only_others_have_may_be_stored_here() -> None:
    """It was computed although the store has it: so it could not be loaded in time. Here it is nearer."""
    first = node()
    first.store("ab")
    second = node(first)
    load = second.load("ab", timeout=1.0)
    second.end(second.waiting(Probe)[0])
    second.wait(1.0)
    second.done(load)
    for operation in second.waiting(Read):
        second.end(operation, Outcome.FAILED)
    ticket = second.begin_store("abc")
    assert [slot.index for slot in ticket.accepted] == [0, 1, 2]
    second.end_store(ticket)
    second.work()
    assert second.held(Tier.CPU, "abc") == "abc"


def test_a_store_goes_on_behind_a_chunk_that_only_others_have() -> None:
    first = node()
    first.store("ab")
    second = node(first)
    load = second.load("ab")
    second.end(second.waiting(Probe)[0])
    second.done(load)
    second.work()
    ticket = second.begin_store("abc", first=2)
    assert [slot.index for slot in ticket.accepted] == [2]
    second.end_store(ticket)


def test_a_chunk_from_the_store_goes_to_the_disk_with_what_its_record_says() -> None:
    first = node()
    first.store("abc")
    second = node(first, disk=store_of(20))
    second.use("abc")
    second.use("abc")
    assert second.held(Tier.DISK, "abc") == "abc"
    marks = {record.mark for record in second.driver.records[Tier.DISK].values()}
    assert marks == {record.mark for record in first.driver.records[Tier.REMOTE].values()}


def test_writes_keep_their_pace() -> None:
    core = node(max_write_bytes_per_s=4096)
    ticket = core.begin_store("abc")
    core.end_store(ticket)
    written = []
    for _ in range(4):
        core.work()
        written.append(core.held(Tier.REMOTE, "abc"))
        core.wait(1.0)
    assert written == ["a", "ab", "abc", "abc"]


def test_a_chunk_that_waits_too_long_to_be_written_is_given_up_until_it_is_used() -> None:
    core = node(max_write_bytes_per_s=4096, max_wait_s=2.5)
    core.end_store(core.begin_store("abcdef"))
    for _ in range(8):
        core.work()
        core.wait(1.0)
    assert core.held(Tier.REMOTE, "abcdef") == "abc"
    assert core.driver.core.stats()["abandoned_writes"] == {Refusal.QUEUE_FULL: 3}
    load = core.load("abcdef")
    core.work()
    core.done(load)
    assert core.held(Tier.REMOTE, "abcdef") == "abcd"


def test_nothing_of_a_full_store_is_thrown_out_by_one_of_those_who_share_it() -> None:
    core = node()
    core.store("abcd")
    for write in begin_writes(core, "xyz"):
        core.end(write, Outcome.FULL)
    core.wait(1.0)
    assert not core.waiting(Delete)
    assert not core.waiting(Write)
    core.wait(10.0)
    core.work()
    assert core.held(Tier.REMOTE, "xyz") == "xyz"


def test_a_chunk_that_the_store_can_not_take_is_offered_now_and_then_and_given_up_in_the_end() -> None:
    core = node(max_wait_s=3.5)
    begin_writes(core, "a")
    offered = 0
    for _ in range(30):
        for write in core.waiting(Write):
            offered += 1
            core.end(write, Outcome.UNAVAILABLE)
        core.wait(0.25)
    assert offered == 4
    assert core.driver.core.stats()["abandoned_writes"] == {Refusal.QUEUE_FULL: 1}
    assert core.driver.core.unfinished == 0
    core.use("a")
    assert core.held(Tier.REMOTE, "a") == "a"


def test_the_end_does_not_wait_for_a_store_that_is_out_of_order() -> None:
    core = node()
    first, *others = begin_writes(core, "abcd")
    core.end(first, Outcome.UNAVAILABLE)
    core.driver.tell(StoreDown(Tier.REMOTE))
    for write in others:
        core.end(write, Outcome.UNAVAILABLE)
    assert core.driver.core.unfinished == 4
    core.driver.call(lambda core, now: core.drain(now))
    assert core.driver.core.unfinished == 0
    assert core.driver.core.stats()["abandoned_writes"] == {Refusal.TIER_OPEN: 4}
    assert core.find("abcd").tiers == (Tier.CPU,) * 4


def test_a_long_chain_is_matched_to_its_end_after_its_probe() -> None:
    word = "abcdefgh"
    first = SmallCore(memory_of(16, 8), remote=shared())
    first.store(word)
    second = SmallCore(memory_of(16, 16), remote=shared(), max_hold=2)
    second.driver.records[Tier.REMOTE] = first.driver.records[Tier.REMOTE]
    second.truth = first.truth
    load = second.load(word)
    second.work()
    assert load.num_chunks == len(word)
    second.done(load)


def test_a_load_released_while_it_is_asked_for_leaves_nothing() -> None:
    first = node()
    first.store("abcd")
    second = node(first)
    second.store("ab")
    load = second.load("abcd")
    second.done(load)
    second.work()
    second.finish()


def test_loads_outrank_uploads() -> None:
    first = node()
    first.store("xy")
    second = node(first)
    second.end_store(second.begin_store("ab"))
    load = second.load("xy")
    kinds = [operation[-1] for operation in second.driver.pending.values() if isinstance(operation, Probe)]
    writes = [operation[-1] for operation in second.waiting(Write)]
    assert all(probe < write for probe in kinds for write in writes)
    second.work()
    second.done(load)


def test_an_answer_for_a_namespace_that_everybody_has_left_is_forgotten() -> None:
    first = node()
    first.store("ab")
    core = first.driver.core
    session = first.driver.call(lambda core, _: core.open_session())
    space = first.driver.attach(b"x" * 32, first.specs[0].parts, session=session)
    load = first.driver.open_load(session, space, keys_of("ab"))
    first.driver.release(load)
    first.driver.call(lambda core, _: core.detach(session, space))
    (probe,) = first.waiting(Probe)
    first.driver.pending.pop(probe.op)
    first.driver.call(lambda core, now: core.complete(ProbeDone(probe.op, Outcome.OK, (True, True)), now))
    assert core.check_integrity() == []
    assert core.stats()["namespaces"] == 1


def test_a_long_answer_is_learnt_in_steps() -> None:
    word = "abcdefghij"
    first = SmallCore(memory_of(16, 8), remote=shared())
    first.store(word)
    second = SmallCore(memory_of(16, 16), remote=shared(), max_hold=3)
    second.driver.records[Tier.REMOTE] = first.driver.records[Tier.REMOTE]
    second.truth = first.truth
    load = second.load(word)
    (probe,) = second.waiting(Probe)
    second.driver.pending.pop(probe.op)
    done = ProbeDone(probe.op, Outcome.OK, (True,) * len(word))
    assert second.driver.call(lambda core, now: core.complete(done, now)) is True
    assert second.held(Tier.REMOTE, word) == "abc"
    while second.driver.call(lambda core, now: core.go_on(now)):
        pass
    assert second.held(Tier.REMOTE, word) == word
    second.work()
    assert load.num_chunks == len(word)
    second.done(load)


def test_a_chunk_first_heard_of_and_then_stored_here_says_where_its_tokens_begin() -> None:
    first = node()
    first.store("abc")
    second = node(first, disk=store_of(20))
    load = second.load("abc", timeout=1.0)
    second.end(second.waiting(Probe)[0])
    second.wait(1.0)
    second.done(load)
    for operation in second.waiting(Read):
        second.end(operation, Outcome.FAILED)
    second.store("abc")
    marks = {record.mark for record in second.driver.records[Tier.DISK].values()}
    assert marks == {record.mark for record in first.driver.records[Tier.REMOTE].values()}


def test_a_hanging_store_leaves_writes_to_the_disk_their_share_of_the_arena() -> None:
    core = SmallCore(memory_of(32, 8), remote=shared(), disk=store_of(40), write_lease_share=0.2)
    for word in ("abcdefghij", "klmnop"):
        core.end_store(core.begin_store(word))
        for _ in range(20):
            for operation in list(core.driver.pending.values()):
                if not (isinstance(operation, Write) and operation.tier is Tier.REMOTE):
                    core.end(operation)
        assert {operation.tier for operation in core.waiting(Write)} == {Tier.REMOTE}
        assert core.held(Tier.DISK, word) == word


def test_a_hanging_store_does_not_hide_what_the_disk_has() -> None:
    core = node(disk=store_of(20))
    core.store("abcd")
    core.empty(Tier.CPU)
    core.driver.records[Tier.REMOTE].clear()
    load = core.load("abcdxy", timeout=4.0)
    (probe,) = core.waiting(Probe)
    wanted = core.wait(0.0)
    assert wanted is not None
    core.wait(wanted - core.driver.now)
    for read in core.waiting(Read):
        core.end(read)
    assert load.state is LoadState.SETTLED
    assert (load.tiers, load.stopped_by) == ([Tier.DISK] * 4, MissReason.STAGING_TIMEOUT)
    core.done(load)
    core.end(probe)


def test_what_can_not_be_staged_any_more_is_no_unknown_chunk() -> None:
    word = "abcdefghijkl"
    first = SmallCore(memory_of(16, 8), remote=shared())
    first.store(word)
    second = node(first)
    load = second.load(word)
    second.work()
    assert (load.num_chunks, load.stopped_by) == (8, MissReason.NO_SLOT)
    second.done(load)


def test_what_waits_for_its_turn_to_be_written_is_not_copied_down_again_and_again() -> None:
    core = SmallCore(memory_of(0, 8), gpu=memory_of(8), remote=shared(max_write_bytes_per_s=4096))
    core.end_store(core.begin_store("abc"))
    copies = 0
    for _ in range(50):
        for operation in list(core.driver.pending.values()):
            copies += isinstance(operation, Copy)
            core.end(operation)
    assert copies == 1
    for _ in range(4):
        core.wait(1.0)
        core.work()
    assert core.held(Tier.REMOTE, "abc") == "abc"


def test_a_chain_that_comes_back_to_a_key_makes_no_circle() -> None:
    first = node()
    first.store("ab")
    second = node(first)
    a, b = keys_of("ab")
    load = second.open_load(second.session, 0, [a, b, a, b], 10.0)
    second.work()
    second.done(load)
    chunk = second.driver.core._space(second.spaces[0]).chunks[a]
    assert chunk.parent is None
    second.finish()


def test_a_load_is_not_matched_before_what_it_asked_for_is_learnt() -> None:
    words = ("abcdefgh", "stuvwxyz")
    first = SmallCore(memory_of(20, 8), remote=shared())
    first.store(*words)
    second = SmallCore(memory_of(16, 16), remote=shared(), max_hold=3)
    second.driver.records[Tier.REMOTE] = first.driver.records[Tier.REMOTE]
    second.truth = first.truth
    loads = [second.load(word) for word in words]
    for probe in second.waiting(Probe):
        second.driver.pending.pop(probe.op)
        done = ProbeDone(probe.op, Outcome.OK, (True,) * 8)
        second.driver.call(lambda core, now, done=done: core.complete(done, now))  # type: ignore[misc]
    second.driver.call(lambda core, now: core.extend(loads[1], now))  # whoever opened it may still be calling
    assert not second.waiting(Probe)
    while second.driver.call(lambda core, now: core.go_on(now)):
        pass
    second.work()
    for load in loads:
        assert load.num_chunks == 8
        second.done(load)


def test_what_is_there_already_does_not_count_for_the_pace_of_writes() -> None:
    first = node()
    first.store("abcdef")
    second = node(first, max_write_bytes_per_s=1)
    second.store("abcdef")
    assert second.driver.core.stats()["tiers"][Tier.REMOTE]["present"] == 6


def test_what_was_read_a_moment_ago_is_believed_to_be_there() -> None:
    first = node()
    first.store("ab")
    second = node(first)
    load = second.load("ab", timeout=100.0)
    second.end(second.waiting(Probe)[0])
    second.wait(50.0)
    second.work()
    second.done(load)
    second.wait(30.0)
    assert second.held(Tier.REMOTE, "ab") == "ab"


def test_what_continues_a_chunk_that_is_only_to_be_asked_for_again_keeps_its_place() -> None:
    first = node()
    first.store("ab")
    second = node(first)
    load = second.load("ab")
    second.end(second.waiting(Probe)[0])
    second.done(load)
    second.work()
    second.empty(Tier.CPU)
    second.end_store(second.begin_store("x"))
    second.end_store(second.begin_store("abc", first=2))
    second.work()
    second.wait(61)
    assert second.held(Tier.REMOTE, "ab") == ""
    second.driver.call(lambda core, now: core.evict(Tier.CPU, 4096, now))
    second.work()
    assert (second.held(Tier.CPU, "abc"), second.held(Tier.CPU, "x")) == ("c", "")


def test_a_probe_that_nobody_waits_for_any_more_is_not_begun() -> None:
    core = node()
    loads = [core.load("ab"), core.load("ab")]
    (probe,) = core.waiting(Probe)
    core.done(loads[0])
    assert probe.op not in core.driver.cancelled
    core.done(loads[1])
    assert probe.op in core.driver.cancelled
    again = core.load("ab")  # asks for itself: the other one may never be answered
    core.end(probe, Outcome.CANCELLED)
    assert again.state is LoadState.PROBING
    core.work()
    assert again.stopped_by is MissReason.NEVER_SEEN
    core.done(again)
