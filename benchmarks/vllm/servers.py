"""vLLM's OpenAI servers and what stands beside them, started by the benchmark and ended by it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx

_READY_S = 240.0
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "LMCACHE_TRACK_USAGE": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    "VLLM_SERVER_DEV_MODE": "1",  # for /reset_prefix_cache
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class Answer(NamedTuple):
    """Of one streamed request."""

    ttft: float
    """Seconds to the first token."""
    tokens: int
    """Of the prompt."""
    cached: int
    """Of these, not computed."""
    text: str


@dataclass
class Server:
    """One of vLLM's."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    model: str
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=300))

    def wait_ready(self) -> None:
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.name} ended: {self.log.read_text()[-3000:]}")
            try:
                if self.client.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.5)
        raise RuntimeError(f"{self.name} did not start: {self.log.read_text()[-3000:]}")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def tokenize(self, prompt: str) -> list[int]:
        """A prompt's tokens."""
        answer = self.client.post(f"{self.url}/tokenize", json={"model": self.model, "prompt": prompt})
        return list(answer.raise_for_status().json()["tokens"])

    def ask(self, prompt: str | list[int], max_tokens: int = 1) -> Answer:
        """One request, to its end."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        began, first, text = time.perf_counter(), 0.0, ""
        usage: dict[str, Any] = {}
        with self.client.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if event["choices"]:
                    first = first or time.perf_counter() - began
                    text += event["choices"][0]["text"]
                usage = event.get("usage") or usage
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Answer(first, usage["prompt_tokens"], cached, text)

    def reset(self) -> None:
        """Empty the engine's own prefix cache."""
        for _ in range(100):
            if self.client.post(f"{self.url}/reset_prefix_cache").status_code == 200:
                return
            time.sleep(0.1)
        raise RuntimeError(f"{self.name}: its prefix cache is in use")

    def metric(self, name: str) -> float:
        """The sum of one metric's series."""
        lines = self.client.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def stop(self) -> None:
        self.client.close()
        end(self.process)


def vllm(
    name: str, port: int, model: Path, folder: Path, connector: dict[str, Any] | None, **environment: str
) -> Server:
    """Start one; `wait_ready` waits for it."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "4096", "--max-num-batched-tokens", "4096", "--disable-uvicorn-access-log"]
    command += ["--enable-prompt-tokens-details"]
    if connector is not None:
        command += ["--kv-transfer-config", json.dumps(connector)]
    log = folder / f"{name}.log"
    return Server(name, port, _begin(command, log, environment), log, str(model))


@contextmanager
def beside(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Some other process, ended at the end."""
    process = _begin(command, log, environment)
    try:
        yield process
    finally:
        end(process)


def _begin(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(  # noqa: S603 - our own
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **ENVIRONMENT, **environment},
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """In order, within a minute."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
