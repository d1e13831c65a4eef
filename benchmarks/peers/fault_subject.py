"""A cache that faults are done to: a process with a directory, and what can be done to both from outside."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.peers.lmcache import WORKER, peer_python

from kvtiers.model.errors import DeadlineExceeded
from kvtiers.ops.bench.peer import PeerProcess
from kvtiers.ops.bench.shapes import Shape

_DATA_SUFFIXES: Final = (".kv", ".pt", ".data")
_END_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Subject:
    """One cache, or one of the peer's ways to keep KV on disk."""

    name: str
    python: Path
    worker: Path
    variant: str = ""

    def start(self, directory: Path, shape: Shape, chunks: int, *, file_system_bytes: int = 0) -> Running:
        """A process that has the directory open; with `file_system_bytes` it is a file system of its own. Raises PeerFailed."""
        directory.mkdir(parents=True, exist_ok=True)
        log = directory.with_suffix(".log")
        start = f"exec {shlex.join([str(self.python), str(self.worker)])} 2>>{shlex.quote(str(log))}"
        command = ["sh", "-c", start]
        if file_system_bytes:
            mount = f"mount -t tmpfs -o size={file_system_bytes},mode=700 tmpfs {shlex.quote(str(directory))}"
            command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f"{mount} && {start}"]
        running = Running(command, self.variant, directory)
        try:
            running.open(shape, chunks, directory)
        except BaseException:
            running.close()
            raise
        return running


def subjects() -> list[Subject]:
    """kvtiers, then LMCache's ways that need nothing but a directory."""
    ours = Subject("kvtiers", Path(sys.executable), Path(__file__).with_name("kvtiers_worker.py"))
    variants = ("in-process", "MP fs", "MP fs_native")
    return [ours, *(Subject(f"LMCache {name}", peer_python(), WORKER, name) for name in variants)]


@dataclass(frozen=True, slots=True)
class Served:
    """What a load from disk brought."""

    tokens: int
    wrong_chunks: int


class Running(PeerProcess):
    """The process. Prompts are numbers; every call has a deadline. Raises PeerFailed, DeadlineExceeded."""

    def __init__(self, command: list[str], variant: str, directory: Path) -> None:
        self._variant = variant
        self.directory = directory
        super().__init__(shlex.join(command))

    def keep(self, prompt: int, *, patience_s: float = 60.0) -> int:
        """Store it; how many of its tokens were on disk by then."""
        return int(self._ask(self._about(prompt, "keep", patience_s=patience_s))["tokens"])

    def serve(self, prompt: int) -> Served:
        """Load it with nothing of it left in memory."""
        answer = self._ask(self._about(prompt, "serve"))
        return Served(int(answer["tokens"]), int(answer["wrong_chunks"]))

    def state(self) -> dict[str, int]:
        """`unfinished` operations, `held_bytes` of memory that eviction can't free, `disk_bytes` it believes to use."""
        return {
            key: int(value) for key, value in self._ask({"op": "state", "variant": self._variant}).items()
        }

    def begin_to_keep(self, prompt: int) -> None:
        """Store it, and don't wait for the answer: only `kill` can follow."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(self._about(prompt, "keep", patience_s=60.0)) + "\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(_END_S)
        self.close()

    def seen_from_here(self, name: str) -> Path:
        """A file of its directory, if that is a file system only the process sees."""
        return Path(f"/proc/{self._process.pid}/root{self.directory}") / name

    def _about(self, prompt: int, operation: str, **more: Any) -> dict[str, Any]:
        return {"op": operation, "variant": self._variant, "prompt": prompt, **more}


def data_files(directory: Path) -> dict[Path, int]:
    """Files under final names, with their sizes in bytes."""
    return {file: size for file, size in _files(directory).items() if file.suffix in _DATA_SUFFIXES}


def other_files(directory: Path) -> set[Path]:
    """Files under any other name."""
    return _files(directory).keys() - data_files(directory).keys()


def flip_bit(file: Path) -> None:
    """One bit, in the middle."""
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        (byte,) = opened.read(1)
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 1]))


def fill(file: Path, leave_bytes: int) -> None:
    """Take all space of its file system but so much."""
    status = os.statvfs(file.parent)
    missing = status.f_bavail * status.f_frsize - leave_bytes
    with file.open("wb") as opened:
        os.posix_fallocate(opened.fileno(), 0, missing)


def wait_for_a_file(directory: Path, known: set[Path], patience_s: float) -> None:
    """Until there is another one, and something in it. Raises DeadlineExceeded."""
    deadline = time.monotonic() + patience_s
    while not any(size for file, size in _files(directory).items() if file not in known):
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"no file was begun in {patience_s:.0f} s")
        time.sleep(1e-4)


def _files(directory: Path) -> dict[Path, int]:
    found = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            file = Path(folder, name)
            try:
                found[file] = file.stat().st_size
            except FileNotFoundError:  # renamed or removed since it was listed
                continue
    return found
