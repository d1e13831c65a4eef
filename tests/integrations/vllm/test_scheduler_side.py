"""Requests of an engine without a model, on a real node: what is loaded, stored, pinned and given back."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvtiers.integrations.vllm import stores
from kvtiers.integrations.vllm.requests import Wishes
from kvtiers.model.keys import ChunkKey
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier
from kvtiers.node.client import GRACE_S, STORE_ANSWER_S
from kvtiers.node.handles import Load, Store
from kvtiers.testing.chaos import wait_until
from kvtiers.testing.direct_engine import PATIENCE_S
from kvtiers.testing.local_node import LocalNode, MakeLocal
from kvtiers.testing.paged_blocks import CHUNK_BLOCKS, CHUNK_TOKENS, PagedRequest
from kvtiers.testing.paged_engine import PagedEngine

if TYPE_CHECKING:
    from tests.integrations.vllm.conftest import MakePaged


def prompt(name: str, tokens: int, *, document: int = 1, max_new: int = 1, **options: Any) -> PagedRequest:
    start = document * 1_000_000
    return PagedRequest(name, list(range(start, start + tokens)), max_new, **options)


def run(engine: PagedEngine, *requests: PagedRequest) -> None:
    for request in requests:
        engine.add(request)
    engine.drain()


def forget_local(engine: PagedEngine) -> None:
    """As a prefix cache that was reset, without a word to the connector."""
    assert engine.pool.reset()


def run_out(engine: PagedEngine, request: PagedRequest) -> None:
    """Until it has ended; its copies need not have."""
    engine.add(request)
    steps_until(engine, lambda: request not in engine.waiting and request not in engine.running)


def steps_until(engine: PagedEngine, condition: Any) -> None:
    def stepped() -> bool:
        engine.step()
        return bool(condition())

    assert wait_until(stepped, PATIENCE_S, every=0.001)


def test_what_was_computed_is_loaded_after_the_engine_forgot_it(
    engine: PagedEngine, local: LocalNode
) -> None:
    run(engine, prompt("a", 3 * CHUNK_TOKENS + 5))
    assert engine.side.stores.counters["stored"] == 3
    forget_local(engine)
    run(engine, prompt("b", 3 * CHUNK_TOKENS + 5))
    assert engine.loaded_tokens == 3 * CHUNK_TOKENS
    assert engine.side.counts.by_tier == {Tier.CPU: 3 * CHUNK_TOKENS}
    assert local.comes_to_rest()


def test_prompt_that_is_cached_whole_is_answered(engine: PagedEngine) -> None:
    run(engine, prompt("a", 2 * CHUNK_TOKENS))
    forget_local(engine)
    run(engine, prompt("b", 2 * CHUNK_TOKENS))
    assert engine.loaded_tokens == 2 * CHUNK_TOKENS


def test_load_begins_in_the_middle_of_a_chunk_where_the_engines_own_blocks_end(engine: PagedEngine) -> None:
    run(engine, prompt("a", 3 * CHUNK_TOKENS))
    forget_local(engine)
    run(engine, prompt("short", CHUNK_TOKENS + 5))
    loaded = engine.loaded_tokens
    run(engine, prompt("b", 3 * CHUNK_TOKENS))
    assert engine.loaded_tokens - loaded == 2 * CHUNK_TOKENS - 4
    assert engine.side.counts.total["load_failures"] == 0


def test_generated_tokens_are_kept_with_the_prompt(engine: PagedEngine) -> None:
    first = prompt("a", CHUNK_TOKENS - 2, max_new=CHUNK_TOKENS + 4)
    run(engine, first)
    forget_local(engine)
    run(engine, PagedRequest("b", [*first.tokens], 1))
    assert engine.loaded_tokens == 2 * CHUNK_TOKENS


def test_requests_that_may_not_load_or_store_do_not(engine: PagedEngine) -> None:
    run(engine, prompt("a", 2 * CHUNK_TOKENS, kv_transfer_params={"kvtiers.no_store": True}))
    assert engine.side.stores.counters == {"stored": 0, "refused": 0, "failed": 0}
    run(engine, prompt("b", 2 * CHUNK_TOKENS))
    assert engine.side.stores.counters["stored"] == 2
    forget_local(engine)
    run(engine, prompt("c", 2 * CHUNK_TOKENS, kv_transfer_params={"kvtiers.no_load": True}))
    run(engine, prompt("d", 2 * CHUNK_TOKENS, skip_reading_prefix_cache=True))
    assert engine.loaded_tokens == 0


def test_one_prefix_of_several_requests_is_stored_once(engine: PagedEngine) -> None:
    run(engine, *(prompt(f"r{n}", 2 * CHUNK_TOKENS + n) for n in range(4)))
    assert engine.side.stores.counters["stored"] == 2
    assert engine.side.stores.counters["failed"] == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_part_that_one_rank_can_not_read_is_computed(engine: PagedEngine, rank: int) -> None:
    run(engine, prompt("a", 3 * CHUNK_TOKENS + 1))
    forget_local(engine)
    engine.ranks[rank].link.lost_after = 1
    late = engine.ranks[1 - rank].link.gate
    late.clear()
    request = engine.add(prompt("b", 3 * CHUNK_TOKENS + 1))
    steps_until(engine, lambda: engine.side.counts.total["load_failures"])
    late.set()
    engine.ranks[rank].link.lost_after = -1
    steps_until(engine, lambda: not request.remote)
    engine.drain()
    assert engine.side.counts.total["load_failures"] == 1
    assert engine.side.counts.total["loaded_tokens"] == 0  # all of it was computed
    assert engine.side.counts.by_tier == {}
    assert engine.side.stores.counters["refused"] == 3  # offered again, and there already


def test_load_of_nothing_begins_again_without_loading(engine: PagedEngine) -> None:
    run(engine, prompt("a", 3 * CHUNK_TOKENS + 1))
    forget_local(engine)
    engine.ranks[1].link.lost_after = 0
    request = engine.add(prompt("b", 3 * CHUNK_TOKENS + 1))
    steps_until(engine, lambda: engine.side.counts.total["load_failures"])
    engine.ranks[1].link.lost_after = -1
    engine.drain()
    assert request.generated == 1
    assert engine.side.counts.total["loads"] == 1


def test_store_that_one_rank_did_not_copy_is_not_found(engine: PagedEngine) -> None:
    engine.ranks[1].link.lost_after = 0
    run(engine, prompt("a", 2 * CHUNK_TOKENS + 1))
    assert engine.side.stores.counters["failed"] == 2
    engine.ranks[1].link.lost_after = -1
    forget_local(engine)
    run(engine, prompt("b", 2 * CHUNK_TOKENS + 1))
    assert engine.loaded_tokens == 0
    assert engine.side.stores.counters["stored"] == 2


def test_store_that_is_answered_too_late_is_given_up_and_the_next_one_is_made(
    engine: PagedEngine, local: LocalNode
) -> None:
    client = engine.client

    def nothing_comes() -> int:
        client._give_up_late()
        return 0

    client.step = nothing_comes  # type: ignore[method-assign]
    engine.add(prompt("a", 2 * CHUNK_TOKENS, max_new=20, kv_transfer_params={"kvtiers.no_load": True}))
    steps_until(engine, lambda: engine.side.stores.pinned)
    engine.skew += STORE_ANSWER_S + 1
    engine.step()
    assert engine.side.stores.pinned == 0
    assert (engine.side.stores.counters["refused"], client.counters["late"]) == (2, 1)
    del client.step
    engine.drain()
    forget_local(engine)
    run(engine, prompt("b", 2 * CHUNK_TOKENS))
    assert engine.loaded_tokens == 0
    forget_local(engine)
    run(engine, prompt("c", 2 * CHUNK_TOKENS))
    assert engine.loaded_tokens == 2 * CHUNK_TOKENS
    assert local.comes_to_rest()


def test_blocks_stay_pinned_until_every_rank_has_copied_them(engine: PagedEngine) -> None:
    gate = engine.ranks[1].link.gate
    gate.clear()
    engine.add(prompt("a", 2 * CHUNK_TOKENS))
    steps_until(engine, lambda: not engine.running and engine.side.stores.busy)
    for _ in range(50):
        engine.step()
    assert engine.side.stores.pinned == 2 * CHUNK_BLOCKS
    assert engine.pool.references == 2 * CHUNK_BLOCKS
    gate.set()
    engine.drain()


def test_pins_are_bounded_and_the_rest_is_told(local: LocalNode, make_paged: MakePaged) -> None:
    engine = make_paged(local, max_pinned_share=0.01).connect()
    for rank in engine.ranks:
        rank.link.gate.clear()
    engine.add(prompt("a", 4 * CHUNK_TOKENS))
    steps_until(engine, lambda: not engine.running and not engine.waiting)
    assert engine.side.stores.pinned == CHUNK_BLOCKS
    assert engine.side.counts.total["not_offered"] == 3
    for rank in engine.ranks:
        rank.link.gate.set()
    engine.drain()


class TestBlocksThatComeFree:
    """By waiting for a copy instead of preempting a request."""

    @pytest.fixture
    def copying(
        self, local: LocalNode, make_paged: MakePaged, monkeypatch: pytest.MonkeyPatch
    ) -> PagedEngine:
        """Its request has ended, and one rank still copies what it computed."""
        monkeypatch.setattr(stores, "_COPIED_WITHIN_S", 60.0)
        engine = make_paged(local, num_blocks=1 + 4 * CHUNK_BLOCKS, max_pinned_share=1.0).connect()
        engine.ranks[1].link.gate.clear()
        run_out(engine, prompt("a", 2 * CHUNK_TOKENS))
        steps_until(engine, lambda: engine.side.stores.frees_blocks)
        return engine

    def test_request_is_held_back_for_them_and_nobody_is_preempted(self, copying: PagedEngine) -> None:
        params = {"kvtiers.no_store": True}
        request = prompt("b", CHUNK_TOKENS, document=2, max_new=2 * CHUNK_TOKENS, kv_transfer_params=params)
        copying.add(request)
        steps_until(copying, lambda: request.num_tokens > 2 * CHUNK_TOKENS)  # of which there are blocks
        for _ in range(30):
            copying.step()
        assert request.num_tokens == 2 * CHUNK_TOKENS + 1
        copying.ranks[1].link.gate.set()
        copying.drain()
        assert copying.preemptions == 0

    def test_copy_that_does_not_end_is_not_waited_for(self, copying: PagedEngine) -> None:
        copying.skew += 61.0
        assert not copying.side.stores.frees_blocks
        copying.ranks[1].link.gate.set()
        copying.drain()

    def test_blocks_that_a_request_uses_as_well_do_not_come_free(self, engine: PagedEngine) -> None:
        engine.ranks[1].link.gate.clear()
        engine.add(prompt("a", 2 * CHUNK_TOKENS, max_new=1000))
        steps_until(engine, lambda: any(one.dispatched_at for one in engine.side.stores._offers.values()))
        assert not engine.side.stores.frees_blocks
        engine.ranks[1].link.gate.set()
        engine.abort(engine.running[0])
        engine.drain()

    def test_what_the_service_has_not_answered_is_not_waited_for(self, engine: PagedEngine) -> None:
        engine.client.step = lambda: 0  # type: ignore[method-assign]
        request = engine.add(prompt("a", 2 * CHUNK_TOKENS, kv_transfer_params={"kvtiers.no_load": True}))
        steps_until(engine, lambda: request.generated == 1)
        assert engine.side.stores.pinned == 2 * CHUNK_BLOCKS
        assert not engine.side.stores.frees_blocks
        del engine.client.step
        engine.drain()


def test_abort_gives_back_what_was_staged(engine: PagedEngine, local: LocalNode) -> None:
    run(engine, prompt("a", 2 * CHUNK_TOKENS))
    forget_local(engine)
    engine.refuse_blocks = True
    request = engine.add(prompt("b", 2 * CHUNK_TOKENS))
    steps_until(engine, lambda: local.leased() == 2)
    engine.abort(request)
    steps_until(engine, lambda: local.leased() == 0)
    engine.skew += 100.0
    engine.step()
    assert engine.side.counts.total["lapsed"] == 0


def test_abort_of_a_load_waits_for_every_rank(engine: PagedEngine, local: LocalNode) -> None:
    run(engine, prompt("a", 2 * CHUNK_TOKENS))
    forget_local(engine)
    gate = engine.ranks[0].link.gate
    gate.clear()
    request = engine.add(prompt("b", 2 * CHUNK_TOKENS))
    steps_until(engine, lambda: request.remote)
    engine.abort(request)
    for _ in range(30):
        engine.step()
    assert engine.pool.references == 2 * CHUNK_BLOCKS
    assert local.leased() == 2
    gate.set()
    engine.drain()
    assert local.comes_to_rest()


def test_leases_of_a_request_that_is_not_scheduled_lapse_and_come_again(
    engine: PagedEngine, local: LocalNode
) -> None:
    run(engine, prompt("a", 2 * CHUNK_TOKENS))
    forget_local(engine)
    engine.refuse_blocks = True
    asked = stages(engine)
    engine.add(prompt("b", 2 * CHUNK_TOKENS))
    steps_until(engine, lambda: local.leased() == 2 and asked[0].done)
    engine.skew += 31.0
    engine.step()
    assert engine.side.counts.total["lapsed"] == 1
    engine.refuse_blocks = False
    engine.drain()
    assert engine.loaded_tokens == 2 * CHUNK_TOKENS
    assert local.comes_to_rest()


def test_staging_may_take_as_long_as_it_was_given(local: LocalNode, make_paged: MakePaged) -> None:
    engine = make_paged(local, load_timeout_s=60.0).connect()
    run(engine, prompt("a", 2 * CHUNK_TOKENS))
    forget_local(engine)
    request = prompt("b", 2 * CHUNK_TOKENS)
    engine.side.on_new_request(request)
    state = engine.side._states["b"]
    asked = state.load
    engine.skew += 59.0
    engine.side._let_lapse()
    assert state.load is asked
    engine.side.finished(request, ())


def test_request_waits_no_longer_than_its_deadline(local: LocalNode, make_paged: MakePaged) -> None:
    engine = make_paged(local, load_timeout_s=5.0).connect()
    engine.client.step = lambda: 0  # type: ignore[method-assign]  # nothing goes out and nothing comes
    request = engine.add(prompt("a", 2 * CHUNK_TOKENS))
    assert engine.side.matched(request, 0) == (None, False)
    del engine.client.step
    engine.skew += 5.5
    engine.side.begin_step((), lambda _: ())
    assert engine.side.matched(request, 0) == (0, False)
    engine.drain()


class TestMissThatPasses:
    """A request waits long for its turn; what was wrong when it came need not be wrong any more."""

    def test_it_is_looked_for_once_more_when_its_turn_comes(
        self, make_local: MakeLocal, make_paged: MakePaged
    ) -> None:
        node = make_local()
        engine = make_paged(node).connect()
        run(engine, prompt("a", 2 * CHUNK_TOKENS))
        node.end()
        assert wait_until(lambda: not engine.client.step() and not engine.client.connected, PATIENCE_S)
        forget_local(engine)
        request = prompt("b", 2 * CHUNK_TOKENS)
        engine.side.on_new_request(request)
        load = engine.side._states["b"].load
        assert load is not None
        assert load.stopped_by is MissReason.TIER_OPEN
        make_local(path=node.socket)
        engine.connect()
        engine.skew += 1.0
        engine.waiting.append(request)
        engine.drain()
        assert engine.loaded_tokens == 2 * CHUNK_TOKENS

    def test_it_is_looked_for_once_more_and_no_oftener(self, engine: PagedEngine) -> None:
        asked = stages(engine)
        engine.side._space.space, number = (
            None,
            engine.side._space.space,
        )  # of a namespace that is not attached
        request = prompt("a", 2 * CHUNK_TOKENS)
        engine.side.on_new_request(request)
        assert [engine.side.matched(request, 0), len(asked)] == [(0, False), 1]  # it is too fresh
        for _ in range(20):
            engine.skew += 1.0
            assert engine.side.matched(request, 0) == (0, False)
        assert len(asked) == 2
        engine.side._space.space = number
        engine.side.finished(request, ())

    def test_it_is_not_looked_for_if_the_engine_has_all_of_it_by_then(self, engine: PagedEngine) -> None:
        engine.side._space.space, number = None, engine.side._space.space
        request = prompt("a", 2 * CHUNK_TOKENS + 1)
        engine.side.on_new_request(request)
        engine.skew += 1.0
        asked = stages(engine)
        assert engine.side.matched(request, 2 * CHUNK_TOKENS) == (0, False)
        assert asked == []
        engine.side._space.space = number
        engine.side.finished(request, ())

    def test_what_was_never_seen_is_not_looked_for_again(self, engine: PagedEngine) -> None:
        asked = stages(engine)
        request = prompt("a", 2 * CHUNK_TOKENS)
        engine.side.on_new_request(request)
        steps_until(engine, lambda: asked[0].done)
        engine.skew += 1.0
        assert engine.side.matched(request, 0) == (0, False)
        assert len(asked) == 1
        engine.side.finished(request, ())

    def test_both_together_take_no_longer_than_its_deadline(self, engine: PagedEngine) -> None:
        client, timeout = engine.client, engine.load_timeout_s
        client.step = lambda: 0  # type: ignore[method-assign]  # nothing goes out and nothing comes
        asked = stages(engine)
        request = prompt("a", 2 * CHUNK_TOKENS)
        engine.side.on_new_request(request)
        engine.skew += timeout - 1.0
        assert engine.side.matched(request, 0) == (None, False)  # its turn
        engine.skew += 1.0 + GRACE_S
        client._give_up_late()
        assert engine.side.matched(request, 0) == (None, False)  # once more
        assert [load.stopped_by for load in asked] == [MissReason.STAGING_TIMEOUT, None]
        engine.skew += timeout - 1.0
        assert engine.side.matched(request, 0) == (0, False)
        engine.side.finished(request, ())
        del client.step


def stages(engine: PagedEngine) -> list[Load]:
    """All loads that it asks for from now on."""
    asked: list[Load] = []
    stage = engine.client.stage

    def noted(*args: Any, **options: Any) -> Load:
        asked.append(stage(*args, **options))
        return asked[-1]

    engine.client.stage = noted  # type: ignore[method-assign]
    return asked


def test_after_a_reset_nothing_from_before_is_found(engine: PagedEngine, local: LocalNode) -> None:
    run(engine, prompt("a", 2 * CHUNK_TOKENS))
    assert engine.reset()
    engine.connect()
    run(engine, prompt("b", 2 * CHUNK_TOKENS))
    assert engine.loaded_tokens == 0
    forget_local(engine)
    run(engine, prompt("c", 2 * CHUNK_TOKENS))
    assert engine.loaded_tokens == 2 * CHUNK_TOKENS
    assert local.comes_to_rest()


def test_what_was_begun_before_a_reset_is_not_stored_after_it(engine: PagedEngine) -> None:
    engine.add(prompt("a", CHUNK_TOKENS - 2, max_new=CHUNK_TOKENS))
    steps_until(engine, lambda: engine.running)
    engine.side.reset(1)  # without a look at the engine's own blocks
    steps_until(engine, lambda: engine.side.ready)
    engine.drain()
    assert engine.side.stores.counters == {"stored": 0, "refused": 0, "failed": 0}


def test_preempted_request_is_stored_from_its_start_after_a_reset(engine: PagedEngine) -> None:
    engine.add(prompt("a", 2 * CHUNK_TOKENS, max_new=CHUNK_TOKENS + 2))
    steps_until(engine, lambda: engine.side.stores.counters["stored"] == 2 and not engine.side.stores.busy)
    engine.refuse_blocks = True  # until the service knows the new namespace
    assert engine.reset()
    engine.connect()
    engine.refuse_blocks = False
    engine.drain()
    assert engine.side.stores.counters["stored"] == 2 + 3


def test_chunks_of_a_service_that_is_gone_are_not_promised(
    make_local: MakeLocal, make_paged: MakePaged
) -> None:
    node = make_local()
    engine = make_paged(node).connect()
    run(engine, prompt("a", 2 * CHUNK_TOKENS))
    forget_local(engine)
    engine.refuse_blocks = True
    engine.add(prompt("b", 2 * CHUNK_TOKENS))
    steps_until(engine, lambda: node.leased() == 2)
    node.end()
    assert wait_until(lambda: not engine.client.step() and not engine.client.connected, PATIENCE_S)
    engine.refuse_blocks = False
    engine.drain()
    assert engine.side.counts.total["loads"] == 0


def test_service_that_comes_back_serves_again(make_local: MakeLocal, make_paged: MakePaged) -> None:
    node = make_local()
    engine = make_paged(node).connect()
    run(engine, prompt("a", 2 * CHUNK_TOKENS))
    node.end()
    forget_local(engine)
    run(engine, prompt("b", 2 * CHUNK_TOKENS + 1))
    assert engine.loaded_tokens == 0
    make_local(path=node.socket)
    engine.connect()
    forget_local(engine)
    run(engine, prompt("c", 2 * CHUNK_TOKENS + 1))
    assert engine.loaded_tokens == 2 * CHUNK_TOKENS
    assert engine.side.counts.by_tier == {Tier.DISK: 2 * CHUNK_TOKENS}


class TestWhatTheEngineHasItself:
    def test_it_is_not_brought_to_memory_again(self, engine: PagedEngine, local: LocalNode) -> None:
        run(engine, prompt("a", 3 * CHUNK_TOKENS + 5))
        before = engine.side.counts.total["asked_tokens"]
        run(engine, prompt("b", 3 * CHUNK_TOKENS + 5))
        assert engine.side.counts.total["asked_tokens"] == before
        assert engine.loaded_tokens == 0
        assert local.comes_to_rest()

    def test_what_it_loses_before_its_turn_is_staged_after_all(self, engine: PagedEngine) -> None:
        run(engine, prompt("a", 3 * CHUNK_TOKENS + 5))
        engine.add(prompt("b", 3 * CHUNK_TOKENS + 5))
        forget_local(engine)
        engine.drain()
        assert engine.loaded_tokens == 3 * CHUNK_TOKENS

    def test_it_counts_as_hits_of_the_gpu_tier(self, engine: PagedEngine) -> None:
        run(engine, prompt("a", 3 * CHUNK_TOKENS + 5))
        assert engine.side.counts.own == {"local_lookups": 3, "local_hits": 0, "local_hit_tokens": 0}
        run(engine, prompt("b", 3 * CHUNK_TOKENS + 5))
        assert engine.side.counts.own["local_hits"] == 3
        assert engine.side.counts.own["local_hit_tokens"] == 3 * CHUNK_TOKENS


class TestWhatTheEngineHasAndOnceOffered:
    """Of the local prefix one chunk is pinned, so that the service looks at what comes before it."""

    def test_it_is_not_pinned_again(self, engine: PagedEngine) -> None:
        run(engine, prompt("a", 4 * CHUNK_TOKENS + 5))
        pinned = {0}
        engine.add(prompt("b", 4 * CHUNK_TOKENS + 5, max_new=3))
        while engine.waiting or engine.running or engine.side.stores.busy:
            engine.step()
            pinned.add(engine.side.stores.pinned)
        assert pinned <= {0, CHUNK_BLOCKS}
        assert engine.side.stores.counters == {"stored": 4, "refused": 1, "failed": 0}

    def test_what_follows_it_is_stored(self, engine: PagedEngine, local: LocalNode) -> None:
        run(engine, prompt("a", 2 * CHUNK_TOKENS + 5))
        run(engine, prompt("b", 4 * CHUNK_TOKENS + 5))
        assert engine.side.stores.counters == {"stored": 4, "refused": 1, "failed": 0}
        forget_local(engine)
        run(engine, prompt("c", 4 * CHUNK_TOKENS + 5))
        assert engine.loaded_tokens == 4 * CHUNK_TOKENS
        assert local.comes_to_rest()

    def test_what_the_cache_has_evicted_meanwhile_is_stored_again(
        self, engine: PagedEngine, local: LocalNode
    ) -> None:
        run(engine, prompt("a", 4 * CHUNK_TOKENS + 5))
        evict_all(local)
        run(engine, prompt("b", 4 * CHUNK_TOKENS + 5, max_new=30))
        forget_local(engine)
        run(engine, prompt("c", 4 * CHUNK_TOKENS + 5))
        assert engine.loaded_tokens == 4 * CHUNK_TOKENS
        assert local.comes_to_rest()

    def test_it_is_stored_again_by_the_next_request_if_the_one_that_finds_out_has_ended(
        self, engine: PagedEngine, local: LocalNode
    ) -> None:
        run(engine, prompt("a", 4 * CHUNK_TOKENS + 5))
        evict_all(local)
        engine.client.step = lambda: 0  # type: ignore[method-assign]  # no answer comes
        request = engine.add(prompt("b", 4 * CHUNK_TOKENS + 5))
        steps_until(engine, lambda: request.generated == 1)
        del engine.client.step
        engine.drain()
        assert engine.side.stores.counters == {"stored": 4, "refused": 1, "failed": 0}
        run(engine, prompt("c", 4 * CHUNK_TOKENS + 5))
        assert engine.side.stores.counters == {"stored": 8, "refused": 1, "failed": 0}
        assert not engine.side._gone

    def test_what_the_service_lost_with_its_memory_and_disk_is_stored_again_in_a_longer_chain(
        self, engine: PagedEngine, local: LocalNode
    ) -> None:
        run(engine, prompt("a", 3 * CHUNK_TOKENS + 5))
        evict_all(local)
        run(engine, prompt("b", 5 * CHUNK_TOKENS + 5, max_new=5))
        forget_local(engine)
        run(engine, prompt("c", 5 * CHUNK_TOKENS + 5))
        assert engine.loaded_tokens == 5 * CHUNK_TOKENS

    def test_what_the_service_refuses_is_not_offered_for_ever(self, engine: PagedEngine) -> None:
        run(engine, prompt("a", 2 * CHUNK_TOKENS + 5))
        offers = []
        open_store = engine.client.open_store

        def lost(space: Any, root: ChunkKey, keys: Sequence[ChunkKey], *, first: int) -> Store:
            offers.append(first)
            unknown = [ChunkKey(bytes(32))] * first
            return open_store(space, root, [*unknown, *keys[first:]], first=first)

        engine.client.open_store = lost  # type: ignore[assignment, method-assign]
        run(engine, prompt("b", 2 * CHUNK_TOKENS + 5, max_new=20))
        assert offers == [1, 0, 2, 3]


def evict_all(local: LocalNode) -> None:
    """From every tier."""

    def empty() -> bool:
        for tier in (Tier.CPU, Tier.DISK):
            local.node.evict(tier, 0)
        return bool(local.node.stats()["chunks"] == 0)

    assert wait_until(empty, PATIENCE_S)


class TestCounting:
    """Once for a request, however often it is looked at."""

    def test_tokens_that_are_staged_again_and_again_are_asked_for_once(self, engine: PagedEngine) -> None:
        run(engine, prompt("a", 2 * CHUNK_TOKENS))
        forget_local(engine)
        before = engine.side.counts.total["asked_tokens"]
        asked = stages(engine)
        engine.refuse_blocks = True
        engine.add(prompt("b", 2 * CHUNK_TOKENS))
        for lapsed in range(3):
            steps_until(engine, lambda n=lapsed: len(asked) == n + 1 and asked[-1].done)
            assert engine.side.counts.total["lapsed"] == lapsed
            engine.skew += 31.0
        engine.refuse_blocks = False
        engine.drain()
        assert len(asked) == 3
        assert engine.side.counts.total["asked_tokens"] - before == 2 * CHUNK_TOKENS
        assert engine.side.counts.total["loaded_tokens"] == 2 * CHUNK_TOKENS

    def test_miss_that_is_forgotten_has_let_nothing_go(self, engine: PagedEngine) -> None:
        asked = stages(engine)
        engine.refuse_blocks = True
        engine.add(prompt("a", 2 * CHUNK_TOKENS))
        steps_until(engine, lambda: asked[0].done)
        engine.skew += 31.0
        steps_until(engine, lambda: len(asked) == 2)
        assert engine.side.counts.total["lapsed"] == 0
        engine.refuse_blocks = False
        engine.drain()

    def test_chunks_are_stored_when_the_service_has_said_so(
        self, make_local: MakeLocal, make_paged: MakePaged
    ) -> None:
        node = make_local()
        engine = make_paged(node).connect()
        posted: list[Store] = []
        commit = engine.client.commit

        def noted(store: Store) -> bool:
            posted.append(store)
            return commit(store)

        engine.client.commit = noted  # type: ignore[assignment, method-assign]
        step = engine.client.step
        engine.client.step = lambda: 0 if posted else step()  # type: ignore[method-assign]
        engine.add(prompt("a", 2 * CHUNK_TOKENS))
        steps_until(engine, lambda: posted)
        engine.step()
        assert engine.side.stores.counters == {"stored": 0, "refused": 0, "failed": 0}
        assert engine.side.stores.settling
        node.end()  # before it has heard of it
        del engine.client.step
        steps_until(engine, lambda: not engine.side.stores.settling)
        assert engine.side.stores.counters == {"stored": 0, "refused": 0, "failed": 2}

    def test_idle_engine_does_not_step_for_an_answer_that_does_not_come(self, engine: PagedEngine) -> None:
        step = engine.client.step
        engine.add(prompt("a", 2 * CHUNK_TOKENS))
        steps_until(engine, lambda: engine.side.stores.busy)
        while not engine.side.stores._commits:
            engine.step()
            engine.client.step = lambda: 0 if engine.side.stores._commits else step()  # type: ignore[method-assign]
        engine.skew += 1.5
        assert not engine.side.stores.settling
        del engine.client.step
        engine.drain()
        steps_until(engine, lambda: engine.side.stores.counters["stored"] == 2)


def test_tokens_are_counted_for_the_tenant_that_a_request_names(engine: PagedEngine) -> None:
    run(engine, prompt("a", 2 * CHUNK_TOKENS))
    forget_local(engine)
    named = prompt("b", 2 * CHUNK_TOKENS)
    named.kv_transfer_params = {"kvtiers.tenant": "acme"}
    run(engine, named)
    assert engine.side.counts.by_tenant == {"acme": 2 * CHUNK_TOKENS}


def adapter(path: Path, number: int) -> Any:
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.bin").write_bytes(bytes([number]))
    return SimpleNamespace(lora_int_id=number, lora_path=str(path), load_inplace=False)


def read_by_now(engine: PagedEngine, request: PagedRequest) -> None:
    """Its adapter has been looked at."""
    asked = engine.side._adapters.ask(request.lora_request)
    assert asked
    assert wait_until(lambda: asked.answered, PATIENCE_S)


class TestAdapterThatIsStillBeingRead:
    @pytest.fixture
    def gate(self, engine: PagedEngine) -> Iterator[threading.Event]:
        gate = threading.Event()
        read = engine.side._adapters._fingerprint

        def slow(path: Path) -> str:
            assert gate.wait(PATIENCE_S)
            return read(path)

        engine.side._adapters._fingerprint = slow
        yield gate
        gate.set()

    def test_its_requests_are_computed_and_not_stored(
        self, engine: PagedEngine, gate: threading.Event, tmp_path: Path
    ) -> None:
        lora = adapter(tmp_path / "l", 1)
        run(engine, prompt("a", 2 * CHUNK_TOKENS, lora_request=lora))
        assert engine.side.stores.counters == {"stored": 0, "refused": 0, "failed": 0}
        assert engine.side.counts.total["unread_adapters"] == 1
        gate.set()
        late = prompt("b", 2 * CHUNK_TOKENS, document=2, lora_request=lora)
        read_by_now(engine, late)
        run(engine, late)
        assert engine.side.stores.counters["stored"] == 2
        forget_local(engine)
        run(engine, prompt("c", 2 * CHUNK_TOKENS, document=2, lora_request=lora))
        assert engine.loaded_tokens == 2 * CHUNK_TOKENS
        assert engine.side.counts.total["unread_adapters"] == 1

    def test_what_runs_when_it_was_read_is_stored(
        self, engine: PagedEngine, gate: threading.Event, tmp_path: Path
    ) -> None:
        lora = adapter(tmp_path / "l", 1)
        engine.add(prompt("a", 2 * CHUNK_TOKENS, max_new=8, lora_request=lora))
        steps_until(engine, lambda: engine.running)
        gate.set()
        read_by_now(engine, prompt("never", 1, lora_request=lora))
        engine.drain()
        assert engine.side.stores.counters["stored"] == 2

    def test_request_waits_for_a_look_at_one_that_is_known_up_to_its_deadline(
        self, engine: PagedEngine, gate: threading.Event, tmp_path: Path
    ) -> None:
        lora = adapter(tmp_path / "l", 1)
        gate.set()
        read_by_now(engine, prompt("never", 1, lora_request=lora))
        run(engine, prompt("a", 2 * CHUNK_TOKENS, lora_request=lora))
        forget_local(engine)
        gate.clear()
        os.utime(tmp_path / "l" / "adapter_model.bin", ns=(1, 1))  # so it is read once more
        request = prompt("b", 2 * CHUNK_TOKENS, lora_request=lora)
        engine.side.on_new_request(request)
        state = engine.side._states["b"]
        assert wait_until(lambda: engine.client.step() >= 0 and state.load is not None and state.load.done)
        assert engine.side.matched(request, 0) == (None, False)
        engine.skew += engine.load_timeout_s + 1
        assert engine.side.matched(request, 0) == (0, False)
        gate.set()
        assert wait_until(lambda: state.asked is not None and state.asked.answered, PATIENCE_S)
        assert engine.side.matched(request, 0) == (2 * CHUNK_TOKENS, True)
        engine.side.finished(request, ())

    def test_what_was_overwritten_after_a_request_came_is_not_loaded(
        self, engine: PagedEngine, gate: threading.Event, tmp_path: Path
    ) -> None:
        gate.set()
        lora = adapter(tmp_path / "l", 1)
        read_by_now(engine, prompt("never", 1, lora_request=lora))
        run(engine, prompt("a", 2 * CHUNK_TOKENS, lora_request=lora))
        forget_local(engine)
        adapter(tmp_path / "l", 2)
        run(engine, prompt("b", 2 * CHUNK_TOKENS, lora_request=lora))
        assert engine.loaded_tokens == 0
        assert engine.side.stores.counters["stored"] == 2


def test_an_adapter_that_was_trained_anew_finds_nothing_of_the_one_before(
    engine: PagedEngine, tmp_path: Path
) -> None:
    """vLLM's hashes name it by its path, which is the same."""
    for name, number, loaded in (("a", 1, 0), ("b", 2, 0), ("c", 2, 2)):
        request = prompt(name, 2 * CHUNK_TOKENS, lora_request=adapter(tmp_path / "l", number))
        read_by_now(engine, request)
        run(engine, request)
        assert engine.loaded_tokens == loaded * CHUNK_TOKENS
        forget_local(engine)


