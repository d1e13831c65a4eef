"""What vLLM's benchmark makes of its rounds."""

from __future__ import annotations

import pytest
from benchmarks.vllm.report import possible
from benchmarks.vllm.servers import Answer


def test_a_hit_is_held_against_the_warm_cache_the_tokens_beyond_it_and_its_bytes() -> None:
    warm, cold = Answer(0.1, 2000, 1920, ""), Answer(1.0, 2000, 0, "")
    hit = Answer(0.2, 2000, 1792, "")
    assert possible(hit, warm, cold, 0.0) == pytest.approx(0.1 + 128 * 0.0005)
    assert possible(hit, warm, cold, 1e-5) == pytest.approx(0.1 + 128 * 0.0005 + 0.01792)
    assert possible(warm, warm, cold, 0.0) == warm.ttft
