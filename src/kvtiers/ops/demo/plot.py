"""An outcome as a picture. Needs matplotlib (extra `plot`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from kvtiers.ops.demo.measure import Source
from kvtiers.ops.demo.outcome import SIMULATED_GPU, Outcome, duration, source_name

_NO_CACHE: Final = "#c44e52"
_CACHED: Final = "#2b6ca3"
_LOAD: Final = "#93bfe0"
_GREY: Final = "#666666"
_TICKS: Final = tuple(digit * 10.0**power for power in range(-4, 5) for digit in (1, 2, 5))
_EDGE: Final = 1.8
"""Room on a log axis beyond the first and the last value, for their labels."""
_MOST_LABELS: Final = 20
"""Turns up to which each value is written beside its point."""


def draw(outcome: Outcome, path: Path) -> None:
    """Write a PNG. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6 if outcome.conversation else 4.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    if outcome.conversation:
        _draw_conversation(outcome, figure)
    else:
        _draw_questions(outcome, figure)
    footer = f"{outcome.setup.model}, {outcome.setup.layout.dtype}, on {outcome.setup.machine}"
    if outcome.setup.simulated_gpu:
        footer += f"\n{SIMULATED_GPU}"
    figure.supxlabel(footer, fontsize=9, color=_GREY)
    figure.savefig(path)


def _draw_questions(outcome: Outcome, figure: Any) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    count = len(outcome.questions)
    tokens = max(run.prompt_tokens for run in outcome.runs)
    figure.suptitle(f"Time to first token, prompt of {tokens:,} tokens", fontsize=13)
    sources = outcome.sources()
    names = {source: source_name(source, simulated_gpu=outcome.setup.simulated_gpu) for source in sources}
    for row, source in enumerate(sources):
        colour = _NO_CACHE if source is Source.NO_CACHE else _CACHED
        times = [run.ttft_s for run in outcome.of(source)]
        left.plot(times, [row] * len(times), "o", color=colour, alpha=0.35, markersize=6, zorder=2)
        middle = outcome.median_ttft(source)
        left.plot(middle, row, "o", color=colour, markersize=11, zorder=3)
        faster = "" if source is Source.NO_CACHE else f"  ({outcome.median_speedup(source):.0f}× sooner)"
        _label(left, f"{duration(middle)}{faster}", (max(times), row), (12, 0), va="center")
    left.set_xscale("log")
    low, high = _limits([run.ttft_s for run in outcome.runs])
    left.set_xlim(low, 1.5 * high)
    _second_ticks(left.xaxis)
    left.set_xlabel("seconds (log scale)")
    left.set_yticks(range(len(sources)), [names[source] for source in sources])
    left.set_ylim(len(sources) - 0.5, -0.5)
    left.set_title(
        f"{count} questions about one document, and their median" if count > 1 else "one question",
        fontsize=10.5,
    )
    left.grid(axis="x", alpha=0.3)

    hits = [source for source in sources if source is not Source.NO_CACHE]
    for row, source in enumerate(hits):
        run = sorted(outcome.of(source), key=lambda run: run.ttft_s)[(len(outcome.of(source)) - 1) // 2]
        load, compute = 1000 * run.load_s, 1000 * run.compute_s
        first = row == 0
        right.barh(
            row, load, 0.55, color=_LOAD, label=f"load {run.reused_tokens:,} tokens" if first else None
        )
        right.barh(row, compute, 0.55, load, color=_CACHED, label="compute the rest" if first else None)
        _label(right, f"{load:.0f} + {compute:.0f} ms", (load + compute, row), (5, 0), va="center")
    right.set_yticks(range(len(hits)), [names[source] for source in hits])
    right.set_ylim(len(hits) - 0.5, -1.15)
    right.set_xlim(0, 1.42 * max(outcome.median_ttft(source) for source in hits) * 1000)
    right.set_axisbelow(True)
    right.set_xlabel("milliseconds")
    right.set_title("where the time of a hit goes (median run)", fontsize=10.5)
    right.legend(loc="upper center", ncols=2, fontsize=9, frameon=False)
    right.grid(axis="x", alpha=0.3)
    _bare(left, right)


def _draw_conversation(outcome: Outcome, figure: Any) -> None:
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1.6, 1))
    turns = list(range(1, len(outcome.questions) + 1))
    figure.suptitle(
        "A conversation about a document: each prompt holds all that was said before", fontsize=13
    )
    for source, colour, marker, label, offset in (
        (Source.NO_CACHE, _NO_CACHE, "s", "without cache", (0, 8)),
        (Source.CACHE, _CACHED, "o", "with cache", (0, -16)),
    ):
        times = [run.ttft_s for run in outcome.of(source)]
        top.plot(turns, times, marker=marker, color=colour, label=label, linewidth=2)
        if len(turns) <= _MOST_LABELS:
            for turn, value in zip(turns, times, strict=True):
                beside = turn == 1 and source is Source.CACHE  # where both lines begin
                at, align = ((-10, -10), "right") if beside else (offset, "center")
                _label(top, duration(value), (turn, value), at, ha=align, color=colour, size=8.5)
    top.set_yscale("log")
    top.set_ylim(*_limits([run.ttft_s for run in outcome.runs]))
    _second_ticks(top.yaxis)
    top.set_ylabel("time to first token,\nseconds (log scale)")
    top.legend(loc="center right", fontsize=9.5)
    top.grid(alpha=0.3)

    cached = outcome.of(Source.CACHE)
    reused = [run.reused_tokens for run in cached]
    computed = [run.prompt_tokens - run.reused_tokens for run in cached]
    bottom.bar(turns, reused, 0.6, color=_LOAD, label="loaded")
    bottom.bar(turns, computed, 0.6, reused, color=_CACHED, label="computed")
    bottom.set_ylabel("prompt tokens,\nwith cache")
    bottom.set_xlabel("turn")
    if len(turns) <= _MOST_LABELS:
        bottom.set_xticks(turns)
    bottom.margins(y=0.3)
    bottom.set_axisbelow(True)
    bottom.set_title(
        f"only full chunks of {outcome.setup.chunk_tokens} tokens are kept, so what is loaded grows in steps",
        fontsize=10,
    )
    bottom.legend(loc="upper left", ncols=2, fontsize=9.5, frameon=False)
    bottom.grid(axis="y", alpha=0.3)
    _bare(top, bottom)


def _label(
    panel: Any,
    text: str,
    at: tuple[float, float],
    offset: tuple[int, int],
    *,
    size: float = 9.5,
    **style: str,
) -> None:
    panel.annotate(text, at, xytext=offset, textcoords="offset points", fontsize=size, **style)


def _limits(values: list[float]) -> tuple[float, float]:
    return min(values) / _EDGE, max(values) * _EDGE


def _second_ticks(axis: Any) -> None:
    """0.1, 0.2, 0.5, 1, … instead of powers of ten."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(_TICKS))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _bare(*panels: Any) -> None:
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
