"""Real vLLM engines in processes of their own, each with a journal of the blocks and bytes that its connector moved.

pytest itself needs no vLLM: the engines run in the Python that has it, `.venv-vllm` or the one pytest runs in. An engine takes half a
minute to start, so there is one for each configuration, and every test has prompts of its own.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import pytest

from kvtiers.testing.chaos import wait_until
from kvtiers.testing.service_process import ServiceProcess

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BLOCK = 32
CHUNK = 64
STARTS_WITHIN_S = 300.0
PATIENCE_S = 120.0
TOLD = 20_000
"""Letters of a log that a test which fails shows."""
TOLD_EVENTS = ("request", "allocated", "staged", "filled", "opened", "kept", "counts")
FAST: dict[str, Any] = {
    "dtype": "float32",  # bf16 is several times slower on most CPUs, and has near ties
    "enforce_eager": True,
    "block_size": BLOCK,
    "max_model_len": 512,
    "max_num_batched_tokens": 128,  # every longer prompt is computed in several steps
    "num_gpu_blocks_override": 24,
    "disable_log_stats": False,
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "vllm: starts more vLLM engines than `make test` has time for")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starting engines is part of the first test that needs them."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(1200))


_services: Final[list[ServiceProcess]] = []
_engines: Final[list[Engine]] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails says what every service and engine of the session thinks, as it may not fail again for weeks."""
    report = yield
    if report.failed and call.when == "call" and HERE in item.path.parents:
        report.sections += [section for service in _services for section in told_by_service(service)]
        report.sections += [section for engine in _engines for section in told_by_engine(engine)]
    return report


def told_by_service(service: ServiceProcess) -> list[tuple[str, str]]:
    """The end of its log, and its statistics."""
    name = service.disk.parent.name
    sections = [(f"log of service {name}", service.log[-TOLD:])]
    if service.exit_code is not None:
        return [*sections, (f"service {name} has ended", f"exit code {service.exit_code}")]
    try:
        stats = json.dumps(service.stats(timeout=5.0), indent=1)
    except AssertionError as error:
        stats = str(error)
    return [*sections, (f"statistics of service {name}", stats)]


def told_by_engine(engine: Engine) -> list[tuple[str, str]]:
    """The end of its log, and what its connector did, without the bytes."""
    told = [
        json.dumps({name: value for name, value in event.items() if name not in ("hashes", "sums")})
        for event in engine.events(*TOLD_EVENTS)[-100:]
    ]
    return [
        (f"log of engine {engine.label}", engine.log[-TOLD:]),
        (f"what the connector of engine {engine.label} did", "\n".join(told)),
    ]


class Answer(NamedTuple):
    """What an engine made of a prompt."""

    name: str
    tokens: tuple[int, ...]
    cached: int
    """Tokens of the prompt that were not computed."""


