"""A service of the engine's own: one is elected, it ends with its engine, and what it had accepted is on disk by then."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvtiers.integrations.vllm.child import ChildService, serves
from kvtiers.integrations.vllm.settings import Settings, read_settings
from kvtiers.testing.chaos import small_config, wait_until
from kvtiers.testing.direct_engine import PATIENCE_S, DirectEngine

pytestmark = pytest.mark.slow

MakeChild = Callable[[], ChildService]

ENGINE = """
import sys, time
from pathlib import Path
from kvtiers.integrations.vllm.child import ChildService
from kvtiers.integrations.vllm.settings import read_settings
child = ChildService(read_settings({"config": sys.argv[1]}), Path(sys.argv[2]))
print(child.ensure(), flush=True)
print(child._process.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def config(folder: Path) -> Path:
    file = folder / "cache.yaml"
    tree = {
        "storage": {
            "chunk_tokens": small_config().storage.chunk_tokens,
            "cpu": {"buffer_size": "1Mi", "huge_pages": "off", "numa_aware": False},
            "disk": {"enabled": True, "path": str(folder / "disk"), "max_size": "64Mi", "min_free_space": 0},
        }
    }
    file.write_text(json.dumps(tree))
    return file


@pytest.fixture
def settings(config: Path) -> Settings:
    return read_settings({"config": str(config)})


@pytest.fixture
def socket(folder: Path) -> Path:
    return folder / "run" / "vllm.sock"


@pytest.fixture
def make_child(settings: Settings, socket: Path) -> Iterator[MakeChild]:
    made: list[ChildService] = []
    processes: list[subprocess.Popen[bytes]] = []

    def make() -> ChildService:
        made.append(ChildService(settings, socket))
        return made[-1]

    yield make
    for child in made:
        if child._process is not None:
            processes.append(child._process)
        child.stop()
    for process in processes:
        process.wait(PATIENCE_S)


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_child_serves_and_ends_when_it_is_stopped(make_child: MakeChild, socket: Path) -> None:
    child = make_child()
    assert child.ensure(PATIENCE_S)
    assert serves(socket)
    process = child._process
    assert process is not None
    child.stop()
    child.stop()
    assert process.wait(PATIENCE_S) == 0
    assert not serves(socket)


def test_a_service_that_was_killed_is_started_again_and_not_at_once_when_it_dies_again(
    settings: Settings, socket: Path
) -> None:
    now = [100.0]
    child = ChildService(settings, socket, clock=lambda: now[0])
    try:
        assert child.ensure(PATIENCE_S)
        assert not child.start_again()  # it runs
        for pause in (5.0, 10.0):
            assert child._process is not None
            child._process.kill()
            child._process.wait(PATIENCE_S)
            assert child.start_again()
            assert wait_until(lambda: serves(socket), PATIENCE_S)
            assert child._process is not None
            child._process.kill()
            child._process.wait(PATIENCE_S)
            now[0] += pause / 2 - 0.1
            assert not child.start_again()
            now[0] += pause / 2 + 0.2
    finally:
        child.stop()


def test_service_that_runs_already_is_used(make_child: MakeChild) -> None:
    first, second = make_child(), make_child()
    assert first.ensure(PATIENCE_S)
    assert second.ensure(PATIENCE_S)
    assert second._process is None


def test_two_that_start_at_once_elect_one(make_child: MakeChild, socket: Path) -> None:
    first, second = make_child(), make_child()
    first._process, second._process = first._start(), second._start()
    assert first.ensure(PATIENCE_S)
    assert second.ensure(PATIENCE_S)
    both = (first._process, second._process)
    assert wait_until(lambda: sum(one.poll() is None for one in both) == 1, PATIENCE_S)
    assert serves(socket)


def test_what_was_accepted_is_found_by_the_next_child(make_child: MakeChild, socket: Path) -> None:
    child = make_child()
    assert child.ensure(PATIENCE_S)
    process = child._process
    engine = DirectEngine(socket).connect()
    tokens = engine.tokens(1, 6)
    engine.store(tokens)
    engine.client.close()
    child.stop()
    assert process is not None
    assert process.wait(PATIENCE_S) == 0
    assert make_child().ensure(PATIENCE_S)
    engine = DirectEngine(socket).connect()
    assert engine.load(tokens).num_chunks == 6
    engine.client.close()


def test_child_ends_when_its_engine_is_killed(config: Path, socket: Path) -> None:
    engine = subprocess.Popen(
        [sys.executable, "-c", ENGINE, str(config), str(socket)], stdout=subprocess.PIPE, text=True
    )
    assert engine.stdout is not None
    assert engine.stdout.readline() == "True\n"
    pid = int(engine.stdout.readline())
    try:
        engine.kill()
        engine.wait(PATIENCE_S)
        assert wait_until(lambda: not running(pid), PATIENCE_S)
        assert not serves(socket)
    finally:
        engine.stdout.close()
        if running(pid):
            os.kill(pid, signal.SIGKILL)


def test_configuration_given_inline_reaches_it_and_leaves_no_file(config: Path, socket: Path) -> None:
    settings = read_settings({"config": json.loads(config.read_text())})
    descriptors = {fd.name for fd in Path("/proc/self/fd").iterdir()}
    child = ChildService(settings, socket)
    assert child.ensure()
    process = child._process
    assert process is not None
    for _ in range(2):  # also when it is started again
        assert (config.parent / "disk").exists()  # which is what the configuration says
        assert all(file.name.startswith(socket.name) for file in socket.parent.iterdir())
        process.kill()
        process.wait(PATIENCE_S)
        assert child.ensure()
        process = child._process
        assert process is not None
    child.stop()
    process.wait(PATIENCE_S)
    assert {fd.name for fd in Path("/proc/self/fd").iterdir()} == descriptors


def test_service_that_can_not_start_is_told_with_its_exit_code(
    settings: Settings, socket: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    assert settings.config_file is not None
    settings.config_file.write_text("storage: {cpu: {buffer: 1}}\n")  # changed since it was read
    child = ChildService(settings, socket)
    assert not child.ensure(5.0)
    assert "did not start" in caplog.text
    assert "storage.cpu" in capfd.readouterr().err
    assert not serves(socket)
    process = child._process
    child.stop()
    assert process is not None
    assert process.wait(PATIENCE_S) in {2, -signal.SIGTERM}


def test_service_that_does_not_come_is_given_up_at_the_deadline(
    settings: Settings, socket: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(ChildService):
        def _start(self) -> subprocess.Popen[bytes]:
            return subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])

    child = Failing(settings, socket)
    assert not child.ensure(0.5)
    assert "every lookup is a miss" in caplog.text
    child.stop()
