"""Engines without a model on nodes that are served from here; what was started is ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import pytest

from kvtiers.testing.local_node import LocalNode, MakeLocal, folder, local, make_local
from kvtiers.testing.paged_engine import PagedEngine

__all__ = ["folder", "local", "make_local"]  # fixtures
MakePaged: TypeAlias = Callable[..., PagedEngine]


@pytest.fixture
def make_paged(make_local: MakeLocal) -> Iterator[MakePaged]:
    """Engines; their threads have ended and nothing is pinned at the end."""
    made: list[PagedEngine] = []

    def make(node: LocalNode, **options: float) -> PagedEngine:
        made.append(PagedEngine(node.socket, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def engine(local: LocalNode, make_paged: MakePaged) -> PagedEngine:
    """One that is connected."""
    return make_paged(local).connect()
