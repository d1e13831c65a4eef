"""The paths as an operator uses them, against a real server in front of a real cache."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvtiers.http.app import make_app
from kvtiers.http.server import HttpServer, listen
from kvtiers.testing.operated import OperatedCache


def samples(text: str) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(f"{key}={value}" for key, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_have_the_names_that_dashboards_use(http: httpx.Client) -> None:
    answer = http.get("/metrics")
    assert answer.status_code == 200
    found = samples(answer.text)
    assert found["lmcache_storage_usage_bytes", "tier=cpu"] > 0
    assert 0 < found["lmcache_storage_usage_percent", "tier=cpu"] <= 100
    assert (
        found["lmcache_cache_hits_total", "tier=cpu"] == found["lmcache_cache_lookups_total", "tier=cpu"] == 6
    )
    assert found["lmcache_async_queue_size",] == 0
    assert found["lmcache_backend_up", "backend=disk"] == 1
    assert found["lmcache_cache_misses_total", "reason=partial_chunk"] == 1
    for edge in ("0.01", "0.1", "+Inf"):
        key = ("lmcache_storage_latency_bucket", "backend=disk", f"le={edge}", "operation=write")
        assert key in found, sorted(one for one in found if one[0].startswith("lmcache_storage_latency"))


def test_statistics_of_each_tier_stand_under_lru_stats(http: httpx.Client) -> None:
    stats = http.get("/api/v1/cache/stats").json()["lru_stats"]
    assert stats["cpu"]["entries"] == stats["disk"]["entries"] == 6
    assert http.get("/api/v1/async/status").json()["queue_size"] == 0


def test_evict_frees_a_tier_down_to_the_share_asked_for(http: httpx.Client, operated: OperatedCache) -> None:
    answer = http.post("/api/v1/cache/evict", json={"tier": "cpu", "target_usage": 0.0})
    assert answer.status_code == 200
    assert answer.json()["evicted_chunks"] == 6
    assert operated.stats()["tiers"]["cpu"]["entries"] == 0
    assert operated.stats()["tiers"]["disk"]["entries"] == 6


@pytest.mark.parametrize(
    ("body", "allowed"),
    [
        ({"tier": "ram", "target_usage": 0.5}, "'gpu', 'cpu', 'disk' or 'remote'"),
        ({"tier": "cpu", "target_usage": 70}, "less than or equal to 1"),
        ({"tier": "cpu", "target_usage": -1}, "greater than or equal to 0"),
        ({"tier": "cpu", "target_usage": "a lot"}, "valid number"),
        ({"tier": "cpu", "target": 0.5}, "Extra inputs are not permitted"),
        ({}, "Field required"),
        ({"tier": "cpu"}, "target_usage"),
        ([], "valid dictionary"),
    ],
)
def test_a_bad_request_is_told_what_is_allowed(http: httpx.Client, body: object, allowed: str) -> None:
    answer = http.post("/api/v1/cache/evict", json=body)
    assert answer.status_code == 422
    assert allowed in answer.text


@pytest.mark.parametrize(
    "body",
    [
        '{"tier": "cpu", "target_usage": NaN}',
        '{"tier": "cpu", "target_usage": 1e999}',
        r'{"tier": "\ud800", "target_usage": 0}',
        r'{"tier": "cpu", "\ud800": 0}',
    ],
)
def test_what_an_answer_could_not_repeat_is_a_bad_request_too(http: httpx.Client, body: str) -> None:
    answer = http.post("/api/v1/cache/evict", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["msg"]


def test_the_memory_map_is_in_order_and_made_once_at_a_time(
    http: httpx.Client, operated: OperatedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtiers.http.app._SLOTS_AT_ONCE", 4)  # six slots: two pieces
    monkeypatch.setattr("kvtiers.runtime.memory_map._SLOTS_AT_ONCE", 4)
    found = http.get("/api/v1/memory").json()
    offsets = [slot["offset"] for slot in found["slots"]]
    assert len(offsets) == 6
    assert offsets == sorted(offsets)
    assert found["format"] == 1

    memory, second = operated.memory, []

    def slow() -> object:
        second.append(httpx.get(f"{http.base_url}/api/v1/memory", timeout=10.0))
        return memory()

    monkeypatch.setattr(operated, "memory", slow)
    assert http.get("/api/v1/memory").status_code == 200
    assert [answer.status_code for answer in second] == [429]


def test_the_engines_gpu_tier_and_a_disabled_one_are_conflicts(http: httpx.Client) -> None:
    for tier, reason in (("gpu", "engine"), ("remote", "disabled")):
        answer = http.post("/api/v1/cache/evict", json={"tier": tier, "target_usage": 0.5})
        assert answer.status_code == 409, answer.text
        assert reason in answer.json()["detail"]


def test_probes_tell_process_service_and_backends_apart(http: httpx.Client, operated: OperatedCache) -> None:
    assert http.get("/healthz").status_code == 200
    ready = http.get("/readyz").json()
    assert ready["ready"] is True
    assert ready["backends"]["disk"].pop("checked_s_ago") >= 0
    assert ready["backends"] == {"disk": {"status": "up", "error": None}}
    assert http.get("/probe").text == 'lmcache_backend_up{backend="disk"} 1\n'
    operated.is_serving = False
    assert http.get("/healthz").status_code == 200
    assert http.get("/readyz").status_code == http.get("/probe").status_code == 503


def test_a_closed_cache_answers_503(http: httpx.Client, operated: OperatedCache, tmp_path: object) -> None:
    operated.cache.close()
    answer = http.post("/api/v1/cache/evict", json={"tier": "cpu", "target_usage": 0.5})
    assert answer.status_code == 503
    assert "closed" in answer.json()["detail"]


def test_only_the_loopbacks_names_are_served_without_a_token(http: httpx.Client) -> None:
    assert http.get("/metrics", headers={"Host": "rebound.example:8000"}).status_code == 403
    assert http.get("/metrics", headers={"Host": "localhost:8000"}).status_code == 200
    assert http.get("/metrics", headers={"Host": "[::1]:8000"}).status_code == 200


def test_a_foreign_pages_form_can_not_evict(http: httpx.Client) -> None:
    answer = http.post(
        "/api/v1/cache/evict", content='{"tier": "cpu"}', headers={"Content-Type": "text/plain"}
    )
    assert answer.status_code == 415


def test_with_a_token_everything_but_the_probes_wants_it(operated: OperatedCache) -> None:
    app = make_app(operated, token="correct-horse")
    with (
        HttpServer(app, listen("127.0.0.1", 0, has_token=True)) as server,
        httpx.Client(base_url=server.url, timeout=10.0) as client,
    ):
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert (
            client.post("/api/v1/cache/evict", json={"tier": "cpu", "target_usage": 0.5}).status_code == 401
        )
        allowed = {"Authorization": "Bearer correct-horse"}
        assert client.get("/metrics", headers={**allowed, "Host": "node-7.cluster:8000"}).status_code == 200
        assert (
            client.post(
                "/api/v1/cache/evict", json={"tier": "cpu", "target_usage": 0.5}, headers=allowed
            ).status_code
            == 200
        )
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200


def test_a_body_has_a_bound(http: httpx.Client) -> None:
    body = '{"tier": "cpu"' + " " * 100_000 + "}"
    kind = {"Content-Type": "application/json"}
    assert http.post("/api/v1/cache/evict", content=body, headers=kind).status_code == 413
    in_pieces = (piece.encode() for piece in (body, ""))  # no length is told
    assert http.post("/api/v1/cache/evict", content=in_pieces, headers=kind).status_code == 413
