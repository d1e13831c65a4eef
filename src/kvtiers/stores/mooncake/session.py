"""The life of a Mooncake client: connected late, by a thread of its own, and closed only when no call is in it.

How the client behaves, and what follows from that:

- Its set-up takes seconds, or as long as pinning the lent memory takes, and fails where there is no master. One daemon thread does
  it, when the first call needs it; calls wait for their time-out and no longer, and the next one finds it done, or begins anew.
- With the master dead each call takes 4 seconds, whatever the time-outs say. So after such a failure the same thread first looks
  whether the master's port answers, before a call is given to the client again.
- A call can't be interrupted. It ends by the time-outs of `settings.py`; until then it stays in its thread, with its lease.
- A call on a closed client ends the process. So calls are counted; a client that is still busy at the end of `close` is left alone.
"""

from __future__ import annotations

import importlib
import logging
import math
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Protocol, cast

from kvtiers.model.errors import StoreUnavailable
from kvtiers.stores.mooncake.registered import Region
from kvtiers.stores.mooncake.settings import CLIENT_MODULE, MooncakeSettings, bound_the_client

_log = logging.getLogger(__name__)

_LOCAL_BUFFER_BYTES: Final = 1 << 20
"""For the client's forms that copy, of which none is used."""


class Client(Protocol):
    """What is used of `mooncake.store.MooncakeDistributedStore`. Addresses are of registered memory; negative results are codes."""

    def setup(
        self,
        *,
        local_hostname: str,
        metadata_server: str,
        global_segment_size: int,
        local_buffer_size: int,
        protocol: str,
        rdma_devices: str,
        master_server_addr: str,
        enable_ssd_offload: bool,
        ssd_offload_path: str,
    ) -> int: ...

    def register_buffer(self, address: int, nbytes: int) -> int: ...

    def batch_put_from(
        self, keys: Sequence[str], addresses: Sequence[int], sizes: Sequence[int]
    ) -> list[int]:
        """0 for each; a key that is there keeps its value."""

    def batch_upsert_from(
        self, keys: Sequence[str], addresses: Sequence[int], sizes: Sequence[int]
    ) -> list[int]:
        """0 for each."""

    def batch_get_into(
        self, keys: Sequence[str], addresses: Sequence[int], sizes: Sequence[int]
    ) -> list[int]:
        """The value's length for each; BAD_ARGUMENT if it is above the size."""

    def batch_is_exist(self, keys: Sequence[str]) -> list[int]:
        """0 or 1 for each."""

    def batch_remove(self, keys: Sequence[str], force: bool) -> list[int]:
        """0 for each; what was read lately only with `force`."""

    def close(self) -> int: ...


