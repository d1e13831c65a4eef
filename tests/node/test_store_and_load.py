"""Engines and the service, end to end: KV goes in through one client and comes out through another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvtiers.model.keys import ChunkKey
from kvtiers.model.layout import KVLayout
from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.model.tiers import Tier
from kvtiers.testing.chaos import wait_until
from kvtiers.testing.service_process import ServiceProcess

if TYPE_CHECKING:
    from tests.node.conftest import LocalNode, MakeEngine, MakeLocal, MakeService

pytestmark = pytest.mark.slow


def test_what_one_engine_stores_another_loads(service: ServiceProcess, make_engine: MakeEngine) -> None:
    one, other = make_engine(service.socket).connect(), make_engine(service.socket).connect()
    tokens = one.tokens(1, 8)
    assert one.store(tokens).indices == tuple(range(8))
    loaded = other.load(tokens)
    assert loaded.tiers == (Tier.CPU,) * 8
    assert loaded.stopped_by is None


def test_equal_namespaces_share_chunks_and_it_is_counted(
    service: ServiceProcess, make_engine: MakeEngine
) -> None:
    one, other = make_engine(service.socket).connect(), make_engine(service.socket).connect()
    tokens = one.tokens(1, 8)
    one.store(tokens[: 5 * one.chunk_tokens])
    second = other.store(tokens)
    assert second.indices == (5, 6, 7)
    assert second.refused == [(0, 5, Refusal.PRESENT)]
    stats = other.stats()
    assert stats["refusals"]["present"] == 5
    assert stats["tiers"]["cpu"]["entries"] == 8


def test_other_namespaces_share_nothing(service: ServiceProcess, make_engine: MakeEngine) -> None:
    one, other = make_engine(service.socket).connect(), make_engine(service.socket, "b-model").connect()
    tokens = one.tokens(1, 4)
    one.store(tokens)
    missed = other.load(tokens)
    assert missed.num_chunks == 0
    assert missed.stopped_by is MissReason.NEVER_SEEN


def test_chunk_that_is_being_stored_is_a_miss_and_refused_to_a_second_engine(
    service: ServiceProcess, make_engine: MakeEngine
) -> None:
    one, other = make_engine(service.socket).connect(), make_engine(service.socket).connect()
    tokens = one.tokens(1, 2)
    store = one.open_store(tokens)
    assert other.load(tokens).stopped_by is MissReason.IN_FLIGHT
    assert other.open_store(tokens).refused == [(0, 2, Refusal.IN_FLIGHT)]
    one.client.abort(store)
    one.client.step()
    one.stats()  # answered after the abort
    assert len(other.open_store(tokens).indices) == 2


def test_parts_of_a_chunk_are_committed_together(service: ServiceProcess, make_engine: MakeEngine) -> None:
    two_ranks = make_engine(service.socket, "b-model", ranks=2).connect()
    tokens = two_ranks.tokens(1, 6)
    stored = two_ranks.store(tokens)
    assert stored.offsets.shape == (6, 2)
    loaded = two_ranks.load(tokens)
    assert loaded.num_chunks == 6
    assert loaded.offsets.shape == (6, 2)


def test_only_what_was_committed_can_be_hit(service: ServiceProcess, make_engine: MakeEngine) -> None:
    engine = make_engine(service.socket).connect()
    tokens = engine.tokens(1, 4)
    store = engine.open_store(tokens)
    engine.write(store, tokens)
    engine.client.commit(store, [0, 1])
    engine.client.abort(store)
    engine.until(lambda: store.committed == 2)
    loaded = engine.load(tokens)
    assert loaded.num_chunks == 2
    assert loaded.stopped_by is MissReason.NEVER_SEEN


def test_chunks_pushed_out_of_memory_come_back_from_disk(
    service: ServiceProcess, make_engine: MakeEngine
) -> None:
    engine = make_engine(service.socket).connect()
    documents = [engine.tokens(number, 10) for number in range(12)]
    for tokens in documents:
        engine.store(tokens)
        assert wait_until(lambda: engine.stats()["async"]["pending_tasks"] == 0)
    found = [engine.load(tokens) for tokens in documents]
    assert all(load.num_chunks == 10 for load in found)
    assert {tier for load in found for tier in load.tiers} == {Tier.CPU, Tier.DISK}


def test_release_before_the_answer_leaves_nothing_leased(
    service: ServiceProcess, make_engine: MakeEngine
) -> None:
    engine = make_engine(service.socket).connect()
    tokens = engine.tokens(1, 8)
    engine.store(tokens)
    for _ in range(50):
        load = engine.client.stage(engine.space, engine.oracle.keys(tokens), deadline=1e12)
        engine.client.release(load)
        assert load.done
        engine.client.step()
    assert wait_until(lambda: engine.stats()["tiers"]["cpu"]["leased_chunks"] == 0)


@pytest.mark.parametrize(
    ("itemsize", "chunk_tokens", "said"),
    [(16, 16, "not of 16 bytes"), (2, 1 << 32, "at most 4294967295 tokens")],
)
def test_what_no_record_could_hold_is_refused_when_it_attaches(
    service: ServiceProcess, make_engine: MakeEngine, itemsize: int, chunk_tokens: int, said: str
) -> None:
    """Accepted, every write of it would fail, and count against the disk."""
    engine = make_engine(service.socket).connect()
    odd = engine.client.attach(bytes(32), engine.space.parts, chunk_tokens=chunk_tokens, itemsize=itemsize)
    engine.until(lambda: odd.error is not None)
    assert said in str(odd.error)
    tokens = engine.tokens(1, 4)  # its own namespace is served all the same
    engine.store(tokens)
    assert engine.load(tokens).num_chunks == 4


def test_second_layout_under_one_digest_is_refused_with_a_reason(
    service: ServiceProcess, make_engine: MakeEngine
) -> None:
    one, other = make_engine(service.socket).connect(), make_engine(service.socket, ranks=2)
    other.client.attach(one.oracle.digest, other.space.parts, chunk_tokens=one.chunk_tokens, itemsize=2)
    wrong = other.client.attach(
        one.oracle.digest, other.space.parts, chunk_tokens=one.chunk_tokens, itemsize=2
    )
    other.until(lambda: wrong.error is not None)
    assert "other parts" in str(wrong.error)
    other.connect()  # its own namespace is served all the same
    missed = other.client.stage(wrong, [ChunkKey(bytes(32))], deadline=1e12)
    assert missed.done
    assert missed.num_chunks == 0


def test_two_models_of_different_shapes_share_the_arena_under_pressure(
    make_local: MakeLocal, make_engine: MakeEngine
) -> None:
    """Each in turn fills more than the arena holds; the other gets whole slabs of it back by eviction, and every byte is right."""
    local = make_local()
    wide = KVLayout(num_layers=5, num_kv_heads=2, head_dim=24, dtype="bfloat16")
    models = [
        make_engine(local.socket).connect(),
        make_engine(local.socket, "b-model", layout=wide).connect(),
    ]
    for turn in range(3):
        for engine in models:
            for document in range(16):
                tokens = engine.tokens(100 * turn + document, 5)
                engine.store(tokens)
                assert local.node.wait_settled(30)
                assert engine.load(tokens).num_chunks == 5
    for turn in range(3):
        for engine in models:
            loads = [engine.load(engine.tokens(100 * turn + document, 5)) for document in range(16)]
            assert [load.num_chunks for load in loads] == [5] * 16


def test_requests_without_a_service_are_misses_at_once(
    make_engine: MakeEngine, make_service: MakeService
) -> None:
    engine = make_engine(make_service().socket)
    tokens = engine.tokens(1, 3)
    assert engine.stage(tokens).stopped_by is MissReason.TIER_OPEN
    assert engine.open_store(tokens).refused == [(0, 3, Refusal.TIER_OPEN)]


@pytest.mark.parametrize("verify", [False, True])
def test_every_byte_is_right_whether_or_not_hits_are_verified(
    make_service: MakeService, make_engine: MakeEngine, verify: bool
) -> None:
    service = make_service({"storage.cpu.verify_on_hit": verify})
    service.start()
    engine = make_engine(service.socket).connect()
    for document in range(20):
        engine.store(engine.tokens(document, 5))
    for document in range(20):
        engine.load(engine.tokens(document, 6))
    assert wait_until(lambda: engine.stats()["tiers"]["cpu"]["leased_chunks"] == 0)


def test_ever_new_namespaces_cost_nothing(local: LocalNode, make_engine: MakeEngine) -> None:
    """As with a model whose weights change every minute: more of them than one connection may have at a time."""
    one = make_engine(local.socket).connect()
    for epoch in range(200):
        space = one.client.attach(
            epoch.to_bytes(32, "little"), one.space.parts, chunk_tokens=one.chunk_tokens, itemsize=2
        )
        one.until(lambda space=space: space.ready)  # type: ignore[misc]
        one.client.detach(space)
    one.client.step()
    assert wait_until(lambda: local.node.stats()["namespaces"] == 1, 10)
    one.client.close()
    assert wait_until(lambda: local.node.stats()["namespaces"] == 0, 10)
