"""What a Mooncake client is told: our settings, and the environment variables that alone bound its waits.

The client reads its time-outs from the environment when it is loaded. Without them a stopped peer holds a read for 30 seconds, and a
master that is not there holds the set-up for 90. So they are set before the import, once for the process; what the operator
has set stays.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Final

from kvtiers.model.errors import ConfigError
from kvtiers.stores.host_port import host_and_port

CLIENT_MODULE: Final = "mooncake.store"
DEFAULT_PORT: Final = 50051
_SHARE_OF_TIMEOUT: Final = 0.4
"""Of a call's time for one answer: a transfer that fails is followed by a word to the master."""


@dataclass(frozen=True, slots=True)
class MooncakeSettings:
    """How to reach a Mooncake Store, and what this node gives to it."""

    endpoint: str
    """host:port of `mooncake_master`, or mooncake://host:port."""
    timeout_s: float = 5.0
    connection_pool_size: int = 32
    segment_bytes: int = 0
    """Memory of this node lent to the pool, where its peers read it (`p2p: true`); 0: a client that only uses what others lend."""
    local_host: str = ""
    """Under which the peers reach this node; empty: the address it has towards the master."""
    protocol: str = "tcp"
    """"tcp" or "rdma"."""
    rdma_devices: str = ""
    """Names, separated by commas; empty: the client chooses."""
    metadata_server: str = "P2PHANDSHAKE"
    """Peers tell each other where their memory is, or the URL of a metadata server."""
    enable_ssd_offload: bool = False
    """Values evicted from lent memory go to this node's SSD; the master has to run with `--enable_offload=true`."""
    ssd_offload_path: str = ""
    piece_bytes: int = 32 << 20
    """Largest value. Fewer are better: each may lie on another node, and a record is readable while all of them are."""
    bounce_bytes: int = 512 << 20
    """At most so much registered memory for payloads that are not in the arena, such as encoded ones."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be {what}, got {value!r}"
            for name, good, what, value in (
                ("timeout_s", self.timeout_s > 0, "above 0", self.timeout_s),
                (
                    "connection_pool_size",
                    self.connection_pool_size >= 1,
                    "at least 1",
                    self.connection_pool_size,
                ),
                ("segment_bytes", self.segment_bytes >= 0, "at least 0", self.segment_bytes),
                ("protocol", self.protocol in ("tcp", "rdma"), "tcp or rdma", self.protocol),
                ("piece_bytes", self.piece_bytes >= 65_536, "at least 64 KiB", self.piece_bytes),
                (
                    "bounce_bytes",
                    self.bounce_bytes >= self.piece_bytes,
                    "at least piece_bytes",
                    self.bounce_bytes,
                ),
                (
                    "ssd_offload_path",
                    bool(self.ssd_offload_path) or not self.enable_ssd_offload,
                    "a directory when enable_ssd_offload is set",
                    self.ssd_offload_path,
                ),
                ("endpoint", _is_endpoint(self.endpoint), "host:port of the master", self.endpoint),
            )
            if not good
        ]
        if problems:
            raise ConfigError(problems, source="mooncake")

    @property
    def bounce_buffers(self) -> int:
        """Of `piece_bytes` each: one for every call that may be under way, as far as `bounce_bytes` goes."""
        return min(self.connection_pool_size, self.bounce_bytes // self.piece_bytes)

    @property
    def master(self) -> tuple[str, int]:
        """Host and port."""
        return host_and_port(self.endpoint, "mooncake", DEFAULT_PORT)


def bound_the_client(timeout_s: float) -> bool:
    """Set the client's time-outs. False if it is too late: something else in this process has loaded it with others."""
    answer_s = timeout_s * _SHARE_OF_TIMEOUT
    wanted = {
        "MC_RPC_TIMEOUT_MS": str(max(1, int(answer_s * 1000))),
        "MC_RPC_CONNECT_TIMEOUT_MS": str(max(1, int(timeout_s * 100))),
        "MC_TCP_PROGRESS_TIMEOUT_SEC": str(max(1, int(answer_s))),
        "MC_TCP_STATUS_TIMEOUT_SEC": str(max(1, int(answer_s))),
        "MC_STORE_CLIENT_SETUP_RETRIES": "1",
        "MC_LOG_LEVEL": "ERROR",
    }
    late = CLIENT_MODULE in sys.modules and not all(name in os.environ for name in wanted)
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    return not late


def _is_endpoint(endpoint: str) -> bool:
    try:
        host_and_port(endpoint, "mooncake", DEFAULT_PORT)
    except ValueError:
        return False
    return True
