"""Caches on a disk that fails on command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from kvtiers.testing.cache_oracle import CacheOracle
from kvtiers.testing.chaos import Chaos, chaos_bench, namespace

MakeChaos: TypeAlias = Callable[..., Chaos]


@pytest.fixture
def oracle() -> CacheOracle:
    return CacheOracle(namespace())


@pytest.fixture
def make_chaos(tmp_path: Path) -> Iterator[MakeChaos]:
    """A cache on a faulty disk; see `chaos_bench`."""
    with chaos_bench(tmp_path / "cache") as make:
        yield make
