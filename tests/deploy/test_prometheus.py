"""The dashboard and the alerts, word for word as they are described, in a real Prometheus that scrapes a live service.

Also what is shipped in deploy/observability: `promtool` finds nothing wrong with it, and each alert fires when it should.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

import httpx
import pytest
import yaml

from kvtiers.model.errors import StoreUnavailable
from kvtiers.testing.chaos import wait_until
from kvtiers.testing.direct_engine import DirectEngine
from kvtiers.testing.faulty_store import Fail
from kvtiers.testing.operated import served_with_faulty_disk
from kvtiers.testing.servers.needs import missing
from kvtiers.testing.servers.process import free_port
from kvtiers.testing.service_process import ServiceProcess

pytestmark = pytest.mark.slow

ROOT: Final = Path(__file__).parents[2]
SHIPPED: Final = ROOT / "deploy" / "observability"
INSTALLER: Final = ROOT / "tools" / "install-system-packages.sh"
PATIENCE_S: Final = 60.0

PANELS: Final = {
    "Storage Tier Usage": 'lmcache_storage_usage_bytes{ tier=~"gpu|cpu|disk" }',
    "Cache Hit Rate by Tier": "rate(lmcache_cache_hits_total[5m]) / rate(lmcache_cache_lookups_total[5m])",
    "Async Queue Size": "lmcache_async_queue_size",
    "Storage Backend Latency": "histogram_quantile(0.99, rate(lmcache_storage_latency_bucket[5m]))",
}
ALERTS: Final = {
    "LMCacheGPUHighUsage": ('lmcache_storage_usage_percent{tier="gpu"} > 85', "5m", "warning"),
    "LMCacheCPUHighUsage": ('lmcache_storage_usage_percent{tier="cpu"} > 90', "5m", "critical"),
    "LMCacheAsyncQueueBacklog": ("lmcache_async_queue_size > 5000", "10m", "warning"),
    "LMCacheStorageBackendDown": ('up{job="lmcache-backend"} == 0', "1m", "critical"),
}


def tool(name: str) -> str:
    """Where it is. Without it the test is skipped, in CI it fails."""
    found = shutil.which(name)
    if found is None:
        missing(f"{name} is not installed: run {INSTALLER.relative_to(ROOT)}")
    return found


class Sample(NamedTuple):
    labels: dict[str, str]
    value: float


class Prometheus:
    """A server that was started here."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=10.0)

    def query(self, expression: str) -> list[Sample]:
        """An instant vector. AssertionError if the expression is not evaluated."""
        answer = self._client.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", answer
        assert answer["data"]["resultType"] == "vector"
        return [Sample(one["metric"], float(one["value"][1])) for one in answer["data"]["result"]]

    def by(self, label: str, expression: str) -> dict[str, float]:
        """The same, by the value of a label that tells the samples apart."""
        samples = self.query(expression)
        found = {one.labels.get(label, ""): one.value for one in samples}
        assert len(found) == len(samples)
        return found

    def rules(self) -> dict[str, dict[str, Any]]:
        (group,) = self._client.get("/api/v1/rules").json()["data"]["groups"]
        return {rule["name"]: rule for rule in group["rules"]}

    def close(self) -> None:
        self._client.close()


class Scraped(NamedTuple):
    """A service and an engine, a cache with a broken disk, and the Prometheus that looks at both."""

    prometheus: Prometheus
    engine: DirectEngine
    working: str
    broken: str
    """The two `instance` labels."""


@pytest.fixture(scope="module")
def scraped() -> Iterator[Scraped]:
    binary = tool("prometheus")
    with (
        TemporaryDirectory(prefix="kvt-") as name,
        served_with_faulty_disk(Path(name) / "broken", health_check_s=0.05) as (server, disk, _),
    ):
        folder = Path(name)
        disk.inject(Fail(StoreUnavailable), times=None)
        service = ServiceProcess(folder, {"observability.metrics_port": 0}, http=True)
        service.start()
        engine = DirectEngine(service.socket).connect()
        process: subprocess.Popen[bytes] | None = None
        prometheus: Prometheus | None = None
        try:
            found = re.search(r"metrics and API on http://(\S+)", service.log)
            assert found, service.log
            working, broken = found[1], server.url.removeprefix("http://")
            config = configured(folder, working, broken)
            process, prometheus = started(binary, folder, config)
            assert wait_until(lambda: prometheus.by("job", 'up{job="lmcache"}') == {"lmcache": 1}, PATIENCE_S)
            work(engine, seconds=4.0)
            yield Scraped(prometheus, engine, working, broken)
        finally:
            if prometheus is not None:
                prometheus.close()
            if process is not None:
                process.terminate()
                process.wait(PATIENCE_S)
            engine.client.close()
            service.kill()


