"""`kvtiers serve` with its HTTP side, by the commands an operator types."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest

from kvtiers.testing.service_process import ServiceProcess

pytestmark = pytest.mark.slow


@pytest.fixture
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="kvt-") as path:
        yield Path(path)


def url_of(service: ServiceProcess) -> str:
    found = re.search(r"metrics and API on (http://\S+)", service.log)
    assert found, service.log
    return found[1]


@pytest.fixture
def service(folder: Path) -> Iterator[ServiceProcess]:
    one = ServiceProcess(folder, {"observability.metrics_port": 0}, http=True)
    one.start()
    yield one
    one.kill()


def test_the_commands_of_a_runbook_work(service: ServiceProcess) -> None:
    url = url_of(service)
    metrics = httpx.get(f"{url}/metrics").text
    lines = [line for line in metrics.splitlines() if line.startswith("lmcache_storage")]
    for tier in ("cpu", "disk"):
        assert any(line.startswith(f'lmcache_storage_usage_bytes{{tier="{tier}"}}') for line in lines)
    assert "cpu" in httpx.get(f"{url}/api/v1/cache/stats").json()["lru_stats"]
    assert httpx.get(f"{url}/api/v1/async/status").json()["queue_size"] == 0
    evicted = httpx.post(f"{url}/api/v1/cache/evict", json={"tier": "cpu", "target_usage": 0.70})
    assert evicted.status_code == 200
    owned = httpx.post(f"{url}/api/v1/cache/evict", json={"tier": "gpu", "target_usage": 0.70})
    assert owned.status_code == 409
    assert "engines" in owned.json()["detail"]
    ready = httpx.get(f"{url}/readyz").json()
    assert ready["ready"] is True
    assert (ready["backends"]["disk"]["status"], ready["backends"]["disk"]["error"]) == ("up", None)


def test_it_ends_in_order_with_a_connection_open(service: ServiceProcess) -> None:
    with httpx.Client(base_url=url_of(service)) as client:
        assert client.get("/healthz").status_code == 200
        assert service.terminate() == 0


def test_a_port_in_use_is_told_before_any_memory_is_taken(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        service = ServiceProcess(folder, {"observability.metrics_port": port}, http=True)
        service.start(wait=False)
        try:
            assert service._process is not None
            assert service._process.wait(30) == 2
        finally:
            service.kill()
        assert f"observability.metrics_port = {port}" in service.log
        assert "arena of" not in service.log


def test_a_service_without_http_listens_on_no_port(folder: Path) -> None:
    service = ServiceProcess(folder)
    service.start()
    try:
        assert "metrics and API on http" not in service.log
    finally:
        assert service.terminate() == 0
