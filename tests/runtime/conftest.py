"""Small caches on real disks, closed at the end of each test, with the audit run before that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from kvtiers.model.layout import KVLayout
from kvtiers.model.namespace import Namespace
from kvtiers.runtime.cache import TieredCache
from kvtiers.runtime.node import CacheNode
from kvtiers.testing.cache_oracle import SMALL_LAYOUT, CacheOracle
from kvtiers.testing.chaos import Chaos, chaos_bench, namespace, small_config

MakeCache: TypeAlias = Callable[..., TieredCache]
MakeChaos: TypeAlias = Callable[..., Chaos]


@pytest.fixture
def oracle() -> CacheOracle:
    return CacheOracle(namespace())


@pytest.fixture
def make_cache(tmp_path: Path) -> Iterator[MakeCache]:
    """A cache with a disk; `values`: settings by dotted key. Audited and closed at the end, if the test has not closed it."""
    made: list[TieredCache] = []

    def make(
        values: Mapping[str, Any] | None = None,
        *,
        layout: KVLayout = SMALL_LAYOUT,
        named: Namespace | None = None,
        node: CacheNode | None = None,
        disk: bool = True,
    ) -> TieredCache:
        config = small_config(tmp_path / "cache" if disk else None, values)
        cache = TieredCache(config, layout, named or namespace(), node=node)
        made.append(cache)
        return cache

    yield make
    problems = [problem for cache in made if not cache.node.closing for problem in cache.check_integrity()]
    closed = [cache.close() for cache in made]
    assert problems == []
    assert all(closed)


@pytest.fixture
def make_chaos(tmp_path: Path) -> Iterator[MakeChaos]:
    """A cache on a faulty disk; see `chaos_bench`."""
    with chaos_bench(tmp_path / "cache") as make:
        yield make
