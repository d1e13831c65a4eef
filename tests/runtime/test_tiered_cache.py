"""The library's calls, one by one, on a real node with a real disk."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvtiers.model.errors import (
    CacheClosed,
    DeadlineExceeded,
    DirectoryInUse,
    DoesNotFit,
    InvalidArgument,
    LayoutMismatch,
    TierDisabled,
    UnknownTier,
)
from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.model.tiers import Tier
from kvtiers.runtime.cache import TieredCache
from kvtiers.stores.guard import Operation
from kvtiers.testing.cache_oracle import SMALL_LAYOUT, CacheOracle, WrongKV
from kvtiers.testing.chaos import namespace, small_config
from kvtiers.testing.disk_damage import record_files
from kvtiers.testing.faulty_store import Stall

if TYPE_CHECKING:
    from pathlib import Path

    from tests.runtime.conftest import MakeCache, MakeChaos

TOKENS = list(range(100))  # six chunks and four tokens
WHOLE = 96


class TestStoring:
    def test_what_was_stored_is_found_and_loaded_bit_for_bit(
        self, make_cache: MakeCache, oracle: CacheOracle
    ) -> None:
        cache = make_cache()
        receipt = cache.store(TOKENS, oracle.kv(TOKENS))
        assert (receipt.accepted, receipt.accepted_tokens, receipt.present) == (6, WHOLE, 0)
        assert receipt.refusal is None
        assert receipt.refusals == ()
        match = cache.lookup(TOKENS)
        assert match.num_tokens == WHOLE
        assert match.tiers == (Tier.CPU,) * 6
        assert match.stopped_by is MissReason.PARTIAL_CHUNK
        loaded = cache.load(TOKENS).result()
        assert loaded.num_tokens == WHOLE
        assert loaded.kv.shape == SMALL_LAYOUT.shape(WHOLE)
        assert loaded.stopped_by is MissReason.PARTIAL_CHUNK
        oracle.check(TOKENS, loaded.num_tokens, loaded.kv)

    def test_the_callers_memory_may_be_reused_at_once(
        self, make_cache: MakeCache, oracle: CacheOracle
    ) -> None:
        cache, kv = make_cache(), oracle.kv(TOKENS)
        cache.store(TOKENS, kv)
        kv[:] = 0
        loaded = cache.load(TOKENS).result()
        oracle.check(TOKENS, loaded.num_tokens, loaded.kv)

    def test_a_large_store_is_committed_while_it_is_copied_and_keeps_that_if_the_rest_fails(
        self, make_cache: MakeCache, oracle: CacheOracle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = make_cache()
        happened: list[Any] = []
        monkeypatch.setattr("kvtiers.runtime.cache._COMMIT_BYTES", SMALL_LAYOUT.nbytes(32))
        memory, commit = cache.node.memory[Tier.CPU], cache.node.commit
        write = memory.write

        def failing_write(*arguments: Any) -> None:
            if happened.count("write") == 5:
                raise RuntimeError("no more")
            happened.append("write")
            write(*arguments)

        def noted_commit(ticket: Any, indices: Any) -> None:
            happened.append(list(indices))
            commit(ticket, indices)

        monkeypatch.setattr(memory, "write", failing_write)
        monkeypatch.setattr(cache.node, "commit", noted_commit)
        with pytest.raises(RuntimeError, match="no more"):
            cache.store(TOKENS, oracle.kv(TOKENS))
        assert happened == ["write", "write", [0, 1], "write", "write", [2, 3], "write"]
        assert cache.stats()["open_tickets"] == 0
        loaded = cache.load(TOKENS).result()
        assert loaded.num_tokens == 64
        oracle.check(TOKENS, loaded.num_tokens, loaded.kv)
        monkeypatch.undo()
        assert cache.store(TOKENS, oracle.kv(TOKENS)).accepted == 2
        assert cache.load(TOKENS).result().num_tokens == WHOLE
        assert cache.node.check_integrity() == []

    def test_a_loaded_array_is_the_callers_own(self, make_cache: MakeCache, oracle: CacheOracle) -> None:
        cache = make_cache()
        cache.store(TOKENS, oracle.kv(TOKENS))
        cache.load(TOKENS).result().kv[:] = 0
        oracle.check(TOKENS, WHOLE, cache.load(TOKENS).result().kv)

    def test_the_same_prompt_again_is_present(self, make_cache: MakeCache, oracle: CacheOracle) -> None:
        cache = make_cache()
        cache.store(TOKENS, oracle.kv(TOKENS))
        again = cache.store(TOKENS, oracle.kv(TOKENS))
        assert (again.accepted, again.present, again.refusal) == (0, 6, None)
        assert again.refusals == tuple((index, Refusal.PRESENT) for index in range(6))

    def test_a_longer_prompt_adds_only_its_end(self, make_cache: MakeCache, oracle: CacheOracle) -> None:
        cache, longer = make_cache(), [*TOKENS, *range(500, 560)]
        cache.store(TOKENS, oracle.kv(TOKENS))
        receipt = cache.store(longer, oracle.kv(longer))
        assert (receipt.accepted, receipt.present) == (4, 6)
        loaded = cache.load(longer).result()
        assert loaded.num_tokens == 160
        assert loaded.stopped_by is None, "160 tokens are ten whole chunks"
        oracle.check(longer, loaded.num_tokens, loaded.kv)

    def test_prompts_that_part_share_their_beginning(
        self, make_cache: MakeCache, oracle: CacheOracle
    ) -> None:
        cache, other = make_cache(), [*TOKENS[:40], *range(900, 960)]
        cache.store(TOKENS, oracle.kv(TOKENS))
        receipt = cache.store(other, oracle.kv(other))
        assert (receipt.accepted, receipt.present) == (4, 2)
        for tokens in (TOKENS, other):
            loaded = cache.load(tokens).result()
            assert loaded.num_tokens == WHOLE
            oracle.check(tokens, loaded.num_tokens, loaded.kv)

    def test_less_than_a_chunk_is_nothing(self, make_cache: MakeCache, oracle: CacheOracle) -> None:
        cache = make_cache()
        receipt = cache.store(TOKENS[:15], oracle.kv(TOKENS[:15]))
        assert (receipt.accepted, receipt.refusal) == (0, None)
        match = cache.lookup(TOKENS[:15])
        assert (match.num_tokens, match.stopped_by) == (0, MissReason.PARTIAL_CHUNK)
        assert cache.load(TOKENS[:15]).result().num_tokens == 0

    def test_no_tokens_are_no_miss(self, make_cache: MakeCache, oracle: CacheOracle) -> None:
        cache = make_cache()
        assert cache.store([], oracle.kv([])).accepted == 0
        assert cache.lookup([]).stopped_by is None
        assert cache.load([]).result().num_tokens == 0

    @pytest.mark.parametrize("form", ["list", "tuple", "range", "int64", "uint32", "int16", "strided"])
    def test_token_ids_may_be_any_integers(
        self, make_cache: MakeCache, oracle: CacheOracle, form: str
    ) -> None:
        cache = make_cache()
        forms: dict[str, Any] = {
            "list": TOKENS,
            "tuple": tuple(TOKENS),
            "range": range(100),
            "int64": np.arange(100),
            "uint32": np.arange(100, dtype=np.uint32),
            "int16": np.arange(100, dtype=np.int16),
            "strided": np.arange(200)[::2] // 2,
        }
        assert cache.store(forms[form], oracle.kv(TOKENS)).accepted == 6
        assert cache.lookup(TOKENS).num_tokens == WHOLE

    def test_layers_of_pairs_and_tensors_store_the_same_bytes(
        self, make_cache: MakeCache, oracle: CacheOracle
    ) -> None:
        cache, kv = make_cache(), oracle.kv(TOKENS)
        tensor = torch.from_numpy(kv.view(np.int16)).view(torch.bfloat16)
        for salt, form in (("pairs", [tuple(layer) for layer in kv]), ("tensor", tensor)):
            cache.store(TOKENS, form, salt=salt)
            loaded = cache.load(TOKENS, salt=salt).result()
            np.testing.assert_array_equal(loaded.kv, kv[:, :, :WHOLE])

    def test_a_wrong_layout_stores_nothing(self, make_cache: MakeCache, oracle: CacheOracle) -> None:
        cache = make_cache()
        for kv in (oracle.kv(TOKENS).astype(np.float64), oracle.kv(TOKENS)[:2], oracle.kv([*TOKENS, 7])):
            with pytest.raises(LayoutMismatch):
                cache.store(TOKENS, kv)
        with pytest.raises(LayoutMismatch, match="tokenize first"):
            cache.store("a prompt", oracle.kv(TOKENS[:8]))  # type: ignore[arg-type]
        with pytest.raises(LayoutMismatch, match="integers"):
            cache.store([-1] * 100, oracle.kv(TOKENS))
        assert cache.stats()["tiers"]["cpu"]["entries"] == 0


class TestStart:
    def test_kv_may_come_piece_by_piece(self, make_cache: MakeCache, oracle: CacheOracle) -> None:
        cache = make_cache()
        for start, end in ((0, 32), (32, 64), (64, 100)):
            receipt = cache.store(TOKENS[:end], oracle.kv(TOKENS[:end], start=start), start=start)
            assert receipt.accepted == (end - start) // 16
        loaded = cache.load(TOKENS).result()
        assert loaded.num_tokens == WHOLE
        oracle.check(TOKENS, loaded.num_tokens, loaded.kv)

    def test_pieces_may_overlap_and_begin_inside_a_chunk(
        self, make_cache: MakeCache, oracle: CacheOracle
    ) -> None:
        cache = make_cache()
        cache.store(TOKENS, oracle.kv(TOKENS)[:, :, :40])
        receipt = cache.store(TOKENS, oracle.kv(TOKENS, start=20)[:, :, :50], start=20)
        assert (receipt.accepted, receipt.present) == (2, 0), (
            "chunks 2 and 3; chunk 1 is whole only with the first piece"
        )
        loaded = cache.load(TOKENS).result()
        assert loaded.num_tokens == 64
        oracle.check(TOKENS, loaded.num_tokens, loaded.kv)

    def test_a_piece_whose_beginning_is_not_cached_is_refused_whole(
        self, make_cache: MakeCache, oracle: CacheOracle
    ) -> None:
        cache = make_cache()
        receipt = cache.store(TOKENS, oracle.kv(TOKENS, start=32), start=32)
        assert receipt.accepted == 0
        assert receipt.refusal is Refusal.CHAIN_BROKEN
        assert receipt.refusals == tuple((index, Refusal.CHAIN_BROKEN) for index in range(2, 6))
        assert cache.lookup(TOKENS).num_tokens == 0

    def test_kv_beyond_the_tokens_or_before_them_is_refused(
        self, make_cache: MakeCache, oracle: CacheOracle
    ) -> None:
        cache = make_cache()
        with pytest.raises(
            LayoutMismatch, match="100 tokens from position 1 on, but there are 100 token ids"
        ):
            cache.store(TOKENS, oracle.kv(TOKENS), start=1)
        with pytest.raises(InvalidArgument, match="start is a number of tokens from 0 on, got -16"):
            cache.store(TOKENS, oracle.kv(TOKENS)[:, :, :32], start=-16)


class TestLoadingInto:
    @pytest.mark.parametrize("tokens", [100, 96, 200])
    def test_an_array_is_filled_from_its_beginning_and_no_further(
        self, make_cache: MakeCache, oracle: CacheOracle, tokens: int
    ) -> None:
        cache = make_cache()
        cache.store(TOKENS, oracle.kv(TOKENS))
        into = np.full(SMALL_LAYOUT.shape(tokens), 7, dtype=np.uint16)
        loaded = cache.load(TOKENS, into=into).result()
        assert loaded.kv is into
        assert loaded.num_tokens == WHOLE
        oracle.check(TOKENS, loaded.num_tokens, into)
        assert (into[:, :, WHOLE:] == 7).all()

    def test_a_short_array_bounds_the_load_and_that_is_no_miss(
        self, make_cache: MakeCache, oracle: CacheOracle
    ) -> None:
        cache = make_cache()
        cache.store(TOKENS, oracle.kv(TOKENS))
        into = np.zeros(SMALL_LAYOUT.shape(32), dtype=np.uint16)
        loaded = cache.load(TOKENS, into=into).result()
        assert (loaded.num_tokens, loaded.stopped_by) == (32, None)
        oracle.check(TOKENS, 32, into)
        into = np.zeros(SMALL_LAYOUT.shape(40), dtype=np.uint16)
        loaded = cache.load(TOKENS, into=into).result()
        assert (loaded.num_tokens, loaded.stopped_by) == (32, MissReason.PARTIAL_CHUNK)

    def test_transformers_tensors_with_heads_first_are_filled_in_place(
        self, make_cache: MakeCache, oracle: CacheOracle
    ) -> None:
        cache = make_cache()
        cache.store(TOKENS, oracle.kv(TOKENS))
        caches = [
            [torch.zeros(2, 100, 24, dtype=torch.bfloat16) for _ in range(2)]
            for _ in range(SMALL_LAYOUT.num_layers)
        ]
        into = [tuple(tensor.transpose(0, 1) for tensor in pair) for pair in caches]
        loaded = cache.load(TOKENS, into=into).result()
        assert loaded.kv is into
        got = torch.stack([torch.stack(pair) for pair in caches]).transpose(2, 3)
        oracle.check(TOKENS, loaded.num_tokens, got.view(torch.int16).numpy().view(np.uint16))

    def test_what_cannot_be_loaded_into_is_refused_before_anything_begins(
        self, make_cache: MakeCache, oracle: CacheOracle
    ) -> None:
        cache = make_cache()
        cache.store(TOKENS, oracle.kv(TOKENS))
        cache.flush()
        frozen = oracle.kv(TOKENS)
        frozen.flags.writeable = False
        for into in (frozen, oracle.kv(TOKENS).astype(np.float32), oracle.kv(TOKENS)[0], "nowhere"):
            with pytest.raises(LayoutMismatch):
                cache.load(TOKENS, into=into)
        assert cache.stats()["open_tickets"] == 0
        assert cache.stats()["requests"] == 0


class TestWhyNot:
    def test_never_seen(self, make_cache: MakeCache) -> None:
        cache = make_cache()
        assert cache.lookup(TOKENS).stopped_by is MissReason.NEVER_SEEN
        loaded = cache.load(TOKENS).result()
        assert (loaded.num_tokens, loaded.tiers, loaded.stopped_by) == (0, (), MissReason.NEVER_SEEN)
        assert cache.stats()["misses"] == {"never_seen": 1}, "a lookup counts nothing"

    def test_salts_keep_prompts_apart_and_the_miss_says_so(
        self, make_cache: MakeCache, oracle: CacheOracle
    ) -> None:
        cache = make_cache()
        cache.store(TOKENS, oracle.kv(TOKENS, salt="mine"), salt="mine")
        for salt in (None, "", "yours"):
            assert cache.lookup(TOKENS, salt=salt).num_tokens == 0
            assert cache.load(TOKENS, salt=salt).result().stopped_by is MissReason.SALT_DIFFERS
        assert cache.stats()["misses"] == {"salt_differs": 3}
        cache.store(TOKENS, oracle.kv(TOKENS, salt="yours"), salt="yours")
        for salt in ("mine", "yours"):
            oracle.check(TOKENS, WHOLE, cache.load(TOKENS, salt=salt).result().kv, salt=salt)
        with pytest.raises(WrongKV):
            oracle.check(TOKENS, WHOLE, cache.load(TOKENS, salt="mine").result().kv, salt="yours")

    def test_another_model_on_the_same_node_finds_nothing_and_the_miss_says_so(
        self, make_cache: MakeCache, oracle: CacheOracle
    ) -> None:
        first = make_cache()
        second = make_cache(named=namespace("another"), node=first.node)
        first.store(TOKENS, oracle.kv(TOKENS))
        assert second.lookup(TOKENS).stopped_by is MissReason.NAMESPACE_CHANGED
        theirs = CacheOracle(namespace("another"))
        second.store(TOKENS, theirs.kv(TOKENS))
        theirs.check(TOKENS, WHOLE, second.load(TOKENS).result().kv)
        oracle.check(TOKENS, WHOLE, first.load(TOKENS).result().kv)

    def test_evicted(self, make_cache: MakeCache, oracle: CacheOracle) -> None:
        cache = make_cache(disk=False)
        cache.store(TOKENS, oracle.kv(TOKENS))
        cache.flush()
        cache.evict("cpu")
        assert cache.lookup(TOKENS).stopped_by is MissReason.EVICTED
        assert cache.load(TOKENS).result().stopped_by is MissReason.EVICTED


class TestEvicting:
    def test_down_to_a_share_of_the_capacity_last_chunks_first(
        self, make_cache: MakeCache, oracle: CacheOracle
    ) -> None:
        cache, tokens = make_cache(disk=False), list(range(640))
        cache.store(tokens, oracle.kv(tokens))
        cache.flush()
        done = cache.evict("cpu", 0.25)
        capacity = cache.stats()["tiers"]["cpu"]["capacity_bytes"]
        usage = cache.stats()["tiers"]["cpu"]["usage_bytes"]
        assert usage <= capacity * 0.25
        assert done.chunks * 12_288 == done.nbytes == 40 * 12_288 - usage
        match = cache.lookup(tokens)
        assert match.num_tokens == usage // 12_288 * 16, "a prefix stays, no chunk of it is stranded"

    def test_what_only_memory_has_goes_to_the_disk_first(
        self, make_cache: MakeCache, oracle: CacheOracle
    ) -> None:
        cache = make_cache({"disk.write_policy": "write_on_evict"})
        cache.store(TOKENS, oracle.kv(TOKENS))
        cache.flush()
        assert cache.lookup(TOKENS).tiers == (Tier.CPU,) * 6
        done = cache.evict(Tier.CPU)
        assert (done.chunks, done.demoting) == (0, 6)
        cache.flush()
        assert cache.lookup(TOKENS).tiers == (Tier.DISK,) * 6
        assert cache.stats()["tiers"]["cpu"]["demoted"] == 6
        loaded = cache.load(TOKENS).result()
        oracle.check(TOKENS, loaded.num_tokens, loaded.kv)

    def test_a_thousand_records_go_and_nothing_of_them_stays(
        self, make_cache: MakeCache, oracle: CacheOracle, tmp_path: Path
    ) -> None:
        cache = make_cache({"disk.max_size": "64Mi"})
        for first in range(0, 1000, 40):
            tokens = list(range(first * 1000, first * 1000 + 640))
            cache.store(tokens, oracle.kv(tokens))
            cache.flush()
        assert len(record_files(tmp_path / "cache")) == 1000
        assert cache.evict("disk").chunks == 1000
        assert cache.check_integrity() == []
        assert record_files(tmp_path / "cache") == {}
        assert cache.stats()["tiers"]["disk"]["entries"] == 0

    def test_nonsense_is_refused_with_what_is_allowed(self, make_cache: MakeCache) -> None:
        cache = make_cache(disk=False)
        with pytest.raises(InvalidArgument, match="between 0 and 1, got 2"):
            cache.evict("cpu", 2)
        with pytest.raises(UnknownTier, match="'l2' is not one of gpu, cpu, disk, remote"):
            cache.evict("l2")
        with pytest.raises(TierDisabled, match="disk"):
            cache.evict("disk")


class TestWaiting:
    def test_flush_waits_for_the_disk_and_says_so_when_it_is_too_late(
        self, make_chaos: MakeChaos, tmp_path: Path
    ) -> None:
        one = make_chaos()
        released = threading.Event()
        one.disk.inject(Stall(released), Operation.WRITE, times=None)
        receipt = one.cache.store(TOKENS, one.oracle.kv(TOKENS))
        with pytest.raises(DeadlineExceeded, match="background operations had not ended"):
            one.cache.flush(0.05)
        with pytest.raises(DeadlineExceeded, match="had not reached their tiers"):
            receipt.wait(0.05)
        assert record_files(tmp_path / "cache") == {}
        released.set()
        receipt.wait(20)
        one.cache.flush()
        assert len(record_files(tmp_path / "cache")) == 6

    def test_a_receipt_waits_for_its_own_chunks_only(self, make_chaos: MakeChaos) -> None:
        one = make_chaos()
        other = [t + 5000 for t in TOKENS]
        mine = {*one.oracle.keys(TOKENS)}
        released = threading.Event()
        one.disk.inject(Stall(released), Operation.WRITE, times=None, where=lambda ref: ref.key not in mine)
        one.cache.store(other[:16], one.oracle.kv(other[:16]))
        receipt = one.cache.store(TOKENS, one.oracle.kv(TOKENS))
        receipt.wait(20)
        with pytest.raises(DeadlineExceeded):
            one.cache.flush(0.01)
        released.set()

    def test_a_load_is_answered_with_what_is_there_at_its_deadline(self, make_chaos: MakeChaos) -> None:
        one = make_chaos()
        one.cache.store(TOKENS, one.oracle.kv(TOKENS))
        one.cache.flush()
        one.cache.evict("cpu")
        slow = one.oracle.keys(TOKENS)[3]
        released = threading.Event()
        one.disk.inject(Stall(released), Operation.READ, where=lambda ref: ref.key == slow)
        pending = one.cache.load(TOKENS, timeout=0.2)
        assert not pending.done()
        with pytest.raises(DeadlineExceeded, match="call result again"):
            pending.result(0.0)
        loaded = pending.result()
        assert pending.done()
        assert (loaded.num_tokens, loaded.stopped_by) == (48, MissReason.STAGING_TIMEOUT)
        assert loaded.tiers == (Tier.DISK,) * 3
        one.oracle.check(TOKENS, 48, loaded.kv)
        assert pending.result() is loaded
        released.set()

    def test_no_time_at_all_gives_what_memory_has(self, make_cache: MakeCache, oracle: CacheOracle) -> None:
        cache = make_cache()
        cache.store(TOKENS, oracle.kv(TOKENS))
        assert cache.load(TOKENS, timeout=0).result().num_tokens == WHOLE
        cache.flush()
        cache.evict("cpu")
        loaded = cache.load(TOKENS, timeout=0).result()
        oracle.check(TOKENS, loaded.num_tokens, loaded.kv)


class TestClosing:
    def test_every_call_after_it_says_so(self, make_cache: MakeCache, oracle: CacheOracle) -> None:
        cache = make_cache()
        receipt = cache.store(TOKENS, oracle.kv(TOKENS))
        assert cache.close()
        assert cache.close(), "twice is no error"
        for call in (
            lambda: cache.store(TOKENS, oracle.kv(TOKENS)),
            lambda: cache.lookup(TOKENS),
            lambda: cache.load(TOKENS),
            lambda: cache.evict("cpu"),
            cache.check_integrity,
        ):
            with pytest.raises(CacheClosed, match="open a new one"):
                call()
        receipt.wait(0)
        cache.flush(0)
        assert cache.stats()["tiers"]["disk"]["entries"] == 6

    def test_what_only_memory_holds_is_written_out(
        self, make_cache: MakeCache, oracle: CacheOracle, tmp_path: Path
    ) -> None:
        values = {"disk.write_policy": "write_on_evict", "gpu.capacity": "1Mi", "gpu.device": "cpu"}
        cache = make_cache(values)
        cache.store(TOKENS, oracle.kv(TOKENS))
        assert record_files(tmp_path / "cache") == {}
        cache.close()
        assert len(record_files(tmp_path / "cache")) == 6
        again = make_cache(values)
        loaded = again.load(TOKENS).result()
        assert loaded.tiers == (Tier.DISK,) * 6
        oracle.check(TOKENS, loaded.num_tokens, loaded.kv)

    def test_a_load_that_waits_for_the_disk_is_given_up(self, make_chaos: MakeChaos) -> None:
        one = make_chaos()
        one.cache.store(TOKENS, one.oracle.kv(TOKENS))
        one.cache.flush()
        one.cache.evict("cpu")
        released = threading.Event()
        stalled = one.disk.inject(Stall(released), Operation.READ, times=None)
        pending = one.cache.load(TOKENS, timeout=3600)
        assert stalled.wait_for_hit(20)
        assert one.cache.close(), "the session holds nothing any more"
        with pytest.raises(CacheClosed, match="while this load was under way"):
            pending.result(20)
        released.set()

    def test_a_session_ends_and_the_node_with_the_others_goes_on(
        self, make_cache: MakeCache, oracle: CacheOracle
    ) -> None:
        first = make_cache()
        second = make_cache(node=first.node)
        second.store(TOKENS, oracle.kv(TOKENS))
        assert first.stats()["sessions"] == 2
        assert second.close()
        assert first.stats()["sessions"] == 1
        with pytest.raises(CacheClosed):
            second.lookup(TOKENS)
        loaded = first.load(TOKENS).result()
        oracle.check(TOKENS, loaded.num_tokens, loaded.kv)

    def test_no_session_begins_on_a_closed_node(self, make_cache: MakeCache) -> None:
        first = make_cache()
        first.close()
        with pytest.raises(CacheClosed):
            make_cache(node=first.node)

    def test_for_ever_is_long_enough_a_time_out(self, make_cache: MakeCache, oracle: CacheOracle) -> None:
        cache = make_cache()
        cache.store(TOKENS, oracle.kv(TOKENS)).wait(float("inf"))
        cache.flush(float("inf"))
        assert cache.close(float("inf"))

    def test_the_with_block_closes(self, oracle: CacheOracle, tmp_path: Path) -> None:
        config = small_config(tmp_path / "cache")
        with TieredCache(config, SMALL_LAYOUT, namespace()) as cache:
            cache.store(TOKENS, oracle.kv(TOKENS))
        with TieredCache(config, SMALL_LAYOUT, namespace()) as again:
            assert again.lookup(TOKENS).num_tokens == WHOLE


class TestOpening:
    def test_a_directory_has_one_owner(self, make_cache: MakeCache, tmp_path: Path) -> None:
        first = make_cache()
        with pytest.raises(DirectoryInUse, match="is in use by this process"):
            make_cache()
        assert first.lookup(TOKENS).num_tokens == 0
        first.close()
        make_cache()

    def test_a_chunk_larger_than_a_tier_is_refused_with_what_to_set_and_nothing_stays_behind(
        self, make_cache: MakeCache
    ) -> None:
        before = threading.active_count()
        with pytest.raises(
            DoesNotFit, match=r"BUFFER_SIZE higher, or KVTIERS_STORAGE__CHUNK_TOKENS lower"
        ) as caught:
            make_cache({"chunk_tokens": 4096})
        assert len(caught.value.problems) == 3
        assert threading.active_count() <= before
        make_cache()  # the directory is free again

    @pytest.mark.parametrize(
        ("values", "says"),
        [
            ({"disk.max_size": "1Mi"}, ["the disk tier keeps 996,147", "DISK__MAX_SIZE higher"]),
            (
                {"gpu.capacity": "1Mi", "gpu.device": "cpu"},
                ["the GPU tier keeps 786,432", "GPU__CAPACITY higher"],
            ),
        ],
        ids=["disk", "gpu"],
    )
    def test_a_tier_too_small_for_one_chunk_is_refused_and_not_silently_left_empty(
        self, make_cache: MakeCache, values: dict[str, Any], says: list[str]
    ) -> None:
        roomy = {"cpu.buffer_size": "8Mi", "cpu.eviction_threshold": 0.7, "chunk_tokens": 2048}
        with pytest.raises(DoesNotFit) as caught:
            make_cache({**roomy, **values})
        assert all(part in str(caught.value) for part in says), str(caught.value)

    def test_a_disk_that_takes_one_record_and_its_directories_keeps_one(
        self, make_cache: MakeCache, oracle: CacheOracle
    ) -> None:
        roomy = {"cpu.buffer_size": "8Mi", "cpu.eviction_threshold": 0.7, "chunk_tokens": 2048}
        needed = 2048 // 16 * 9216 + 4096 + 9 * 4096  # KV and a header; the log and the directories
        with pytest.raises(DoesNotFit):
            make_cache({**roomy, "disk.max_size": int(needed / 0.95) - 10})
        cache = make_cache({**roomy, "disk.max_size": int(needed / 0.95) + 10})
        one = list(range(2048))
        cache.store(one, oracle.kv(one))
        cache.flush()
        assert cache.stats()["tiers"]["disk"]["entries"] == 1

    def test_chunks_of_another_size_on_the_same_node_are_another_namespace(
        self, make_cache: MakeCache
    ) -> None:
        first = make_cache()
        other = make_cache({"chunk_tokens": 32}, node=first.node)
        oracle = CacheOracle(namespace(), chunk_tokens=32)
        other.store(TOKENS, oracle.kv(TOKENS))
        assert first.lookup(TOKENS).num_tokens == 0
        loaded = other.load(TOKENS).result()
        assert loaded.num_tokens == 96
        oracle.check(TOKENS, loaded.num_tokens, loaded.kv)


class TestStats:
    def test_hits_count_for_exactly_one_tier_in_chunks_tokens_and_bytes(
        self, make_cache: MakeCache, oracle: CacheOracle
    ) -> None:
        cache = make_cache()
        cache.store(TOKENS, oracle.kv(TOKENS))
        cache.flush()
        cache.load(TOKENS).result()
        cache.evict("cpu", 0.04)  # three chunks stay
        cache.flush()
        loaded = cache.load(TOKENS).result()
        assert loaded.tiers == (Tier.CPU,) * 3 + (Tier.DISK,) * 3
        tiers = cache.stats()["tiers"]
        assert (tiers["cpu"]["lookups"], tiers["cpu"]["hits"]) == (12, 9)
        assert (tiers["disk"]["lookups"], tiers["disk"]["hits"]) == (3, 3)
        assert tiers["cpu"]["hit_tokens"] == 9 * 16
        assert tiers["disk"]["hit_bytes"] == 3 * 9216
        assert cache.stats()["requests"] == 2

    def test_they_are_plain_values_that_json_can_hold(
        self, make_cache: MakeCache, oracle: CacheOracle
    ) -> None:
        cache = make_cache({"gpu.capacity": "1Mi", "gpu.device": "cpu"})
        cache.store(TOKENS, oracle.kv(TOKENS), tenant="someone")
        cache.flush()
        cache.load(TOKENS).result()
        stats = json.loads(json.dumps(cache.stats()))
        assert stats["tenants"] == {"someone": WHOLE}
        assert stats["tiers"]["gpu"]["simulated"] is True
        assert stats["tiers"]["disk"]["breaker"] == "closed"
        assert stats["latency"]["disk"]["write"]["count"] == 6
        assert stats["async"]["failed"] == {}

    @pytest.mark.parametrize("tenant", [[], 7, b"name"])
    def test_what_is_no_name_is_refused_before_anything_is_kept(
        self, make_cache: MakeCache, oracle: CacheOracle, tenant: Any
    ) -> None:
        cache = make_cache()
        with pytest.raises(InvalidArgument, match="tenant"):
            cache.store(TOKENS, oracle.kv(TOKENS), tenant=tenant)
        assert cache.lookup(TOKENS).num_tokens == 0

    def test_tenants_are_bounded(self, make_cache: MakeCache, oracle: CacheOracle) -> None:
        cache = make_cache(disk=False)
        for number in range(1100):
            tokens = [number] * 16
            assert cache.store(tokens, oracle.kv(tokens), tenant=f"tenant {number}").accepted
            cache.flush()
        tenants = cache.stats()["tenants"]
        assert len(tenants) == 1001
        assert tenants["(others)"] == 100 * 16
