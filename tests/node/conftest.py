"""Services in processes of their own or on threads of this one, and clients; everything that was started is ended by its id."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pytest

from kvtiers.node.server import NodeServer
from kvtiers.runtime.node import CacheNode
from kvtiers.runtime.plan import plan_node
from kvtiers.testing.chaos import faulty_plan, small_config, wait_until
from kvtiers.testing.direct_engine import DirectEngine
from kvtiers.testing.faulty_store import FaultyStore
from kvtiers.testing.service_process import ServiceProcess

CHILD = Path(__file__).with_name("client_child.py")
PATIENCE_S = 30.0


class LocalNode(NamedTuple):
    """A node that is served from this process, so that a test can look inside."""

    node: CacheNode
    server: NodeServer
    disk: FaultyStore
    socket: Path

    def taken(self) -> frozenset[int]:
        """Offsets of the slots in use."""
        return self.node.inspect(lambda core: core._state.cpu.slots.taken)

    def leased(self) -> int:
        """Chunks that somebody holds."""
        leased: int = self.node.stats()["tiers"]["cpu"]["leased_chunks"]
        return leased

    def comes_to_rest(self) -> bool:
        """Whether in the end nobody holds anything."""
        return wait_until(lambda: self.leased() == 0, PATIENCE_S)


class Child:
    """`client_child.py`, running."""

    def __init__(self, path: Path, action: str, *rest: object, engine: str = "-") -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(CHILD), str(path), engine, action, *map(str, rest)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hear(self, wanted: str) -> list[str]:
        """Wait for a line that begins so; the rest of it."""
        assert self.process.stdout is not None
        word, *rest = self.process.stdout.readline().split() or [""]
        assert word == wanted
        return rest

    def tell(self) -> None:
        """Let it go on."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=PATIENCE_S)


MakeService: TypeAlias = Callable[..., ServiceProcess]
MakeEngine: TypeAlias = Callable[..., DirectEngine]
MakeLocal: TypeAlias = Callable[..., LocalNode]
MakeChild: TypeAlias = Callable[..., Child]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short enough a path for a socket."""
    path = Path(tempfile.mkdtemp(prefix="kvt-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def make_service(folder: Path) -> Iterator[MakeService]:
    """`kvtiers serve`, not started yet; `values`: settings by dotted key. Killed at the end, if it has not ended."""
    made: list[ServiceProcess] = []

    def make(values: Mapping[str, Any] | None = None) -> ServiceProcess:
        made.append(ServiceProcess(folder, values))
        return made[-1]

    yield make
    for one in made:
        one.kill()


@pytest.fixture
def service(make_service: MakeService) -> ServiceProcess:
    """One that serves."""
    one = make_service()
    one.start()
    return one


@pytest.fixture
def make_local(folder: Path) -> Iterator[MakeLocal]:
    """A node on a faulty disk, served from here. At the end nobody holds anything, and the audit has nothing to say."""
    made: list[LocalNode] = []

    def make(values: Mapping[str, Any] | None = None, **options: Any) -> LocalNode:
        plan, disk = faulty_plan(plan_node(small_config(folder / "disk", values)))
        path = folder / f"{len(made)}.sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        node = CacheNode(plan)
        server = NodeServer(node, listener, **options)
        server.start()
        made.append(LocalNode(node, server, disk, path))
        return made[-1]

    yield make
    for one in made:
        one.disk.heal()
    stopped = [one.server.stop() for one in made]
    problems = [problem for one in made if not one.node.closing for problem in one.node.check_integrity()]
    for one in made:
        one.node.close()
    assert problems == []
    assert all(stopped)


@pytest.fixture
def local(make_local: MakeLocal) -> LocalNode:
    """One with the usual settings."""
    return make_local()


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """Clients in this process; closed at the end."""
    made: list[DirectEngine] = []

    def make(path: Path, model: str = "a-model", **options: Any) -> DirectEngine:
        made.append(DirectEngine(path, model, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.client.close()


@pytest.fixture
def make_child() -> Iterator[MakeChild]:
    """Clients in processes of their own; killed at the end."""
    made: list[Child] = []

    def make(path: Path, action: str, *rest: object, engine: str = "-") -> Child:
        made.append(Child(path, action, *rest, engine=engine))
        return made[-1]

    yield make
    for child in made:
        if child.process.poll() is None:
            child.kill()
        for stream in (child.process.stdin, child.process.stdout):
            if stream is not None and not stream.closed:
                stream.close()