class Engine:
    """`engine_child.py`, running."""

    def __init__(self, python: Path, model: Path, label: str, folder: Path, **options: Any) -> None:
        self.label = label
        self.journal = folder / "journal" / label
        self.journal.mkdir(parents=True)
        self._log = folder / f"{label}.log"
        self._calls = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._arrived: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        environ = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",  # threads that wait for each other at every layer crawl where engines share cores
            "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT / 'src'}",
            "KVTIERS_TEST_JOURNAL": str(self.journal),
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [python, HERE / "engine_child.py", json.dumps({**FAST, "model": str(model), **options})],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environ,
                process_group=0,  # so that `kill` ends all of its processes; a session would starve the service: docs/decisions/vllm.md
            )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        _engines.append(self)

    def wait_ready(self) -> Engine:
        """Wait until it takes prompts."""
        self.answer(0, STARTS_WITHIN_S)
        return self

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._arrived.put(json.loads(line))
        self._arrived.put(None)

    @property
    def log(self) -> str:
        """What it wrote."""
        return self._log.read_text(errors="replace")

    def ask(self, do: str, **values: Any) -> int:
        """Send a command; the number that `answer` takes."""
        self._calls += 1
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"call": self._calls, "do": do, **values}) + "\n")
        self._process.stdin.flush()
        return self._calls

    def answer(self, call: int, timeout: float = PATIENCE_S) -> dict[str, Any]:
        """Wait for a command's answer. AssertionError with the end of the engine's log if there is none."""
        deadline = time.monotonic() + timeout
        while call not in self._answers:
            try:
                found = self._arrived.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no answer in {timeout:.0f} s\n{self.log[-8000:]}") from None
            assert found is not None, f"the engine has ended\n{self.log[-8000:]}"
            self._answers[found["call"]] = found
        found = self._answers.pop(call)
        assert "error" not in found, f"{found['error']}\n{self.log[-8000:]}"
        return found

    def begin(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int = 8,
        salt: str | None = None,
        wishes: Mapping[str, Any] | None = None,
        adapter: Mapping[str, Any] | None = None,
    ) -> tuple[str, int]:
        """Send a prompt; its name, and the number that `end` takes. `adapter`: `number` and `path` of a LoRA adapter."""
        name = f"{self.label}-{self._calls + 1}"
        return name, self.ask(
            "generate",
            name=name,
            prompt=list(prompt),
            max_tokens=max_tokens,
            salt=salt,
            wishes=wishes,
            adapter=adapter,
        )

    def end(self, begun: tuple[str, int]) -> Answer:
        """Wait for what was begun, to its last token."""
        found = self.answer(begun[1])
        assert not found.get("aborted"), found
        return Answer(begun[0], tuple(found["tokens"]), found["cached"])

    def generate(self, *prompts: Sequence[int], **options: Any) -> list[Answer]:
        """All of them together; returns when what is kept of them lies in the cache."""
        begun = [self.begin(prompt, **options) for prompt in prompts]
        answers = [self.end(one) for one in begun]
        self.settle()
        return answers

    def reset(self, *, connector: bool = False) -> bool:
        """vLLM's own prefix cache, and the connector's on request."""
        return bool(self.answer(self.ask("reset", connector=connector))["reset"])

    def metric(self, name: str) -> float:
        """A counter or gauge of vLLM's /metrics."""
        return float(self.answer(self.ask("metrics"))["metrics"].get(name, 0))

    def tokens(self, text: str) -> list[int]:
        """By the model's tokenizer."""
        return list(self.answer(self.ask("tokens", text=text))["tokens"])

    @property
    def pids(self) -> set[int]:
        """Of its processes that live."""
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.getpgid(int(folder.name)) == self._process.pid:
                    found.add(int(folder.name))
            except ProcessLookupError:
                continue
        return found

    def stop(self) -> None:
        """End it and all of its processes; by force if it does not go by itself."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            pass
        self.kill()

    def kill(self) -> None:
        """SIGKILL to every process of the engine."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait(PATIENCE_S)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._listener.join(PATIENCE_S)

    # --- the journal -----------------------------------------------------------------------------------------------------

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """In the order in which they happened."""
        lines = [
            line
            for file in self.journal.glob("*.jsonl")
            for line in file.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ]
        found = [event for event in map(json.loads, lines) if event["event"] in kinds]
        return sorted(found, key=lambda event: event["at"])

    def settle(self) -> None:
        """Wait until no store is under way."""
        if not self.events("offers"):
            return  # an engine without connector
        assert wait_until(lambda: self.events("offers")[-1]["count"] == 0, PATIENCE_S), "a store does not end"

    def hashes(self, answer: Answer) -> list[str]:
        """Of the prompt's whole blocks."""
        found = [event for event in self.events("request") if is_named(event, answer.name)]
        return list(found[-1]["hashes"])

    def steps(self, answer: Answer) -> list[int]:
        """Tokens computed of a request, step by step."""
        return [
            count
            for event in self.events("step")
            for name, count in event["tokens"].items()
            if name.startswith(f"{answer.name}-") or name == answer.name
        ]

    def loaded(self, name: str, ranks: int = 1) -> list[int]:
        """Places in the prompt of the blocks that were loaded for a request.

        AssertionError unless each was filled once by each rank, in the block that vLLM gave the request for that place, with the
        bytes that some engine's worker of that rank had read from a block with the same hash when it was stored.
        """
        kept = self._kept()
        hashes = [event["hashes"] for event in self.events("request") if is_named(event, name)][-1]
        given: list[int] = []
        places: dict[int, list[int]] = {}
        for event in self.events("allocated", "filled"):
            if not is_named(event, name):
                continue
            if event["event"] == "allocated":
                given = event["blocks"]
                continue
            for block, block_hash, checksum in zip(
                event["blocks"], event["hashes"], event["sums"], strict=True
            ):
                place = given.index(block)
                assert hashes[place] == block_hash, f"block {block} was filled with another one's KV"
                assert checksum in kept[event["rank"], block_hash], f"block {block} holds other bytes"
                places.setdefault(event["rank"], []).append(place)
        assert all(found == next(iter(places.values())) for found in places.values()), places
        assert not places or sorted(places) == list(range(ranks))
        first = places.get(0, [])
        assert len(set(first)) == len(first), "a block was filled twice"
        return first

    def stored(self, answer: Answer) -> list[int]:
        """Places in the prompt of the blocks that this engine has copied to the cache, under their hashes, so far."""
        kept = {block_hash for event in self.events("kept") for block_hash in event["hashes"]}
        return [place for place, block_hash in enumerate(self.hashes(answer)) if block_hash in kept]

    def _kept(self) -> dict[tuple[int, str], set[str]]:
        found: dict[tuple[int, str], set[str]] = {}
        for file in self.journal.parent.glob("*/*.jsonl"):
            for line in file.read_text().splitlines(keepends=True):
                event = json.loads(line) if line.endswith("\n") and '"kept"' in line else {}
                for block_hash, checksum in zip(event.get("hashes", ()), event.get("sums", ()), strict=True):
                    found.setdefault((event["rank"], block_hash), set()).add(checksum)
        return found

    # --- copies that wait ------------------------------------------------------------------------------------------------

    def hold(self, what: str) -> None:
        """Let the next copies wait: "filled" loads or "kept" stores."""
        (self.journal / f"at-{what}").unlink(missing_ok=True)
        (self.journal / f"hold-{what}").touch()

    def held(self, what: str) -> None:
        """Wait until a copy waits."""
        assert wait_until((self.journal / f"at-{what}").exists, PATIENCE_S), self.log[-4000:]

    def go_on(self, what: str) -> None:
        """End that."""
        (self.journal / f"hold-{what}").unlink(missing_ok=True)


