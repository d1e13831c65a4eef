"""The arithmetic of a benchmark: rounds, medians and intervals, ratios round by round, verdicts."""

from __future__ import annotations

import gc

import pytest

from kvtiers.ops.bench.figures import (
    GB_PER_S,
    MS,
    US,
    Figure,
    S,
    Series,
    Verdict,
    as_json,
    at_least,
    at_most,
    best,
    compare,
    rates,
    times,
)
from kvtiers.ops.bench.measure import Contestant, Spread, interleave, repeated, seconds_of, spread


def test_spread_is_the_median_and_the_interpolated_5_and_95_percent_quantiles() -> None:
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)
    found = spread([float(value) for value in range(20, -1, -1)])
    assert found.median == 10.0
    assert found.low == pytest.approx(1.0)
    assert found.high == pytest.approx(19.0)
    assert spread([1.0, 2.0]).low == pytest.approx(1.05)


class TestInterleave:
    def test_every_contestant_has_one_turn_a_round_and_the_order_turns_round(self) -> None:
        turns: list[str] = []

        def contestant(name: str) -> Contestant:
            def turn() -> float:
                turns.append(name)
                return float(len(turns))

            return turn

        advanced: list[None] = []
        taken = interleave(
            {name: contestant(name) for name in "abc"}, 3, advance=lambda: advanced.append(None)
        )
        assert "".join(turns) == "cba" + "abc" + "cba" + "abc"
        assert taken == {"a": [4.0, 9.0, 10.0], "b": [5.0, 8.0, 11.0], "c": [6.0, 7.0, 12.0]}
        assert len(advanced) == 12

    def test_warm_ups_are_thrown_away(self) -> None:
        values = iter([100.0, 50.0, 1.0, 2.0])
        assert interleave({"a": lambda: next(values)}, 2, warmups=2) == {"a": [1.0, 2.0]}

    def test_the_collector_is_off_in_a_turn_and_on_after_it_even_if_the_turn_fails(self) -> None:
        seen: list[bool] = []

        def fail() -> float:
            seen.append(gc.isenabled())
            raise ValueError("a turn that fails")

        assert gc.isenabled()
        with pytest.raises(ValueError, match="a turn that fails"):
            interleave({"a": fail}, 1)
        assert seen == [False]
        assert gc.isenabled()

    def test_several_in_one_turn_count_with_their_mean(self) -> None:
        values = iter([1.0, 2.0, 6.0])
        assert repeated(lambda: next(values), 3)() == 3.0

    def test_seconds_are_those_of_the_call(self) -> None:
        called: list[int] = []
        assert seconds_of(lambda: called.append(1)) >= 0.0
        assert called == [1]


class TestVerdicts:
    @pytest.mark.parametrize(
        ("found", "verdict"),
        [
            (Spread(0.95, 0.91, 0.99), Verdict.MET),
            (Spread(0.90, 0.80, 0.99), Verdict.MET),
            (Spread(0.89, 0.80, 0.90), Verdict.NOT_DECIDED),
            (Spread(0.85, 0.80, 0.89), Verdict.MISSED),
        ],
    )
    def test_more_is_better(self, found: Spread, verdict: Verdict) -> None:
        assert at_least(0.9).verdict(found) is verdict

    @pytest.mark.parametrize(
        ("found", "verdict"),
        [
            (Spread(1.1, 1.0, 1.5), Verdict.MET),
            (Spread(1.2, 1.1, 9.0), Verdict.MET),
            (Spread(1.3, 1.2, 1.4), Verdict.NOT_DECIDED),
            (Spread(1.3, 1.25, 1.4), Verdict.MISSED),
            (Spread(0.0, 0.0, 0.0), Verdict.MET),
        ],
    )
    def test_less_is_better(self, found: Spread, verdict: Verdict) -> None:
        assert at_most(1.2).verdict(found) is verdict

    def test_targets_say_their_direction_and_unit(self) -> None:
        assert at_least(0.9).text() == "≥ 0.9"
        assert at_most(0.6).text("ms") == "≤ 0.6 ms"


class TestSeries:
    def test_rates_are_bytes_by_seconds_in_gigabytes(self) -> None:
        assert rates("copy", [0.5, 0.25], 2 * 10**9) == Series("copy", GB_PER_S, (4.0, 8.0))

    def test_times_are_converted_and_divided(self) -> None:
        assert times("a", [0.002], MS).values == (2.0,)
        assert times("a", [0.002], US, per=4).values == (500.0,)
        assert times("a", [2.0], S).values == (2.0,)

    def test_ratios_are_taken_within_a_round(self) -> None:
        """A slow machine in one round slows both: the ratio of medians would be another one."""
        ours, limit = Series("us", GB_PER_S, (9.0, 1.0, 4.0)), Series("limit", GB_PER_S, (10.0, 1.0, 8.0))
        found = compare(ours, limit, at_least(0.9))
        assert found.ratios == (0.9, 1.0, 0.5)
        assert found.spread.median == 0.9
        assert found.verdict is Verdict.MET
        assert compare(ours, limit).verdict is None

    def test_other_rounds_can_not_be_compared(self) -> None:
        with pytest.raises(ValueError, match="shorter"):
            compare(Series("us", MS, (1.0, 2.0)), Series("limit", MS, (1.0,)))

    def test_the_best_rate_is_the_highest_median_and_the_best_time_the_lowest(self) -> None:
        fast, slow = Series("fast", GB_PER_S, (9.0, 9.0, 1.0)), Series("slow", GB_PER_S, (99.0, 5.0, 5.0))
        assert best([slow, fast]) is fast
        short, long = Series("short", MS, (1.0,)), Series("long", MS, (2.0,))
        assert best(iter([long, short])) is short


def test_json_of_a_figure_has_every_round_and_every_verdict() -> None:
    ours, limit = Series("us", GB_PER_S, (9.0, 8.0)), Series("limit", GB_PER_S, (10.0, 10.0))
    figure = Figure(
        "cpu",
        "load",
        ours,
        "llama3-8b",
        target=at_least(10),
        comparisons=(compare(ours, limit, at_least(0.5)), compare(ours, limit)),
        others=(limit,),
        notes=("a note",),
    )
    assert figure.verdicts() == [Verdict.MISSED, Verdict.MET]
    plain = as_json(figure)
    assert plain["ours"]["values"] == [9.0, 8.0]
    assert plain["target"] == {"bound": 10, "kind": "at least"}
    assert plain["verdict"] == "missed"
    first, second = plain["comparisons"]
    assert first["ratios"] == [0.9, 0.8]
    assert first["ratio"]["median"] == pytest.approx(0.85)
    assert (first["verdict"], second["verdict"], second["target"]) == ("met", None, None)
    assert plain["others"][0]["name"] == "limit"
    assert plain["notes"] == ["a note"]
