"""Somebody scribbles on memory: what is found out when, and that it is never blessed."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from kvtiers.core.messages import OpId, Priority
from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.model.tiers import Tier
from kvtiers.runtime.pools import Job
from kvtiers.stores.guard import Operation
from kvtiers.testing.faulty_store import FlipBit, Stall

if TYPE_CHECKING:
    from tests.runtime.conftest import MakeCache, MakeChaos

    from kvtiers.runtime.node import CacheNode
    from kvtiers.testing.cache_oracle import CacheOracle

TOKENS = list(range(100))
DAMAGED = 2
VERIFY = {"cpu.verify_on_hit": True}
ON_EVICT = {"disk.write_policy": "write_on_evict"}


def scribble(node: CacheNode, key: bytes, at: int = 5000, *, tier: Tier = Tier.CPU) -> None:
    """Flip a bit of the chunk's slot in the arena, or in the simulated GPU pool."""
    copies = node.inspect(lambda core: core.copies(tier))
    (slots,) = [copy.slots for copy in copies if copy.chunk.key == key]
    if tier is Tier.CPU:
        node.arena.view(slots[0], 9216)[at] ^= 4
    else:
        assert node.device_pool is not None
        node.device_pool.view(slots[0], 9216)[at] ^= 4


class TestVerifyOnHit:
    @pytest.mark.parametrize("at", [0, 5000, 9215])
    def test_a_scribbled_slot_is_a_miss_and_heals_with_the_next_store(
        self, make_cache: MakeCache, oracle: CacheOracle, at: int
    ) -> None:
        cache = make_cache(VERIFY, disk=False)
        cache.store(TOKENS, oracle.kv(TOKENS))
        cache.flush()
        scribble(cache.node, oracle.keys(TOKENS)[DAMAGED], at)
        loaded = cache.load(TOKENS).result()
        assert (loaded.num_tokens, loaded.stopped_by) == (16 * DAMAGED, MissReason.CORRUPT)
        assert loaded.tiers == (Tier.CPU,) * DAMAGED
        oracle.check(TOKENS, loaded.num_tokens, loaded.kv)
        stats = cache.stats()
        assert stats["tiers"]["cpu"]["corrupt"] == 1
        assert stats["misses"] == {"corrupt": 1}
        assert stats["tiers"]["cpu"]["hits"] == DAMAGED, "what was cut off is no hit"
        assert stats["tiers"]["cpu"]["hit_bytes"] == DAMAGED * 9216
        assert cache.lookup(TOKENS).stopped_by is MissReason.CORRUPT
        assert cache.store(TOKENS, oracle.kv(TOKENS)).accepted == 1
        cache.flush()
        loaded = cache.load(TOKENS).result()
        assert loaded.num_tokens == 96
        oracle.check(TOKENS, loaded.num_tokens, loaded.kv)
        assert cache.check_integrity() == []

    def test_with_a_disk_the_next_load_reads_it_from_there(
        self, make_cache: MakeCache, oracle: CacheOracle
    ) -> None:
        cache = make_cache(VERIFY)
        cache.store(TOKENS, oracle.kv(TOKENS))
        cache.flush()
        scribble(cache.node, oracle.keys(TOKENS)[DAMAGED])
        assert cache.load(TOKENS).result().num_tokens == 16 * DAMAGED
        loaded = cache.load(TOKENS).result()
        assert loaded.tiers == tuple(Tier.DISK if index == DAMAGED else Tier.CPU for index in range(6))
        oracle.check(TOKENS, loaded.num_tokens, loaded.kv)

    def test_what_was_copied_to_the_gpu_pool_from_it_goes_too(
        self, make_cache: MakeCache, oracle: CacheOracle
    ) -> None:
        cache = make_cache({**VERIFY, "gpu.capacity": "1Mi", "gpu.device": "cpu"})
        cache.store(TOKENS, oracle.kv(TOKENS))
        cache.flush()
        cache.evict("gpu")
        cache.flush()
        scribble(cache.node, oracle.keys(TOKENS)[DAMAGED])
        assert (
            cache.load(TOKENS).result().num_tokens == 16 * DAMAGED
        )  # it was on its way up when this was found
        cache.flush()
        loaded = cache.load(TOKENS).result()
        assert loaded.num_tokens == 96
        oracle.check(TOKENS, loaded.num_tokens, loaded.kv)

    @pytest.mark.parametrize("promoted", [True, False], ids=["promoted", "stored there and copied down"])
    def test_a_scribbled_slot_of_the_gpu_pool_is_a_miss_once_and_then_comes_from_below(
        self, make_cache: MakeCache, oracle: CacheOracle, promoted: bool
    ) -> None:
        cache = make_cache({**VERIFY, "gpu.capacity": "1Mi", "gpu.device": "cpu"}, disk=False)
        cache.store(TOKENS, oracle.kv(TOKENS))
        cache.flush()
        if promoted:
            cache.evict("gpu")
            assert cache.load(TOKENS).result().tiers == (Tier.CPU,) * 6
            cache.flush()
        scribble(cache.node, oracle.keys(TOKENS)[DAMAGED], tier=Tier.GPU)
        loaded = cache.load(TOKENS).result()
        assert (loaded.num_tokens, loaded.stopped_by) == (16 * DAMAGED, MissReason.CORRUPT)
        assert loaded.tiers == (Tier.GPU,) * DAMAGED
        oracle.check(TOKENS, loaded.num_tokens, loaded.kv)
        assert cache.stats()["tiers"]["gpu"]["corrupt"] == 1
        loaded = cache.load(TOKENS).result()
        assert loaded.num_tokens == 96
        assert loaded.tiers[DAMAGED] is Tier.CPU
        oracle.check(TOKENS, loaded.num_tokens, loaded.kv)

    def test_a_promoted_chunk_keeps_its_checksum_when_the_arena_lets_it_go(
        self, make_cache: MakeCache, oracle: CacheOracle
    ) -> None:
        cache = make_cache({**VERIFY, "gpu.capacity": "1Mi", "gpu.device": "cpu"})
        cache.store(TOKENS, oracle.kv(TOKENS))
        cache.flush()
        cache.evict("gpu")
        cache.load(TOKENS).result()
        cache.flush()
        cache.evict("cpu")
        cache.flush()
        scribble(cache.node, oracle.keys(TOKENS)[DAMAGED], tier=Tier.GPU)
        (problem,) = cache.check_integrity()
        assert problem.startswith("gpu: the bytes of chunk")
        assert cache.load(TOKENS).result().num_tokens == 16 * DAMAGED
        loaded = cache.load(TOKENS).result()
        assert loaded.tiers[DAMAGED] is Tier.DISK
        oracle.check(TOKENS, loaded.num_tokens, loaded.kv)

    def test_what_lies_behind_the_first_bad_chunk_does_not_reach_the_gpu_pool_either(
        self, make_cache: MakeCache, oracle: CacheOracle
    ) -> None:
        """A load is cut at its first bad chunk and looks no further."""
        cache = make_cache({**VERIFY, "gpu.capacity": "1Mi", "gpu.device": "cpu"})
        cache.store(TOKENS, oracle.kv(TOKENS))
        cache.flush()
        cache.evict("gpu")
        cache.flush()
        for index in (1, 2, 4):
            scribble(cache.node, oracle.keys(TOKENS)[index])
        lengths = []
        for _ in range(5):
            loaded = cache.load(TOKENS).result()
            oracle.check(TOKENS, loaded.num_tokens, loaded.kv)
            lengths.append(loaded.num_tokens // 16)
            cache.flush()
        assert lengths[0] == 1
        assert lengths[-1] == 6, "each is found in turn, and read from the disk then"

    def test_what_a_disk_delivered_wrong_behind_its_own_check_is_found_too(
        self, make_chaos: MakeChaos
    ) -> None:
        one = make_chaos(VERIFY)
        one.cache.store(TOKENS, one.oracle.kv(TOKENS))
        one.cache.flush()
        one.cache.evict("cpu")
        key = one.oracle.keys(TOKENS)[DAMAGED]
        one.disk.inject(FlipBit(777), Operation.READ, where=lambda ref: ref.key == key)
        loaded = one.cache.load(TOKENS).result()
        assert (loaded.num_tokens, loaded.stopped_by) == (16 * DAMAGED, MissReason.CORRUPT)
        loaded = one.cache.load(TOKENS).result()
        assert loaded.num_tokens == 96
        one.oracle.check(TOKENS, loaded.num_tokens, loaded.kv)

    def test_large_loads_copied_in_two_halves_are_cut_at_the_first_bad_chunk_of_either(
        self, make_cache: MakeCache, oracle: CacheOracle
    ) -> None:
        values = {**VERIFY, "cpu.buffer_size": "16Mi"}
        tokens = list(range(16 * 600))  # 600 chunks of 9 KiB: past the 4 MiB where two threads share the copy
        cache = make_cache(values, disk=False)
        cache.store(tokens, oracle.kv(tokens))
        cache.flush()
        keys = oracle.keys(tokens)
        for first, second in ((550, 580), (120, 450)):
            for index in (first, second):
                scribble(cache.node, keys[index])
            loaded = cache.load(tokens).result()
            assert (loaded.num_tokens, loaded.stopped_by) == (16 * first, MissReason.CORRUPT)
            oracle.check(tokens, loaded.num_tokens, loaded.kv)
            scribble(cache.node, keys[second])  # as it was


class TestWithoutIt:
    def test_the_audit_finds_a_scribbled_slot(self, make_cache: MakeCache, oracle: CacheOracle) -> None:
        cache = make_cache(disk=False)
        cache.store(TOKENS, oracle.kv(TOKENS))
        assert cache.check_integrity() == []
        key = oracle.keys(TOKENS)[DAMAGED]
        scribble(cache.node, key)
        (problem,) = cache.check_integrity()
        assert problem == f"cpu: the bytes of chunk {key.hex()[:12]} are not those that were committed"
        scribble(cache.node, key)  # the same bit again: all is well
        assert cache.check_integrity() == []


class TestNeverBlessed:
    """The checksum is made at commit, so writing what lies in a slot later can't make it right."""

    @pytest.mark.parametrize("codec", ["none", "zstd"])
    def test_what_was_scribbled_on_between_commit_and_write_is_rejected_at_the_read(
        self, make_chaos: MakeChaos, codec: str
    ) -> None:
        one = make_chaos({"disk.compression": codec})
        released = threading.Event()
        key = one.oracle.keys(TOKENS)[DAMAGED]
        stalled = one.disk.inject(Stall(released), Operation.WRITE, where=lambda ref: ref.key == key)
        one.cache.store(TOKENS, one.oracle.kv(TOKENS))
        assert stalled.wait_for_hit(20)
        scribble(one.node, key)
        released.set()
        one.cache.flush()
        self.rejected_then_healed(one)

    @pytest.mark.parametrize("codec", ["none", "zstd"])
    def test_what_was_scribbled_on_before_it_left_memory_is_rejected_at_the_read(
        self, make_chaos: MakeChaos, codec: str
    ) -> None:
        one = make_chaos({**ON_EVICT, "disk.compression": codec})
        one.cache.store(TOKENS, one.oracle.kv(TOKENS))
        one.cache.flush()
        scribble(one.node, one.oracle.keys(TOKENS)[DAMAGED])
        self.rejected_then_healed(one)

    def rejected_then_healed(self, one: Any) -> None:
        for _ in range(6):
            one.cache.evict("cpu")
            one.cache.flush()
        assert one.cache.lookup(TOKENS).tiers == (Tier.DISK,) * 6
        loaded = one.cache.load(TOKENS).result()
        assert (loaded.num_tokens, loaded.stopped_by) == (16 * DAMAGED, MissReason.CORRUPT)
        one.oracle.check(TOKENS, loaded.num_tokens, loaded.kv)
        assert one.node.wait_settled(20)
        assert one.cache.stats()["tiers"]["disk"]["corrupt"] == 1
        receipt = one.cache.store(TOKENS, one.oracle.kv(TOKENS))
        assert receipt.accepted == 1
        assert all(refusal is Refusal.PRESENT for _, refusal in receipt.refusals)
        one.cache.flush()
        loaded = one.cache.load(TOKENS).result()
        assert loaded.num_tokens == 96
        one.oracle.check(TOKENS, loaded.num_tokens, loaded.kv)


def test_the_checksum_is_made_off_the_callers_thread(make_cache: MakeCache, oracle: CacheOracle) -> None:
    cache = make_cache(disk=False)
    free = threading.Event()
    begun = threading.Semaphore(0)

    def hold() -> None:
        begun.release()
        free.wait(20)

    for _ in range(2):  # both threads of the memory pool
        assert cache.node.engine.run_in_memory_pool(Job(OpId(0), Priority.LOAD, hold, lambda: None))
    assert all(begun.acquire(timeout=20) for _ in range(2))
    assert cache.store(TOKENS, oracle.kv(TOKENS)).accepted == 6  # it would hang if it made them itself
    assert not any(copy.checksums for copy in cache.node.inspect(lambda core: core.copies(Tier.CPU)))
    assert cache.lookup(TOKENS).num_tokens == 96, "it can be hit all the same"
    free.set()
    cache.flush()
    assert all(copy.checksums for copy in cache.node.inspect(lambda core: core.copies(Tier.CPU)))
