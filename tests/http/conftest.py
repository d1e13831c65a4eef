from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvtiers.http.app import make_app
from kvtiers.http.operated import Eviction, TierNotOurs
from kvtiers.http.server import HttpServer, listen
from kvtiers.model.tiers import Tier
from kvtiers.runtime.cache import TieredCache
from kvtiers.testing.cache_oracle import SMALL_LAYOUT, CacheOracle
from kvtiers.testing.chaos import namespace, small_config

TOKENS = list(range(500, 600))


class LibraryCache:
    """A real cache with an operator's view; the GPU tier is an engine's."""

    def __init__(self, cache: TieredCache) -> None:
        self.cache = cache
        self.is_serving = True

    def stats(self) -> Mapping[str, Any]:
        return self.cache.stats()

    def evict(self, tier: Tier, target_usage: float) -> Eviction:
        if tier is Tier.GPU:
            raise TierNotOurs("the GPU tier is the engine's own prefix cache: it evicts by itself")
        done = self.cache.evict(tier, target_usage)
        return Eviction(done.chunks, done.nbytes, done.demoting)

    def serving(self) -> bool:
        return self.is_serving


@pytest.fixture
def operated(tmp_path: Path) -> Iterator[LibraryCache]:
    cache = TieredCache(small_config(tmp_path / "cache"), SMALL_LAYOUT, namespace())
    oracle = CacheOracle(namespace())
    cache.store(TOKENS, oracle.kv(TOKENS))
    cache.flush()
    cache.load(TOKENS).result(10)
    yield LibraryCache(cache)
    assert cache.node.closing or cache.check_integrity() == []
    assert cache.close()


@pytest.fixture
def http(operated: LibraryCache) -> Iterator[httpx.Client]:
    """A client of a real server on the loopback."""
    server = HttpServer(make_app(operated), listen("127.0.0.1", 0, has_token=False))
    with server, httpx.Client(base_url=server.url, timeout=10.0) as client:
        yield client
