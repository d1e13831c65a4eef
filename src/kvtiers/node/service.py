"""The cache process of a node: takes the socket, the memory and the stores, serves, and ends in order.

    take the socket's lock → wait for the memory of the service before → make the node → listen → (what `extra` adds) → wait for a signal
    → close the socket, tell the clients → write out what was accepted → exit

The main thread only waits for signals; the control thread serves (see `server`).
"""

from __future__ import annotations

import gc
import logging
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Final, TypeAlias

from kvtiers.config import CacheConfig
from kvtiers.node.address import SocketRefused
from kvtiers.node.ownership import LeftBehind, Ownership, wait_for_memory
from kvtiers.node.server import STOP_WITHIN_S, NodeServer
from kvtiers.runtime.node import CacheNode
from kvtiers.runtime.plan import NodePlan, plan_node

_log = logging.getLogger(__name__)

SWITCH_INTERVAL_S: Final = 2e-4
"""The control thread must get the GIL soon: a round trip beside a busy Python thread is 0.6 ms with this, 8.6 with Python's 5 ms."""
_BACKLOG: Final = 128
_SIGNAL_POLL_S: Final = 1.0
_LEAST_S: Final = 0.5
"""What telling the clients may take, however short the time to close is."""

Extra: TypeAlias = Callable[["Service"], AbstractContextManager[object]]
"""Made and entered when the node serves, left before it is closed: the HTTP port, for one."""


class Service:
    """One node behind one socket. Made, run once, gone."""

    def __init__(
        self,
        config: CacheConfig,
        socket_path: Path,
        *,
        lease_timeout_s: float = 60.0,
        memory_wait_s: float = 15.0,
    ) -> None:
        """`lease_timeout_s`: clients that hold slots and are silent for so long count as stopped. `memory_wait_s`: how long
        engines may still occupy the memory of the service before this one, which they have not noticed to be gone.
        """
        self.config = config
        self.socket_path = socket_path
        self._lease_timeout = lease_timeout_s
        self._memory_wait = memory_wait_s
        self._stop = threading.Event()
        self._end_by = math.inf
        self._node: CacheNode | None = None
        self._server: NodeServer | None = None

    @property
    def node(self) -> CacheNode:
        """The node that is served; only while it is."""
        assert self._node is not None
        return self._node

    @property
    def server(self) -> NodeServer:
        """The server of its socket; only while it serves."""
        assert self._server is not None
        return self._server

    @property
    def seconds_left(self) -> float:
        """Until the end of `async.close_timeout_s`, which begins when it is asked to stop; infinite before."""
        return max(0.0, self._end_by - time.monotonic())

    def stop(self) -> None:
        """Have `run` end in order. From any thread or signal handler."""
        self._stop.set()

    def run(self, *, extra: Iterable[Extra] = (), on_ready: Callable[[], None] = lambda: None) -> bool:
        """Serve until `stop`. False if something was still running at `async.close_timeout_s`, and was left behind.

        Raises DirectoryInUse, SocketRefused, DoesNotFit, StoreUnavailable, ConfigError; nothing is left behind then.
        """
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        with ExitStack() as undo:
            ownership = Ownership(self.socket_path)
            left = ownership.take()
            undo.callback(ownership.release)
            if left is not None:
                self._wait_for_memory(left)
            if self._stop.is_set():
                return True
            plan = _without_gpu(plan_node(self.config))
            node = self._node = CacheNode(plan)
            undo.callback(node.close, 0.0)
            gc.freeze()  # what was recovered stays: no collection need look at all of it again
            ownership.serves(node.arena.fileno())
            listener = self._listen()
            undo.callback(self.socket_path.unlink, missing_ok=True)
            server = self._server = NodeServer(node, listener, lease_timeout_s=self._lease_timeout)
            server.start()
            undo.callback(server.stop)
            with ExitStack() as edge:
                for make in extra:
                    edge.enter_context(make(self))
                _log.info("serving at %s", self.socket_path)
                on_ready()
                while not self._stop.wait(_SIGNAL_POLL_S):
                    pass
                self._end_by = time.monotonic() + node.plan.close_timeout_s
                _log.info("ending: writing out what was accepted, within %.0f s", node.plan.close_timeout_s)
            told = server.stop(max(_LEAST_S, min(STOP_WITHIN_S, self.seconds_left)))
            closed = node.close(self.seconds_left)
            return told and closed

    def _wait_for_memory(self, left: LeftBehind) -> None:
        still = wait_for_memory(left, self._memory_wait, give_up=self._stop.is_set)
        if still:
            _log.warning(
                "processes %s have not let go of the %.0f MiB of the service before: if what is left does not suffice, restart them",
                ", ".join(map(str, still)),
                left.nbytes / (1 << 20),
            )

    def _listen(self) -> socket.socket:
        """The lock is ours, so a socket that lies there is a dead service's."""
        self.socket_path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(os.fspath(self.socket_path))
            self.socket_path.chmod(0o600)
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            raise SocketRefused(f"{self.socket_path} can't be listened on: {error.strerror}") from error
        return listener


def stop_on_signals(service: Service) -> None:
    """SIGTERM and SIGINT end it in order; a second one at once, with exit code 1. Main thread only."""
    seen = threading.Event()

    def stop(number: int, _: FrameType | None) -> None:
        if seen.is_set():
            os._exit(1)
        seen.set()
        _log.info("%s: ending", signal.Signals(number).name)
        service.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def stop_with(service: Service, pid: int) -> None:
    """End it in order when that process has ended, however it did: it is the service's only user."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        service.stop()
        return

    def watch() -> None:
        select.select([descriptor], [], [])
        os.close(descriptor)
        _log.info("process %d has ended: ending", pid)
        service.stop()

    threading.Thread(target=watch, name="kvtiers-owner", daemon=True).start()


def _without_gpu(plan: NodePlan) -> NodePlan:
    """Under an engine the GPU's memory is the engine's own."""
    if plan.core.gpu is None:
        return plan
    _log.info("storage.gpu: the engines own their GPU memory; the service keeps no GPU tier")
    return replace(plan, core=replace(plan.core, gpu=None), device_pool=None)
