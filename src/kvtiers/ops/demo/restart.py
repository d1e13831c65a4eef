"""The demo's second process: opens the cache that the first one has closed, and answers the same questions from its disk.

`python -m kvtiers.ops.demo.restart WORK RESULT`: both JSON files. It only reports what it saw; the first process judges.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import msgspec

from kvtiers.model.errors import DeadlineExceeded, KvtiersError
from kvtiers.model.tiers import Tier
from kvtiers.ops.demo.measure import Run, Source
from kvtiers.ops.demo.questions import answer_from
from kvtiers.ops.demo.session import (
    Say,
    Work,
    load_chat,
    load_model,
    open_session,
    prepare_libraries,
)
from kvtiers.stores.disk.store import DiskStore

_DEADLINE_S: Final = 1800.0
"""For loading the model and answering; far more than any model that runs on a CPU in a bearable time."""


class RestartFailed(KvtiersError):
    """The second process ended without a result."""


@dataclass(frozen=True, slots=True)
class Restarted:
    """What the second process did. Opening the cache: arena, disk index, one warm-up pass of a chunk."""

    runs: tuple[Run, ...]
    integrity: tuple[str, ...]
    load_model_s: float
    open_cache_s: float
    past_page_cache: bool
    """Whether its reads really came from the disk (O_DIRECT)."""


def answer_in_new_process(work: Work, directory: Path, *, deadline_s: float = _DEADLINE_S) -> Restarted:
    """Run the second process; its progress appears on our stderr. Raises RestartFailed, DeadlineExceeded."""
    work_file, result_file = directory / "work.json", directory / "result.json"
    work_file.write_bytes(msgspec.json.encode(asdict(work)))
    command = [sys.executable, "-m", "kvtiers.ops.demo.restart", str(work_file), str(result_file)]
    try:
        done = subprocess.run(  # noqa: S603 - our own module, with paths of our own
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            timeout=deadline_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"the second process had not answered after {deadline_s:.0f} s") from None
    if done.returncode != 0 or not result_file.is_file():
        raise RestartFailed(
            f"the second process ended with exit code {done.returncode}; what it said stands above"
        )
    return msgspec.json.decode(result_file.read_bytes(), type=Restarted)


def answer_after_restart(work: Work, say: Say) -> Restarted:
    """In the second process: everything from the disk."""
    prepare_libraries(work.threads)
    started = time.perf_counter()
    chat = load_chat(Path(work.model))
    model = load_model(Path(work.model), work.device)
    loaded = time.perf_counter()
    session = open_session(model, chat, work, say)
    opened = time.perf_counter()
    with session.lm as lm:
        runs = answer_from(session, Tier.DISK, Source.RESTART)
        integrity = lm.cache.check_integrity()
        disk = lm.cache.node.guards[Tier.DISK].store
        direct = isinstance(disk, DiskStore) and disk.bypasses_page_cache
    return Restarted(tuple(runs), tuple(integrity), loaded - started, opened - loaded, direct)


def main(arguments: Sequence[str]) -> int:
    """Entry point of the second process."""
    work_file, result_file = map(Path, arguments)
    work = msgspec.json.decode(work_file.read_bytes(), type=Work)
    try:
        restarted = answer_after_restart(work, _say)
    except KvtiersError as error:
        _say(f"error: {error}")
        return 1
    result_file.write_bytes(msgspec.json.encode(asdict(restarted)))
    return 0


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
