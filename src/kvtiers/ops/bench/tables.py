"""A report as a reader sees it: rich tables for a terminal, Markdown for the docs. Both from the same rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvtiers.ops.bench.figures import Figure, Verdict
from kvtiers.ops.bench.measure import Spread
from kvtiers.ops.bench.report import Report

_TITLES: Final = {
    "cpu": "CPU tier",
    "disk": "Disk tier",
    "latency": "Load latency of one chunk",
    "lookup": "Lookup",
    "restart": "Restart",
    "overhead": "Engine thread",
    "remote": "Remote tier",
}
_COLUMNS: Final = ("figure", "shape", "ours", "against", "theirs", "ratio", "target", "verdict")
_NUMBERS: Final = ("ours", "theirs", "ratio", "target")
_STYLES: Final = {Verdict.MET: "green", Verdict.MISSED: "red", Verdict.NOT_DECIDED: "yellow"}


class Row(NamedTuple):
    """One line of a table; empty cells continue the figure above."""

    figure: str
    shape: str
    ours: str
    against: str
    theirs: str
    ratio: str
    target: str
    verdict: Verdict | None


def rows_of(figure: Figure) -> Iterator[Row]:
    """The figure itself, if it stands alone or has a target of its own, then one row for each comparison."""
    head = (figure.name, figure.shape, f"{_interval(figure.ours.spread)} {figure.ours.unit}")
    if figure.target is not None or not figure.comparisons:
        target = "" if figure.target is None else figure.target.text(figure.ours.unit)
        yield Row(*head, "", "", "", target, figure.verdict)
        head = ("", "", "")
    for one in figure.comparisons:
        theirs = f"{_number(one.to.spread.median)} {one.to.unit}"
        target = "" if one.target is None else one.target.text()
        yield Row(*head, one.to.name, theirs, _interval(one.spread), target, one.verdict)
        head = ("", "", "")


def render(report: Report) -> Group:
    """The machine, a table for each subject, notes, how many targets were met."""
    parts: list[RenderableType] = [Text(line) for line in report.machine.describe()]
    parts.append(Text(_how(report)))
    for subject in report_subjects(report):
        table = Table(
            title=_TITLES.get(subject, subject),
            title_justify="left",
            title_style="bold",
            box=None,
            pad_edge=False,
            header_style="bold",
            padding=(0, 2, 0, 0),
        )
        for column in _COLUMNS:
            table.add_column(column, justify="right" if column in _NUMBERS else "left", overflow="fold")
        for row in _rows(report, subject):
            style = _STYLES.get(row.verdict, "") if row.verdict else ""
            table.add_row(*row[:-1], Text(str(row.verdict or ""), style=style))
        parts += [Text(), table, *(Text(f"  {note}", style="dim") for note in _notes(report, subject))]
    parts += [Text(), *(Text(line, style="yellow") for line in _skipped(report))]
    parts += [Text(_summary(report), style="bold")]
    return Group(*parts)


def markdown(report: Report) -> str:
    """The same as a fragment for a document."""
    lines = [f"{line}  " for line in report.machine.describe()]
    lines += [_how(report), ""]
    for subject in report_subjects(report):
        lines += [f"### {_TITLES.get(subject, subject)}", "", f"| {' | '.join(_COLUMNS)} |"]
        lines += ["|" + "|".join("---:" if column in _NUMBERS else "---" for column in _COLUMNS) + "|"]
        lines += [f"| {' | '.join([*row[:-1], _bold(row.verdict)])} |" for row in _rows(report, subject)]
        lines.append("")
        if notes := _notes(report, subject):
            lines += [*(f"- {note}" for note in notes), ""]
    lines += [f"{line}  " for line in _skipped(report)]
    lines += [_summary(report), ""]
    return "\n".join(lines)


def report_subjects(report: Report) -> list[str]:
    """In the order measured."""
    return list(dict.fromkeys(figure.subject for figure in report.figures))


def _rows(report: Report, subject: str) -> Iterator[Row]:
    for figure in report.figures:
        if figure.subject == subject:
            yield from rows_of(figure)


def _notes(report: Report, subject: str) -> list[str]:
    """Each once, however many figures have it."""
    found = [note for figure in report.figures if figure.subject == subject for note in figure.notes]
    return list(dict.fromkeys(found))


def _how(report: Report) -> str:
    if report.tiny:
        return "A run at a tiny size, for tests: its figures say nothing."
    return (
        f"{report.rounds} rounds in turns; medians [5–95 % of the rounds]; a ratio is ours by the other's of the same round; "
        f"{report.seconds:.0f} s in all"
    )


def _skipped(report: Report) -> list[str]:
    return [f"Not measured: {one}" for one in report.skipped]


def _summary(report: Report) -> str:
    counts = {verdict: report.count(verdict) for verdict in Verdict}
    text = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return f"Targets: {text or 'none in this run'}."


def _bold(verdict: Verdict | None) -> str:
    return f"**{verdict}**" if verdict is Verdict.MISSED else str(verdict or "")


def _interval(found: Spread) -> str:
    if found.low == found.high:
        return _number(found.median)
    return f"{_number(found.median)} [{_number(found.low)}–{_number(found.high)}]"


def _number(value: float) -> str:
    """Three digits or so: 0.023, 1.28, 13.4, 1,230."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 3 if abs(value) >= 0.01 else 5
    return f"{value:.{digits}f}"
