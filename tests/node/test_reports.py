"""What engines report reaches the operator: how full their GPUs are, and how much prefill hits have saved."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest

from kvtiers.node.protocol import Report
from kvtiers.node.reports import LocalHits, Savings, gpu_tier
from kvtiers.observe.metrics import registry_of
from kvtiers.testing.cache_oracle import SMALL_CHUNK
from kvtiers.testing.chaos import wait_until

if TYPE_CHECKING:
    from tests.node.conftest import LocalNode, MakeEngine

    from kvtiers.testing.direct_engine import DirectEngine


def value(local: LocalNode, name: str, **labels: str) -> float | None:
    return registry_of(local.server.stats).get_sample_value(name, labels)


def report(engine: DirectEngine, **values: Any) -> None:
    told: dict[str, Any] = {"gpu_usage": 0.0, "prefill_tokens_per_s": 0.0, **values}
    engine.client.report(**told)
    engine.client.step()


def test_the_gpu_tier_is_as_full_as_the_fullest_engine(local: LocalNode, make_engine: MakeEngine) -> None:
    name = "lmcache_storage_usage_percent"
    first, second = make_engine(local.socket).connect(), make_engine(local.socket).connect()
    assert value(local, name, tier="gpu") is None, "nobody has told"
    report(first, gpu_usage=0.5)
    assert wait_until(lambda: value(local, name, tier="gpu") == 50)
    report(second, gpu_usage=0.875)
    assert wait_until(lambda: value(local, name, tier="gpu") == 87.5)
    report(first, gpu_usage=0.25)
    second.client.close()
    assert wait_until(lambda: value(local, name, tier="gpu") == 25), "who has gone fills nothing"
    assert value(local, "lmcache_storage_usage_bytes", tier="gpu") is None, "bytes are not known"
    first.client.close()
    assert wait_until(lambda: value(local, name, tier="gpu") is None)


def test_hits_of_engines_own_prefix_caches_are_hits_of_the_gpu_tier(
    local: LocalNode, make_engine: MakeEngine
) -> None:
    one, two = make_engine(local.socket).connect(), make_engine(local.socket).connect()
    assert value(local, "lmcache_cache_hits_total", tier="gpu") is None
    report(one, local_lookups=8, local_hits=5, local_hit_tokens=80)
    report(two, local_lookups=4, local_hits=0)
    one.client.close()
    assert wait_until(lambda: value(local, "lmcache_cache_lookups_total", tier="gpu") == 12)
    assert value(local, "lmcache_cache_hits_total", tier="gpu") == 5
    assert value(local, "lmcache_cache_hit_tokens_total", tier="gpu") == 80


def test_a_hit_saves_the_prefill_of_its_tokens_at_the_reported_rate(
    local: LocalNode, make_engine: MakeEngine
) -> None:
    name = "lmcache_prefill_seconds_saved_total"
    engine, other = make_engine(local.socket).connect(), make_engine(local.socket).connect()
    prompt = engine.tokens(1, 8)
    engine.store(prompt)
    engine.load(prompt)
    assert value(local, name) == 0, "no rate is known yet"
    report(engine, prefill_tokens_per_s=64.0)
    engine.load(engine.tokens(1, 10))
    assert wait_until(lambda: value(local, name) == 8 * SMALL_CHUNK / 64)
    engine.load(engine.tokens(2, 3))
    assert value(local, name) == 8 * SMALL_CHUNK / 64, "a miss saves nothing"
    report(other, prefill_tokens_per_s=16.0)
    other.load(prompt[: 4 * SMALL_CHUNK])
    assert wait_until(lambda: value(local, name) == 8 * SMALL_CHUNK / 64 + 4 * SMALL_CHUNK / 16)
    engine.client.close()
    other.client.close()
    assert wait_until(lambda: value(local, "lmcache_clients") == 0)
    assert value(local, name) == 8 * SMALL_CHUNK / 64 + 4 * SMALL_CHUNK / 16, "a counter never falls"


@pytest.mark.parametrize(
    ("used", "taken"), [(range(0), 0), (range(2, 5), 3), (range(6, 99), 2), (None, 8)], ids=str
)
def test_what_was_staged_and_not_taken_is_no_hit_and_saves_nothing(
    local: LocalNode, make_engine: MakeEngine, used: range | None, taken: int
) -> None:
    engine = make_engine(local.socket).connect()
    prompt = engine.tokens(1, 8)
    engine.store(prompt)
    report(engine, prefill_tokens_per_s=64.0)
    load = engine.stage(prompt)
    assert load.num_chunks == 8
    assert value(local, "lmcache_cache_hits_total", tier="cpu") == 0, "nobody has taken anything yet"
    engine.client.release(load, used)
    engine.client.step()
    assert wait_until(lambda: value(local, "lmcache_cache_unused_total") == 8 - taken)
    assert wait_until(lambda: value(local, "lmcache_cache_hits_total", tier="cpu") == taken)
    assert value(local, "lmcache_prefill_seconds_saved_total") == taken * SMALL_CHUNK / 64
    assert value(local, "lmcache_cache_hit_tokens_total", tier="cpu") == taken * SMALL_CHUNK
    assert value(local, "lmcache_cache_lookups_total", tier="cpu") == taken
    assert value(local, "lmcache_requests_total") == (1 if taken else 0)
    engine.client.close()


def test_a_chunk_that_a_second_engine_offers_is_deduplicated(
    local: LocalNode, make_engine: MakeEngine
) -> None:
    name = "lmcache_chunks_deduplicated_total"
    first, second = make_engine(local.socket).connect(), make_engine(local.socket).connect()
    prompt = first.tokens(1, 5)
    under_way = first.open_store(prompt)
    assert second.open_store(prompt[: 2 * SMALL_CHUNK]).indices == ()
    assert value(local, name) == 2, "the first is bringing them"
    first.write(under_way, prompt)
    first.client.commit(under_way)
    first.until(lambda: under_way.committed == 5)
    second.store(second.tokens(1, 7))
    assert value(local, name) == 2 + 5
    second.store(second.tokens(2, 3))
    assert value(local, name) == 2 + 5


def test_a_load_is_timed_under_the_slowest_tier_it_needed(local: LocalNode, make_engine: MakeEngine) -> None:
    def staged(backend: str) -> float | None:
        return value(local, "lmcache_storage_latency_count", backend=backend, operation="stage")

    engine = make_engine(local.socket).connect()
    engine.load(engine.tokens(9, 3))
    assert (staged("cpu"), staged("disk")) == (0, 0), "nothing was found"
    for document in range(12):  # more than memory holds
        engine.store(engine.tokens(document, 10))
    local.node.flush(30)
    engine.load(engine.tokens(11, 10))
    assert (staged("cpu"), staged("disk")) == (1, 0)
    engine.load(engine.tokens(0, 10))
    assert (staged("cpu"), staged("disk")) == (1, 1)


def test_what_is_no_number_is_neither_sent_nor_shown(local: LocalNode, make_engine: MakeEngine) -> None:
    engine = make_engine(local.socket).connect()
    engine.client.report(gpu_usage=math.nan, prefill_tokens_per_s=64.0)
    engine.client.report(gpu_usage=0.5, prefill_tokens_per_s=math.inf)
    [client] = engine.stats()["service"]["clients"]
    assert client["gpu_usage"] is client["prefill_tokens_per_s"] is None
    assert engine.client.counters["losses"] == 0
    engine.client._post(Report(0.5, math.inf))  # a client that does not look
    [client] = engine.stats()["service"]["clients"]
    assert (client["gpu_usage"], client["prefill_tokens_per_s"]) == (0.5, None)
    json.dumps(local.server.memory(), allow_nan=False)


@pytest.mark.parametrize("rate", [math.nan, math.inf, 0.0, 1e-300])
def test_a_senseless_rate_saves_nothing(rate: float) -> None:
    savings = Savings()
    savings.add(1000, Report(0.5, rate))
    savings.add(1000, None)
    assert savings.seconds == 0
    savings.add(1000, Report(0.5, 500.0))
    assert savings.seconds == 2


@pytest.mark.parametrize(
    ("usages", "tier"),
    [
        ([], {}),
        ([math.nan], {}),
        ([math.nan, 0.5, 0.25], {"enabled": True, "owner": "engines", "usage_percent": 50.0}),
        ([0.0], {"enabled": True, "owner": "engines", "usage_percent": 0.0}),
    ],
)
def test_the_gpu_tier_of_what_was_reported(usages: list[float], tier: dict[str, Any]) -> None:
    assert gpu_tier(usages, LocalHits()) == tier
