"""A Mooncake Store from its package: a master, and nodes that lend memory to it.

Its data ports listen on every address, whatever they are told: use it only inside `own_network`.
"""

from __future__ import annotations

import importlib
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from kvtiers.model.parts import RecordRef
from kvtiers.stores.manifest import MANIFEST_BYTES, Manifest, decode_manifest
from kvtiers.stores.mooncake.settings import CLIENT_MODULE, bound_the_client
from kvtiers.testing.chaos import wait_until
from kvtiers.testing.servers.mooncake_lender import READY
from kvtiers.testing.servers.needs import missing
from kvtiers.testing.servers.process import LOOPBACK, PATIENCE_S, RemoteEngine, ServerProcess, free_port

TIMEOUT_S: Final = 2.5
"""Of all clients in a test process: they share what the environment says."""


def mooncake_master() -> str:
    """Where the master's program is. Without it, or without the client's libraries, the test is skipped; in CI it fails."""
    bound_the_client(TIMEOUT_S)
    try:
        importlib.import_module(CLIENT_MODULE)
    except ImportError as error:
        missing(
            f"no Mooncake ({error}): pip install mooncake-transfer-engine-non-cuda, and tools/install-system-packages.sh"
        )
    import mooncake

    (folder,) = mooncake.__path__
    return str(Path(folder) / "mooncake_master")


class MooncakePool(RemoteEngine):
    """A master and `lenders` nodes; what they hold is in memory. `client`: for what the test does behind the store's back."""

    def __init__(
        self,
        folder: Path,
        *,
        lenders: int = 1,
        mib: int = 64,
        node_gone_after_s: int = 60,
        ssd: bool = False,
    ) -> None:
        """`mib`: lent by each node. `node_gone_after_s`: without a sign of life, the master forgets a node. `ssd`: beside the memory."""
        self._program = mooncake_master()
        self._port = free_port()
        self._node_gone_after_s = node_gone_after_s
        self._ssd = ssd
        self._mib = mib
        self.ssd_folder = folder / "ssd"
        self.master = ServerProcess("master", folder)
        self.lenders = [ServerProcess(f"lender{number}", folder) for number in range(lenders)]
        self._client: Any = None

    @property
    def address(self) -> tuple[str, int]:
        return LOOPBACK, self._port

    @property
    def endpoint(self) -> str:
        """The master's."""
        return f"{LOOPBACK}:{self._port}"

    def start(self) -> None:
        self.start_master()
        started = [lender for lender in self.lenders if not lender.running]
        seen = {id(lender): lender.log.count(READY) for lender in started}
        for lender in started:
            lender.launch(self._lender_command())
        for lender in started:
            ready = wait_until(
                lambda one=lender: one.log.count(READY) > seen[id(one)] or not one.running,  # type: ignore[misc]
                PATIENCE_S,
            )
            assert ready, lender.log
            assert lender.running, lender.log

    def start_master(self) -> None:
        """Alone; nodes that were there come back by themselves."""
        if self.master.running:
            return
        self.master.launch(
            [
                self._program,
                f"--rpc_address={LOOPBACK}",
                f"--rpc_port={self._port}",
                f"--metrics_host={LOOPBACK}",
                f"--metrics_port={free_port()}",
                "--default_kv_lease_ttl=3000",
                f"--client_ttl={self._node_gone_after_s}",
                "--logtostderr=1",
                *(["--enable_offload=true"] if self._ssd else []),
            ]
        )
        ready = wait_until(lambda: self._listens() or not self.master.running, PATIENCE_S)
        assert ready, self.master.log
        assert self.master.running, self.master.log

    def stop(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        for process in self._processes:
            process.stop()

    def kill(self) -> None:
        for process in self._processes:
            process.kill()

    def pause(self) -> None:
        for process in self._processes:
            process.pause()

    def resume(self) -> None:
        for process in self._processes:
            process.resume()

    def clear(self) -> None:
        assert wait_until(lambda: self.client.remove_all(True) >= 0, PATIENCE_S, every=0.1), self.master.log

    @property
    def client(self) -> Any:
        """A client of its own, without a share of memory."""
        if self._client is None:
            client = importlib.import_module(CLIENT_MODULE).MooncakeDistributedStore()
            assert client.setup(LOOPBACK, "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", self.endpoint) == 0
            self._client = client
        return self._client

    def manifest_of(self, ref: RecordRef) -> tuple[str, Manifest]:
        """The name of a record's manifest, and what it says."""
        name = f"kv1:{ref.namespace.hex()}:{{{ref.key.hex()}}}:{ref.part}"
        return name, decode_manifest(self.client.get(name)[:MANIFEST_BYTES], ref)

    def pieces_of(self, ref: RecordRef) -> list[str]:
        """The names of its pieces."""
        name, manifest = self.manifest_of(ref)
        return [f"{name}:{manifest.piece_id.hex()}:{number}" for number in range(manifest.num_pieces)]

    @property
    def _processes(self) -> Sequence[ServerProcess]:
        return [*self.lenders, self.master]

    def _lender_command(self) -> list[str]:
        words = [
            sys.executable,
            "-m",
            "kvtiers.testing.servers.mooncake_lender",
            self.endpoint,
            str(self._mib),
        ]
        if self._ssd:
            self.ssd_folder.mkdir(exist_ok=True)
            words.append(str(self.ssd_folder))
        return words

    def _listens(self) -> bool:
        try:
            socket.create_connection(self.address, PATIENCE_S).close()
        except OSError:
            return False
        return True
