"""How a load reaches its arrays: on whichever threads, in whichever pieces, every byte and once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvtiers.core.messages import OpId, Priority
from kvtiers.model.layout import KVLayout
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier
from kvtiers.runtime.pools import Job
from kvtiers.runtime.transfer import ArenaSlots
from kvtiers.testing.cache_oracle import CacheOracle
from kvtiers.testing.chaos import namespace

if TYPE_CHECKING:
    from tests.runtime.conftest import MakeCache

    from kvtiers.runtime.node import CacheNode

WAIT_S = 20.0
LAYER = 3072
"""Bytes of a layer of a chunk of `SMALL_LAYOUT`."""


@contextmanager
def held(node: CacheNode, workers: int) -> Iterator[None]:
    """So many threads of the memory pool are busy with something else."""
    free, begun = threading.Event(), threading.Semaphore(0)

    def hold() -> None:
        begun.release()
        free.wait(WAIT_S)

    for _ in range(workers):
        assert node.engine.run_in_memory_pool(Job(OpId(0), Priority.LOAD, hold, lambda: None))
    assert all(begun.acquire(timeout=WAIT_S) for _ in range(workers))
    try:
        yield
    finally:
        free.set()


def never_inline(monkeypatch: pytest.MonkeyPatch, *, piece: int = LAYER) -> None:
    for name, value in (("_INLINE_BYTES", 0), ("_PIECE_BYTES", piece)):
        monkeypatch.setattr(f"kvtiers.runtime.copying.{name}", value)


def stored(make_cache: MakeCache, chunks: int, **values: Any) -> tuple[Any, list[int]]:
    cache, tokens = make_cache({"cpu.buffer_size": "2Mi", **values}, disk=False), list(range(16 * chunks))
    assert cache.store(tokens, CacheOracle(namespace()).kv(tokens)).accepted == chunks
    cache.flush()
    return cache, tokens


def test_a_small_answer_is_there_when_load_returns_though_the_pool_is_busy(
    make_cache: MakeCache, oracle: CacheOracle
) -> None:
    cache, tokens = stored(make_cache, 6)
    with held(cache.node, 2):
        pending = cache.load(tokens)
        assert pending.done()
    oracle.check(tokens, 96, pending.result().kv)


def test_a_large_answer_is_left_to_the_pool(
    make_cache: MakeCache, oracle: CacheOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_inline(monkeypatch)
    cache, tokens = stored(make_cache, 6)
    with held(cache.node, 2):
        pending = cache.load(tokens)
        assert not pending.done()
    oracle.check(tokens, 96, pending.result(WAIT_S).kv)


def test_a_thread_that_is_held_up_leaves_its_share_to_the_other(
    make_cache: MakeCache, oracle: CacheOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_inline(monkeypatch)
    cache, tokens = stored(make_cache, 6)
    with held(cache.node, 1):
        into = np.zeros(cache.layout.shape(96), np.uint16)
        assert cache.load(tokens, into=into).result(WAIT_S).num_tokens == 96
        oracle.check(tokens, 96, into)
        assert cache.stats()["tiers"]["cpu"]["leased_chunks"] == 0
        into[:] = 0
    assert cache.node.engine.wait_idle(WAIT_S)
    assert not into.any(), "a thread that came late wrote into arrays that were the caller's again"


@pytest.mark.parametrize("chunks", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("piece", [1, LAYER, 2 * LAYER + 1, 20 * LAYER])
@pytest.mark.parametrize("verify", [False, True])
def test_pieces_cover_every_layer_of_every_chunk_once(
    make_cache: MakeCache, oracle: CacheOracle, monkeypatch: pytest.MonkeyPatch, *, chunks: int, piece: int, verify: bool
) -> None:  # fmt: skip
    never_inline(monkeypatch, piece=piece)
    cache, tokens = stored(make_cache, chunks, **{"cpu.verify_on_hit": verify})
    copied: list[tuple[int, int]] = []
    read = ArenaSlots.read

    def counted(self: Any, offset: int, kv: Any, start: int, *rest: Any, layers: range | None = None) -> None:
        copied.extend((start // 16, layer) for layer in layers or range(3))
        read(self, offset, kv, start, *rest, layers=layers)

    monkeypatch.setattr(ArenaSlots, "read", counted)
    oracle.check(tokens, 16 * chunks, cache.load(tokens).result(WAIT_S).kv)
    assert sorted(copied) == [(chunk, layer) for chunk in range(chunks) for layer in range(3)]


def test_many_threads_load_at_once(make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    never_inline(monkeypatch)
    layout = KVLayout(5, 2, 24, "bfloat16")
    oracle = CacheOracle(namespace(), layout)
    cache = make_cache({"cpu.buffer_size": "4Mi"}, layout=layout, disk=False)
    prompts = [list(range(first, first + 16 * (first % 5 + 1))) for first in range(8)]
    for tokens in prompts:
        cache.store(tokens, oracle.kv(tokens))
    cache.flush()
    wrong: list[BaseException] = []

    def many(tokens: list[int]) -> None:
        try:
            for _ in range(20):
                loaded = cache.load(tokens).result(WAIT_S)
                assert loaded.num_tokens == len(tokens)
                oracle.check(tokens, loaded.num_tokens, loaded.kv)
        except BaseException as error:  # noqa: BLE001 - told below
            wrong.append(error)

    threads = [threading.Thread(target=many, args=(tokens,)) for tokens in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


@pytest.mark.parametrize("damaged", [0, 3, 19])
def test_the_first_chunk_that_is_wrong_ends_an_answer_that_two_threads_copy(
    make_cache: MakeCache, oracle: CacheOracle, monkeypatch: pytest.MonkeyPatch, damaged: int
) -> None:
    never_inline(monkeypatch)
    cache, tokens = stored(make_cache, 20, **{"cpu.verify_on_hit": True})
    wanted = oracle.keys(tokens)[damaged]
    (slots,) = [
        copy.slots
        for copy in cache.node.inspect(lambda core: core.copies(Tier.CPU))
        if copy.chunk.key == wanted
    ]
    cache.node.arena.view(slots[0], 9216)[17] ^= 1
    loaded = cache.load(tokens).result(WAIT_S)
    assert (loaded.num_tokens, loaded.stopped_by) == (16 * damaged, MissReason.CORRUPT)
    oracle.check(tokens, loaded.num_tokens, loaded.kv)
