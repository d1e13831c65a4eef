"""The client in the package `infinistore` (0.2.35), and the only file that knows it. **Not run on an RDMA host**: written after its sources, and tested with a
stand-in for it; no device was at hand. What is to be known of it:

- **Its calls may block for ever**, and a transfer whose server has gone is never answered. So they are made by one daemon thread for each connection, and
  others wait for that until their deadline.
- **The server may write to a buffer as long as the connection lives.** So each has a buffer of its own, registered once, that nobody else ever uses. It is let go of
  when the connection was closed and destroyed; where that does not end, never.
- **One transfer at a time on a connection**: answers carry no number and are matched in the order of requests, and an error overtakes data.
- It opens the first device if it does not find the one named, may crash if there is none, and aborts if it may not lock memory: so these are looked at before. It pins
  512 MiB for each connection, and knows IPv4 alone.
- Its coroutines are not used, but the calls below them: an answer to an event loop that has ended would end the process. Its `connect` prints.
"""

from __future__ import annotations

import importlib
import mmap
import os
import queue
import resource
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol, cast

import numpy as np

from kvtiers.model.errors import StoreError, StoreUnavailable
from kvtiers.stores.infinistore.frames import Status
from kvtiers.stores.infinistore.values import InfiniStoreSettings

CLIENT_MODULE: Final = "infinistore"
INSTALL: Final = "pip install --no-deps infinistore==0.2.35"
_DEVICES = Path("/sys/class/infiniband")
_LINK_TYPES: Final = {"InfiniBand": "IB", "Ethernet": "Ethernet"}
_PINNED_BY_CLIENT: Final = 128 * (4 << 20)
_CONNECT_S = 30.0
"""A connection that is not there after so long is given up; a call waits for it no longer than its own time-out."""
_REFUSED: Final = -1
_IN_STEP: Final = frozenset({Status.OK, Status.MISSING, Status.FULL})
"""After any other answer, or none, the connection is given up."""


class Connection(Protocol):
    """What is used of `infinistore._infinistore.Connection`. Negative: refused. `answered` is called by a thread of its own, with a `Status`."""

    def r_rdma_async(
        self, keys: list[str], offsets: list[int], nbytes: int, base: int, answered: Callable[[int], None]
    ) -> int: ...

    def w_rdma_async(
        self, keys: list[str], offsets: list[int], nbytes: int, base: int, answered: Callable[[int], None]
    ) -> int: ...

    def register_mr(self, base: int, nbytes: int) -> int: ...

    def close(self) -> None: ...


class _Transfer:
    """Of the first bytes of a link's buffer to or from a value."""

    def __init__(self, name: str, nbytes: int, *, writing: bool) -> None:
        self.name, self.nbytes, self.writing = name, nbytes, writing
        self.code = _REFUSED
        self.done = threading.Event()

    def answered(self, code: int) -> None:
        """By a thread of the client's: what is raised there ends the process."""
        self.code = code
        self.done.set()


