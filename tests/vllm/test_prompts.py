"""What engines do with prompts: whole blocks, chunks entered in the middle, batches, salts, wishes, preemption, aborts, resets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from kvtiers.testing.chaos import wait_until

if TYPE_CHECKING:
    from tests.vllm.conftest import Engine, Text

pytestmark = pytest.mark.vllm

Expected = Callable[..., tuple[int, ...]]
NOT_AT_ALL = {"kvtiers.no_load": True, "kvtiers.no_store": True}


def test_prompt_of_whole_chunks_hits_to_its_last_token(
    engine: Engine, text: Text, expected: Expected
) -> None:
    prompt = text(3, 256)
    cold = engine.generate(prompt)[0]
    assert cold.cached == 0
    assert engine.stored(cold) == list(range(8))
    assert engine.reset()
    hit = engine.generate(prompt)[0]
    assert hit.tokens == expected(prompt) == cold.tokens
    assert engine.loaded(hit.name) == list(range(8))
    assert hit.cached >= 255  # the last one is computed for the sake of its output
    local = engine.generate(prompt)[0]  # vLLM's own hits leave out the last block, which the cache has
    assert local.tokens == cold.tokens
    assert engine.loaded(local.name) == [7]


def test_prompt_of_whole_blocks_that_ends_within_a_chunk(
    engine: Engine, text: Text, expected: Expected
) -> None:
    prompt = text(4, 288)
    engine.generate(prompt)
    assert engine.reset()
    hit = engine.generate(prompt)[0]
    assert hit.tokens == expected(prompt)
    assert (hit.cached, engine.loaded(hit.name)) == (256, list(range(8)))


def test_chunks_are_stored_while_a_long_prompt_is_still_prefilled(
    engine: Engine, text: Text, expected: Expected
) -> None:
    prompt = text(5, 460)
    cold = engine.generate(prompt)[0]
    assert cold.tokens == expected(prompt)
    assert engine.steps(cold)[:4] == [128, 128, 128, 76]
    assert engine.stored(cold) == list(range(14))
    offers = [event["at"] for event in engine.events("offers") if event["count"]]
    steps = [
        event["at"]
        for event in engine.events("step")
        if any(n.startswith(cold.name) for n in event["tokens"])
    ]
    assert any(steps[0] < at < steps[3] for at in offers)
    assert engine.reset()
    hit = engine.generate(prompt)[0]
    assert hit.tokens == cold.tokens
    assert (hit.cached, engine.loaded(hit.name)) == (448, list(range(14)))
    assert engine.steps(hit)[0] == 12


def test_load_begins_in_the_middle_of_a_chunk_where_the_engine_has_its_beginning(
    engine: Engine, text: Text, expected: Expected
) -> None:
    prompt = text(6)
    engine.generate(prompt)
    assert engine.reset()
    part = engine.generate(prompt[:100], wishes=NOT_AT_ALL)[0]
    assert (part.cached, engine.loaded(part.name)) == (0, [])
    hit = engine.generate(prompt)[0]
    assert hit.tokens == expected(prompt)
    assert (hit.cached, engine.loaded(hit.name)) == (256, [3, 4, 5, 6, 7])


def test_longer_prompt_loads_what_it_shares_and_computes_the_rest(
    engine: Engine, text: Text, expected: Expected
) -> None:
    prompt = text(7, 400)
    engine.generate(prompt[:200])
    assert engine.reset()
    longer = engine.generate(prompt)[0]
    assert longer.tokens == expected(prompt)
    assert (longer.cached, engine.loaded(longer.name)) == (192, [0, 1, 2, 3, 4, 5])
    assert engine.stored(longer) == list(range(12))


def test_requests_of_one_prefix_in_a_batch(engine: Engine, text: Text, expected: Expected) -> None:
    shared = text(8, 192)
    prompts = [[*shared, *text(number, 60)] for number in (9, 10, 11)]
    engine.generate([*shared, 7])
    assert engine.reset()
    answers = engine.generate(*prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == expected(prompt)
        assert answer.cached == 192
        assert engine.loaded(answer.name) in (list(range(6)), [])  # or it came from a neighbour's blocks
    assert any(engine.loaded(answer.name) for answer in answers)


def test_salt_keeps_prompts_apart(engine: Engine, text: Text, expected: Expected) -> None:
    prompt = text(12)
    first = engine.generate(prompt, salt="one")[0]
    assert engine.reset()
    for salt in ("another", None):
        other = engine.generate(prompt, salt=salt)[0]
        assert (other.cached, engine.loaded(other.name)) == (0, [])
        assert engine.reset()
    same = engine.generate(prompt, salt="one")[0]
    assert (same.cached, engine.loaded(same.name)) == (256, list(range(8)))
    assert same.tokens == first.tokens == expected(prompt)


def test_request_may_wish_not_to_be_stored(engine: Engine, text: Text, expected: Expected) -> None:
    prompt = text(13)
    private = engine.generate(prompt, wishes={"kvtiers.no_store": True})[0]
    assert engine.stored(private) == []
    assert engine.reset()
    again = engine.generate(prompt)[0]
    assert (again.cached, engine.loaded(again.name)) == (0, [])
    assert again.tokens == private.tokens == expected(prompt)


def test_request_may_wish_not_to_be_loaded(engine: Engine, text: Text, expected: Expected) -> None:
    prompt = text(14)
    engine.generate(prompt)
    assert engine.reset()
    computed = engine.generate(prompt, wishes={"kvtiers.no_load": True})[0]
    assert (computed.cached, engine.loaded(computed.name)) == (0, [])
    assert computed.tokens == expected(prompt)


def test_preempted_requests_come_back_from_the_cache(engine: Engine, text: Text, expected: Expected) -> None:
    prompts = [text(15, 330), text(16, 330)]
    assert engine.reset()
    before = engine.metric("vllm:num_preemptions")
    answers = engine.generate(*prompts, max_tokens=60)
    assert engine.metric("vllm:num_preemptions") > before
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == expected(prompt, max_tokens=60)
        engine.loaded(answer.name)  # whatever was loaded was right
    assert engine.reset()
    for prompt, answer in zip(prompts, answers, strict=True):
        hit = engine.generate(prompt)[0]
        assert hit.tokens == answer.tokens[:8]
        assert (hit.cached, engine.loaded(hit.name)) == (320, list(range(10)))
        assert engine.reset()


def test_abort_in_mid_load_leaves_nothing_behind(engine: Engine, text: Text, expected: Expected) -> None:
    prompt, others = text(17), [text(18), text(19)]
    wanted = [expected(other) for other in others]
    engine.generate(prompt)
    assert engine.reset()
    engine.hold("filled")
    try:
        name, call = engine.begin(prompt)
        engine.held("filled")
        engine.answer(engine.ask("abort", name=name))
        assert engine.answer(call).get("aborted")
        meanwhile = [engine.begin(other) for other in others]
        for begun, tokens in zip(meanwhile, wanted, strict=True):  # computed while the copy still waits
            assert engine.end(begun).tokens == tokens
    finally:
        engine.go_on("filled")

    def filled() -> int:
        events = engine.events("filled")
        return sum(len(event["blocks"]) for event in events if event["request"].startswith(name))

    assert wait_until(lambda: filled() == 8)
    assert engine.loaded(name) == list(range(8))  # into blocks that were still its own
    assert wait_until(engine.reset)  # no block is in use, once the engine has heard of it
    again = engine.generate(prompt)[0]
    assert again.tokens == expected(prompt)
    assert (again.cached, engine.loaded(again.name)) == (256, list(range(8)))


def test_reset_of_the_connector_forgets_for_this_engine_only(
    engine: Engine, make_second: Callable[[], Engine], text: Text, expected: Expected
) -> None:
    prompt, second = text(20), make_second()
    second.generate(prompt)
    assert second.reset(connector=True)
    again = second.generate(prompt)[0]
    assert (again.cached, second.loaded(again.name)) == (0, [])
    assert again.tokens == expected(prompt)
    assert second.reset()
    hit = second.generate(prompt)[0]  # of what was stored since
    assert (hit.cached, second.loaded(hit.name)) == (256, list(range(8)))
    other = engine.generate(prompt)[0]
    assert (other.cached, engine.loaded(other.name)) == (256, list(range(8)))
    assert hit.tokens == other.tokens == expected(prompt)
    second.stop()
    make_second.forget()  # type: ignore[attr-defined]
