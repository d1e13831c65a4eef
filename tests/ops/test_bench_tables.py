"""A report as a reader sees it: one set of rows for the terminal and for Markdown, and a picture where right of 1 is good."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from kvtiers.ops.bench.figures import GB_PER_S, MS, Figure, Series, Verdict, at_least, at_most, compare
from kvtiers.ops.bench.machine import machine_report
from kvtiers.ops.bench.plot import draw, marks
from kvtiers.ops.bench.report import Report
from kvtiers.ops.bench.tables import markdown, render, rows_of

OURS = Series("us", GB_PER_S, (9.0, 9.0, 9.0))
LIMIT = Series("limit", GB_PER_S, (10.0, 12.0, 18.0))


def a_report(*figures: Figure, tiny: bool = False) -> Report:
    return Report("tiers", 3, ("x",), machine_report(Path.cwd()), figures, 1.0, tiny=tiny)


LOAD = Figure(
    "cpu", "load", OURS, "llama3-8b", comparisons=(compare(OURS, LIMIT, at_least(0.9)), compare(OURS, LIMIT))
)
LATENCY = Figure(
    "latency", "disk, p99", Series("load", MS, (20.0,)), target=at_most(10.0), notes=("slow", "slow")
)


def test_a_comparison_is_a_row_and_the_figure_s_name_stands_in_the_first() -> None:
    first, second = rows_of(LOAD)
    assert first[:5] == ("load", "llama3-8b", "9.00 GB/s", "limit", "12.0 GB/s")
    assert first.ratio.startswith("0.75 [")
    assert (first.target, first.verdict) == ("≥ 0.9", Verdict.MISSED)
    assert second[:4] == ("", "", "", "limit")
    assert (second.target, second.verdict) == ("", None)


def test_a_value_with_a_target_of_its_own_is_a_row() -> None:
    (row,) = rows_of(LATENCY)
    assert row == ("disk, p99", "", "20.0 ms", "", "", "", "≤ 10 ms", Verdict.MISSED)


def test_terminal_and_markdown_say_the_same() -> None:
    report = a_report(LOAD, LATENCY)
    out = io.StringIO()
    Console(file=out, width=200, markup=False).print(render(report))
    text, fragment = out.getvalue(), markdown(report)
    for expected in ("CPU tier", "Load latency", "limit", "≥ 0.9", "missed", "Targets: 2 missed.", "slow"):
        assert expected in text
        assert expected in fragment
    assert fragment.count("- slow") == 1
    assert "| load | llama3-8b |" in fragment


def test_a_tiny_run_says_that_it_says_nothing() -> None:
    assert "figures say nothing" in markdown(a_report(LOAD, tiny=True))
    assert "figures say nothing" not in markdown(a_report(LOAD))


def test_in_the_picture_right_of_1_is_met_whatever_the_direction() -> None:
    load, latency = marks(a_report(LOAD, LATENCY))
    assert load.spread.median == pytest.approx(0.75 / 0.9)
    assert latency.spread.median == pytest.approx(0.5)
    fast = Figure("latency", "cpu", Series("load", MS, (2.0, 5.0)), target=at_most(10.0))
    (mark,) = marks(a_report(fast))
    assert mark.spread.low < mark.spread.median < mark.spread.high
    assert mark.spread.low > 1


def test_zero_waits_are_no_mark_and_a_report_without_targets_no_picture(tmp_path: Path) -> None:
    zero = Figure("overhead", "waits", Series("waits", "waits", (0.0,)), target=at_most(0.0))
    assert marks(a_report(zero)) == []
    assert not draw(a_report(zero), tmp_path / "none.png")
    assert list(tmp_path.iterdir()) == []


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert draw(a_report(LOAD, LATENCY), tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
