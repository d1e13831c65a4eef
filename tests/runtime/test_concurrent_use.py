"""Many threads, two models, one small node: right bytes, no deadlock, books that add up."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvtiers.model.errors import CacheClosed
from kvtiers.runtime.cache import TieredCache
from kvtiers.runtime.results import PendingLoad
from kvtiers.testing.cache_oracle import SMALL_LAYOUT, CacheOracle
from kvtiers.testing.chaos import namespace, small_config

if TYPE_CHECKING:
    from pathlib import Path

    from tests.runtime.conftest import MakeCache

pytestmark = pytest.mark.slow

WAIT_S = 60.0


def prompt(rng: random.Random) -> list[int]:
    """One of 60 documents, cut anywhere: prompts share prefixes, and together they are larger than memory."""
    document = rng.randrange(60)
    return list(range(document * 1000, document * 1000 + rng.randrange(1, 130)))


def work(cache: TieredCache, oracle: CacheOracle, seed: int, rounds: int) -> None:
    rng = random.Random(seed)
    for _ in range(rounds):
        tokens, salt = prompt(rng), rng.choice([None, "salt"])
        match rng.randrange(10):
            case 0:
                cache.evict(rng.choice(["cpu", "disk"]), rng.random())
            case 1:
                cache.stats()
            case 2 | 3 | 4:
                receipt = cache.store(tokens, oracle.kv(tokens, salt=salt), salt=salt)
                assert receipt.accepted + receipt.present <= len(tokens) // 16
            case 5:
                match = cache.lookup(tokens, salt=salt)
                assert match.num_tokens <= len(tokens)
            case _:
                into = np.zeros(SMALL_LAYOUT.shape(len(tokens)), np.uint16) if rng.random() < 0.5 else None
                loaded = cache.load(tokens, into=into, salt=salt).result(WAIT_S)
                oracle.check(tokens, loaded.num_tokens, loaded.kv, salt=salt)


def in_threads(jobs: list[Callable[[], None]]) -> None:
    """Run all at once; raise what any of them raised."""
    errors: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001 - told below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"disk.write_policy": "write_on_evict", "disk.compression": "zstd"},
        {"gpu.capacity": "1Mi", "gpu.device": "cpu", "gpu.max_utilization": 0.3, "cpu.verify_on_hit": True},
        {"cpu.enabled": False, "disk.max_size": "1Mi"},
        {"disk.max_size": "1Mi", "async.max_workers": 1, "async.queue_size": 4},
    ],
    ids=["write-through", "write-on-evict", "gpu", "disk only", "a tiny disk and queue"],
)
def test_threads_of_two_models_never_see_wrong_bytes(make_cache: MakeCache, values: dict[str, Any]) -> None:
    first = make_cache(values)
    second = make_cache(values, named=namespace("another"), node=first.node)
    jobs: list[Callable[[], None]] = []
    for number in range(6):
        cache, name = ((first, "a-model"), (second, "another"))[number % 2]
        oracle = CacheOracle(namespace(name))
        jobs.append(lambda cache=cache, oracle=oracle, number=number: work(cache, oracle, number, 400))  # type: ignore[misc]
    in_threads(jobs)
    assert first.check_integrity() == []
    assert first.stats()["open_tickets"] == 0
    assert first.stats()["tiers"]["cpu"]["leased_chunks"] == 0
    assert first.stats()["async"]["pools"]["disk"]["errors"] == 0
    assert first.stats()["async"]["pools"]["memory"]["errors"] == 0


def test_equal_prompts_stored_at_once_are_stored_once(make_cache: MakeCache, oracle: CacheOracle) -> None:
    cache, tokens = make_cache(), list(range(160))
    barrier = threading.Barrier(6)
    accepted: list[int] = []

    def store() -> None:
        kv = oracle.kv(tokens)
        barrier.wait(WAIT_S)
        accepted.append(cache.store(tokens, kv).accepted)

    in_threads([store] * 6)
    assert sum(accepted) == 10
    cache.flush()
    assert cache.stats()["tiers"]["cpu"]["stored"] == 10
    assert cache.stats()["tiers"]["disk"]["stored"] == 10
    loaded = cache.load(tokens).result()
    assert loaded.num_tokens == 160
    oracle.check(tokens, 160, loaded.kv)


def test_equal_loads_at_once_share_their_reads(make_cache: MakeCache, oracle: CacheOracle) -> None:
    cache, tokens = make_cache({"cpu.eviction_threshold": 0.7}), list(range(160))
    cache.store(tokens, oracle.kv(tokens))
    cache.flush()
    cache.evict("cpu")
    barrier = threading.Barrier(6)

    def load() -> None:
        barrier.wait(WAIT_S)
        loaded = cache.load(tokens).result(WAIT_S)
        assert loaded.num_tokens == 160
        oracle.check(tokens, 160, loaded.kv)

    in_threads([load] * 6)
    cache.flush()
    assert cache.stats()["latency"]["disk"]["read"]["count"] == 10
    assert cache.stats()["requests"] == 6


@pytest.mark.parametrize("shared", [False, True], ids=["own node", "shared node"])
@pytest.mark.parametrize("seed", range(8))
def test_closing_among_stores_and_loads_leaves_nobody_waiting(
    tmp_path: Path, seed: int, shared: bool
) -> None:
    rng = random.Random(seed)
    config = small_config(
        tmp_path / "cache", {"gpu.capacity": "1Mi", "gpu.device": "cpu"} if seed % 2 else {}
    )
    keeper = TieredCache(config, SMALL_LAYOUT, namespace("keeper"))
    cache = TieredCache(config, SMALL_LAYOUT, namespace(), node=keeper.node) if shared else keeper
    oracle = CacheOracle(namespace() if shared else namespace("keeper"))
    pending: list[tuple[list[int], PendingLoad]] = []
    begun = threading.Semaphore(0)

    def use(number: int) -> None:
        rng = random.Random(seed * 10 + number)
        try:
            while True:
                tokens = prompt(rng)
                if rng.random() < 0.4:
                    cache.store(tokens, oracle.kv(tokens))
                else:
                    pending.append((tokens, cache.load(tokens)))
                if rng.random() < 0.1:
                    cache.evict("cpu")
                begun.release()
        except CacheClosed:
            pass

    def close() -> None:
        for _ in range(rng.randrange(1, 60)):
            begun.acquire(timeout=WAIT_S)
        assert cache.close(WAIT_S)

    in_threads([close, *(lambda number=number: use(number) for number in range(4))])
    ended = 0
    for tokens, load in pending:
        try:
            loaded = load.result(0.0)  # close has returned: none may be left unanswered
        except CacheClosed:
            continue
        oracle.check(tokens, loaded.num_tokens, loaded.kv)
        ended += 1
    if shared:
        assert keeper.check_integrity() == []
        assert keeper.stats()["sessions"] == 1
        assert keeper.stats()["open_tickets"] == 0
        assert keeper.close(WAIT_S)
