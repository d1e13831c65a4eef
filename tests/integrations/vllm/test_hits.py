"""What counts as hits at the service, whose figures an operator reads: what workers have copied, once, and nothing that was only staged."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from kvtiers.testing.chaos import wait_until
from kvtiers.testing.local_node import LocalNode
from kvtiers.testing.paged_blocks import CHUNK_TOKENS, PagedRequest
from kvtiers.testing.paged_engine import PagedEngine

TOKENS = 3 * CHUNK_TOKENS + 5


class Counted(NamedTuple):
    taken: int
    unused: int


def counted(local: LocalNode) -> Counted:
    """Chunks."""
    assert local.comes_to_rest()
    stats = local.server.stats()
    tiers = (tier for name, tier in stats["tiers"].items() if name != "gpu")
    return Counted(sum(tier.get("hits", 0) for tier in tiers), stats["unused"])


def add(engine: PagedEngine, name: str) -> PagedRequest:
    return engine.add(PagedRequest(name, list(range(TOKENS)), 1))


def compute_and_forget(engine: PagedEngine) -> None:
    add(engine, "first")
    engine.drain()
    assert engine.pool.reset()


def test_a_load_counts_when_it_was_copied(engine: PagedEngine, local: LocalNode) -> None:
    compute_and_forget(engine)
    assert counted(local) == (0, 0)
    add(engine, "again")
    engine.drain()
    assert counted(local) == (3, 0)


def test_what_was_staged_for_an_aborted_request_does_not(engine: PagedEngine, local: LocalNode) -> None:
    compute_and_forget(engine)
    request = add(engine, "again")

    def staged() -> bool:
        engine.side._client.step()  # a step of the engine's would begin to load
        return bool(local.server.stats()["tiers"]["cpu"]["leased_chunks"])

    assert wait_until(staged)
    engine.abort(request)
    engine.drain()
    assert counted(local) == (0, 3)


def test_of_two_with_one_prompt_only_what_each_has_loaded_does(engine: PagedEngine, local: LocalNode) -> None:
    compute_and_forget(engine)
    add(engine, "one")
    add(engine, "other")
    engine.drain()
    taken, unused = counted(local)
    assert taken * CHUNK_TOKENS == engine.loaded_tokens
    assert taken + unused == 6


@pytest.mark.parametrize("good", [0, 1, 2])
def test_of_a_load_that_failed_what_came_before_does(
    engine: PagedEngine, local: LocalNode, good: int
) -> None:
    """The engine keeps those blocks."""
    compute_and_forget(engine)
    engine.ranks[1].link.lost_after = good
    add(engine, "again")

    def failed() -> bool:
        engine.step()
        return bool(engine.side.counts.total["load_failures"])

    assert wait_until(failed)
    engine.ranks[1].link.lost_after = -1
    engine.drain()
    assert counted(local) == (good, 3 - good)
