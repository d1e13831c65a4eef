"""A server of a test's own: a process in a folder of its own, on a free port of the loopback, that ends with the test whatever happens.

It is started and ended from the test's main thread: where `setpriv` is there, the kernel kills it when the thread that started it
is gone, also when the test was ended by a time-out. Every wait is bounded.
"""

from __future__ import annotations

import random
import shutil
import signal
import socket
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from kvtiers.testing.chaos import wait_until

PATIENCE_S: Final = 30.0
_TRIES: Final = 100
LOOPBACK: Final = "127.0.0.1"


def free_port() -> int:
    """One that is this process' until it ends: no other caller is given it, nor does the kernel give it to an outgoing connection.

    A port that a test merely found free may be another's before its server listens, or while that is down.
    """
    lowest, highest = 10_000, _first_ephemeral_port() - 1
    for port in random.sample(range(lowest, highest), _TRIES):
        claim = socket.socket(socket.AF_UNIX)
        try:
            # abstract: of this network namespace, and gone with the process
            claim.bind(f"\0kvtiers-test-port-{port}")
            socket.create_server((LOOPBACK, port)).close()
        except OSError:
            claim.close()
            continue
        claim.detach()  # open until the process ends
        return port
    raise AssertionError(f"none of {_TRIES} ports between {lowest} and {highest} is free")


def _first_ephemeral_port() -> int:
    return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])


class RemoteEngine(ABC):
    """An engine as tests see it, of one process or several: it can be hurt, and emptied."""

    @property
    @abstractmethod
    def address(self) -> tuple[str, int]:
        """Host and port that clients are given."""

    @abstractmethod
    def start(self) -> None:
        """Start, or start again at the same address after `kill` or `stop`, and wait until it serves. Nothing if it runs."""

    @abstractmethod
    def stop(self) -> None:
        """End it in good order (SIGTERM), else by force. Nothing if it does not run."""

    @abstractmethod
    def kill(self) -> None:
        """SIGKILL, and wait. Nothing if it does not run."""

    @abstractmethod
    def pause(self) -> None:
        """SIGSTOP, and wait until every thread has stopped: connections stay open, and nobody answers."""

    @abstractmethod
    def resume(self) -> None:
        """SIGCONT after `pause`. Nothing if it does not run."""

    @abstractmethod
    def clear(self) -> None:
        """Forget every value."""


class ServerProcess:
    """One process; what it writes goes to `<folder>/<name>.log`."""

    def __init__(self, name: str, folder: Path, *, environ: Mapping[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._name = name
        self._environ = environ
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self, command: Sequence[str]) -> None:
        """Start the process, which must not run."""
        assert not self.running, f"{self._name} runs already"
        setpriv = shutil.which("setpriv")
        guarded = [setpriv, "--pdeathsig", "KILL", *command] if setpriv else command
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - a test's own server
                guarded, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, env=self._environ
            )

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the last one started."""
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """What it wrote, over all its starts."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def stop(self, timeout: float = PATIENCE_S) -> None:
        """SIGTERM; SIGKILL if it has not ended in time. Nothing if it does not run."""
        if self._process is None or not self.running:
            return
        self.resume()
        self._process.terminate()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """SIGKILL, and wait. Nothing if it does not run."""
        if self._process is not None and self.running:
            self._process.kill()
            self._process.wait(PATIENCE_S)

    def pause(self) -> None:
        """SIGSTOP, and wait until every thread has stopped."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.pid}/task")
        assert wait_until(
            lambda: all(_state(task) == "T" for task in tasks.iterdir()), PATIENCE_S, every=0.001
        )

    def resume(self) -> None:
        """SIGCONT. Nothing if it does not run."""
        if self._process is not None and self.running:
            self._process.send_signal(signal.SIGCONT)


def _state(task: Path) -> str:
    return (task / "stat").read_text().rpartition(")")[2].split()[0]
