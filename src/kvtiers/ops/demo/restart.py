"""The demo's other processes: one opens the cache that the first one has closed, and answers the same questions from its disk; one
is a second instance, which has nothing but the remote store.

`python -m kvtiers.ops.demo.restart WORK RESULT`: both JSON files. It only reports what it saw; the first process judges.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from kvtiers.model.errors import DeadlineExceeded, KvtiersError
from kvtiers.model.tiers import Tier
from kvtiers.ops.demo.measure import Run
from kvtiers.ops.demo.questions import IN_NEW_PROCESS, answer_from
from kvtiers.ops.demo.session import (
    Say,
    Work,
    load_chat,
    load_model,
    open_session,
    prepare_libraries,
)
from kvtiers.stores.disk.store import DiskStore

if TYPE_CHECKING:
    from kvtiers.runtime.cache import TieredCache

_DEADLINE_S: Final = 1800.0
"""For loading the model and answering; far more than any model that runs on a CPU in a bearable time."""
_REMOVE_S: Final = 20.0


class RestartFailed(KvtiersError):
    """A process of the demo ended without a result."""


@dataclass(frozen=True, slots=True)
class Restarted:
    """What a new process did. Opening the cache: arena, disk index, one warm-up pass of a chunk."""

    runs: tuple[Run, ...]
    integrity: tuple[str, ...]
    load_model_s: float
    open_cache_s: float
    past_page_cache: bool | None
    """Whether its reads really came from the disk (O_DIRECT); None without one."""


def answer_in_new_process(work: Work, directory: Path, *, deadline_s: float = _DEADLINE_S) -> Restarted:
    """Run `work` in a new process, from the last of its tiers; its progress appears on our stderr. Raises RestartFailed, DeadlineExceeded."""
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
        raise DeadlineExceeded(f"a new process had not answered after {deadline_s:.0f} s") from None
    if done.returncode != 0 or not result_file.is_file():
        raise RestartFailed(
            f"a new process ended with exit code {done.returncode}; what it said stands above"
        )
    return msgspec.json.decode(result_file.read_bytes(), type=Restarted)


def answer_anew(work: Work, say: Say) -> Restarted:
    """In the new process: everything from the last tier. What lies in a remote store is removed at the end."""
    prepare_libraries(work.threads)
    started = time.perf_counter()
    chat = load_chat(Path(work.model))
    model = load_model(Path(work.model), work.device)
    loaded = time.perf_counter()
    session = open_session(model, chat, work, say)
    opened = time.perf_counter()
    with session.lm as lm:
        tier = work.tiers[-1]
        runs = answer_from(session, tier, IN_NEW_PROCESS[tier])
        integrity = lm.cache.check_integrity()
        direct = None
        if tier is Tier.DISK:
            disk = lm.cache.node.guards[tier].store
            direct = isinstance(disk, DiskStore) and disk.bypasses_page_cache
        else:
            session.move_down(tier)  # what lies in memory would be written anew
            _remove(lm.cache, tier)
    return Restarted(tuple(runs), tuple(integrity), loaded - started, opened - loaded, direct)


def _remove(cache: TieredCache, tier: Tier) -> None:
    """All that this instance knows to be there. What can't be removed in time stays: it is of no use to anybody."""
    cache.evict(tier)
    ends = time.monotonic() + _REMOVE_S
    while cache.stats()["tiers"][tier]["usage_bytes"] and time.monotonic() < ends:
        time.sleep(0.01)


def main(arguments: Sequence[str]) -> int:
    """Entry point of the new process."""
    work_file, result_file = map(Path, arguments)
    work = msgspec.json.decode(work_file.read_bytes(), type=Work)
    try:
        restarted = answer_anew(work, _say)
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
