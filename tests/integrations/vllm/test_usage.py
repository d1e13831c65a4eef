"""A pool is as full as its blocks that may not be taken without losing something."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvtiers.integrations.vllm.usage import LOOKED_AT_A_SECOND, report_every, usage_of
from kvtiers.testing.local_node import LocalNode
from kvtiers.testing.paged_blocks import CHUNK_TOKENS, PagedRequest
from kvtiers.testing.paged_engine import PagedEngine


def block(ref_cnt: int = 0, block_hash: bytes | None = None, *, is_null: bool = False) -> Any:
    return SimpleNamespace(ref_cnt=ref_cnt, block_hash=block_hash, is_null=is_null)


def test_every_block_counts_once() -> None:
    free, cached, referenced, both = block(), block(0, b"h"), block(1), block(2, b"h")
    null = block(1, is_null=True)
    assert usage_of([null, free, cached, referenced, both]) == 0.75
    assert usage_of([null, cached, cached, referenced, free]) == 0.75  # more than either kind alone
    assert usage_of([null]) == 0.0


def test_large_pool_is_looked_at_less_often() -> None:
    assert report_every(20_000) == 1.0
    assert report_every(4 * LOOKED_AT_A_SECOND) == 4.0


def test_what_a_request_leaves_behind_counts_with_what_the_next_one_uses(
    engine: PagedEngine, local: LocalNode
) -> None:
    engine.add(PagedRequest("a", list(range(2 * CHUNK_TOKENS)), 1))
    engine.drain()
    left = usage_of(engine.pool.blocks)
    request = engine.add(PagedRequest("b", list(range(1000, 1001 + CHUNK_TOKENS)), 1000))
    while not request.generated:
        engine.step()
    total = len(engine.pool.blocks) - 1
    assert usage_of(engine.pool.blocks) == pytest.approx(left + len(request.blocks) / total)
    engine.abort(request)
    engine.drain()
    assert local.comes_to_rest()
