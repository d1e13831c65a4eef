"""How long a batch of 512 keys takes from the client's post to its answer: idle, and under load.

    .venv/bin/python benchmarks/node_latency.py

An engine of this process stages 512 chunks of SmolLM2-135M that lie in memory, again and again, each time as one batch beside a
step's other messages, and looks for the answer ten times a millisecond. Under load a second engine (a process of its own) that steps
every 5 ms stores 8 new chunks and loads 8 in every step, copies both ways included; the disk takes what it can of that, the CPU tier
evicts, and the metrics are scraped ten times a second. Time is what the client sees; it never waits: a
real engine takes the answer at its next step. Beside it stands what the machine takes for as many bytes there and back: a process
that sends back what it receives, idle and beside the same load, asked in the same turns.
"""

from __future__ import annotations

import argparse
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import numpy as np

from kvtiers.model.layout import KVLayout
from kvtiers.testing.direct_engine import DirectEngine
from kvtiers.testing.service_process import ServiceProcess

KEYS = 512
SMOLLM2 = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16")
CHUNK = 256  # 5.6 MiB a chunk
NEIGHBOURS_CHUNKS = 8
NEIGHBOURS_STEP_S = 0.005
_NEIGHBOUR = """
import sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
from node_latency import neighbour
neighbour(Path({socket!r}), {url!r})
"""


_ECHO = """
import socket, sys
with socket.socket(fileno=int(sys.argv[1])) as pipe:
    while data := pipe.recv(1 << 16):
        pipe.sendall(data)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=200, help="in each round")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kvt-"))
    service = ServiceProcess(
        folder,
        {
            "storage.chunk_tokens": CHUNK,
            "storage.cpu.buffer_size": "5Gi",
            "storage.disk.max_size": "16Gi",
            "observability.metrics_port": 0,
        },
        http=True,
    )
    try:
        service.start()
        url = re.search(r"metrics and API on (http://\S+)", service.log)
        assert url is not None, service.log
        measure(service.socket, url[1], options.rounds, options.batches)
    finally:
        service.kill()
        shutil.rmtree(folder)


def measure(path: Path, url: str, rounds: int, batches: int) -> None:
    engine = DirectEngine(path, "measured", layout=SMOLLM2, chunk_tokens=CHUNK).connect()
    tokens = engine.tokens(1, KEYS)
    for end in range(32, KEYS + 1, 32):
        store_anything(engine, tokens[: end * CHUNK])
    keys = engine.oracle.keys(tokens)
    times: dict[str, list[float]] = {
        name: [] for name in ("idle", "  echo", "under load", "  echo, under load")
    }
    ours, theirs = socket.socketpair()
    with subprocess.Popen([sys.executable, "-c", _ECHO, str(theirs.fileno())], pass_fds=[theirs.fileno()]):  # noqa: S603 - ourselves
        theirs.close()
        for _ in range(rounds):
            wait_until_idle(url)
            times["idle"] += batch_times(engine, keys, batches)
            times["  echo"] += echo_times(ours, batches)
            script = _NEIGHBOUR.format(here=str(Path(__file__).parent), socket=str(path), url=url)
            with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:  # noqa: S603 - ourselves
                try:
                    assert child.stdout is not None
                    child.stdout.readline()  # it is at work
                    times["under load"] += batch_times(engine, keys, batches)
                    times["  echo, under load"] += echo_times(ours, batches)
                finally:
                    child.kill()
        ours.close()
    engine.client.close()
    show(times)


def show(times: dict[str, list[float]]) -> None:
    for name, seconds in times.items():
        milliseconds = sorted(1000 * one for one in seconds)
        p50, p99 = statistics.median(milliseconds), milliseconds[int(len(milliseconds) * 0.99)]
        print(
            f"{name:18}  p50 {p50:6.2f} ms  p99 {p99:6.2f} ms  max {milliseconds[-1]:6.2f} ms  n={len(seconds)}"
        )


def batch_times(engine: DirectEngine, keys: list, batches: int) -> list[float]:  # type: ignore[type-arg]
    times = []
    for _ in range(batches):
        started = time.perf_counter()
        load = engine.client.stage(engine.space, keys, deadline=time.monotonic() + 5)
        engine.client.step()
        while not load.done:
            time.sleep(0.0001)
            engine.client.step()
        times.append(time.perf_counter() - started)
        assert load.num_chunks == KEYS, load.stopped_by
        engine.client.release(load)
        time.sleep(0.002)
    return times


def echo_times(pipe: socket.socket, batches: int) -> list[float]:
    """As many bytes as a batch and its answer are about, looked for as often."""
    pipe.setblocking(False)
    data, times = bytes(KEYS * 32), []
    for _ in range(batches):
        started = time.perf_counter()
        pipe.sendall(data)
        missing = len(data)
        while missing:
            time.sleep(0.0001)
            try:
                missing -= len(pipe.recv(missing))
            except BlockingIOError:
                continue
        times.append(time.perf_counter() - started)
        time.sleep(0.002)
    return times


def wait_until_idle(url: str) -> None:
    """Until what the neighbour has stored is on the disk."""
    with httpx.Client() as client:
        while client.get(f"{url}/api/v1/async/status").raise_for_status().json()["queue_size"]:
            time.sleep(0.05)
        time.sleep(0.5)


def scrape(url: str) -> None:
    """As a Prometheus in a hurry does."""
    with httpx.Client() as client:
        while True:
            client.get(f"{url}/metrics").raise_for_status()
            time.sleep(0.1)


def neighbour(socket: Path, url: str) -> None:
    """The second engine: new documents all the time, each written to the disk, old ones read back. And a scraper."""
    threading.Thread(target=scrape, args=(url,), daemon=True).start()
    engine = DirectEngine(socket, "neighbour", layout=SMOLLM2, chunk_tokens=CHUNK).connect()
    print("at work", flush=True)
    out = np.empty(engine.part_bytes, np.uint8)
    for document in range(1_000_000):
        store_anything(engine, engine.tokens(document, NEIGHBOURS_CHUNKS))
        again = engine.stage(engine.tokens(max(0, document - 20), NEIGHBOURS_CHUNKS))
        for row in range(again.num_chunks):
            np.copyto(out, engine.slots(again, row)[0])
        engine.client.release(again)
        engine.client.step()
        time.sleep(NEIGHBOURS_STEP_S)


def store_anything(engine: DirectEngine, tokens: list[int]) -> None:
    """Whatever the bytes are: nobody checks them here."""
    store = engine.open_store(tokens)
    kv = np.empty(engine.part_bytes, np.uint8)
    for row in range(len(store.indices)):
        np.copyto(engine.slots(store, row)[0], kv)
    engine.client.commit(store)
    engine.client.step()


if __name__ == "__main__":
    main()