def configured(folder: Path, working: str, broken: str) -> Path:
    """What is shipped, but for where to scrape and how often."""
    config = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    config["rule_files"] = [str(SHIPPED / name) for name in config["rule_files"]]
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert list(jobs) == ["lmcache", "lmcache-backend"]
    jobs["lmcache"]["static_configs"] = [{"targets": [working]}]
    jobs["lmcache-backend"]["static_configs"] = [{"targets": [working, broken]}]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def started(binary: str, folder: Path, config: Path) -> tuple[subprocess.Popen[bytes], Prometheus]:
    address, log = f"127.0.0.1:{free_port()}", folder / "prometheus.log"
    command = [binary, f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={address}"], stdout=stream, stderr=stream
        )
    url = f"http://{address}"
    assert wait_until(partial(is_ready_or_over, url, process), PATIENCE_S)
    assert process.poll() is None, log.read_text()
    return process, Prometheus(url)


def is_ready_or_over(url: str, process: subprocess.Popen[bytes]) -> bool:
    if process.poll() is not None:
        return True
    try:
        return httpx.get(f"{url}/-/ready", timeout=5.0).status_code == 200
    except httpx.TransportError:
        return False


def work(engine: DirectEngine, *, seconds: float) -> None:
    """Prompts that memory can't all hold, each stored once and then loaded again and again."""
    engine.client.report(gpu_usage=0.97, prefill_tokens_per_s=5000.0)
    ends = time.monotonic() + seconds
    turn = 0
    while time.monotonic() < ends:
        prompt = engine.tokens(turn % 12, 10)
        engine.load(prompt)
        engine.store(prompt)
        engine.load(prompt)
        turn += 1
        time.sleep(0.02)
    assert turn > 24


def has_data(prometheus: Prometheus, expression: str) -> bool:
    found = prometheus.query(expression)
    return bool(found) and any(math.isfinite(one.value) for one in found)


@pytest.mark.parametrize("expression", PANELS.values(), ids=PANELS)
def test_a_panel_shows_data(scraped: Scraped, expression: str) -> None:
    assert wait_until(lambda: has_data(scraped.prometheus, expression), PATIENCE_S)


def test_the_panels_show_what_has_happened(scraped: Scraped) -> None:
    prometheus = scraped.prometheus
    usage = prometheus.by("tier", PANELS["Storage Tier Usage"])
    assert usage.keys() == {"cpu", "disk"}, "how many bytes an engine's GPU holds is not known"
    assert 0 < usage["cpu"] <= 1 << 20
    assert usage["disk"] > 12 * 10 * 12_288

    rate = prometheus.by("tier", PANELS["Cache Hit Rate by Tier"])
    assert 0 < rate["cpu"] < 1
    assert 0 < rate["disk"] <= 1

    (queue,) = prometheus.query(PANELS["Async Queue Size"])
    assert queue.value >= 0

    latency = {
        (one.labels["backend"], one.labels["operation"]): one.value
        for one in prometheus.query(PANELS["Storage Backend Latency"])
    }
    assert {("disk", "read"), ("disk", "write"), ("disk", "stage")} <= latency.keys()
    assert all(0 < latency["disk", operation] < 100 for operation in ("read", "write", "stage"))


@pytest.mark.parametrize("expression", [one[0] for one in ALERTS.values()], ids=ALERTS)
def test_what_an_alert_looks_at_is_there(scraped: Scraped, expression: str) -> None:
    scraped.prometheus.query(expression)
    compared = re.fullmatch(r"(.+) (?:>|==) \d+", expression)
    assert compared
    assert has_data(scraped.prometheus, compared[1])


def test_the_gpu_alert_follows_what_the_engine_reports(scraped: Scraped) -> None:
    prometheus, client = scraped.prometheus, scraped.engine.client
    alert, _, _ = ALERTS["LMCacheGPUHighUsage"]
    assert wait_until(lambda: prometheus.by("tier", alert) == {"gpu": 97}, PATIENCE_S)
    client.report(gpu_usage=0.5, prefill_tokens_per_s=5000.0)
    client.step()
    assert wait_until(lambda: prometheus.query(alert) == [], PATIENCE_S)
    client.report(gpu_usage=0.86, prefill_tokens_per_s=5000.0)
    client.step()
    assert wait_until(lambda: prometheus.by("tier", alert) == {"gpu": 86}, PATIENCE_S)


