"""Engines of two processes each, through one service: they share prefixes and survive its restart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtiers.testing.chaos import wait_until
from kvtiers.testing.service_process import ServiceProcess
from kvtiers.testing.toy_engine import ToyEngine

if TYPE_CHECKING:
    from tests.node.conftest import MakeEngine


@pytest.fixture
def make_toy() -> Iterator[Callable[[Path], ToyEngine]]:
    made: list[ToyEngine] = []

    def make(path: Path) -> ToyEngine:
        made.append(ToyEngine(path))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def warm(engine: ToyEngine, tokens: list[int]) -> int:
    """Serve it again until the cache is used; chunks loaded then."""
    found = 0

    def served() -> bool:
        nonlocal found
        found = engine.run(tokens).loaded
        return found == len(tokens) // 16

    assert wait_until(served), found
    return found


def test_two_engines_share_a_prefix_and_survive_a_restart(
    service: ServiceProcess, make_toy: Callable[[Path], ToyEngine], make_engine: MakeEngine
) -> None:
    one, other = make_toy(service.socket), make_toy(service.socket)
    prefix, prompt = one.tokens(1, 6), one.tokens(1, 9)
    assert warm(one, prefix) == 6
    assert wait_until(lambda: other.run(prompt).loaded >= 6)  # what the first one stored
    assert warm(other, prompt) == 9
    watcher = make_engine(service.socket).connect()
    assert wait_until(lambda: watcher.stats()["tiers"]["disk"]["entries"] >= 9)
    watcher.client.close()

    service.kill()
    for engine in (one, other):
        assert wait_until(lambda engine=engine: engine.run(prompt).loaded == 0)  # type: ignore[misc]
    service.start()
    assert warm(one, prompt) == 9
    assert warm(other, prompt) == 9
