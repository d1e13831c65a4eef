"""Time to first token of vLLM's OpenAI server: without a cache, with its own, with kvtiers from memory, disk and after restarts.

    .venv-vllm/bin/python -m benchmarks.vllm.ttft --model DIR [--rounds 9] [--peer] [--output DIR]

A chat of two turns over a document: a question, 16 tokens of an answer, another question. Documents are cuts of this repository's own
texts, of random length; each round has a new one, and every contestant gets the same, in an order that turns round. Every TTFT is of
one streamed request on an idle server; of what can be repeated within a round the median of three. `--peer`: LMCache's connector too, where it is installed in the same environment (lmcache, aiofile,
aiofiles, caio, nvtx, opentelemetry-exporter-prometheus and sortedcontainers, with `--no-deps`). Afterwards a
mixed load with and without the connector, and the time that the engine's threads spent in the connector.

A hit is held against what it could take: the engine without connector, with as many tokens in its own prefix cache as the hit gave, so
that both compute the same ones, and the hit's bytes at the rate of the tier, measured beside.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from benchmarks.vllm.report import Answers, table
from benchmarks.vllm.servers import Answer, Server, beside, vllm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PORTS = {"none": 18101, "kvtiers": 18102, "lmcache": 18103}
PEER_PORT = 18155
CHUNK = 256
BLOCK_POOL_TOKENS = (1 << 30) // 46_080
"""What a server's blocks hold, of SmolLM2-135M in float32."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("bench-output"))
    parser.add_argument("--chunk", type=int, default=CHUNK)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kvt-"))
    try:
        report = Benchmark(folder, options.model, options.rounds, options.chunk, peer=options.peer).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "vllm_ttft.json").write_text(json.dumps(report, indent=1))
    print(table(report))


