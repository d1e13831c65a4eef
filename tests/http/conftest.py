from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from kvtiers.http.app import make_app
from kvtiers.http.server import HttpServer, listen
from kvtiers.runtime.cache import TieredCache
from kvtiers.testing.cache_oracle import SMALL_LAYOUT, CacheOracle
from kvtiers.testing.chaos import namespace, small_config
from kvtiers.testing.operated import OperatedCache

TOKENS = list(range(500, 600))


@pytest.fixture
def operated(tmp_path: Path) -> Iterator[OperatedCache]:
    cache = TieredCache(small_config(tmp_path / "cache"), SMALL_LAYOUT, namespace())
    oracle = CacheOracle(namespace())
    cache.store(TOKENS, oracle.kv(TOKENS))
    cache.flush()
    cache.load(TOKENS).result(10)
    yield OperatedCache(cache)
    assert cache.node.closing or cache.check_integrity() == []
    assert cache.close()


@pytest.fixture
def http(operated: OperatedCache) -> Iterator[httpx.Client]:
    """A client of a real server on the loopback."""
    server = HttpServer(make_app(operated), listen("127.0.0.1", 0, has_token=False))
    with server, httpx.Client(base_url=server.url, timeout=10.0) as client:
        yield client
