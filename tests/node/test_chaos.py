"""Random faults under working engines: no wrong byte, no stuck engine, no slot lost, and whatever is killed comes back."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtiers.model.reasons import MissReason
from kvtiers.runtime.cache import TieredCache
from kvtiers.testing.chaos import small_config, wait_until
from kvtiers.testing.direct_engine import DirectEngine
from kvtiers.testing.service_process import ServiceProcess
from kvtiers.testing.toy_engine import DOCUMENTS, LONGEST_PROMPT

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.node.conftest import MakeService

ENGINES = 2
LEASE_TIMEOUT_S = 1.0
RESERVED = 1000
"""Documents that no engine serves: for the vandal."""


class EngineProcess:
    """`python -m kvtiers.testing.toy_engine`, started again whenever it has ended."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        self.path = path
        self.rng = rng
        self.done = 0
        self.loaded = 0
        self.wrong: list[str] = []
        self.workers: list[int] = []
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "kvtiers.testing.toy_engine", str(self.path)]
        process = subprocess.Popen(
            [*command, str(self.rng.randrange(1 << 30)), "1000000"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        threading.Thread(target=self._listen, args=(process,), daemon=True).start()
        return process

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                match line.split():
                    case ["worker", pid]:
                        self.workers.append(int(pid))
                    case ["done", _, loaded, _]:
                        self.done += 1
                        self.loaded += int(loaded)
                    case ["wrong", *_]:
                        self.wrong.append(line)
                    case _:
                        pass

    def see_to_it(self) -> None:
        """Start it again if it has ended, as a supervisor would."""
        if self.process.poll() is not None:
            self.process = self._start()

    @property
    def worker(self) -> int:
        """The last one, 0 before there is any."""
        return self.workers[-1] if self.workers else 0

    def signal(self, pid: int, number: signal.Signals) -> None:
        """To the scheduler or a worker of this engine, if it is still that."""
        if pid == self.process.pid:
            self.process.send_signal(number)
        elif _is_toy(pid):
            os.kill(pid, number)

    def end(self) -> None:
        for pid in (*self.workers, self.process.pid):
            self.signal(pid, signal.SIGCONT)
        self.process.kill()
        self.process.wait(20)
        assert wait_until(lambda: not any(_is_toy(pid) for pid in self.workers)), (
            "a worker outlived its engine"
        )


def _is_toy(pid: int) -> bool:
    try:
        return b"toy_engine" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


class Vandal:
    """Stores documents of its own, writes over them without a lease, and sees that nobody is served that."""

    def __init__(self, path: Path) -> None:
        self.engine = DirectEngine(path)
        self.document = RESERVED
        self.found_out = 0

    def scribble(self) -> None:
        engine, self.document = self.engine, self.document + 1
        engine.client.step()
        if not wait_until(lambda: engine.client.step() >= 0 and engine.space.ready, 5):
            return
        tokens = engine.tokens(self.document, 3)
        store = engine.open_store(tokens)
        if not store.indices:
            return
        views = [engine.slots(store, row)[0] for row in range(len(store.indices))]
        engine.write(store, tokens)
        engine.client.commit(store)
        engine.until(lambda: bool(store.committed) or not engine.client.connected)
        time.sleep(
            0.05
        )  # it is sealed by then, or the seal is of what is scribbled now and nobody could tell
        held = engine.stage(tokens)  # in memory, and leased by nobody else
        if held.num_chunks and int(held.offsets[0, 0]) == int(store.offsets[0, 0]):
            views[0][:64] ^= 0xFF
        engine.client.release(held)
        again = engine.load(tokens)  # raises if it is served a wrong byte
        self.found_out += again.stopped_by is MissReason.CORRUPT


def play(service: ServiceProcess, faults: int, seed: int) -> None:
    print(f"seed {seed}")  # shown if it fails
    rng = random.Random(seed)
    options = ("--lease-timeout", str(LEASE_TIMEOUT_S), "--memory-wait", "3")
    service.start(*options)
    engines = [EngineProcess(service.socket, rng) for _ in range(ENGINES)]
    vandal = Vandal(service.socket)

    def pause(one: EngineProcess, pid: int) -> None:
        one.signal(pid, signal.SIGSTOP)
        time.sleep(rng.choice((0.1, LEASE_TIMEOUT_S + 1)))
        one.signal(pid, signal.SIGCONT)

    def kill_service() -> None:
        service.kill()
        time.sleep(rng.random() / 2)
        service.start(*options)

    def end_service() -> None:
        assert service.terminate() == 0
        service.start(*options)

    def stop_service() -> None:
        service.pause()
        time.sleep(rng.random() * 2)
        service.send_signal(signal.SIGCONT)

    def garbage() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(service.socket))
            sock.send(rng.randbytes(rng.randrange(1, 200)))

    def any_engine(act: Callable[[EngineProcess, int], None], *, worker: bool) -> Callable[[], None]:
        def fault() -> None:
            one = rng.choice(engines)
            pid = one.worker if worker else one.process.pid
            if pid:
                act(one, pid)

        return fault

    def kill(one: EngineProcess, pid: int) -> None:
        one.signal(pid, signal.SIGKILL)

    menu = [
        any_engine(kill, worker=False),
        any_engine(kill, worker=True),
        any_engine(pause, worker=False),
        any_engine(pause, worker=True),
        kill_service,
        end_service,
        stop_service,
        garbage,
        vandal.scribble,
    ]
    try:
        for number in range(faults):
            fault = menu[number % len(menu)] if number < len(menu) else rng.choice(menu)
            fault()
            before = [one.done for one in engines]

            def goes_on(before: list[int] = before) -> bool:
                for one in engines:
                    one.see_to_it()
                return all(one.done > then for one, then in zip(engines, before, strict=True))

            assert wait_until(goes_on, 60), (
                f"an engine stands still after fault {number}\n{service.log[-4000:]}"
            )
            assert not [line for one in engines for line in one.wrong]
        assert sum(one.loaded for one in engines) > 0
        assert vandal.found_out > 0
    finally:
        for one in engines:
            one.end()
    assert not [line for one in engines for line in one.wrong]
    vandal.engine.connect()
    rest = lambda: vandal.engine.stats()["tiers"]["cpu"]["leased_chunks"] == 0  # noqa: E731
    assert wait_until(rest), "slots stay taken after everybody has gone"
    vandal.engine.client.close()
    assert service.terminate() == 0
    assert "Traceback" not in service.log, service.log


def check_disk(path: Path) -> None:
    """Open what the service left, and check every byte of every document and the whole of the books."""
    engine = DirectEngine(path / "nowhere")
    with TieredCache(small_config(path), engine.oracle.layout, engine.oracle.namespace) as cache:
        for document in (*range(DOCUMENTS), *range(RESERVED, RESERVED + 50)):
            tokens = engine.tokens(document, LONGEST_PROMPT)
            loaded = cache.load(tokens).result()
            engine.oracle.check(tokens, loaded.num_tokens, loaded.kv)
        assert cache.check_integrity() == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_30_random_faults(make_service: MakeService) -> None:
    service = make_service({"storage.cpu.verify_on_hit": True})
    play(service, 30, seed=1)
    check_disk(service.disk)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_500_random_faults(make_service: MakeService) -> None:
    service = make_service({"storage.cpu.verify_on_hit": True})
    play(service, 500, seed=random.randrange(1 << 30))
    check_disk(service.disk)
