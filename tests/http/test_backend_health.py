"""A disk that breaks and heals, as its operator sees it: on the probes and among the metrics."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvtiers.http.health import redacted
from kvtiers.model.errors import StoreUnavailable
from kvtiers.stores.guard import Operation
from kvtiers.testing.chaos import wait_until
from kvtiers.testing.faulty_store import Fail, FaultyStore, Stall
from kvtiers.testing.operated import served_with_faulty_disk


class Operator:
    """Who looks at the port."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=10.0)

    def disk(self) -> dict[str, Any]:
        """As `/readyz` tells of it, which answers 200 whatever became of the disk."""
        answer = self.client.get("/readyz")
        assert answer.status_code == 200
        found: dict[str, Any] = answer.json()["backends"]["disk"]
        return found

    def sees(self, status: str) -> bool:
        return bool(self.disk()["status"] == status)

    def gauge(self, name: str) -> float:
        (family,) = (
            one
            for one in text_string_to_metric_families(self.client.get("/metrics").text)
            if one.name == name
        )
        return {sample.labels["backend"]: sample.value for sample in family.samples}["disk"]


@pytest.fixture
def seen(tmp_path: Path) -> Iterator[tuple[Operator, FaultyStore]]:
    """A disk that nobody uses, checked up on 20 times a second."""
    with served_with_faulty_disk(tmp_path / "disk", health_check_s=0.05) as (server, disk, _):
        operator = Operator(server.url)
        yield operator, disk
        operator.client.close()


def test_a_disk_that_breaks_is_shown_with_the_reason_until_it_works_again(
    seen: tuple[Operator, FaultyStore],
) -> None:
    operator, disk = seen
    assert operator.sees("up")
    assert operator.gauge("lmcache_backend_up") == 1
    assert operator.client.get("/probe").status_code == 200

    disk.inject(Fail(StoreUnavailable, "no disk at /mnt/tenant-7/kv: Input/output error"), times=None)
    assert wait_until(lambda: operator.sees("down"))
    error = operator.disk()["error"]
    assert error == "StoreUnavailable: no disk at <hidden>: Input/output error"
    assert operator.gauge("lmcache_backend_up") == 0
    probe = operator.client.get("/probe")
    assert (probe.status_code, probe.text) == (503, 'lmcache_backend_up{backend="disk"} 0\n')

    disk.heal()
    assert wait_until(lambda: operator.sees("up"))
    assert operator.disk()["error"] is None
    assert wait_until(lambda: operator.client.get("/probe").status_code == 200)
    assert operator.gauge("lmcache_backend_up") == 1


def test_a_disk_that_hangs_is_down_though_it_reports_no_error(seen: tuple[Operator, FaultyStore]) -> None:
    operator, disk = seen
    released = threading.Event()
    disk.inject(Stall(released), Operation.PROBE, times=None)
    try:
        assert wait_until(lambda: operator.sees("down"))
        assert operator.disk()["error"] == "no answer to a probe within 0.3 s"
        checked = operator.disk()["checked_s_ago"]
        assert wait_until(lambda: operator.disk()["checked_s_ago"] > checked), "a check is under way"
        assert operator.gauge("lmcache_backend_check_age_seconds") > 0
    finally:
        disk.heal()
        released.set()
    assert wait_until(lambda: operator.sees("up"))


def test_an_idle_disk_is_checked_again_and_again(seen: tuple[Operator, FaultyStore]) -> None:
    operator, _ = seen
    ages = [operator.disk()["checked_s_ago"]]

    def was_checked_meanwhile() -> bool:
        ages.append(operator.disk()["checked_s_ago"])
        return bool(ages[-1] < ages[-2])

    assert wait_until(was_checked_meanwhile), ages


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            "StoreUnavailable: /data/kv is full of '/data/my kv/a.lock'",
            "StoreUnavailable: <hidden> is full of <hidden>",
        ),
        (
            "redis://user:pass@10.2.3.4:6379/0?x=y did not answer",
            "<hidden> did not answer",
        ),
        ("connect to 10.2.3.4:6379: timed out", "connect to <hidden>: timed out"),
        ("[2001:db8::7%eth0]:6379 is gone, [::1] too", "<hidden> is gone, <hidden> too"),
        ("connect to 2001:db8::7: refused", "connect to <hidden>: refused"),
        ("fe80::1%eth0 and ::1 are gone", "<hidden> and <hidden> are gone"),
        ("2001:db8:1:2:3:4:5:6 is gone", "<hidden> is gone"),
        ("kv::Store has failed", "kv::Store has failed"),
        ("cache-7.internal:6379 can't be reached: refused", "<hidden> can't be reached: refused"),
        ("kv:6379: no answer within 5 s", "<hidden>: no answer within 5 s"),
        ("...kv:6379, kv.internal.:6379", "...<hidden>, <hidden>"),
        ("no answer to a read within 5 s", "no answer to a read within 5 s"),
        ("rejected: password=hunter2, retry", "rejected: <hidden> retry"),
        ("read/write error 5/6", "read/write error 5/6"),
        ("one\ntwo   three", "one two three"),
        ("x" * 1000, "x" * 200),
    ],
)
def test_whoever_reaches_the_port_learns_no_path_and_no_credential(error: str, told: str) -> None:
    assert redacted(error) == told