class Link:
    """A connection, its buffer, and the thread that makes all calls of it. One call at a time holds it."""

    def __init__(
        self, connect: Callable[[int, int], Connection], nbytes: int, ended: Callable[[Link], None]
    ) -> None:
        """`connect`: given the buffer's address and bytes. `ended`: told when nothing can come any more."""
        self.buffer = memoryview(mmap.mmap(-1, nbytes))
        self._base = int(np.frombuffer(self.buffer, np.uint8).ctypes.data)
        self._given_up_at = time.monotonic() + _CONNECT_S
        self._ready = threading.Event()
        self.error: StoreError | None = None
        self._in_step = True
        self._jobs: queue.SimpleQueue[_Transfer | None] = queue.SimpleQueue()
        threading.Thread(
            target=self._run, args=(connect, ended), name="kvtiers-infinistore-rdma", daemon=True
        ).start()

    @property
    def usable(self) -> bool:
        """By another call: nothing is owed on it. False also if it took too long to connect."""
        return self._in_step and (self._ready.is_set() or time.monotonic() < self._given_up_at)

    def wait(self, until: float) -> None:
        """For the connection. Raises StoreUnavailable."""
        if not self._ready.wait(max(0.0, until - time.monotonic())):
            raise StoreUnavailable("not yet connected to InfiniStore by RDMA")
        if self.error is not None:
            raise type(self.error)(str(self.error))

    def transfer(self, name: str, nbytes: int, until: float, *, writing: bool) -> int:
        """The server's status. Raises TimeoutError."""
        job = _Transfer(name, nbytes, writing=writing)
        self._in_step = False
        self._jobs.put(job)
        if not job.done.wait(max(0.0, until - time.monotonic())):
            raise TimeoutError
        self._in_step = job.code in _IN_STEP
        return job.code

    def end(self) -> None:
        """Have it closed by its thread, whenever that can."""
        self._jobs.put(None)

    def _run(self, connect: Callable[[int, int], Connection], ended: Callable[[Link], None]) -> None:
        try:
            connection = connect(self._base, self.buffer.nbytes)
        except StoreError as error:
            self.error = type(error)(str(error))  # without what its traceback holds: the connection
        except Exception as error:  # noqa: BLE001 - those who wait have to be told, whatever it was
            self.error = StoreUnavailable(f"InfiniStore's RDMA client can't be set up: {error}")
        else:
            self._ready.set()
            while (job := self._jobs.get()) is not None:
                post = connection.w_rdma_async if job.writing else connection.r_rdma_async
                try:
                    accepted = post([job.name], [0], job.nbytes, self._base, job.answered) >= 0
                except Exception:  # noqa: BLE001 - as above
                    accepted = False
                if not accepted:
                    job.answered(_REFUSED)
                del post  # it holds the connection
            connection.close()
            del connection  # its end is that of the queue pair: nobody can write to the buffer any more
        self._ready.set()
        ended(self)


def check(settings: InfiniStoreSettings) -> None:
    """Raises StoreUnavailable without the package, the device, or the right to lock memory."""
    try:
        importlib.import_module(CLIENT_MODULE)
    except ImportError as error:
        raise StoreUnavailable(
            f"InfiniStore's RDMA client can't be loaded ({error}): {INSTALL}, and the system library libibverbs1"
        ) from error
    _link_type(settings)
    _check_lockable(settings)


def connect(settings: InfiniStoreSettings, base: int, nbytes: int) -> Connection:
    """By a thread that may wait for ever. Raises StoreUnavailable."""
    host, port = settings.address
    try:
        found = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise StoreUnavailable(
            f"{host} has no IPv4 address, and InfiniStore's RDMA client knows no others"
        ) from error
    wheel: Any = importlib.import_module(CLIENT_MODULE)
    config = wheel.ClientConfig(
        connection_type=wheel.TYPE_RDMA,
        host_addr=found[0][4][0],
        service_port=port,
        dev_name=settings.rdma_device,
        ib_port=settings.rdma_port,
        link_type=_link_type(settings),
        log_level="error",
    )
    connection = wheel.InfinityConnection(config).conn
    steps: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("reach the server", connection.init_connection, (config,)),
        (f"connect through {settings.rdma_device}", connection.setup_rdma, (config,)),
        ("register memory", connection.register_mr, (base, nbytes)),
    ]
    try:
        for what, step, arguments in steps:
            if step(*arguments) < 0:
                raise StoreUnavailable(
                    f"InfiniStore's RDMA client could not {what}; what it wrote to the standard output says why"
                )
    except BaseException:
        connection.close()
        raise
    return cast("Connection", connection)


def _link_type(settings: InfiniStoreSettings) -> str:
    """As the client calls it. Raises StoreUnavailable if there is no such device, or port of it."""
    try:
        layer = (
            _DEVICES / settings.rdma_device / "ports" / str(settings.rdma_port) / "link_layer"
        ).read_text()
    except OSError:
        there = ", ".join(sorted(one.name for one in _DEVICES.glob("*"))) or "none"
        raise StoreUnavailable(
            f"there is no RDMA device {settings.rdma_device} with a port {settings.rdma_port} (devices here: {there}); "
            "set storage.remote.infinistore.rdma_device, or leave it out for TCP"
        ) from None
    return _LINK_TYPES.get(layer.strip(), "Ethernet")


def _check_lockable(settings: InfiniStoreSettings) -> None:
    needed = settings.rdma_connections * (_PINNED_BY_CLIENT + settings.piece_bytes)
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if os.geteuid() and limit != resource.RLIM_INFINITY and limit < needed:
        raise StoreUnavailable(
            f"RDMA to InfiniStore has to lock {needed >> 20} MiB of memory, and this process may lock {limit >> 20} MiB: "
            "raise `ulimit -l` (LimitMEMLOCK= of a systemd unit)"
        )