def is_named(event: Mapping[str, Any], name: str) -> bool:
    """Whether it is about a request: vLLM appends something to its name."""
    return bool(event.get("request") == name or str(event.get("request")).startswith(f"{name}-"))


def transfer_config(socket: Path | None = None, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON argument of the guide, with the connector that keeps a journal."""
    storage = {"storage": {"chunk_tokens": CHUNK}, "async": {"load_timeout_ms": 20_000}}
    # a prompt takes half of these engines' few blocks, and all of it is to be stored
    extra: dict[str, Any] = {"config": config or storage, "max_pinned_share": 1.0}
    if socket is not None:
        extra["socket"] = str(socket)
    return {
        "kv_connector": "RecordingConnector",
        "kv_connector_module_path": "recording_connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The Python that has vLLM."""
    if find_spec("vllm") is not None:
        return Path(sys.executable)
    python = ROOT / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        pytest.skip("there is no .venv-vllm: `make test-vllm` builds it, and runs these tests and many more")
    return python


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """Short enough a path for sockets."""
    path = Path(tempfile.mkdtemp(prefix="kvt-vllm-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def connector() -> Callable[..., dict[str, Any]]:
    """`transfer_config`, for tests."""
    return transfer_config


MakeEngine: TypeAlias = Callable[..., Engine]


@pytest.fixture(scope="session")
def make_engine(vllm_python: Path, folder: Path) -> Iterator[MakeEngine]:
    """Engines; ended with the session, if they have not been before. Those of one `group` share what their loads are compared with."""
    made: list[Engine] = []

    def make(model: Path, *, group: str = "smollm2", **options: Any) -> Engine:
        made.append(Engine(vllm_python, model, f"e{len(made)}", folder / group, **options))
        return made[-1].wait_ready()

    yield make
    for engine in made:
        engine.stop()


@pytest.fixture(scope="session")
def make_session_service(folder: Path) -> Iterator[Callable[..., ServiceProcess]]:
    """`kvtiers serve` with a disk, started; killed with the session. A second argument: more settings, by dotted key."""
    made: list[ServiceProcess] = []

    def make(name: str, more: Mapping[str, Any] | None = None) -> ServiceProcess:
        (folder / name).mkdir(exist_ok=True)
        values = {
            "storage.chunk_tokens": CHUNK,
            "storage.cpu.buffer_size": "256Mi",
            "storage.disk.max_size": "4Gi",
            **(more or {}),
        }
        made.append(ServiceProcess(folder / name, values))
        _services.append(made[-1])
        made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.kill()


@pytest.fixture(scope="session")
def service(make_session_service: Callable[..., ServiceProcess]) -> ServiceProcess:
    """The one of SmolLM2's engines. Whoever ends it starts it again."""
    return make_session_service("s")


@pytest.fixture(scope="session")
def smollm2(vllm_python: Path) -> Path:
    """A real model."""
    code = "import sys; from kvtiers.ops.demo.model import obtain_model; print(obtain_model(lambda text: print(text, file=sys.stderr)))"
    done = subprocess.run([vllm_python, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def plain(make_engine: MakeEngine, smollm2: Path) -> Engine:
    """SmolLM2 without connector, computing everything: what every answer is compared with."""
    return make_engine(smollm2, enable_prefix_caching=False)


@pytest.fixture(scope="session")
def engine(make_engine: MakeEngine, smollm2: Path, service: ServiceProcess) -> Engine:
    """SmolLM2 with the connector."""
    return make_engine(smollm2, kv_transfer_config=transfer_config(service.socket))


@pytest.fixture(scope="session")
def make_second(make_engine: MakeEngine, smollm2: Path, service: ServiceProcess) -> Callable[[], Engine]:
    """Another of the same kind. A test that ends it calls `make_second.forget()`."""
    made: list[Engine] = []

    def make() -> Engine:
        if not made:
            made.append(make_engine(smollm2, kv_transfer_config=transfer_config(service.socket)))
        return made[-1]

    make.forget = made.clear  # type: ignore[attr-defined]
    return make


Text: TypeAlias = Callable[..., list[int]]


@pytest.fixture(scope="session")
def text(plain: Engine) -> Text:
    """`text(n)` is a prompt of real text; no two numbers have a prefix in common."""
    tokens = plain.tokens((ROOT / "LICENSE").read_text())
    handed: set[int] = set()

    def make(number: int, length: int = 300) -> list[int]:
        assert number not in handed, "another test has that text"
        handed.add(number)
        start = 41 * number
        assert start + length <= len(tokens)
        return tokens[start : start + length]

    return make


@pytest.fixture(scope="session")
def expected(plain: Engine) -> Callable[..., tuple[int, ...]]:
    """What the engine without connector answers to a prompt."""

    def answer(prompt: Sequence[int], **options: Any) -> tuple[int, ...]:
        return plain.generate(prompt, **options)[0].tokens

    return answer


@pytest.fixture(scope="session")
def reconnect_to() -> Callable[..., None]:
    """Let an engine make steps until all of its sides are connected to a service that is back."""

    def until(service: ServiceProcess, engine: Engine, before: int, ranks: int = 1) -> None:
        def connected() -> bool:
            engine.generate([5], max_tokens=1)
            return service.log.count("is connected") - before > ranks

        assert wait_until(connected, PATIENCE_S, every=0.1), service.log[-4000:]
        engine.generate([5], max_tokens=8)  # steps in which it hears of that

    return until


@pytest.fixture(scope="session")
def reconnect(service: ServiceProcess, reconnect_to: Callable[..., None]) -> Callable[[Engine, int], None]:
    """The same for SmolLM2's."""
    return lambda engine, before: reconnect_to(service, engine, before)
