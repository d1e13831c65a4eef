"""Services in processes of their own or on threads of this one, and clients; everything that was started is ended by its id."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from kvtiers.testing.direct_engine import DirectEngine
from kvtiers.testing.local_node import LocalNode, MakeLocal, folder, local, make_local
from kvtiers.testing.service_process import ServiceProcess

CHILD = Path(__file__).with_name("client_child.py")
PATIENCE_S = 30.0
__all__ = [
    "LocalNode",
    "MakeLocal",
    "folder",
    "local",
    "make_local",
]  # fixtures, and names for the tests beside this file


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
MakeChild: TypeAlias = Callable[..., Child]


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
