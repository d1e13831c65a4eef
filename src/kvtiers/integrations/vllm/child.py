"""A service of the engine's own: started if nobody serves at the socket, ended with the engine.

Every process of an engine, and every data-parallel rank, may try: the service takes a lock beside its socket, so one of them is the
service and the others' attempts end at once. The child is told whose it is, and ends also if that process is killed.
"""

from __future__ import annotations

import logging
import math
import os
import random
import socket as sockets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from kvtiers.integrations.vllm.settings import Settings
from kvtiers.node.backoff import Backoff

_log = logging.getLogger(__name__)

_READY_WITHIN_S: Final = 60.0
_END_WITHIN_S: Final = 1.0
"""vLLM kills an engine that takes seconds to end."""
_LOOKS: Final = 20
_LOOK_EVERY_S: Final = 0.05
_AGAIN_S: Final = 5.0
_AGAIN_MOST_S: Final = 300.0
"""Between starts of a service that ended by itself: the first pause, and the longest. One that lives longer begins anew."""


class ChildService:
    """At most one child process."""

    def __init__(self, settings: Settings, socket: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._socket = socket
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._backoff = Backoff(random.Random(), first_s=_AGAIN_S, longest_s=_AGAIN_MOST_S)
        self._again_at = -math.inf

    def ensure(self, timeout: float = _READY_WITHIN_S) -> bool:
        """Start it unless somebody serves there; wait until one does. False if none does in time: everything is a miss then."""
        if serves(self._socket):
            return True
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            # one that has ended was not the first, or the one before it still writes out what it has: its directory is locked
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            for _ in range(_LOOKS):
                if serves(self._socket):
                    return True
                time.sleep(_LOOK_EVERY_S)
        _log.error(
            "the cache's service did not start at %s (exit code %s; its log is above): every lookup is a miss",
            self._socket,
            self._process.poll() if self._process is not None else None,
        )
        return False

    def start_again(self) -> bool:
        """Nobody serves there any more: start one, unless ours still runs or one was started a little while ago. Never waits."""
        process, now = self._process, self._clock()
        if now < self._again_at or (process is not None and process.poll() is None):
            return False
        if process is not None:
            _log.warning(
                "the cache's service has ended (exit code %s; its log is above) and is started again",
                process.returncode,
            )
        if now - self._again_at > _AGAIN_MOST_S:
            self._backoff.succeeded()
        self._process = self._start()
        self._again_at = now + self._backoff.pause()
        return True

    def _start(self) -> subprocess.Popen[bytes]:
        with _file_with(self._settings) as (file, descriptors):
            return self._serve(file, descriptors)

    def _serve(self, config: Path, descriptors: tuple[int, ...]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "kvtiers", "serve", "--socket", str(self._socket)]
        command += ["--config", str(config), "--with-process", str(os.getpid())]
        command += [] if self._settings.http else ["--no-http"]
        # A group of its own, as a Ctrl-C is the engine's affair; but the engine's session. Linux shares the processor among sessions,
        # and one whose tasks spin on sched_yield, as vLLM's ranks do, can keep it from the others for seconds (docs/decisions/vllm.md).
        return subprocess.Popen(  # noqa: S603 - our own
            command, stdin=subprocess.DEVNULL, process_group=0, pass_fds=descriptors
        )

    def stop(self, timeout: float = _END_WITHIN_S) -> None:
        """End the child, if there is one: it still writes out what was accepted, which nobody waits for. Idempotent."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            _log.info("the cache's service, process %d, still writes out what it has", process.pid)


@contextmanager
def _file_with(settings: Settings) -> Iterator[tuple[Path, tuple[int, ...]]]:
    """A path that a child can read the configuration from, and the descriptors it needs for that. Nothing is left on a disk."""
    if settings.config_file is not None:
        yield settings.config_file, ()
        return
    with os.fdopen(os.memfd_create("kvtiers-config"), "w") as file:
        file.write(settings.inline)
        file.flush()
        yield Path(f"/proc/self/fd/{file.fileno()}"), (file.fileno(),)


def serves(socket: Path) -> bool:
    """Whether somebody listens there."""
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as sock:
        sock.settimeout(1.0)
        try:
            sock.connect(os.fspath(socket))
        except OSError:
            return False
    return True
