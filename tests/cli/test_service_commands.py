"""`kvtiers stats|status|evict|dump-memory` against a live service, as an operator types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from kvtiers.cli.running_service import DEFAULT_URL, RunningService
from kvtiers.http.server import listen, listen_unix
from kvtiers.testing.direct_engine import DirectEngine
from kvtiers.testing.service_process import ServiceProcess

pytestmark = pytest.mark.slow


def kvtiers(*args: object, code: int = 0, **env: str) -> tuple[str, str]:
    """stdout and stderr of one command."""
    run = subprocess.run(
        [sys.executable, "-c", "from kvtiers.cli.app import main; main()", *map(str, args)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "", "PYTHONPATH": os.pathsep.join(sys.path), **env},
    )
    assert run.returncode == code, run.stdout + run.stderr
    return run.stdout, run.stderr


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="kvt-") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[ServiceProcess]:
    """Without a TCP port: the operator's socket is there all the same."""
    one = ServiceProcess(folder)
    one.start()
    yield one
    one.kill()


@pytest.fixture(scope="module")
def engine(service: ServiceProcess) -> Iterator[DirectEngine]:
    """One that has stored eight chunks in two parts each, and holds two of them."""
    one = DirectEngine(service.socket, ranks=2).connect()
    tokens = one.tokens(1, 8)
    one.store(tokens)
    held = one.stage(tokens[: 2 * one.chunk_tokens])
    assert held.num_chunks == 2
    yield one
    one.client.close()


def test_status_names_backends_and_engines(service: ServiceProcess, engine: DirectEngine) -> None:
    text, _ = kvtiers("status", "--socket", service.socket)
    assert "disk is up" in text
    assert "a-model" in text
    report = json.loads(kvtiers("status", "--socket", service.socket, "--json")[0])
    assert report["ok"] is True
    assert [one["holding"] for one in report["engines"]] == [1]


def test_stats_shows_tiers_and_why_requests_stopped(service: ServiceProcess, engine: DirectEngine) -> None:
    engine.client.release(engine.stage(engine.tokens(2, 1)))
    text, _ = kvtiers("stats", "--socket", service.socket)
    assert "never_seen" in text
    found = json.loads(kvtiers("stats", "--socket", service.socket, "--json")[0])
    assert found["tiers"]["cpu"]["entries"] == 8


def test_the_memory_map_names_every_slot_and_its_owner(
    service: ServiceProcess, engine: DirectEngine, folder: Path
) -> None:
    output = folder / "memory_profile.json"
    _, said = kvtiers("dump-memory", f"--output={output}", "--socket", service.socket)
    assert "16 slots in use (4 leased)" in said
    found: dict[str, Any] = json.loads(output.read_text())
    assert Counter(slot["chunk"] for slot in found["slots"]) == {
        key.hex(): 2 for key in engine.oracle.keys(engine.tokens(1, 8))
    }
    assert {slot["part"] for slot in found["slots"]} == {0, 1}
    [client] = found["clients"]
    leased = [slot for slot in found["slots"] if slot["leases"]]
    assert all(set(slot["sessions"]) <= set(client["sessions"]) for slot in leased)
    assert all(slot["idle_s"] >= 0 for slot in found["slots"])
    [(namespace, sums)] = found["namespaces"].items()
    assert namespace == engine.oracle.digest.hex()
    assert (
        sums["cpu_bytes"]
        == sum(slot["nbytes"] for slot in found["slots"])
        == found["tiers"]["cpu"]["slot_bytes_taken"]
    )
    assert sums["chunk_tokens"] == engine.chunk_tokens
    assert list(folder.glob(".memory_profile*")) == []


def test_what_is_no_file_is_written_to_and_not_replaced(service: ServiceProcess, folder: Path) -> None:
    pipe, link, target = folder / "pipe", folder / "link.json", folder / "target.json"
    os.mkfifo(pipe)
    with subprocess.Popen(["/bin/cat", pipe], stdout=subprocess.PIPE) as reader:
        kvtiers("dump-memory", "-o", pipe, "--socket", service.socket)
        assert json.loads(reader.communicate(timeout=60)[0])["format"] == 1
    assert pipe.is_fifo()
    link.symlink_to(target)
    kvtiers("dump-memory", "-o", link, "--socket", service.socket)
    assert link.is_symlink()
    printed, _ = kvtiers("dump-memory", "--output=-", "--socket", service.socket)
    assert json.loads(printed)["format"] == 1
    assert json.loads(target.read_text())["format"] == 1


def test_evicting_says_what_went(service: ServiceProcess, engine: DirectEngine) -> None:
    tokens = engine.tokens(3, 4)
    engine.store(tokens)
    engine.until(lambda: engine.stats()["tiers"]["disk"]["entries"] == 12)
    text, _ = kvtiers("evict", "cpu", "--target-usage", "0", "--socket", service.socket)
    assert text.startswith("cpu: 10 chunks evicted")  # two are held
    _, said = kvtiers("evict", "gpu", "--target-usage", "0", "--socket", service.socket, code=1)
    assert "engines" in said
    _, said = kvtiers("evict", "cup", "--target-usage", "0", "--socket", service.socket, code=1)
    assert "'cpu'" in said


def test_the_default_socket_is_not_believed_in_anothers_directory_nor_when_nobody_listens(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = folder / "planted"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    path = runtime / "kvtiers" / "node.sock.http"
    path.parent.mkdir(0o700, parents=True)
    with listen_unix(path), RunningService.reach(None, None, None) as ours:
        assert ours.where == str(path.with_suffix(""))
    assert path.exists(), "as a service that was killed leaves it"
    with RunningService.reach(None, None, None) as other:
        assert other.where == DEFAULT_URL
    path.unlink()
    undo = ExitStack()
    undo.enter_context(listen_unix(path))
    uid = os.getuid()
    monkeypatch.setattr("os.getuid", lambda: uid + 1)
    with RunningService.reach(None, None, None) as other:
        assert other.where == DEFAULT_URL
    undo.close()


def test_no_proxy_stands_between_the_command_and_its_own_machine(folder: Path) -> None:
    with listen("127.0.0.1", 0, has_token=False) as unused:
        port = unused.getsockname()[1]
    below = folder / "with-port"
    below.mkdir()
    one = ServiceProcess(below, {"observability.metrics_port": port}, http=True)
    with ExitStack() as undo:
        undo.callback(one.kill)
        one.start()
        for name in ("127.0.0.1", "localhost"):
            text, _ = kvtiers("status", "--url", f"http://{name}:{port}", http_proxy="http://127.0.0.1:9")
            assert "disk is up" in text


def test_the_default_socket_is_where_serve_listens_by_default(folder: Path) -> None:
    _, said = kvtiers("status", "--url", "http://127.0.0.1:9", code=1)
    assert "start `kvtiers serve`" in said
    _, said = kvtiers("status", "--socket", folder / "none.sock", code=1)
    assert str(folder / "none.sock") in said
    _, said = kvtiers("status", "--url", "x", "--socket", "y", code=2)
    assert "not both" in said


def test_default_addresses_find_a_default_service(folder: Path) -> None:
    runtime = folder / "runtime"
    (runtime / "kvtiers").mkdir(parents=True, mode=0o700)
    one = ServiceProcess(runtime)
    one.socket = runtime / "kvtiers" / "node.sock"
    one.start()
    try:
        text, _ = kvtiers("status", XDG_RUNTIME_DIR=str(runtime))
        assert "no engine is connected" in text
    finally:
        one.kill()
