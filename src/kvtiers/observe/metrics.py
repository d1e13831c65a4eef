"""A cache's `stats()` as Prometheus metrics, under the names of the LMCache-compatible interface.

A collector: nothing is counted twice, and nothing is done between scrapes. Every hit counts for exactly one tier; hits and lookups
have the same labels and the same unit (chunks), so that their ratio is a hit rate. Latencies are in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

Stats = Mapping[str, Any]

_TIER_GAUGES: Final = {
    "lmcache_storage_usage_bytes": ("usage_bytes", "Bytes that a tier holds."),
    "lmcache_storage_usage_percent": ("usage_percent", "Share of a tier's capacity in use, 0 to 100."),
    "lmcache_storage_capacity_bytes": ("capacity_bytes", "Bytes that a tier may hold."),
    "lmcache_index_entries": ("entries", "Chunks that a tier holds."),
    "lmcache_offloadable_bytes": (
        "offloadable_bytes",
        "Bytes not used for idle_after_s: they are demoted first.",
    ),
    "lmcache_leased_chunks": ("leased_chunks", "Chunks held by a reader or a writer: not evicted."),
}
_TIER_COUNTERS: Final = {
    "lmcache_cache_hits": ("hits", "Chunks served, each counted for the one tier it came from."),
    "lmcache_cache_lookups": ("lookups", "Chunks for which a tier was consulted, nearest tier first."),
    "lmcache_cache_hit_tokens": ("hit_tokens", "Tokens served from a tier."),
    "lmcache_cache_hit_bytes": ("hit_bytes", "Bytes served from a tier."),
    "lmcache_chunks_stored": ("stored", "Chunks that reached a tier."),
    "lmcache_chunks_evicted": ("evicted", "Chunks evicted from a tier."),
    "lmcache_chunks_demoted": ("demoted", "Chunks written to the next tier because they were evicted."),
    "lmcache_chunks_promoted": ("promoted", "Chunks brought up to a tier by a hit in a slower one."),
    "lmcache_chunks_dropped_unwritten": ("dropped_dirty", "Chunks evicted that no slower tier had."),
    "lmcache_storage_failures": ("failed", "Operations of a tier's store that failed."),
    "lmcache_checksum_failures": (
        "corrupt",
        "Chunks whose checksum was wrong: each was a miss and was removed.",
    ),
}


class CacheCollector:
    """Register one for each cache: `registry.register(CacheCollector(node.stats))`."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        """One reading, all metrics from the same instant."""
        stats = self._stats()
        tiers: Mapping[str, Stats] = stats["tiers"]
        for name, (field, text) in _TIER_GAUGES.items():
            yield _family(GaugeMetricFamily(name, text, labels=["tier"]), tiers, field)
        for name, (field, text) in _TIER_COUNTERS.items():
            yield _family(CounterMetricFamily(name, text, labels=["tier"]), tiers, field)
        yield _by_reason(
            "lmcache_cache_misses", "Why requests stopped short of their prompt's end.", stats["misses"]
        )
        yield _by_reason("lmcache_store_refusals", "Why chunks were not accepted.", stats["refusals"])
        yield GaugeMetricFamily(
            "lmcache_async_queue_size",
            "Background tasks that wait for a thread.",
            value=stats["async"]["queue_size"],
        )
        yield GaugeMetricFamily(
            "lmcache_async_pending_tasks",
            "Background tasks that wait or run.",
            value=stats["async"]["pending_tasks"],
        )
        yield CounterMetricFamily("lmcache_requests", "Requests answered.", value=stats["requests"])
        yield GaugeMetricFamily("lmcache_sessions", "Engines attached.", value=stats["sessions"])
        yield self._up(tiers)
        yield self._latency(stats["latency"])

    def _up(self, tiers: Mapping[str, Stats]) -> Metric:
        family = GaugeMetricFamily(
            "lmcache_backend_up", "1 if the tier's store works, else 0.", labels=["backend"]
        )
        for tier, values in tiers.items():
            if "up" in values:
                family.add_metric([tier], float(values["up"]))
        return family

    def _latency(self, latencies: Mapping[str, Mapping[str, Stats]]) -> Metric:
        family = HistogramMetricFamily(
            "lmcache_storage_latency",
            "Seconds that an operation of a backend took.",
            labels=["backend", "operation"],
        )
        for backend, operations in latencies.items():
            for operation, one in operations.items():
                buckets = [(str(edge), float(count)) for edge, count in one["buckets"]]
                family.add_metric(
                    [backend, operation], [*buckets, ("+Inf", float(one["count"]))], one["sum_s"]
                )
        return family


def registry_of(*stats: Callable[[], Stats]) -> CollectorRegistry:
    """A registry with nothing in it but these caches: no metric of the process' default registry is mixed in."""
    registry = CollectorRegistry(auto_describe=False)
    for one in stats:
        registry.register(CacheCollector(one))
    return registry


def _family(
    family: GaugeMetricFamily | CounterMetricFamily, tiers: Mapping[str, Stats], field: str
) -> GaugeMetricFamily | CounterMetricFamily:
    for tier, values in tiers.items():
        if field in values:
            family.add_metric([tier], float(values[field]))
    return family


def _by_reason(name: str, text: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=["reason"])
    for reason, count in counts.items():
        family.add_metric([reason], float(count))
    return family
