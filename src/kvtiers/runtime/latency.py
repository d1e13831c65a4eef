"""Latency histograms: counts in fixed buckets, cheap enough for every operation, good enough for a p99 within a bucket.

Edges in seconds, 100 µs to 100 s, with 10 ms and 100 ms among them: the two thresholds that operators alert on.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from typing import Any, Final

EDGES_S: Final[tuple[float, ...]] = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 100.0,
)  # fmt: skip


class Histogram:
    """Durations in seconds. Thread-safe."""

    __slots__ = ("_counts", "_lock", "_sum")

    def __init__(self) -> None:
        self._counts = [0] * (len(EDGES_S) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        with self._lock:
            self._counts[bisect_left(EDGES_S, seconds)] += 1
            self._sum += seconds

    def snapshot(self) -> dict[str, Any]:
        """`count`, `sum_s`, `p50_s`, `p99_s` (upper edge of the bucket; None without data) and `buckets` [edge, cumulative]."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        count = sum(counts)
        cumulative, buckets = 0, []
        for edge, bucket in zip(EDGES_S, counts, strict=False):
            cumulative += bucket
            buckets.append([edge, cumulative])
        return {
            "count": count,
            "sum_s": total,
            "p50_s": _quantile(counts, count, 0.50),
            "p99_s": _quantile(counts, count, 0.99),
            "buckets": buckets,
        }


def _quantile(counts: list[int], count: int, share: float) -> float | None:
    if not count:
        return None
    wanted, seen = share * count, 0
    for index, bucket in enumerate(counts):
        seen += bucket
        if seen >= wanted:
            return EDGES_S[min(index, len(EDGES_S) - 1)]
    return EDGES_S[-1]


class Latencies:
    """One histogram for each (backend, operation), made when it is expected or first used."""

    def __init__(self) -> None:
        self._histograms: dict[tuple[str, str], Histogram] = {}
        self._lock = threading.Lock()

    def expect(self, backend: str, *operations: str) -> None:
        """Show these from the start, empty: of what appears with its first count no rate can be told."""
        with self._lock:
            for operation in operations:
                self._histograms.setdefault((backend, operation), Histogram())

    def observe(self, backend: str, operation: str, seconds: float) -> None:
        """Count one operation of a backend ("gpu", "cpu", "disk", …)."""
        histogram = self._histograms.get((backend, operation))
        if histogram is None:
            with self._lock:
                histogram = self._histograms.setdefault((backend, operation), Histogram())
        histogram.observe(seconds)

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """`backend` → `operation` → histogram."""
        result: dict[str, dict[str, Any]] = {}
        for (backend, operation), histogram in sorted(self._histograms.items()):
            result.setdefault(backend, {})[operation] = histogram.snapshot()
        return result