def test_an_adapter_that_is_not_here_is_not_cached(engine: PagedEngine, tmp_path: Path) -> None:
    missing = SimpleNamespace(lora_int_id=1, lora_path=str(tmp_path / "nowhere"), load_inplace=False)
    for name in ("a", "b"):
        run(engine, prompt(name, 2 * CHUNK_TOKENS, lora_request=missing))
        forget_local(engine)
    assert engine.loaded_tokens == 0
    assert engine.side.stores.counters["stored"] == 0


def test_no_goodbye_is_said_while_a_rank_may_still_copy(engine: PagedEngine, local: LocalNode) -> None:
    """After a goodbye the slots are somebody else's at once, and the late copy would be in their KV."""
    engine.ranks[1].link.gate.clear()
    engine.add(prompt("a", 2 * CHUNK_TOKENS))
    steps_until(engine, lambda: engine.side.stores.busy and local.leased() == 2)
    engine.side.close()
    assert not wait_until(lambda: engine.client.step() > 0 or local.leased() < 2, 0.3)
    engine.ranks[1].link.gate.set()
    engine.drain()
    engine.side.close()
    assert local.comes_to_rest()
    assert not engine.client.connected or engine.client.step() == 0


@pytest.mark.parametrize(
    ("said", "may"),
    [
        (True, False),
        ("true", False),
        (1, False),
        (" Yes", False),
        ("on", False),
        (False, True),
        ("false", True),
        (0, True),
        (None, True),
    ],
)
def test_wishes_may_be_texts(said: object, may: bool) -> None:
    wishes = Wishes.of({"kvtiers.no_load": said, "kvtiers.no_store": said})
    assert (wishes.may_load, wishes.may_store) == (may, may)
