"""`kvtiers serve` in a process of its own, small enough to be started and killed many times."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kvtiers.node.client import NodeClient
from kvtiers.testing.cache_oracle import SMALL_CHUNK
from kvtiers.testing.chaos import wait_until

PATIENCE_S: Final = 30.0
START_WITHIN_S: Final = 120.0
"""On a busy machine Python's imports alone took 20 s."""
_READY: Final = "kvtiers serves at"


class ServiceProcess:
    """A service on a disk and a socket below `folder` (a short path: sockets have at most 107 bytes)."""

    def __init__(self, folder: Path, values: Mapping[str, Any] | None = None, *, http: bool = False) -> None:
        """1 MiB of arena (64 chunks of the small layout, room to stage 21), 64 MiB of disk. `values`: settings by dotted key."""
        self.socket = folder / "run" / "node.sock"
        self.disk = folder / "disk"
        self._config = folder / "config.yaml"
        self._log = folder / "service.log"
        self._config.write_text(json.dumps(_tree(self.disk, values or {})))  # JSON is YAML
        self._process: subprocess.Popen[bytes] | None = None
        self._ready_before = 0
        self._http = http

    def start(self, *options: str, wait: bool = True) -> None:
        """`options` of `kvtiers serve`; with `wait`, until it serves."""
        self._ready_before = self.log.count(_READY)
        command = [sys.executable, "-c", "from kvtiers.cli.app import main; main()", "serve"]
        command += ["--config", str(self._config), "--socket", str(self.socket), *options]
        command += [] if self._http else ["--no-http"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)  # noqa: S603 - our own
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until it serves. AssertionError with its log if it ended, or does not in time."""
        ready = wait_until(lambda: self.ready or self.exit_code is not None, START_WITHIN_S)
        assert ready, self.log
        assert self.exit_code is None, self.log

    @property
    def ready(self) -> bool:
        """Whether it has said that it serves."""
        return self.log.count(_READY) > self._ready_before

    @property
    def log(self) -> str:
        """What it wrote, over all its starts."""
        return self._log.read_text() if self._log.exists() else ""

    @property
    def pid(self) -> int:
        """Of the last one started."""
        assert self._process is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def send_signal(self, number: signal.Signals) -> None:
        """To the process that was started here, if it still runs."""
        assert self._process is not None
        self._process.send_signal(number)

    def stats(self, timeout: float = PATIENCE_S) -> dict[str, Any]:
        """What it tells of itself over its socket. AssertionError if it does not answer in time."""
        client = NodeClient(self.socket, name="test")
        try:
            assert wait_until(lambda: client.step() >= 0 and client.connected, timeout), "it does not answer"
            answer = client.stats()
            assert wait_until(lambda: client.step() >= 0 and answer.done, timeout), "it does not answer"
        finally:
            client.close()
        assert answer.value is not None, "it ended before it answered"
        found: dict[str, Any] = json.loads(answer.value)
        return found

    def pause(self) -> None:
        """SIGSTOP, and wait until every thread has stopped. `send_signal(SIGCONT)` lets it go on."""
        self.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.pid}/task")
        assert wait_until(
            lambda: all(_state(task) == "T" for task in tasks.iterdir()), PATIENCE_S, every=0.001
        )

    def terminate(self, timeout: float = PATIENCE_S) -> int:
        """SIGTERM; its exit code. subprocess.TimeoutExpired if it does not end in time."""
        self.send_signal(signal.SIGTERM)
        assert self._process is not None
        return self._process.wait(timeout)

    def kill(self) -> None:
        """SIGKILL, and wait. Nothing if it has ended or never began."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(PATIENCE_S)


def _state(task: Path) -> str:
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


def _tree(disk: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "storage": {
            "chunk_tokens": SMALL_CHUNK,
            "cpu": {
                "buffer_size": "1Mi",
                "eviction_threshold": 0.75,
                "huge_pages": "off",
                "numa_aware": False,
            },
            "disk": {"enabled": True, "path": str(disk), "max_size": "64Mi", "min_free_space": 0},
        },
        "async": {"close_timeout_s": 10},
    }
    for key, value in values.items():
        *above, last = key.split(".")
        below = tree
        for step in above:
            below = below.setdefault(step, {})
        below[last] = value
    return tree
