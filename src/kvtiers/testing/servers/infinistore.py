"""InfiniStore's server from its package, on a host without RDMA: **TCP only**.

It opens an RDMA device before it listens, so a library that pretends to be one (`no_rdma.c`) is compiled and loaded before libibverbs. Its packages don't
go with ours (an older uvloop), so they are in an environment of their own, made once below the user's cache. It listens on every address: use it only
inside `own_network`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Final

from kvtiers.testing.chaos import wait_until
from kvtiers.testing.servers.needs import missing
from kvtiers.testing.servers.process import LOOPBACK, PATIENCE_S, RemoteEngine, ServerProcess, free_port

_VERSION: Final = "0.2.35"
_BESIDE: Final = ("numpy==2.4.6", "uvloop==0.21.0", "fastapi==0.165.0", "uvicorn==0.54.0")
_INSTALL_S: Final = 300.0
_RUN: Final = "import infinistore.server as server; server.prevent_oom = lambda: None; server.main()"
"""It would make itself the last process to be killed when the host is out of memory, which needs root."""


def infinistore_environment() -> Path:
    """The folder with the server's Python and the library, made if it is not there. Needs a package index once, and a C compiler."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvtiers-tests"
    folder = cache / f"infinistore-{_VERSION}-python{sys.version_info.major}.{sys.version_info.minor}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "infinistore.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may want it
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            _make(folder)
            (folder / "complete").touch()
    return folder


def _make(folder: Path) -> None:
    source = Path(__file__).with_name("no_rdma.c")
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    steps = (
        [sys.executable, "-m", "venv", str(folder)],
        [*install, *_BESIDE],
        [*install, "--no-deps", f"infinistore=={_VERSION}"],
        ["cc", "-shared", "-fPIC", "-O1", "-o", str(folder / "no_rdma.so"), str(source)],
    )
    for step in steps:
        try:
            subprocess.run(step, check=True, capture_output=True, text=True, timeout=_INSTALL_S)  # noqa: S603 - the words above
        except subprocess.CalledProcessError as error:
            missing(f"InfiniStore's server can't be made ready: {step[0]}: {error.stderr.strip()[-500:]}")
        except (OSError, subprocess.TimeoutExpired) as error:
            missing(f"InfiniStore's server can't be made ready: {error}")


class InfiniStoreServer(RemoteEngine):
    """One server with 1 GiB of memory, the least there is; the kernel gives it what is written to."""

    def __init__(self, folder: Path) -> None:
        environment = infinistore_environment()
        self._python = str(environment / "bin" / "python")
        environ = {**os.environ, "LD_PRELOAD": str(environment / "no_rdma.so")}
        environ.pop("PYTHONPATH", None)
        self._process = ServerProcess("infinistore", folder, environ=environ)
        self._port, self._manage_port = free_port(), free_port()

    @property
    def address(self) -> tuple[str, int]:
        return LOOPBACK, self._port

    def start(self) -> None:
        if self._process.running:
            return
        ports = ["--service-port", str(self._port), "--manage-port", str(self._manage_port)]
        self._process.launch([self._python, "-c", _RUN, "--prealloc-size", "1", *ports])
        ready = wait_until(lambda: self._listens() or not self._process.running, PATIENCE_S)
        assert ready, self._process.log
        assert self._process.running, self._process.log

    def stop(self) -> None:
        self._process.stop()

    def kill(self) -> None:
        self._process.kill()

    def pause(self) -> None:
        self._process.pause()

    def resume(self) -> None:
        self._process.resume()

    def clear(self) -> None:
        request = urllib.request.Request(f"http://{LOOPBACK}:{self._manage_port}/purge", method="POST")
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:  # noqa: S310 - our own
            assert answer.status == 200

    def _listens(self) -> bool:
        for port in (self._port, self._manage_port):
            try:
                socket.create_connection((LOOPBACK, port), PATIENCE_S).close()
            except OSError:
                return False
        return True