class _Attempt:
    """To get ready, by a thread of its own; others wait for it."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: StoreUnavailable | None = None


class Session:
    """One client of a Mooncake Store."""

    def __init__(self, settings: MooncakeSettings) -> None:
        self._settings = settings
        self._changed = threading.Condition()
        self._regions: list[Region] = []
        self._open = False
        self._client: Client | None = None
        self._doubted = False
        self.reunions = 0
        """How often the master was there again after it had not been reached: it keeps its index in memory."""
        self._attempt: _Attempt | None = None
        self._calls = 0

    def register(self, region: Region) -> None:
        """Before the first call: memory to be registered once connected."""
        self._regions.append(region)

    def open(self) -> None:
        """Load the client. Raises StoreUnavailable if it is not installed, or lacks a system library."""
        if not bound_the_client(self._settings.timeout_s):
            _log.warning(
                "mooncake: the client was loaded before kvtiers could set its time-outs; set MC_RPC_TIMEOUT_MS and the others "
                "in the environment, or a peer that stops may hold calls for 30 s"
            )
        try:
            importlib.import_module(CLIENT_MODULE)
        except ImportError as error:
            raise StoreUnavailable(
                f"the Mooncake client can't be loaded ({error}): pip install 'kvtiers[mooncake]' (hosts with CUDA: "
                "mooncake-transfer-engine), and the system libraries libibverbs1, libnuma1 and libcurl4"
            ) from error
        with self._changed:
            self._open = True

    @contextmanager
    def client(self, until: float = math.inf) -> Iterator[Client]:
        """The client, for one call. Waits no longer than the time-out, nor than `until` on `time.monotonic`. Raises StoreUnavailable."""
        with self._changed:
            attempt = self._attempt_needed()
        if attempt is not None:
            self._wait(attempt, until)
        with self._changed:
            client = self._client
            if client is None or not self._open:
                raise StoreUnavailable("the Mooncake client is closed")
            self._calls += 1
        try:
            yield client
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()

    def doubt(self) -> None:
        """A call has not reached the master: look before the next one."""
        with self._changed:
            self._doubted = True

    def close(self) -> None:
        """Idempotent; ends within twice the time-out. Lent memory is taken back: what lay in it is gone."""
        with self._changed:
            self._open = False
            client = self._client
            self._changed.notify_all()
            idle = self._changed.wait_for(lambda: not self._calls, self._settings.timeout_s)
            if client is None or self._client is None:
                return
            if not idle:
                _log.warning("mooncake: %d calls have not ended; the client is left as it is", self._calls)
                return
            self._client = None
        closing = threading.Thread(target=client.close, name="kvtiers-mooncake-close", daemon=True)
        closing.start()
        closing.join(self._settings.timeout_s)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _attempt_needed(self) -> _Attempt | None:
        """With the lock held: what has to end well before a call; begun if it is not under way."""
        if not self._open:
            raise StoreUnavailable("the Mooncake client is closed")
        if self._attempt is None and (self._client is None or self._doubted):
            self._attempt = _Attempt()
            threading.Thread(
                target=self._get_ready, args=(self._attempt,), name="kvtiers-mooncake", daemon=True
            ).start()
        return self._attempt

    def _wait(self, attempt: _Attempt, until: float) -> None:
        if not attempt.done.wait(max(0.0, min(self._settings.timeout_s, until - time.monotonic()))):
            raise StoreUnavailable(f"not yet connected to the Mooncake master at {self._settings.endpoint}")
        if attempt.error is not None:
            raise StoreUnavailable(str(attempt.error)) from attempt.error

    def _get_ready(self, attempt: _Attempt) -> None:
        client: Client | None = None
        try:
            address = self._reach_master()
            if self._client is None:
                client = self._connect(address)
        except StoreUnavailable as error:
            attempt.error = error
        except Exception as error:  # noqa: BLE001 - those who wait have to be told, whatever it was
            _log.exception("mooncake: the set-up failed")
            attempt.error = StoreUnavailable(f"the Mooncake client can't be set up: {error}")
        with self._changed:
            self._attempt = None
            if self._doubted and attempt.error is None:
                self._doubted = False
                self.reunions += 1
            if client is not None and self._open:
                self._client, client = client, None
        attempt.done.set()
        if client is not None:
            client.close()

    def _reach_master(self) -> str:
        """Whether its port answers; the address this host has towards it."""
        host, port = self._settings.master
        try:
            with socket.create_connection((host, port), self._settings.timeout_s) as connection:
                return str(connection.getsockname()[0])
        except socket.gaierror as error:
            raise StoreUnavailable(
                f"the host of the Mooncake master at {self._settings.endpoint} is not known ({error.strerror}); check storage.remote.endpoint"
            ) from error
        except OSError as error:
            raise StoreUnavailable(
                f"no Mooncake master at {self._settings.endpoint} ({error.strerror or error}); start mooncake_master there"
            ) from error

    def _connect(self, address: str) -> Client:
        settings = self._settings
        module = importlib.import_module(CLIENT_MODULE)
        client = cast("Client", module.MooncakeDistributedStore())
        code = client.setup(
            local_hostname=settings.local_host or address,
            metadata_server=settings.metadata_server,
            global_segment_size=settings.segment_bytes,
            local_buffer_size=_LOCAL_BUFFER_BYTES,
            protocol=settings.protocol,
            rdma_devices=settings.rdma_devices,
            master_server_addr="{}:{}".format(*settings.master),
            enable_ssd_offload=settings.enable_ssd_offload,
            ssd_offload_path=settings.ssd_offload_path,
        )
        if code:
            raise StoreUnavailable(
                f"the Mooncake master at {settings.endpoint} does not take this client (code {code}); is it one, and does it answer?"
            )
        for region in self._regions:
            code = client.register_buffer(region.address, region.nbytes)
            if code:
                client.close()
                raise StoreUnavailable(
                    f"Mooncake can't register {region.nbytes} bytes of memory (code {code}); is memory locking limited (ulimit -l)?"
                )
        return client
