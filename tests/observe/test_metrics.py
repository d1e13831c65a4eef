"""The metrics are what docs/metrics.md says, all of them, whatever has happened so far."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import Metric

from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.observe.metrics import LATENCY, LATENCY_LABELS, LATENCY_MEANING, METRICS, CacheCollector
from kvtiers.runtime.cache import TieredCache
from kvtiers.testing.cache_oracle import SMALL_LAYOUT, CacheOracle
from kvtiers.testing.chaos import namespace, small_config

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
TOKENS = list(range(100))
ROW = re.compile(r"^\| `(lmcache_\w+)` \| (\w+) \| (.*?) \| (.*?) \| (.*?) \|$", re.MULTILINE)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[TieredCache]:
    with TieredCache(small_config(tmp_path / "cache"), SMALL_LAYOUT, namespace()) as one:
        yield one


def collected(cache: TieredCache) -> dict[str, Metric]:
    """As they are scraped, by name."""
    found = {}
    for family in CacheCollector(cache.stats).collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert name not in found
        found[name] = family
    return found


def test_the_page_has_every_metric_as_it_is() -> None:
    said = {name: rest for name, *rest in ROW.findall(PAGE.read_text())}
    known = {
        one.name: [one.kind, ", ".join(f"`{label}`" for label in one.labels), one.unit, one.meaning]
        for one in METRICS
    }
    labels = ", ".join(f"`{label}`" for label in LATENCY_LABELS)
    known[LATENCY] = ["histogram", labels, "seconds", LATENCY_MEANING]
    assert said == known


def test_the_page_explains_every_reason() -> None:
    said = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE))
    assert {*MissReason, *Refusal} <= said.keys()


def test_what_is_collected_is_what_is_described(cache: TieredCache) -> None:
    found = collected(cache)
    assert found.keys() == {LATENCY} | {one.name for one in METRICS}
    for one in METRICS:
        family = found[one.name]
        assert (family.type, family.documentation) == (one.kind, one.meaning)
        assert {tuple(sample.labels) for sample in family.samples} <= {one.labels}
    histogram = found[LATENCY]
    assert {tuple(label for label in sample.labels if label != "le") for sample in histogram.samples} == {
        LATENCY_LABELS
    }


def test_every_reason_is_there_before_it_has_ever_applied(cache: TieredCache) -> None:
    found = collected(cache)
    for name, reasons in (
        ("lmcache_cache_misses_total", MissReason),
        ("lmcache_store_refusals_total", Refusal),
    ):
        values = {sample.labels["reason"]: sample.value for sample in found[name].samples}
        assert values == dict.fromkeys(reasons, 0.0)
    operations = {
        (sample.labels["backend"], sample.labels["operation"]): sample.value
        for sample in found[LATENCY].samples
        if sample.name.endswith("_count")
    }
    assert operations["disk", "write"] == operations["disk", "stage"] == operations["cpu", "stage"] == 0


def test_counters_only_grow_and_all_values_are_numbers(cache: TieredCache) -> None:
    oracle = CacheOracle(namespace())
    before = collected(cache)
    cache.store(TOKENS, oracle.kv(TOKENS))
    cache.flush()
    cache.load(TOKENS).result(10)
    cache.evict("cpu")
    cache.load(TOKENS).result(10)
    after = collected(cache)
    for name, family in after.items():
        old = {(one.name, *one.labels.items()): one.value for one in before[name].samples}
        for sample in family.samples:
            assert math.isfinite(sample.value)
            if family.type in {"counter", "histogram"}:
                assert sample.value >= old.get((sample.name, *sample.labels.items()), 0.0), sample
    hits = {sample.labels["tier"]: sample.value for sample in after["lmcache_cache_hit_tokens_total"].samples}
    assert hits == {"cpu": 96, "disk": 96}


def test_the_page_names_no_metric_that_is_not_there() -> None:
    named = set(re.findall(r"lmcache_\w+", PAGE.read_text()))
    assert named <= {one.name for one in METRICS} | {LATENCY, f"{LATENCY}_bucket"}


def test_a_remote_tier_has_no_capacity_and_counts_what_it_was_spared(tmp_path: Path) -> None:
    remote = {
        "remote.enabled": True,
        "remote.backend": "kvtiers.testing.memory_values:memory_store",
        "remote.endpoint": str(tmp_path),
    }
    oracle, found = CacheOracle(namespace()), dict[str, Metric]()
    for _ in range(2):
        with TieredCache(small_config(None, remote), SMALL_LAYOUT, namespace()) as one:
            one.store(TOKENS, oracle.kv(TOKENS))
            one.flush()
            found = collected(one)
    spared = {sample.labels["tier"]: sample.value for sample in found["lmcache_uploads_spared_total"].samples}
    assert spared["remote"] == 6
    capacities = {sample.labels["tier"] for sample in found["lmcache_storage_capacity_bytes"].samples}
    assert "remote" not in capacities
    up = {sample.labels["backend"]: sample.value for sample in found["lmcache_backend_up"].samples}
    assert up == {"remote": 1.0}
