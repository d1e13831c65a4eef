"""Another cache in the same rounds: a child process in its own virtualenv that does the same work and says how long it took.

Requests and answers are JSON objects, one a line, one answer for each request, on the child's stdin and stdout (its log goes to
stderr). The child makes its own KV and token ids: only sizes and times cross the pipe.

    {"op": "hello"}                                   → {"name": "Peer 1.2", "variants": {"cpu": ["in-process"], "disk": […], "redis": […], "lookup": […]}}
    {"op": "open", "shape": {"num_layers": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", "chunk_tokens": 256},
     "chunks": 8, "directory": "…", "endpoint": "…"}  → {}                  one shape at a time; opening another closes the last;
                                                                            endpoint: host:port of a Redis server, if there is one
    {"op": "store", "tier": "cpu", "variant": "…"}    → {"seconds": .021}   so many chunks it does not have, until they are kept
    {"op": "load", "tier": "disk", "variant": "…"}    → {"seconds": .064}   those it stored last; from disk with the page cache dropped
    {"op": "lookup", "variant": "…", "tokens": 131072, "hit": true} → {"seconds": .0026}   every chunk hits, or the first does not
    {"op": "close"}                                   → {}                  the child ends

What it can't do it answers with {"error": "…"}; that variant is left out of the run, and a note says so.
"""

from __future__ import annotations

import json
import queue
import shlex
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol, Self

from kvtiers.model.errors import DeadlineExceeded, KvtiersError
from kvtiers.ops.bench.shapes import Shape

_START_DEADLINE_S: Final = 120.0
_CALL_DEADLINE_S: Final = 120.0
_END_DEADLINE_S: Final = 10.0
_LONGEST_LINE: Final = 1 << 20
SCRIPT: Final = Path("benchmarks/peers/lmcache_worker.py")
"""What `--peer PYTHON` runs, below the current directory: a checkout has it, an installed package has not."""
PYTHON: Final = Path(".venv-peer/bin/python")
"""Where a checkout keeps the peer's virtualenv."""


def installed_peer() -> str | None:
    """The peer of the checkout that is the current directory, if it is there."""
    return shlex.join([str(PYTHON), str(SCRIPT)]) if PYTHON.exists() and SCRIPT.exists() else None


class PeerFailed(KvtiersError):
    """The peer can't do it, has ended, or answers something that makes no sense."""


class Peer(Protocol):
    """Another cache. Every call returns the seconds it took. Raises PeerFailed, DeadlineExceeded."""

    name: str

    def variants(self, subject: str) -> tuple[str, ...]:
        """Its ways to do "cpu", "disk", "redis" or "lookup"; empty if it has none."""
        ...

    def open(self, shape: Shape, chunks: int, directory: Path, *, endpoint: str = "") -> None:
        """Make ready for prompts of so many chunks. `endpoint`: of the server that "redis" is about."""
        ...

    def store(self, tier: str, variant: str) -> float:
        """A new prompt, until it is kept in that tier."""
        ...

    def load(self, tier: str, variant: str) -> float:
        """The prompt stored last; from "disk" with the page cache dropped, from "redis" with nothing in its memory."""
        ...

    def lookup(self, variant: str, tokens: int, *, hit: bool) -> float:
        """A prompt of so many tokens of which every chunk hits, or the first one does not."""
        ...


class PeerProcess:
    """A `Peer` behind a pipe. Use it in a `with`; one thread calls."""

    def __init__(self, command: str) -> None:
        """`command`: the peer's Python, which then runs `SCRIPT`, or a whole command line."""
        arguments = shlex.split(command)
        if len(arguments) == 1 and Path(arguments[0]).name.startswith("python"):
            arguments.append(str(SCRIPT))
        try:
            self._process = subprocess.Popen(  # noqa: S603 - the operator's own command
                arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
        except (OSError, IndexError) as error:
            raise PeerFailed(
                f"--peer {command}: can't be started: {error}; --peer none leaves it out"
            ) from error
        self._lines: queue.Queue[str] = queue.Queue(maxsize=16)
        self._says_no_more = False
        threading.Thread(target=self._read, name="bench-peer", daemon=True).start()
        try:
            hello = self._ask({"op": "hello"}, _START_DEADLINE_S)
            self.name = str(hello["name"])
            self._variants: Mapping[str, list[str]] = hello["variants"]
        except KeyError as error:
            self.close()
            raise PeerFailed(f"--peer {command}: its first answer has no {error}") from error
        except BaseException:
            self.close()
            raise

    def variants(self, subject: str) -> tuple[str, ...]:
        return tuple(self._variants.get(subject, ()))

    def open(self, shape: Shape, chunks: int, directory: Path, *, endpoint: str = "") -> None:
        fields = {
            "num_layers": shape.layout.num_layers,
            "num_kv_heads": shape.layout.num_kv_heads,
            "head_dim": shape.layout.head_dim,
            "dtype": shape.layout.dtype,
            "chunk_tokens": shape.chunk_tokens,
        }
        request = {"op": "open", "shape": fields, "chunks": chunks, "directory": str(directory)}
        self._ask({**request, "endpoint": endpoint})

    def store(self, tier: str, variant: str) -> float:
        return self._seconds({"op": "store", "tier": tier, "variant": variant})

    def load(self, tier: str, variant: str) -> float:
        return self._seconds({"op": "load", "tier": tier, "variant": variant})

    def lookup(self, variant: str, tokens: int, *, hit: bool) -> float:
        return self._seconds({"op": "lookup", "variant": variant, "tokens": tokens, "hit": hit})

    def close(self) -> None:
        """Ask it to end, then end it. Idempotent."""
        if self._process.poll() is None:
            if not self._says_no_more:
                with suppress(KvtiersError):
                    self._ask({"op": "close"}, _END_DEADLINE_S)
            try:
                self._process.wait(_END_DEADLINE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        try:
            while line := stdout.readline(_LONGEST_LINE):
                self._lines.put(line, timeout=_CALL_DEADLINE_S)
        except (ValueError, OSError, queue.Full) as error:
            sys.stderr.write(f"the peer's answers can't be read any more: {error}\n")
        with suppress(queue.Full):
            self._lines.put("", timeout=_CALL_DEADLINE_S)

    def _ask(self, request: Mapping[str, Any], deadline_s: float = _CALL_DEADLINE_S) -> dict[str, Any]:
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = self._lines.get(timeout=deadline_s)
        except (OSError, ValueError) as error:
            raise PeerFailed(f"the peer has ended: {error}") from error
        except queue.Empty:
            self._process.kill()  # a late answer would be taken for the next one's
            raise DeadlineExceeded(
                f"the peer had not answered {request['op']} after {deadline_s:.0f} s"
            ) from None
        self._says_no_more = not line
        try:
            answer = json.loads(line)
        except ValueError:
            what = (
                f"wrote {line[:80]!r}, which is no JSON" if line else "has ended; what it said stands above"
            )
            raise PeerFailed(f"the peer {what}") from None
        if not isinstance(answer, dict) or "error" in answer:
            raise PeerFailed(f"the peer can't {request['op']}: {answer!r}")
        return answer

    def _seconds(self, request: Mapping[str, Any]) -> float:
        try:
            return float(self._ask(request)["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise PeerFailed(f"the peer's answer to {request['op']} has no seconds") from error
