"""What an engine says of its own speed is of steps that are mostly prefill, and of no time in which it was idle."""

from __future__ import annotations

import pytest

from kvtiers.integrations.vllm.prefill_rate import PrefillRate


def test_nothing_is_said_before_a_prompt_was_computed() -> None:
    rate = PrefillRate()
    rate.step(512, 10.0)
    assert rate.tokens_per_s == 0


def test_a_step_lasts_until_the_next_and_idle_time_is_none_of_it() -> None:
    rate = PrefillRate()
    rate.step(512, 10.0)
    rate.step(0, 10.5)
    assert rate.tokens_per_s == 1024
    rate.step(512, 1000.0)
    rate.step(0, 1000.5)
    assert rate.tokens_per_s == 1024


def test_decoding_steps_say_nothing() -> None:
    rate = PrefillRate()
    for second in range(5):
        rate.step(8, float(second))
    assert rate.tokens_per_s == 0


def test_the_newest_steps_weigh_most() -> None:
    rate, now = PrefillRate(), 0.0
    for tokens, seconds in [(100, 1.0)] * 3 + [(100, 0.5)] * 20:
        rate.step(tokens, now)
        now += seconds
    rate.step(0, now)
    assert rate.tokens_per_s == pytest.approx(200, rel=0.01)


def test_a_step_that_is_planned_while_another_is_computed_is_no_end_of_it() -> None:
    rate = PrefillRate(in_flight=2)
    rate.step(512, 10.0)
    rate.step(256, 10.001)  # planned at once
    rate.step(0, 10.5)  # the first has ended
    assert rate.tokens_per_s == pytest.approx(512 / 0.499)
    rate.step(0, 10.75)  # and the second
    assert rate.tokens_per_s == pytest.approx(1024, rel=0.01)
