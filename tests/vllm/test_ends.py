"""Services and engines that are killed at the worst time. Nobody waits for ever, nothing wrong is read, and what was kept is a hit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from kvtiers.testing.chaos import wait_until
from kvtiers.testing.service_process import ServiceProcess

if TYPE_CHECKING:
    from tests.vllm.conftest import Engine, Text

pytestmark = pytest.mark.vllm

Expected = Callable[..., tuple[int, ...]]
Restart = Callable[..., None]


@pytest.fixture
def restart(service: ServiceProcess, reconnect: Callable[[Engine, int], None]) -> Restart:
    """End the service by SIGTERM, so that all it has is on disk, or find it killed; start it, and let engines connect."""

    def again(*engines: Engine) -> None:
        before = service.log.count("is connected")
        if service.exit_code is None:
            assert service.terminate() == 0
        service.start()
        for engine in engines:
            reconnect(engine, before)
            before = service.log.count("is connected")

    return again


def comes_back_whole(engine: Engine, prompt: list[int], tokens: tuple[int, ...]) -> None:
    """After the engine forgot it: all of its chunks from the cache, and the same answer."""
    assert engine.reset()
    hit = engine.generate(prompt)[0]
    assert hit.tokens == tokens
    assert (hit.cached, engine.loaded(hit.name)) == (256, list(range(8)))


def knows_their_end(service: ServiceProcess, pids: set[int]) -> bool:
    """Whether it has noticed that these processes are gone: until then what they were storing is in flight, and refused to others."""
    return not any(client["pid"] in pids for client in service.stats()["service"]["clients"])


def test_service_killed_while_it_stages(
    engine: Engine, service: ServiceProcess, text: Text, expected: Expected, restart: Restart
) -> None:
    prompt = text(21)
    engine.generate(prompt)
    restart(engine)
    assert engine.reset()
    service.pause()
    begun = engine.begin(prompt)
    service.kill()
    answer = engine.end(begun)
    assert answer.tokens == expected(prompt)
    assert (answer.cached, engine.loaded(answer.name)) == (0, [])
    restart(engine)
    comes_back_whole(engine, prompt, answer.tokens)


def test_service_killed_while_a_load_is_copied(
    engine: Engine, service: ServiceProcess, text: Text, expected: Expected, restart: Restart
) -> None:
    prompt = text(22)
    engine.generate(prompt)
    restart(engine)
    assert engine.reset()
    engine.hold("filled")
    try:
        begun = engine.begin(prompt)
        engine.held("filled")
        service.kill()
    finally:
        engine.go_on("filled")
    answer = engine.end(begun)
    assert answer.tokens == expected(prompt)
    filled = engine.loaded(answer.name)
    assert filled == list(range(len(filled)))
    restart(engine)
    comes_back_whole(engine, prompt, answer.tokens)


def test_service_killed_while_a_store_is_copied(
    engine: Engine, service: ServiceProcess, text: Text, expected: Expected, restart: Restart
) -> None:
    prompt = text(23)
    engine.hold("kept")
    try:
        begun = engine.begin(prompt)
        engine.held("kept")
        answer = engine.end(begun)  # which does not wait for the store
        service.kill()
    finally:
        engine.go_on("kept")
    assert answer.tokens == expected(prompt)
    engine.settle()
    restart(engine)
    assert engine.reset()  # no block is pinned
    again = engine.generate(prompt)[0]
    assert again.tokens == answer.tokens
    engine.loaded(again.name)
    assert engine.reset()
    hit = engine.generate(prompt)[0]
    assert hit.tokens == answer.tokens
    assert (hit.cached, engine.loaded(hit.name)) == (256, list(range(8)))


def test_two_engines_at_once(
    engine: Engine, make_second: Callable[[], Engine], text: Text, expected: Expected
) -> None:
    second = make_second()
    prompts = [text(number, 200) for number in (24, 25, 26)]
    for one in (engine, second):
        assert one.reset()
    begun = [(one, prompt, one.begin(prompt)) for prompt in prompts for one in (engine, second)]
    for one, prompt, begin in begun:
        answer = one.end(begin)
        assert answer.tokens == expected(prompt)
        one.loaded(answer.name)
    for one in (engine, second):
        one.settle()
        assert one.reset()
    begun = [(one, prompt, one.begin(prompt)) for prompt in prompts for one in (second, engine)]
    for one, prompt, begin in begun:
        answer = one.end(begin)
        assert answer.tokens == expected(prompt)
        assert (answer.cached, one.loaded(answer.name)) == (192, list(range(6)))


def test_engine_killed_in_mid_store_leaves_nothing_wrong(
    engine: Engine,
    make_second: Callable[[], Engine],
    service: ServiceProcess,
    text: Text,
    expected: Expected,
) -> None:
    prompt, second = text(27), make_second()
    second.hold("kept")
    begun = second.begin(prompt)
    second.held("kept")
    answer = second.end(begun)
    pids = second.pids
    second.kill()
    make_second.forget()  # type: ignore[attr-defined]
    assert wait_until(lambda: knows_their_end(service, pids)), service.log[-4000:]
    first = engine.generate(prompt)[0]  # nothing of it was committed
    assert first.tokens == expected(prompt) == answer.tokens
    assert (first.cached, engine.loaded(first.name)) == (0, [])
    assert engine.stored(first) == list(range(8))
    assert engine.reset()
    hit = engine.generate(prompt)[0]
    assert hit.tokens == answer.tokens
    assert (hit.cached, engine.loaded(hit.name)) == (256, list(range(8)))
