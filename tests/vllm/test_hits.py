"""KV that comes back: from memory, from disk, to another engine. Tokens, counts, blocks and bytes are all compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvtiers.testing.service_process import ServiceProcess

if TYPE_CHECKING:
    from tests.vllm.conftest import Engine, Text

Expected = Callable[..., tuple[int, ...]]


def test_prompt_comes_back_from_memory_after_the_prefix_cache_was_reset(
    engine: Engine, text: Text, expected: Expected
) -> None:
    assert [event["backend"] for event in engine.events("begun")] == ["CPU_ATTN"]
    prompt = text(0)
    cold = engine.generate(prompt)[0]
    assert cold.tokens == expected(prompt)
    assert (cold.cached, engine.loaded(cold.name)) == (0, [])
    assert engine.stored(cold) == list(range(8))
    assert engine.reset()
    warm = engine.generate(prompt)[0]
    assert warm.tokens == cold.tokens
    assert warm.cached == 256
    assert engine.loaded(warm.name) == list(range(8))


def test_prompt_comes_back_from_disk_after_the_service_was_restarted(
    engine: Engine,
    service: ServiceProcess,
    text: Text,
    expected: Expected,
    reconnect: Callable[[Engine, int], None],
) -> None:
    prompt = text(1)
    cold = engine.generate(prompt)[0]
    assert cold.cached == 0
    assert engine.reset()
    before = service.log.count("is connected")
    assert service.terminate() == 0
    service.start()
    reconnect(engine, before)
    hit = engine.generate(prompt)[0]
    assert hit.tokens == expected(prompt) == cold.tokens
    assert hit.cached == 256
    assert engine.loaded(hit.name) == list(range(8))


def test_prompt_of_one_engine_is_a_hit_in_another(
    engine: Engine, make_second: Callable[[], Engine], text: Text, expected: Expected
) -> None:
    prompt, second = text(2), make_second()
    cold = engine.generate(prompt)[0]
    assert cold.cached == 0
    hit = second.generate(prompt)[0]
    assert hit.tokens == expected(prompt) == cold.tokens
    assert hit.cached == 256
    assert second.loaded(hit.name) == list(range(8))
    assert second.stored(hit) == []