def test_the_backend_alert_is_about_the_one_whose_disk_is_down(scraped: Scraped) -> None:
    prometheus = scraped.prometheus
    alert, _, _ = ALERTS["LMCacheStorageBackendDown"]
    assert wait_until(lambda: prometheus.by("instance", alert) == {scraped.broken: 0}, PATIENCE_S)
    assert prometheus.by("instance", 'up{job="lmcache-backend"}')[scraped.working] == 1
    assert wait_until(
        lambda: prometheus.rules()["LMCacheStorageBackendDown"]["state"] in {"pending", "firing"}, PATIENCE_S
    )


def test_prometheus_has_no_trouble_with_any_rule(scraped: Scraped) -> None:
    prometheus = scraped.prometheus
    assert wait_until(
        lambda: all(rule["health"] == "ok" for rule in prometheus.rules().values()), PATIENCE_S
    ), prometheus.rules()
    assert prometheus.rules().keys() == ALERTS.keys()


def test_every_panel_shipped_shows_data(scraped: Scraped) -> None:
    for title, expression in shipped_panels().items():
        assert wait_until(partial(has_data, scraped.prometheus, expression), PATIENCE_S), title


def test_every_expression_of_the_metrics_page_is_one(scraped: Scraped) -> None:
    _, _, section = (ROOT / "docs" / "metrics.md").read_text().partition("## What to look at\n")
    rows = re.findall(r"^\| [^|]+ \| (`.+`) \|$", section.partition("## What lies where")[0], re.MULTILINE)
    expressions = [expression for row in rows for expression in re.findall(r"`([^`]+)`", row)]
    assert len(expressions) >= len(rows) >= 8
    for expression in expressions:
        scraped.prometheus.query(expression)
        watched = expression.removesuffix(" > 0")
        assert wait_until(partial(has_data, scraped.prometheus, watched), PATIENCE_S), expression


def shipped_panels() -> dict[str, str]:
    dashboard = json.loads((SHIPPED / "dashboard.json").read_text())
    return {panel["title"]: target["expr"] for panel in dashboard["panels"] for target in panel["targets"]}


def shipped_alerts() -> dict[str, tuple[str, str, str]]:
    (group,) = yaml.safe_load((SHIPPED / "alerts.yml").read_text())["groups"]
    assert group["name"] == "lmcache-storage"
    return {rule["alert"]: (rule["expr"], rule["for"], rule["labels"]["severity"]) for rule in group["rules"]}


def test_what_is_shipped_has_the_described_panels_and_alerts() -> None:
    assert shipped_panels().items() >= PANELS.items()
    assert shipped_alerts() == ALERTS


def promtool(*arguments: str) -> str:
    done = subprocess.run(
        [tool("promtool"), *arguments], cwd=SHIPPED, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_finds_nothing_wrong_with_what_is_shipped() -> None:
    assert "4 rules found" in promtool("check", "rules", "alerts.yml")
    assert "1 rule files found" in promtool("check", "config", "prometheus.yml")


def test_every_alert_fires_in_its_unit_test() -> None:
    cases = yaml.safe_load((SHIPPED / "alerts_test.yml").read_text())["tests"]
    fired = {one["alertname"] for case in cases for one in case["alert_rule_test"] if one["exp_alerts"]}
    assert fired == ALERTS.keys()
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml")


def test_an_alert_that_would_not_fire_is_found_out(tmp_path: Path) -> None:
    for name in ("alerts.yml", "alerts_test.yml"):
        shutil.copy(SHIPPED / name, tmp_path / name)
    rules = tmp_path / "alerts.yml"
    rules.write_text(rules.read_text().replace("> 85", "> 99"))
    done = subprocess.run(
        [tool("promtool"), "test", "rules", "alerts_test.yml"], cwd=tmp_path, timeout=60, check=False
    )
    assert done.returncode != 0


def test_a_missing_tool_is_a_skip_outside_ci_and_a_failure_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"tools/install-system-packages\.sh"):
        tool("prometheus")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=r"tools/install-system-packages\.sh"):
        tool("prometheus")
