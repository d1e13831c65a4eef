"""A report as a picture: every ratio and every value that has a target, by how far it is from it. Needs matplotlib (extra `plot`)."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from kvtiers.ops.bench.figures import Target, Verdict
from kvtiers.ops.bench.measure import Spread
from kvtiers.ops.bench.report import Report

_COLOURS: Final = {Verdict.MET: "#2b6ca3", Verdict.NOT_DECIDED: "#d9a441", Verdict.MISSED: "#c44e52"}
_GREY: Final = "#666666"
_ROW_INCHES: Final = 0.24
_TWO_DECADES: Final = 100
_HEADROOM_INCHES: Final = 1.9
_LEAST: Final = 1e-3
"""A value of zero has no place on a log axis."""


class Mark(NamedTuple):
    """One line of the picture. `spread` is divided by the target's bound, and turned round where less is better: right of 1 is met."""

    label: str
    spread: Spread
    verdict: Verdict
    text: str


def marks(report: Report) -> list[Mark]:
    """Whatever has a target with a bound above zero."""
    found: list[Mark] = []
    for figure in report.figures:
        name = f"{figure.subject}: {figure.name}" + (f", {figure.shape}" if figure.shape else "")
        if figure.target is not None and figure.verdict is not None and figure.target.bound > 0:
            unit = figure.ours.unit
            found.append(_mark(name, figure.ours.spread, figure.target, figure.verdict, unit))
        found += [
            _mark(f"{name}\nagainst {one.to.name}", one.spread, one.target, one.verdict, "")
            for one in figure.comparisons
            if one.target is not None and one.verdict is not None
        ]
    return found


def _mark(label: str, spread: Spread, target: Target, verdict: Verdict, unit: str) -> Mark:
    low, median, high = (
        max(value, _LEAST) / target.bound for value in (spread.low, spread.median, spread.high)
    )
    if not target.at_least:
        low, median, high = 1 / high, 1 / median, 1 / low
    text = f"{spread.median:.3g}{f' {unit}' if unit else ''}  ({target.text(unit)})"
    return Mark(label, Spread(median, low, high), verdict, text)


def draw(report: Report, path: Path) -> bool:
    """Write a PNG; False if nothing in the report has a target. Raises ImportError without matplotlib."""
    found = marks(report)
    if not found:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    lines = sum(1 + mark.label.count("\n") for mark in found)
    picture = Picture(figsize=(11, _HEADROOM_INCHES + _ROW_INCHES * lines), dpi=130, layout="constrained")
    FigureCanvasAgg(picture)
    panel = picture.subplots()
    picture.suptitle(f"kvtiers bench {report.command}: how far from the target", fontsize=13)
    for row, mark in enumerate(found):
        colour, middle = _COLOURS[mark.verdict], mark.spread.median
        panel.plot([mark.spread.low, mark.spread.high], [row, row], color=colour, linewidth=5, alpha=0.35)
        panel.plot(middle, row, "o", color=colour, markersize=8)
        panel.annotate(
            mark.text,
            (mark.spread.high, row),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    panel.axvline(1, color=_GREY, linewidth=1)
    panel.set_xscale("log")
    low = min(mark.spread.low for mark in found)
    high = max(mark.spread.high for mark in found)
    panel.set_xlim(min(0.5, low / 1.2), max(2.0, high * 3))
    digits = (1, 2, 5) if high / low < _TWO_DECADES else (1,)
    ticks = [digit * 10.0**power for power in range(-4, 5) for digit in digits]
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_yticks(range(len(found)), [mark.label for mark in found], fontsize=8.5)
    panel.set_ylim(len(found) - 0.4, -0.6)
    panel.set_xlabel("target reached (1×) or passed (right of it); bars: 5–95 % of the rounds")
    panel.grid(axis="x", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    picture.supxlabel("\n".join(report.machine.describe()), fontsize=7.5, color=_GREY)
    picture.savefig(path)
    return True
