"""Histograms of durations."""

from __future__ import annotations

import threading

from kvtiers.runtime.latency import EDGES_S, Histogram, Latencies


def test_an_empty_histogram_has_no_quantiles() -> None:
    snapshot = Histogram().snapshot()
    assert snapshot["count"] == 0
    assert snapshot["p50_s"] is None
    assert snapshot["p99_s"] is None
    assert [edge for edge, _ in snapshot["buckets"]] == list(EDGES_S)


def test_a_duration_counts_in_the_bucket_whose_edge_it_does_not_exceed() -> None:
    histogram = Histogram()
    for seconds in (0.01, 0.0101, 0.0, 1000.0):
        histogram.observe(seconds)
    buckets = dict(map(tuple, histogram.snapshot()["buckets"]))
    assert buckets[EDGES_S[0]] == 1
    assert buckets[0.005] == 1
    assert buckets[0.01] == 2
    assert buckets[0.025] == 3
    assert buckets[100.0] == 3, "what lies above the last edge counts in no bucket, only in the total"
    assert histogram.snapshot()["count"] == 4
    assert histogram.snapshot()["sum_s"] == 0.01 + 0.0101 + 1000.0


def test_quantiles_are_upper_edges_and_never_too_low() -> None:
    histogram = Histogram()
    for _ in range(98):
        histogram.observe(0.002)
    histogram.observe(0.3)
    histogram.observe(200.0)
    snapshot = histogram.snapshot()
    assert snapshot["p50_s"] == 0.0025
    assert snapshot["p99_s"] == 0.5


def test_the_thresholds_that_operators_alert_on_are_edges() -> None:
    assert 0.01 in EDGES_S
    assert 0.1 in EDGES_S
    assert list(EDGES_S) == sorted(EDGES_S)


def test_no_observation_is_lost_between_threads() -> None:
    latencies = Latencies()

    def observe(backend: str) -> None:
        for _ in range(2000):
            latencies.observe(backend, "read", 0.001)
            latencies.observe("shared", "read", 0.001)

    threads = [threading.Thread(target=observe, args=(f"backend {index}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    snapshot = latencies.snapshot()
    assert snapshot["shared"]["read"]["count"] == 8000
    assert {snapshot[f"backend {index}"]["read"]["count"] for index in range(4)} == {2000}
