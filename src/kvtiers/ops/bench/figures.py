"""What was measured, as plain values: series, ratios to what they are compared with, targets and verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from kvtiers.ops.bench.measure import Spread, spread

GB_PER_S: Final = "GB/s"
MS: Final = "ms"
US: Final = "µs"
S: Final = "s"


class Verdict(StrEnum):
    """What a run says about a target."""

    MET = "met"
    """The median reaches it."""
    MISSED = "missed"
    """The whole 5–95 % interval falls short of it."""
    NOT_DECIDED = "not decided"
    """The median falls short, the interval reaches it."""


@dataclass(frozen=True, slots=True)
class Target:
    """A bound from below or from above."""

    bound: float
    at_least: bool = True

    def verdict(self, found: Spread) -> Verdict:
        """See `Verdict`."""
        if self._reached(found.median):
            return Verdict.MET
        best = found.high if self.at_least else found.low
        return Verdict.NOT_DECIDED if self._reached(best) else Verdict.MISSED

    def text(self, unit: str = "") -> str:
        """`≥ 0.9` or `≤ 0.6 ms`."""
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}{f' {unit}' if unit else ''}"

    def _reached(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


def at_least(bound: float) -> Target:
    """The more the better."""
    return Target(bound)


def at_most(bound: float) -> Target:
    """The less the better."""
    return Target(bound, at_least=False)


@dataclass(frozen=True, slots=True)
class Series:
    """One contestant's values, one for each round (or each call, for latencies)."""

    name: str
    unit: str
    values: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        """Median and 5–95 % interval."""
        return spread(self.values)

    @property
    def more_is_better(self) -> bool:
        """Rates are, times are not."""
        return self.unit == GB_PER_S


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ours against another series of the same rounds."""

    to: Series
    ratios: tuple[float, ...]
    """Ours by theirs, round by round."""
    target: Target | None = None

    @property
    def spread(self) -> Spread:
        """Of the rounds' ratios."""
        return spread(self.ratios)

    @property
    def verdict(self) -> Verdict | None:
        """None without a target."""
        return None if self.target is None else self.target.verdict(self.spread)


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing measured."""

    subject: str
    """`cpu`, `disk`, `latency`, `lookup`, `restart`, `overhead`, `remote`."""
    name: str
    ours: Series
    shape: str = ""
    target: Target | None = None
    """On the value itself."""
    comparisons: tuple[Comparison, ...] = ()
    others: tuple[Series, ...] = ()
    """What else took part, for the record."""
    notes: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict | None:
        """Of the value itself; None without a target."""
        return None if self.target is None else self.target.verdict(self.ours.spread)

    def verdicts(self) -> list[Verdict]:
        """All there are."""
        found = [self.verdict, *(comparison.verdict for comparison in self.comparisons)]
        return [one for one in found if one is not None]


def rates(name: str, seconds: Sequence[float], nbytes: int) -> Series:
    """GB/s (10^9) of rounds that moved `nbytes` each."""
    return Series(name, GB_PER_S, tuple(nbytes / one / 1e9 for one in seconds))


def times(name: str, seconds: Sequence[float], unit: str = MS, *, per: int = 1) -> Series:
    """Milliseconds, µs or s; divided by `per` (a chunk, say)."""
    factor = {S: 1.0, MS: 1e3, US: 1e6}[unit]
    return Series(name, unit, tuple(one * factor / per for one in seconds))


def compare(ours: Series, to: Series, target: Target | None = None) -> Comparison:
    """Round by round; both took part in the same rounds."""
    return Comparison(to, tuple(a / b for a, b in zip(ours.values, to.values, strict=True)), target)


def best(series: Iterable[Series]) -> Series:
    """The one with the best median."""
    candidates = list(series)
    pick = max if candidates[0].more_is_better else min
    return pick(candidates, key=lambda one: one.spread.median)


def as_json(figure: Figure) -> dict[str, Any]:
    """Plain values, every round included."""
    return {
        "subject": figure.subject,
        "name": figure.name,
        "shape": figure.shape,
        "ours": _series(figure.ours),
        "target": _target(figure.target),
        "verdict": figure.verdict,
        "comparisons": [
            {
                "to": _series(one.to),
                "ratio": _spread(one.spread),
                "ratios": list(one.ratios),
                "target": _target(one.target),
                "verdict": one.verdict,
            }
            for one in figure.comparisons
        ],
        "others": [_series(one) for one in figure.others],
        "notes": list(figure.notes),
        "extra": figure.extra,
    }


def _series(series: Series) -> dict[str, Any]:
    return {"name": series.name, "unit": series.unit, **_spread(series.spread), "values": list(series.values)}


def _spread(found: Spread) -> dict[str, float]:
    return {"median": found.median, "p5": found.low, "p95": found.high}


def _target(target: Target | None) -> dict[str, Any] | None:
    return (
        None
        if target is None
        else {"bound": target.bound, "kind": "at least" if target.at_least else "at most"}
    )