class Benchmark:
    """Servers, and rounds over them."""

    def __init__(self, folder: Path, model: Path, rounds: int, chunk: int, *, peer: bool) -> None:
        self.folder, self.model, self.rounds, self.chunk, self.peer = folder, model, rounds, chunk, peer
        self.socket = folder / "n.sock"
        self.answers: Answers = {}
        self.second_turns: dict[str, str] = {}
        """Second turns by first."""
        self.documents = documents(random.Random(7))
        self.asked: list[str] = []

    def run(self) -> dict[str, Any]:
        with ExitStack() as undo:
            undo.enter_context(self.service())
            none = undo.enter_context(started(vllm("none", PORTS["none"], self.model, self.folder, None)))
            ours = undo.enter_context(started(self.ours()))
            servers = [none, ours]
            contestants: list[Callable[[str], None]] = [
                lambda text: self.without(none, text),
                lambda text: self.with_kvtiers(ours, text),
            ]
            if self.peer:
                undo.enter_context(self.peer_service())
                theirs = undo.enter_context(started(self.theirs()))
                contestants.append(lambda text: self.with_peer(theirs, text))
                servers.append(theirs)
            for server in servers:
                touch_all_blocks(server)
            for number in range(-1, self.rounds):
                text = next(self.documents)
                for one in contestants[:: -1 if number % 2 else 1]:
                    one(text)
                if number < 0:
                    self.answers.clear()  # the warm-up
                else:
                    self.asked.append(self.second_turns[text])
                    told = next(reversed(self.answers.values()))[-1]
                    print(f"round {number + 1} of {self.rounds}: {told.tokens} tokens", file=sys.stderr)
            throughput = self.mixed_load({"none": none, "kvtiers": ours})
            per_token = ours.metric("vllm:kvtiers_load_bytes_total") / ours.metric(
                "vllm:kvtiers_loaded_tokens_total"
            )
            rates = {"memory": copy_rate(), "disk": read_rate(self.folder / "disk")}
            threads = self.engine_threads()
        with self.service(), started(self.ours()) as again:
            again.ask("A first request warms the engine up, whatever it says. " * 40)
            for text in self.asked:
                self.note("kvtiers, both restarted", again.ask(text))
        return {
            "answers": {
                name: [answer._asdict() for answer in answers] for name, answers in self.answers.items()
            },
            "chunk_tokens": self.chunk,
            "bytes_per_token": per_token,
            "bytes_per_s": rates,
            "throughput_tokens_per_s": throughput,
            "engine_threads": threads,
        }

    # --- contestants ---

    def without(self, server: Server, text: str) -> None:
        server.reset()
        second = self.first_turn(server, "no connector", text)
        self.note("no connector, second turn, warm", server.ask(second))
        server.reset()
        self.note("no connector, second turn, cold", server.ask(second))
        tokens = server.tokenize(second)

        def whole_chunks() -> Answer:
            server.reset()
            server.ask(tokens[: (len(tokens) - 1) // self.chunk * self.chunk])
            return server.ask(second)

        self.note("no connector, second turn, whole chunks warm", middle(whole_chunks))

    def with_kvtiers(self, server: Server, text: str) -> None:
        server.reset()
        second = self.first_turn(server, "kvtiers", text)
        self.note("kvtiers, second turn, warm", server.ask(second))
        settle()

        def hit() -> Answer:
            server.reset()
            answer = server.ask(second)
            settle()
            return answer

        def hit_on_disk() -> Answer:
            self.evict()
            return hit()

        self.note("kvtiers, from CPU memory", middle(hit))
        self.note("kvtiers, from disk", middle(hit_on_disk))

    def with_peer(self, server: Server, text: str) -> None:
        server.reset()
        second = self.first_turn(server, "LMCache", text)
        server.ask(second)
        settle()

        def hit() -> Answer:
            server.reset()
            answer = server.ask(second)
            settle()
            return answer

        self.note("LMCache, from CPU memory", middle(hit))

    def first_turn(self, server: Server, name: str, text: str) -> str:
        """The second turn's prompt: all contestants have the same, as they answer the same."""
        answer = server.ask(text, 16)
        self.note(f"{name}, first turn, cold", answer)
        second = f"{text}{answer.text}\n\nQuestion: what else does it say?\nAnswer:"
        if self.second_turns.setdefault(text, second) != second:
            raise RuntimeError(f"{name} answered something else than the others")
        return second

    def note(self, name: str, answer: Answer) -> None:
        self.answers.setdefault(name, []).append(answer)

    # --- what runs ---

    def ours(self) -> Server:
        times = self.folder / "times"
        times.mkdir(exist_ok=True)
        connector = {
            "kv_connector": "TimedConnector",
            "kv_connector_module_path": "timed_connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"config": str(self.config()), "socket": str(self.socket)},
        }
        return vllm(
            "kvtiers",
            PORTS["kvtiers"],
            self.model,
            self.folder,
            connector,
            PYTHONPATH=str(HERE),
            KVTIERS_TIMES=str(times),
        )

    def theirs(self) -> Server:
        connector = {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": PEER_PORT},
        }
        return vllm("lmcache", PORTS["lmcache"], self.model, self.folder, connector)

    def config(self) -> Path:
        file = self.folder / "config.yaml"
        disk = {"enabled": True, "path": str(self.folder / "disk"), "max_size": "4Gi", "min_free_space": 0}
        tree = {"storage": {"chunk_tokens": self.chunk, "cpu": {"buffer_size": "2Gi"}, "disk": disk}}
        file.write_text(yaml.safe_dump(tree))
        return file

    @contextmanager
    def service(self) -> Iterator[None]:
        command = [sys.executable, "-m", "kvtiers", "serve", "--config", str(self.config())]
        command += ["--socket", str(self.socket), "--no-http"]
        log = self.folder / "service.log"
        with beside(command, log) as process:
            for _ in range(600):
                if self.socket.exists() or process.poll() is not None:
                    break
                time.sleep(0.1)
            if not self.socket.exists():
                raise RuntimeError(f"the service did not start: {log.read_text()[-3000:]}")
            yield

    @contextmanager
    def peer_service(self) -> Iterator[None]:
        server = str(Path(sys.executable).with_name("lmcache"))
        command = [
            server,
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(PEER_PORT),
            "--chunk-size",
            str(self.chunk),
        ]
        command += [
            "--l1-size-gb",
            "2",
            "--eviction-policy",
            "LRU",
            "--supported-transfer-mode",
            "engine_driven",
        ]
        log = self.folder / "lmcache-server.log"
        with beside(command, log) as process:
            time.sleep(15)
            if process.poll() is not None:
                raise RuntimeError(f"LMCache's server has ended: {log.read_text()[-3000:]}")
            yield

    def evict(self) -> None:
        command = [
            sys.executable,
            "-m",
            "kvtiers",
            "evict",
            "cpu",
            "--target-usage",
            "0",
            "--socket",
            str(self.socket),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=60)  # noqa: S603 - our own

    # --- the rest ---

    def mixed_load(self, servers: dict[str, Server]) -> dict[str, list[float]]:
        """Tokens computed and generated a second: four clients, new documents and old ones, in turns."""
        rates: dict[str, list[float]] = {name: [] for name in servers}
        for number in range(3):
            texts = [next(self.documents) for _ in range(8)]
            for name in list(servers)[:: -1 if number % 2 else 1]:
                rates[name].append(load(servers[name], texts))
        return rates

    def engine_threads(self) -> dict[str, Any]:
        """Of each process that had the connector: seconds in it by method, and calls."""
        found = {}
        for file in sorted((self.folder / "times").glob("*.json")):
            record = json.loads(file.read_text())
            record["total_s"] = sum(seconds for seconds, _ in record["spent"].values())
            found[file.stem] = record
        return found


def load(server: Server, texts: list[str]) -> float:
    """Prompt and generated tokens a second of four clients at once; each text is asked twice."""
    server.reset()
    waiting, lock, tokens = [*texts, *texts], threading.Lock(), [0]

    def work() -> None:
        while True:
            with lock:
                if not waiting:
                    return
                text = waiting.pop(0)
            answer = server.ask(text, 16)
            with lock:
                tokens[0] += answer.tokens + 16

    began = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tokens[0] / (time.perf_counter() - began)


@contextmanager
def started(server: Server) -> Iterator[Server]:
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


def touch_all_blocks(server: Server) -> None:
    """Memory is given to a process when it first writes there (3 GB/s here, a copy of what it has: 11): not in what is measured."""
    for number in range(BLOCK_POOL_TOKENS // 2000 + 1):
        server.ask([100 + (number * 2000 + place) % 40_000 for place in range(2000)])
    server.reset()


def middle(ask: Callable[[], Answer]) -> Answer:
    """The one of three that took neither the longest nor the shortest."""
    return sorted((ask() for _ in range(3)), key=lambda answer: answer.ttft)[1]


def settle() -> None:
    """Background copies and writes end; nobody competes with the next request."""
    time.sleep(1.0)


def documents(rng: random.Random) -> Iterator[str]:
    """Cuts of this repository's pages, 600 to 2,800 tokens or so, and a question."""
    text = "\n".join(file.read_text() for file in sorted((ROOT / "docs").rglob("*.md")))
    words = text.split(" ")
    number = 0
    while True:
        number += 1
        length, begin = rng.randint(350, 1500), rng.randrange(len(words) - 1600)
        cut = " ".join(words[begin : begin + length])
        yield f"Document {number}.\n{cut}\n\nQuestion: what is this about?\nAnswer:"


def copy_rate() -> float:
    """Bytes a second that one thread copies in memory: the best of five."""
    source, target = np.ones(1 << 27, np.uint8), np.ones(1 << 27, np.uint8)
    return max(source.nbytes / timed(lambda: np.copyto(target, source)) for _ in range(5))


def read_rate(disk: Path) -> float:
    """Bytes a second of the records that lie there, read past the page cache, one after another."""
    files = [file for file in disk.rglob("*.kv") if file.stat().st_size % 4096 == 0]
    buffer = mmap.mmap(-1, max(file.stat().st_size for file in files))

    def read() -> None:
        for file in files:
            fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
            try:
                while os.readv(fd, [buffer]) == len(buffer):
                    pass
            finally:
                os.close(fd)

    return sum(file.stat().st_size for file in files) / timed(read)


def timed(act: Callable[[], object]) -> float:
    """Seconds it takes."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
