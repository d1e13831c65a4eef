"""What the two-turn chat is held against."""

from __future__ import annotations

import pytest
from benchmarks.vllm.report import possible, spread
from benchmarks.vllm.servers import Answer


def test_a_hit_is_held_against_as_many_tokens_in_a_warm_prefix_cache_and_its_bytes() -> None:
    hit = Answer(0.3, 2000, 1792, "")
    assert possible(hit, Answer(0.2, 2000, 1792, ""), 0.0) == pytest.approx(0.2)
    assert possible(hit, Answer(0.2, 2000, 1792, ""), 1e-5) == pytest.approx(0.2 + 0.01792)
    with pytest.raises(ValueError, match="1792 tokens of the hit were cached, 1920"):
        possible(hit, Answer(0.2, 2000, 1920, ""), 0.0)


def test_the_spread_leaves_no_round_out() -> None:
    assert spread([3.0, 1.0, 2.0] * 20 + [9.0, 0.5]) == (0.5, 9.0)
