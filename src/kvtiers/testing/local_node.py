"""Nodes that are served from this process, so that a test can look inside; as fixtures for whoever imports them into a conftest."""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import pytest

from kvtiers.node.server import NodeServer
from kvtiers.runtime.node import CacheNode
from kvtiers.runtime.plan import plan_node
from kvtiers.testing.chaos import faulty_plan, small_config, wait_until
from kvtiers.testing.faulty_store import FaultyStore

_PATIENCE_S: Final = 30.0


class LocalNode(NamedTuple):
    """A node, its server and its disk."""

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
        return wait_until(lambda: self.leased() == 0, _PATIENCE_S)

    def end(self) -> list[str]:
        """Stop serving, audit, close; what the audit has to say. The socket's path is free then. Idempotent."""
        self.disk.heal()
        stopped = self.server.stop()
        problems = [] if self.node.closing else list(self.node.check_integrity())
        self.node.close()
        self.socket.unlink(missing_ok=True)
        return problems if stopped else [*problems, "the server did not stop in time"]


class MakeLocal(Protocol):
    """Makes a node and serves it. `values`: settings by dotted key; `options`: of `NodeServer`."""

    def __call__(
        self, values: Mapping[str, Any] | None = None, *, path: Path | None = None, **options: Any
    ) -> LocalNode: ...


@contextmanager
def local_nodes(folder: Path) -> Iterator[MakeLocal]:
    """What makes nodes on one faulty disk below `folder` (a short path). At the end no audit has anything to say."""
    made: list[LocalNode] = []

    def make(
        values: Mapping[str, Any] | None = None, *, path: Path | None = None, **options: Any
    ) -> LocalNode:
        plan, disk = faulty_plan(plan_node(small_config(folder / "disk", values)))
        path = path or folder / f"{len(made)}.sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        node = CacheNode(plan)
        server = NodeServer(node, listener, **options)
        server.start()
        made.append(LocalNode(node, server, disk, path))
        return made[-1]

    yield make
    problems = [problem for one in made for problem in one.end()]
    assert problems == []


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short enough a path for a socket."""
    path = Path(tempfile.mkdtemp(prefix="kvt-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def make_local(folder: Path) -> Iterator[MakeLocal]:
    """Nodes on a faulty disk, served from here. At the end nobody holds anything, and their audits have nothing to say."""
    with local_nodes(folder) as make:
        yield make


@pytest.fixture
def local(make_local: MakeLocal) -> LocalNode:
    """One with the usual settings."""
    return make_local()
