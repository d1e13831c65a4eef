"""How a figure is taken: contestants in turns, round by round, so that a slow minute of the machine is everyone's.

A contestant does one round's work and returns what it took. The order is turned round in every other round: whoever comes first
finds other caches and clocks than whoever comes last. A warm-up round is thrown away.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

Contestant: TypeAlias = Callable[[], float]
"""One round's work; returns seconds. What it prepares or cleans up is not in them."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and the 5 and 95 % quantiles of the rounds."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value; quantiles are interpolated."""
    low, median, high = np.quantile(np.asarray(values, np.float64), (0.05, 0.5, 0.95))
    return Spread(float(median), float(low), float(high))


def interleave(
    contestants: Mapping[str, Contestant],
    rounds: int,
    *,
    warmups: int = 1,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Each contestant's seconds, one for each round. `advance` is called after every turn, warm-ups included."""
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(-warmups, rounds):
        order = list(contestants.items())
        for name, contestant in order if number % 2 == 0 else reversed(order):
            with _no_collection():
                seconds = contestant()
            if number >= 0:
                taken[name].append(seconds)
            advance()
    return taken


def repeated(contestant: Contestant, times: int) -> Contestant:
    """Several in one turn, and their mean: for work of a few milliseconds."""
    return lambda: sum(contestant() for _ in range(times)) / times


def seconds_of(work: Callable[[], object]) -> float:
    """What one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@contextmanager
def _no_collection() -> Iterator[None]:
    """The benchmark's own garbage is not the contestant's."""
    gc.collect(0)
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
