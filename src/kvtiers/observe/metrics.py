"""A cache's `stats()` as Prometheus metrics, under the names of the LMCache-compatible interface.

A collector: nothing is counted twice, and nothing is done between scrapes. Every hit counts for exactly one tier; hits and lookups
have the same labels and the same unit (chunks), so that their ratio is a hit rate. What can be counted by reason shows every reason
from the start, at 0: the first of its kind is an increase too. docs/metrics.md is this table, checked by a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

import kvtiers
from kvtiers.model.reasons import MissReason, Refusal

Stats: TypeAlias = Mapping[str, Any]
Samples: TypeAlias = Iterable[tuple[tuple[str, ...], float]]
"""Values of the labels, and the number."""


class MetricInfo(NamedTuple):
    """One metric: what it is called, what it says, and where in `stats()` it stands."""

    name: str
    """As it is scraped: a counter ends in `_total`."""
    kind: Literal["gauge", "counter"]
    labels: tuple[str, ...]
    unit: str
    meaning: str
    read: Callable[[Stats], Samples]


LATENCY: Final = "lmcache_storage_latency"
LATENCY_LABELS: Final = ("backend", "operation")
LATENCY_MEANING: Final = "Time that an operation of a backend took, retries included, in seconds."


def _of_tiers(field: str) -> Callable[[Stats], Samples]:
    return lambda stats: [
        ((tier,), of[field]) for tier, of in stats["tiers"].items() if of.get(field) is not None
    ]


def _of_stores(field: str, scale: float = 1.0) -> Callable[[Stats], Samples]:
    """What the stores that have it count."""
    return lambda stats: [
        ((tier,), of["store"][field] * scale)
        for tier, of in stats["tiers"].items()
        if field in of.get("store", {})
    ]


def _by_reason(field: str, reasons: Iterable[str]) -> Callable[[Stats], Samples]:
    none = dict.fromkeys(map(str, reasons), 0)
    return lambda stats: [((reason,), count) for reason, count in {**none, **stats[field]}.items()]


def _health(of: Callable[[Stats], float]) -> Callable[[Stats], Samples]:
    return lambda stats: [
        ((tier,), of(values["health"])) for tier, values in stats["tiers"].items() if "health" in values
    ]


def _one(of: Callable[[Stats], float]) -> Callable[[Stats], Samples]:
    return lambda stats: [((), of(stats))]


def _pools(field: str) -> Callable[[Stats], Samples]:
    return lambda stats: [((name,), pool[field]) for name, pool in stats["async"]["pools"].items()]


def _clients(stats: Stats) -> int:
    return len(stats["service"]["clients"]) if "service" in stats else int(stats["sessions"])


def _connections(stats: Stats) -> Samples:
    return [((event,), count) for event, count in stats.get("service", {}).get("connections", {}).items()]


def _deduplicated(stats: Stats) -> float:
    return sum(int(stats["refusals"].get(reason, 0)) for reason in (Refusal.PRESENT, Refusal.IN_FLIGHT))


def _gauge(name: str, labels: tuple[str, ...], unit: str, meaning: str, read: Any) -> MetricInfo:
    return MetricInfo(name, "gauge", labels, unit, meaning, read)


def _counter(name: str, labels: tuple[str, ...], unit: str, meaning: str, read: Any) -> MetricInfo:
    return MetricInfo(name, "counter", labels, unit, meaning, read)


_TIER: Final = ("tier",)
_REASON: Final = ("reason",)

METRICS: Final[tuple[MetricInfo, ...]] = (
    # --- what lies where
    _gauge("lmcache_storage_usage_bytes", _TIER, "bytes", "What a tier holds; on disk with what others put into its directory.", _of_tiers("usage_bytes")),
    _gauge(
        "lmcache_storage_usage_percent", _TIER, "percent, 0 to 100",
        "Share of a tier's capacity in use; `gpu`: of the fullest engine's KV blocks, as the engines report it.",
        _of_tiers("usage_percent"),
    ),
    _gauge("lmcache_storage_capacity_bytes", _TIER, "bytes", "What a tier may hold.", _of_tiers("capacity_bytes")),
    _gauge("lmcache_index_entries", _TIER, "chunks", "Chunks that a tier holds.", _of_tiers("entries")),
    _gauge(
        "lmcache_offloadable_bytes", _TIER, "bytes", "What was not used for `idle_after_s`: it is demoted first.",
        _of_tiers("offloadable_bytes"),
    ),
    _gauge(
        "lmcache_leased_chunks", _TIER, "chunks", "Chunks that a reader or a writer holds: they are not evicted.",
        _of_tiers("leased_chunks"),
    ),
    # --- hits and misses
    _counter(
        "lmcache_requests_total", (), "loads", "Loads answered and used, or answered with nothing.",
        _one(lambda stats: stats["requests"]),
    ),
    _counter(
        "lmcache_cache_lookups_total", _TIER, "chunks", "Chunks for which a tier was consulted, nearest tier first.",
        _of_tiers("lookups"),
    ),
    _counter(
        "lmcache_cache_hits_total", _TIER, "chunks", "Chunks served, each counted for the one tier it came from.",
        _of_tiers("hits"),
    ),
    _counter("lmcache_cache_hit_tokens_total", _TIER, "tokens", "Tokens served from a tier.", _of_tiers("hit_tokens")),
    _counter("lmcache_cache_hit_bytes_total", _TIER, "bytes", "KV served from a tier.", _of_tiers("hit_bytes")),
    _counter(
        "lmcache_cache_unused_total", (), "chunks", "Chunks that lay ready for a load and were not taken: no hits.",
        _one(lambda stats: stats["unused"]),
    ),
    _counter(
        "lmcache_cache_misses_total", _REASON, "loads", "Loads that ended before the last token asked for, and why.",
        _by_reason("misses", MissReason),
    ),
    _counter(
        "lmcache_prefill_seconds_saved_total", (), "seconds",
        "Tokens served to engines ÷ the prefill rate that the engine had reported; nothing is counted before it has.",
        _one(lambda stats: stats.get("service", {}).get("prefill_s_saved", 0.0)),
    ),
    # --- what is stored, moved, evicted
    _counter("lmcache_chunks_stored_total", _TIER, "chunks", "Chunks that came to lie in a tier.", _of_tiers("stored")),
    _counter(
        "lmcache_chunks_deduplicated_total", (), "chunks",
        "Chunks offered and passed over, as a tier has them or another store is bringing them.", _one(_deduplicated),
    ),
    _counter(
        "lmcache_uploads_spared_total", _TIER, "chunks", "Chunks that were not uploaded, as another instance had done so.",
        _of_tiers("present"),
    ),
    _counter(
        "lmcache_store_refusals_total", _REASON, "chunks", "Chunks offered and not taken, and why.",
        _by_reason("refusals", Refusal),
    ),
    _counter("lmcache_chunks_evicted_total", _TIER, "chunks", "Chunks evicted from a tier.", _of_tiers("evicted")),
    _counter(
        "lmcache_chunks_demoted_total", _TIER, "chunks", "Chunks evicted that were brought to the next tier first.",
        _of_tiers("demoted"),
    ),
    _counter(
        "lmcache_chunks_dropped_unwritten_total", _TIER, "chunks", "Chunks evicted that no other tier had: they are lost.",
        _of_tiers("dropped_dirty"),
    ),
    _counter(
        "lmcache_chunks_promoted_total", _TIER, "chunks", "Chunks brought up from a tier to a faster one, by a hit.",
        _of_tiers("promoted"),
    ),
    # --- the backends
    _gauge(
        "lmcache_backend_up", ("backend",), "0 or 1",
        "1 if it works; 0 if its breaker is open or its last check-up failed.", _health(lambda health: health["up"]),
    ),
    _gauge(
        "lmcache_backend_check_age_seconds", ("backend",), "seconds", "Time since a check-up of the backend last ended.",
        _health(lambda health: health["checked_s_ago"]),
    ),
    _counter(
        "lmcache_connection_waits_total", ("backend",), "calls",
        "Waits of calls to a remote store: `connection_pool_size` were under way, or (mooncake) all registered buffers were in use.", _of_stores("connection_waits"),
    ),
    _counter(
        "lmcache_connection_wait_seconds_total", ("backend",), "seconds", "How long they waited in all.",
        _of_stores("connection_wait_us", 1e-6),
    ),
    _counter(
        "lmcache_storage_failures_total", _TIER, "operations", "Reads, writes and deletes of a tier that failed.",
        _of_tiers("failed"),
    ),
    _counter(
        "lmcache_checksum_failures_total", _TIER, "chunks",
        "Chunks with a wrong checksum: each was a miss and was removed.", _of_tiers("corrupt"),
    ),
    # --- background work
    _gauge(
        "lmcache_async_queue_size", (), "tasks", "Background tasks that wait for a thread.",
        _one(lambda stats: stats["async"]["queue_size"]),
    ),
    _gauge(
        "lmcache_async_pending_tasks", (), "tasks", "Background tasks that wait or run.",
        _one(lambda stats: stats["async"]["pending_tasks"]),
    ),
    _counter(
        "lmcache_async_refused_total", ("pool",), "tasks", "Tasks that a pool of threads did not take, as its queue was full.",
        _pools("refused"),
    ),
    _counter(
        "lmcache_writes_deferred_total", _REASON, "writes", "Writes to slower tiers that were put off, and why.",
        _by_reason("deferred_writes", (Refusal.TIER_OPEN, Refusal.QUEUE_FULL, Refusal.NO_SLOT)),
    ),
    _counter(
        "lmcache_writes_abandoned_total", _REASON, "writes", "Writes to slower tiers that were given up, and why.",
        _by_reason("abandoned_writes", (Refusal.NO_SLOT, Refusal.QUEUE_FULL)),
    ),
    # --- the service
    _gauge("lmcache_clients", (), "clients", "Engine processes connected; without a service: caches open.", _one(_clients)),
    _counter(
        "lmcache_connections_total", ("event",), "connections",
        "Connections `accepted` and `refused`; closed for sending nonsense (`garbage`), for silence while holding slots (`expired`), "
        "for not reading answers (`unread`); ended without a goodbye for whatever reason (`lost`).",
        _connections,
    ),
    _gauge("lmcache_build_info", ("version",), "always 1", "Which kvtiers this is.", lambda _: [((kvtiers.__version__,), 1)]),
)  # fmt: skip


class CacheCollector:
    """Register one for each cache: `registry.register(CacheCollector(node.stats))`."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        """One reading, all metrics from the same instant."""
        stats = self._stats()
        for metric in METRICS:
            of_kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = of_kind(metric.name, metric.meaning, labels=metric.labels)
            for labels, value in metric.read(stats):
                family.add_metric(labels, float(value))
            yield family
        yield _latency(stats["latency"])


def _latency(latencies: Mapping[str, Mapping[str, Stats]]) -> Metric:
    family = HistogramMetricFamily(LATENCY, LATENCY_MEANING, labels=LATENCY_LABELS)
    for backend, operations in latencies.items():
        for operation, one in operations.items():
            buckets = [(str(edge), float(count)) for edge, count in one["buckets"]]
            family.add_metric([backend, operation], [*buckets, ("+Inf", float(one["count"]))], one["sum_s"])
    return family


def registry_of(*stats: Callable[[], Stats]) -> CollectorRegistry:
    """A registry with nothing in it but these caches: no metric of the process' default registry is mixed in."""
    registry = CollectorRegistry(auto_describe=False)
    for one in stats:
        registry.register(CacheCollector(one))
    return registry
