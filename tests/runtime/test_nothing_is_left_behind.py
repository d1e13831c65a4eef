"""What goes wrong in the middle of a call: nobody hangs, nothing is served that is not right, and no slot, thread or lock stays taken."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvtiers.core.messages import OpId, Priority
from kvtiers.core.settings import MemorySettings
from kvtiers.memory.cuda import DevicePool
from kvtiers.model.errors import (
    CacheClosed,
    CodecError,
    DirectoryInUse,
    OutOfMemoryError,
    RecordCorrupt,
    StoreTransient,
    StoreUnavailable,
)
from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.model.tiers import Tier
from kvtiers.records.codecs.base import Codec
from kvtiers.runtime import cache as cache_module
from kvtiers.runtime.cache import TieredCache
from kvtiers.runtime.node import CacheNode
from kvtiers.runtime.plan import plan_node
from kvtiers.runtime.pools import Job, WorkerPool
from kvtiers.stores.base import StoredRecord
from kvtiers.stores.guard import GuardPolicy, Operation
from kvtiers.testing.cache_oracle import SMALL_LAYOUT, CacheOracle
from kvtiers.testing.chaos import IMPATIENT, SLOT, Chaos, namespace, small_config, wait_until
from kvtiers.testing.disk_damage import record_files
from kvtiers.testing.faulty_store import Fail, FaultyStore, Full, Stall

if TYPE_CHECKING:
    from tests.runtime.conftest import MakeCache, MakeChaos

pytestmark = pytest.mark.slow

TOKENS = list(range(100))
WHOLE = 96
WAIT_S = 20.0


class Interposed:
    """Stands before a tier's memory: `before` is called with each slot's offset, and may raise or wait."""

    def __init__(self, memory: Any, before: Callable[[int], None]) -> None:
        self.memory = memory
        self.before = before

    def write(self, offset: int, *rest: Any) -> None:
        self.before(offset)
        self.memory.write(offset, *rest)

    def read(self, offset: int, *rest: Any) -> None:
        self.before(offset)
        self.memory.read(offset, *rest)


def interpose(node: CacheNode, before: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(node.memory, Tier.CPU, Interposed(node.memory[Tier.CPU], before))


def mapped_arenas() -> int:
    gc.collect()
    return sum("kvtiers-arena" in line for line in Path("/proc/self/maps").read_text().splitlines())


def is_clean(cache: TieredCache) -> None:
    stats = cache.stats()
    assert stats["open_tickets"] == 0
    assert stats["tiers"]["cpu"]["leased_chunks"] == 0
    assert cache.node._core.loads == {}
    assert cache.check_integrity() == []


class TestCopiesThatFail:
    @pytest.mark.parametrize("error", [RuntimeError, MemoryError, ValueError, OSError])
    @pytest.mark.parametrize("chunks", [6, 600], ids=["one copy", "two halves"])
    def test_a_load_whose_copy_fails_fails_and_never_claims_bytes_it_has_not_copied(
        self,
        make_cache: MakeCache,
        oracle: CacheOracle,
        monkeypatch: pytest.MonkeyPatch,
        error: type[Exception],
        chunks: int,
    ) -> None:
        cache, tokens = make_cache({"cpu.buffer_size": "16Mi"}, disk=False), list(range(16 * chunks))
        cache.store(tokens, oracle.kv(tokens))
        cache.flush()
        bad = [copy.slots[0] for copy in cache.node.inspect(lambda core: core.copies(Tier.CPU))][chunks // 3]

        def fail(offset: int) -> None:
            if offset == bad:
                raise error("the caller's memory went away")

        with monkeypatch.context() as patch:
            interpose(cache.node, fail, patch)
            with pytest.raises(error, match="the caller's memory went away"):
                cache.load(tokens).result()
        is_clean(cache)
        loaded = cache.load(tokens).result()
        assert loaded.num_tokens == len(tokens)
        oracle.check(tokens, loaded.num_tokens, loaded.kv)

    def test_a_store_whose_copy_fails_keeps_nothing_of_it(
        self, make_cache: MakeCache, oracle: CacheOracle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache, calls = make_cache(disk=False), iter(range(100))

        def fail(_: int) -> None:
            if next(calls) == 3:
                raise MemoryError("no memory for a view")

        with monkeypatch.context() as patch:
            interpose(cache.node, fail, patch)
            with pytest.raises(MemoryError):
                cache.store(TOKENS, oracle.kv(TOKENS))
        is_clean(cache)
        assert cache.lookup(TOKENS).num_tokens == 0
        assert cache.stats()["tiers"]["cpu"]["usage_bytes"] == 0
        assert cache.store(TOKENS, oracle.kv(TOKENS)).accepted == 6

    def test_no_memory_for_the_answer_fails_the_load_and_gives_its_leases_back(
        self, make_cache: MakeCache, oracle: CacheOracle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = make_cache()
        cache.store(TOKENS, oracle.kv(TOKENS))
        cache.flush()

        def refuse(*_: object) -> None:
            raise MemoryError("no memory for the answer")

        for tier in ("nowhere", "cpu"):  # answered at once, and by a read
            with monkeypatch.context() as patch:
                patch.setattr(cache_module, "empty_kv", refuse)
                if tier == "cpu":
                    cache.evict("cpu")
                with pytest.raises(MemoryError, match="no memory for the answer"):
                    cache.load(TOKENS).result(WAIT_S)
            is_clean(cache)

    def test_a_callback_that_fails_does_not_keep_others_from_their_answer(
        self, make_chaos: MakeChaos
    ) -> None:
        one = make_chaos()
        one.cache.store(TOKENS, one.oracle.kv(TOKENS))
        one.cache.flush()
        one.cache.evict("cpu")
        released, keys = threading.Event(), one.oracle.keys(TOKENS)
        one.disk.inject(Stall(released), Operation.READ, times=None)
        session, space = one.cache._session, one.cache._space

        def fail() -> None:
            raise ZeroDivisionError

        loads = [one.node.open_load(session, space, keys, 3600) for _ in range(3)]
        heard: list[int] = []
        for number, load in enumerate(loads):
            load.when_answered(fail)
            load.when_answered(lambda number=number: heard.append(number))  # type: ignore[misc]
        released.set()
        assert all(load.wait(WAIT_S) for load in loads)
        assert one.node.wait_settled(WAIT_S)
        assert sorted(heard) == [0, 1, 2]
        for load in loads:
            load.release()


@contextmanager
def interrupted() -> Iterator[None]:
    """What is done inside waits, and is interrupted after a moment."""
    interrupt = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    interrupt.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGINT, before)


class TestInterrupts:
    """Ctrl-C in a notebook: the call ends in KeyboardInterrupt, and the cache goes on."""

    def test_a_store_interrupted_while_its_work_is_handed_out_ends_well(
        self, make_cache: MakeCache, oracle: CacheOracle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache, me = make_cache(), threading.current_thread()
        submit, calls = WorkerPool.submit, iter(range(1000))

        def interrupted(pool: WorkerPool, job: Job) -> bool:
            taken = submit(pool, job)
            if threading.current_thread() is me and next(calls) == 2:
                raise KeyboardInterrupt
            return taken

        with monkeypatch.context() as patch:
            patch.setattr(WorkerPool, "submit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                cache.store(TOKENS, oracle.kv(TOKENS))
        cache.flush(WAIT_S)  # three seals were left: without them their slots would be leased for ever
        assert cache.stats()["tiers"]["disk"]["entries"] == 6
        is_clean(cache)

    def test_a_load_interrupted_while_waiting_can_be_waited_for_again(self, make_chaos: MakeChaos) -> None:
        one = make_chaos(guard=GuardPolicy())  # patient: the read must not be given up before the interrupt
        one.cache.store(TOKENS, one.oracle.kv(TOKENS))
        one.cache.flush()
        one.cache.evict("cpu")
        released = threading.Event()
        one.disk.inject(Stall(released), Operation.READ)
        pending = one.cache.load(TOKENS)
        with interrupted():
            pending.result(WAIT_S)
        released.set()
        assert pending.result(WAIT_S).num_tokens == WHOLE

    def test_a_cache_whose_close_was_interrupted_has_let_its_directory_go(
        self, make_chaos: MakeChaos, make_cache: MakeCache
    ) -> None:
        one = make_chaos(guard=GuardPolicy())
        released = threading.Event()
        stalled = one.disk.inject(Stall(released), Operation.WRITE, times=None)
        one.cache.store(TOKENS, one.oracle.kv(TOKENS))
        assert stalled.wait_for_hit(WAIT_S)
        with interrupted():
            one.node.close(WAIT_S)
        released.set()
        assert one.node.close(WAIT_S)
        make_cache()


class TestManyAtOnce:
    """What one call sets off is worked off in a loop, however much it is: nothing recurses."""

    def test_hundreds_of_loads_answered_in_one_moment(self, make_chaos: MakeChaos) -> None:
        one = make_chaos(guard=GuardPolicy())
        one.cache.store(TOKENS, one.oracle.kv(TOKENS))
        one.cache.flush()
        one.cache.evict("cpu")
        released = threading.Event()
        one.disk.inject(Stall(released), Operation.READ, times=None)
        loads = []
        for _ in range(400):
            load = one.node.open_load(one.cache._session, one.cache._space, one.oracle.keys(TOKENS), 0.5)
            load.when_answered(load.release)
            loads.append(load)
        assert all(load.wait(WAIT_S) for load in loads)
        released.set()
        assert one.node.wait_settled(WAIT_S)
        is_clean(one.cache)

    def test_hundreds_of_reads_given_up_in_one_moment(self, make_chaos: MakeChaos) -> None:
        one = make_chaos(
            {"cpu.buffer_size": "16Mi"},
            cpu=MemorySettings(1200 * SLOT, 600 * SLOT, 500 * SLOT),
            guard=GuardPolicy(),
        )
        tokens = list(range(16 * 500))
        one.cache.store(tokens, one.oracle.kv(tokens))
        one.cache.flush()
        one.cache.evict("cpu")
        released = threading.Event()
        stalled = one.disk.inject(Stall(released), Operation.READ, times=None)
        load = one.node.open_load(one.cache._session, one.cache._space, one.oracle.keys(tokens), 3600)
        assert stalled.wait_for_hit(WAIT_S, hits=4)
        load.release()
        # the ticker hands out cancels too: the last one may still be in its hands
        assert wait_until(lambda: one.node.engine.health()["queue_size"] == 0)
        released.set()
        assert one.node.wait_settled(WAIT_S)
        assert stalled.hits == 4
        is_clean(one.cache)


class TestClosingASessionOfSeveral:
    """Slots of a session go back only when none of its copies runs: else another session's bytes would be mixed with them."""

    def pair(self, make_cache: MakeCache) -> tuple[TieredCache, TieredCache]:
        first = make_cache(
            {"cpu.eviction_threshold": 0.05, "cpu.low_watermark": 0.04}, disk=False
        )  # four chunks
        return first, make_cache(node=first.node, named=namespace("another"), disk=False)

    def test_a_store_that_is_still_copying_keeps_its_slots(
        self, make_cache: MakeCache, oracle: CacheOracle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = self.pair(make_cache)
        theirs = CacheOracle(namespace("another"))
        copying, go_on = threading.Event(), threading.Event()
        me = threading.current_thread()

        def wait(_: int) -> None:
            if threading.current_thread() is not me:
                copying.set()
                go_on.wait(WAIT_S)

        interpose(first.node, wait, monkeypatch)
        thread = threading.Thread(target=lambda: second.store(TOKENS[:64], theirs.kv(TOKENS[:64])))
        thread.start()
        assert copying.wait(WAIT_S)
        assert not second.close(0.05), "a copy still runs"
        assert first.store(TOKENS[:64], oracle.kv(TOKENS[:64])).refusal is Refusal.NO_SLOT
        go_on.set()
        thread.join(WAIT_S)
        assert second.close(WAIT_S)
        assert first.stats()["sessions"] == 1
        first.flush()
        assert first.store(TOKENS[:64], oracle.kv(TOKENS[:64])).accepted == 4
        loaded = first.load(TOKENS[:64]).result()
        assert loaded.num_tokens == 64
        oracle.check(TOKENS, 64, loaded.kv)

    def test_a_load_that_is_still_copying_keeps_its_slots_and_its_bytes(
        self, make_cache: MakeCache, oracle: CacheOracle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = self.pair(make_cache)
        theirs = CacheOracle(namespace("another"))
        second.store(TOKENS[:64], theirs.kv(TOKENS[:64]))
        first.flush()
        copying, go_on = threading.Event(), threading.Event()
        me = threading.current_thread()

        def wait(_: int) -> None:
            if threading.current_thread() is not me:
                copying.set()
                go_on.wait(WAIT_S)

        interpose(first.node, wait, monkeypatch)
        monkeypatch.setattr("kvtiers.runtime.copying._INLINE_BYTES", 0)
        pending = second.load(TOKENS[:64])
        assert copying.wait(WAIT_S)
        assert not second.close(0.05)
        assert first.store(TOKENS[:64], oracle.kv(TOKENS[:64])).refusal is Refusal.NO_SLOT
        go_on.set()
        loaded = pending.result(WAIT_S)
        assert loaded.num_tokens == 64
        theirs.check(TOKENS, 64, loaded.kv)
        assert second.close(WAIT_S)

    def test_loads_that_wait_are_given_up_and_forgotten(self, make_chaos: MakeChaos) -> None:
        one = make_chaos()
        other = TieredCache(one.cache.config, SMALL_LAYOUT, namespace(), node=one.node)
        one.cache.store(TOKENS, one.oracle.kv(TOKENS))
        one.cache.flush()
        one.cache.evict("cpu")
        released = threading.Event()
        one.disk.inject(Stall(released), Operation.READ, times=None)
        pending = [other.load(TOKENS, timeout=3600) for _ in range(3)]
        mine = one.cache.load(TOKENS, timeout=3600)
        assert other.close(WAIT_S)
        for load in pending:
            with pytest.raises(CacheClosed):
                load.result(0.0)
        assert len(one.node._core.loads) == 1
        released.set()
        assert mine.result(WAIT_S).num_tokens == WHOLE


class TestOpeningThatFails:
    def threads(self) -> set[str]:
        return {thread.name for thread in threading.enumerate() if thread.name.startswith("kvtiers")}

    @pytest.fixture
    def nothing_stays(self) -> Iterator[None]:
        threads, arenas, descriptors = self.threads(), mapped_arenas(), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        yield
        assert self.threads() == threads
        assert mapped_arenas() == arenas
        assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208

    @pytest.mark.usefixtures("nothing_stays")
    def test_on_a_disk_that_cannot_be_opened(self, tmp_path: Path) -> None:
        class Broken(FaultyStore):
            def open(self) -> None:
                raise StoreUnavailable("no such disk")

        self.refuse(tmp_path, Broken, StoreUnavailable)

    @pytest.mark.usefixtures("nothing_stays")
    def test_on_a_disk_that_fails_while_it_is_listed(self, tmp_path: Path) -> None:
        class Broken(FaultyStore):
            def recover(self) -> Iterator[StoredRecord]:
                raise StoreTransient("the log can't be read")

        self.refuse(tmp_path, Broken, StoreTransient)
        TieredCache(
            small_config(tmp_path / "cache"), SMALL_LAYOUT, namespace()
        ).close()  # not locked any more

    @pytest.mark.usefixtures("nothing_stays")
    def test_without_memory_for_the_gpu_pool(self, tmp_path: Path) -> None:
        def refuse() -> DevicePool:
            raise OutOfMemoryError("a GPU pool of 1 TiB")

        plan = replace(plan_node(small_config(tmp_path / "cache")), device_pool=refuse)
        with pytest.raises(OutOfMemoryError):
            CacheNode(plan)

    @pytest.mark.usefixtures("nothing_stays")
    def test_on_a_directory_in_use(self, tmp_path: Path) -> None:
        config = small_config(tmp_path / "cache")
        with TieredCache(config, SMALL_LAYOUT, namespace()):
            before = self.threads()
            with pytest.raises(DirectoryInUse):
                TieredCache(config, SMALL_LAYOUT, namespace())
            assert self.threads() <= before

    def refuse(self, tmp_path: Path, kind: type[FaultyStore], error: type[Exception]) -> None:
        plan = plan_node(small_config(tmp_path / "cache"))
        store = plan.stores[Tier.DISK]
        plan = replace(plan, stores={Tier.DISK: replace(store, store=kind(store.store))})
        with pytest.raises(error):
            CacheNode(plan)


class TestNoLivelock:
    """Whatever keeps failing is tried again later, never at once and for ever."""

    def fill(self, one: Chaos, prompts: int, first: int = 0) -> None:
        for number in range(first, first + prompts):
            tokens = list(range(number * 1000, number * 1000 + 64))
            one.cache.store(tokens, one.oracle.kv(tokens))
            one.cache.flush()

    def test_evicting_from_a_disk_that_deletes_nothing_returns(self, make_chaos: MakeChaos) -> None:
        one = make_chaos(guard=GuardPolicy(max_retries=0))
        self.fill(one, 80)
        one.disk.inject(Fail(StoreTransient), Operation.DELETE, times=None)
        assert one.cache.evict("disk").chunks >= 256
        assert one.node.wait_settled(WAIT_S)
        assert one.cache.stats()["tiers"]["disk"]["entries"] == 320
        one.disk.heal()
        assert one.node.wait_settled(WAIT_S)

    def test_evicting_from_a_disk_that_hangs_returns(self, make_chaos: MakeChaos) -> None:
        one = make_chaos({"async.queue_size": 8})
        self.fill(one, 80)
        released = threading.Event()
        one.disk.inject(Stall(released), *Operation, times=None)
        one.cache.evict("disk")
        released.set()

    def test_a_delete_that_the_queue_refuses_is_tried_again_a_little_later(
        self, make_chaos: MakeChaos
    ) -> None:
        one = make_chaos(
            {"async.max_workers": 1, "async.queue_size": 4}, guard=GuardPolicy(), disk={"capacity": 1 << 20, "ceiling": 950_000, "low": 600_000}
        )  # fmt: skip
        self.fill(one, 10)
        released = threading.Event()
        stalled = one.disk.inject(Stall(released), times=None)
        self.store_without_waiting(
            one, range(100, 110)
        )  # each needs room on the disk, and the queue takes no delete
        assert stalled.hits <= 1
        assert one.cache.stats()["tiers"]["disk"]["failed"] < 2000
        released.set()

    def store_without_waiting(self, one: Chaos, numbers: range) -> None:
        for number in numbers:
            tokens = list(range(number * 1000, number * 1000 + 64))
            one.cache.store(tokens, one.oracle.kv(tokens))

    def test_a_record_that_cannot_be_sealed_is_given_up_and_stays_in_memory(
        self, tmp_path: Path, oracle: CacheOracle
    ) -> None:
        class Broken(Codec):
            name = "broken"

            def parameters(self, itemsize: int) -> bytes:
                return b""

            def bound(self, nbytes: int) -> int:
                return nbytes

            def encode(self, payload: memoryview, out: memoryview, itemsize: int) -> int:
                raise CodecError("this codec fails")

            def decode(self, stored: memoryview, out: memoryview, parameters: bytes) -> None:
                raise AssertionError("nothing was written")

        plan = plan_node(small_config(tmp_path / "cache"))
        disk: Any = plan.stores[Tier.DISK].store
        object.__setattr__(disk.settings, "codec", Broken())
        node = CacheNode(plan)
        cache = TieredCache(small_config(tmp_path / "cache"), SMALL_LAYOUT, namespace(), node=node)
        cache.store(TOKENS, oracle.kv(TOKENS))
        cache.flush()  # it would never come to an end
        assert cache.stats()["async"]["failed"] == {"disk_write:failed": 6}
        assert cache.lookup(TOKENS).tiers == (Tier.CPU,) * 6
        assert record_files(tmp_path / "cache") == {}
        assert cache.check_integrity() == []
        assert node.close(WAIT_S)

    def test_a_read_is_not_tried_again_when_its_load_waits_no_more(self, make_chaos: MakeChaos) -> None:
        patient = replace(
            IMPATIENT, max_retries=50, base_delay_s=0.2, backoff_factor=1.0, jitter=0.0, failures_to_open=100
        )
        one = make_chaos(guard=patient)
        one.cache.store(TOKENS[:16], one.oracle.kv(TOKENS[:16]))
        one.cache.flush()
        one.cache.evict("cpu")
        failing = one.disk.inject(Fail(StoreTransient), Operation.READ, times=None)
        loaded = one.cache.load(TOKENS[:16], timeout=0.3).result()
        assert loaded.num_tokens == 0
        assert loaded.stopped_by in {MissReason.STAGING_TIMEOUT, MissReason.TIER_OPEN}
        assert one.node.wait_settled(WAIT_S)
        assert failing.hits <= 3, "it went on for as long as the guard allows"

    def test_questions_to_a_hung_disk_do_not_pile_up(self, make_chaos: MakeChaos) -> None:
        one = make_chaos(
            {"async.max_workers": 1}, guard=replace(IMPATIENT, probe_after_s=0.01, probe_after_max_s=0.01)
        )
        released = threading.Event()
        stalled = one.disk.inject(Stall(released), times=None)
        one.cache.store(TOKENS, one.oracle.kv(TOKENS))
        assert stalled.wait_for_hit(WAIT_S)
        tier = one.node._tender
        for _ in range(50):
            tier._ask(Tier.DISK, tier._probe)
        writes = one.cache.stats()["tiers"]["disk"]["writes_in_flight"]
        assert one.cache.stats()["async"]["pools"]["disk"]["queued"] <= writes + 1
        released.set()


class TestLowSpace:
    def test_space_that_came_back_is_noticed_although_nothing_is_written_meanwhile(
        self, make_chaos: MakeChaos
    ) -> None:
        """What a store says is free is as old as its last write. Believed, it would empty the cache and never write again."""
        one = make_chaos()
        tokens = list(range(640))
        one.cache.store(tokens, one.oracle.kv(tokens))
        one.cache.flush()
        disk: Any = one.disk.store
        wanted = 1 << 40
        plan = one.node.plan
        stores = {
            Tier.DISK: replace(plan.stores[Tier.DISK], min_free_bytes=disk.usage().free_bytes - (8 << 20))
        }
        one.node._tender._plan = replace(plan, stores=stores)
        for volume in disk._volumes:
            volume.free_bytes = min(volume.free_bytes, wanted) - (
                16 << 20
            )  # as it was for a moment at the last write
        for _ in range(20):
            one.node._tender._report_space()
            assert one.node.wait_settled(WAIT_S)
        assert one.cache.stats()["tiers"]["disk"]["entries"] == 40
        more = list(range(5000, 5064))
        one.cache.store(more, one.oracle.kv(more))
        one.cache.flush()
        assert one.cache.stats()["tiers"]["disk"]["entries"] == 44


class TestClosingTheNode:
    def test_two_threads_may_close_at_once(self, make_cache: MakeCache, oracle: CacheOracle) -> None:
        cache = make_cache({"disk.write_policy": "write_on_evict"})
        cache.store(TOKENS, oracle.kv(TOKENS))
        threads = [threading.Thread(target=cache.close) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert not any(thread.is_alive() for thread in threads)
        assert cache.close()

    def test_a_load_whose_copy_has_not_begun_is_told(
        self, make_cache: MakeCache, oracle: CacheOracle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("kvtiers.runtime.copying._INLINE_BYTES", 0)
        cache = make_cache(disk=False)
        cache.store(TOKENS, oracle.kv(TOKENS))
        cache.flush()
        free, begun = threading.Event(), threading.Semaphore(0)

        def hold() -> None:
            begun.release()
            free.wait(WAIT_S)

        for _ in range(2):
            assert cache.node.engine.run_in_memory_pool(Job(OpId(0), Priority.LOAD, hold, lambda: None))
        assert all(begun.acquire(timeout=WAIT_S) for _ in range(2))
        pending = cache.load(TOKENS)
        assert not pending.done()
        assert not cache.node.close(0.1), "two jobs still run"
        with pytest.raises(CacheClosed):
            pending.result(WAIT_S)
        free.set()
        assert cache.node.close(WAIT_S), "asked again, it tells that they have ended"

    def test_stores_that_have_no_room_on_the_disk_do_not_keep_it_open_beyond_its_time(
        self, make_chaos: MakeChaos
    ) -> None:
        one = make_chaos({"disk.write_policy": "write_on_evict"})
        one.cache.store(TOKENS, one.oracle.kv(TOKENS))
        one.disk.inject(Full(), Operation.WRITE, times=None)
        one.cache.close()
        one.node.close(0.2)  # it would hang until the test's time-out

    def test_the_memory_a_stuck_read_may_still_write_to_stays_mapped_until_it_has_ended(
        self, make_chaos: MakeChaos
    ) -> None:
        arenas = mapped_arenas()
        one = make_chaos()
        one.cache.store(TOKENS, one.oracle.kv(TOKENS))
        one.cache.flush()
        one.cache.evict("cpu")
        released = threading.Event()
        stalled = one.disk.inject(Stall(released), Operation.READ, times=None)
        pending = one.cache.load(TOKENS, timeout=3600)
        assert stalled.wait_for_hit(WAIT_S)
        one.cache.close(0.1)
        with pytest.raises(CacheClosed):
            pending.result(WAIT_S)
        workers = [t for t in threading.enumerate() if t.name.startswith("kvtiers-disk")]
        assert not one.node.close(0.1)
        assert mapped_arenas() == arenas + 1
        released.set()  # now it writes into memory that would be somebody else's, were it unmapped
        for worker in workers:
            worker.join(WAIT_S)
        assert not any(worker.is_alive() for worker in workers)
        assert one.node.close(WAIT_S)
        assert mapped_arenas() == arenas


def test_a_chunk_that_is_read_into_a_slot_smaller_than_a_record_never_spills(
    make_cache: MakeCache, oracle: CacheOracle
) -> None:
    """A slot is whole pages, and a record's padding fills the last one: the neighbours stay as they were."""
    cache = make_cache()
    cache.store(TOKENS, oracle.kv(TOKENS))
    cache.flush()
    cache.evict("cpu")
    for _ in range(3):
        loaded = cache.load(TOKENS).result()
        oracle.check(TOKENS, loaded.num_tokens, loaded.kv)
    assert all(
        slots[0] % SLOT == 0
        for slots in (copy.slots for copy in cache.node.inspect(lambda core: core.copies(Tier.CPU)))
    )


def test_what_the_sealed_write_says_of_corruption_is_no_reason_to_try_at_once_again(
    make_chaos: MakeChaos,
) -> None:
    one = make_chaos()
    failing = one.disk.inject(Fail(RecordCorrupt), Operation.WRITE, times=None)
    one.cache.store(TOKENS, one.oracle.kv(TOKENS))
    one.cache.flush()
    assert failing.hits == 6
    failing.cancel()
    one.cache.load(TOKENS).result()  # a touch tries again
    one.cache.flush()
    assert one.cache.stats()["tiers"]["disk"]["entries"] == 6
    np.testing.assert_array_equal(one.cache.load(TOKENS).result().kv, one.oracle.kv(TOKENS)[:, :, :WHOLE])
