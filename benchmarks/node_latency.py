"""How long a batch of 512 keys takes from the client's post to its answer: idle, and under load.

    .venv/bin/python benchmarks/node_latency.py

An engine of this process stages 512 chunks that lie in memory, again and again, each time as one batch beside a step's other
messages, and looks for the answer ten times a millisecond. Under load a second engine (a process of its own) stores, loads and
evicts, the disk takes its writes, and the metrics are scraped ten times a second. Time is what the client sees; it never waits: a real engine takes the answer at its next step.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

from kvtiers.model.layout import KVLayout
from kvtiers.testing.direct_engine import DirectEngine
from kvtiers.testing.service_process import ServiceProcess

KEYS = 512
LAYOUT = KVLayout(num_layers=4, num_kv_heads=2, head_dim=64, dtype="bfloat16")
CHUNK = 64  # 131,072 bytes a chunk
_NEIGHBOUR = """
import sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
from node_latency import neighbour
neighbour(Path({socket!r}), {url!r})
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
            "storage.cpu.buffer_size": "512Mi",
            "storage.disk.max_size": "4Gi",
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


def measure(socket: Path, url: str, rounds: int, batches: int) -> None:
    engine = DirectEngine(socket, "measured", layout=LAYOUT, chunk_tokens=CHUNK).connect()
    tokens = engine.tokens(1, KEYS)
    for end in range(64, KEYS + 1, 64):
        engine.store(tokens[: end * CHUNK])
    keys = engine.oracle.keys(tokens)
    idle: list[float] = []
    loaded: list[float] = []
    for _ in range(rounds):
        idle += batch_times(engine, keys, batches)
        script = _NEIGHBOUR.format(here=str(Path(__file__).parent), socket=str(socket), url=url)
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:  # noqa: S603 - ourselves
            try:
                assert child.stdout is not None
                child.stdout.readline()  # it is at work
                loaded += batch_times(engine, keys, batches)
            finally:
                child.kill()
    engine.client.close()
    for name, times in (("idle", idle), ("under load", loaded)):
        milliseconds = sorted(1000 * one for one in times)
        p50, p99 = statistics.median(milliseconds), milliseconds[int(len(milliseconds) * 0.99)]
        print(
            f"{name:10}  p50 {p50:6.2f} ms  p99 {p99:6.2f} ms  max {milliseconds[-1]:6.2f} ms  n={len(times)}"
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


def scrape(url: str) -> None:
    """As a Prometheus in a hurry does."""
    with httpx.Client() as client:
        while True:
            client.get(f"{url}/metrics").raise_for_status()
            time.sleep(0.1)


def neighbour(socket: Path, url: str) -> None:
    """The second engine: new documents all the time, each written to the disk, old ones read back. And a scraper."""
    threading.Thread(target=scrape, args=(url,), daemon=True).start()
    engine = DirectEngine(socket, "neighbour", layout=LAYOUT, chunk_tokens=CHUNK).connect()
    print("at work", flush=True)
    for document in range(1_000_000):
        tokens = engine.tokens(document, 32)
        store = engine.open_store(tokens)
        engine.client.commit(store)  # whatever lies there: nobody checks it
        again = engine.stage(engine.tokens(max(0, document - 40), 32))
        engine.client.release(again)


if __name__ == "__main__":
    main()
