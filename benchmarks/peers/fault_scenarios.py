"""The faults, and what was seen of each. A scenario does one thing to one cache in an empty directory and tells what happened."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from benchmarks.peers.fault_subject import (
    Running,
    Served,
    Subject,
    data_files,
    fill,
    flip_bit,
    other_files,
    wait_for_a_file,
)

from kvtiers.ops.bench.shapes import SHAPES

_SMALL: Final = SHAPES["smollm2-135m"]
_LARGE: Final = SHAPES["llama3-8b"]  # a chunk takes longest to write, so that a kill falls into it
_CHUNKS: Final = 16
_TOKENS: Final = _CHUNKS * _SMALL.chunk_tokens
_KILL_CHUNKS: Final = 8
_FULL_CHUNKS: Final = 8
_ROOM_LEFT: Final = 2.5
"""Chunks that still fit when the disk is filled up; eight are stored."""
_FULL_PATIENCE_S: Final = 5.0
_RECOVERY_S: Final = 15.0
_MB: Final = 1e6


@dataclass(frozen=True, slots=True)
class Observation:
    """What was seen, in words for a table; `facts` are the same for a program."""

    text: str
    facts: dict[str, int | float | bool]


Scenario: TypeAlias = Callable[[Subject, Path], Observation]


def restart(subject: Subject, directory: Path) -> Observation:
    """A prompt is stored, the process closes as it should, another one is started."""
    with subject.start(directory, _SMALL, _CHUNKS) as first:
        kept = first.keep(1)
    on_disk = sum(data_files(directory).values())
    with subject.start(directory, _SMALL, _CHUNKS) as second:
        believed = second.state()["disk_bytes"]
        served = second.serve(1)
    return Observation(
        f"{_served(served, kept)}; told {believed / _MB:.0f} of {on_disk / _MB:.0f} MB on disk",
        {"kept_tokens": kept, "disk_bytes": on_disk, "believed_bytes": believed, **_facts(served)},
    )


def killed(subject: Subject, directory: Path) -> Observation:
    """SIGKILL when the first file of a second prompt has been begun; then another process, which stores that prompt's like."""
    with subject.start(directory, _LARGE, _KILL_CHUNKS) as first:
        first.keep(1)
        known = set(data_files(directory)) | other_files(directory)
        whole = max(data_files(directory).values())
        first.begin_to_keep(2)
        wait_for_a_file(directory, known, 30.0)
        first.kill()
    partial = _partial(directory, whole)
    left = len(other_files(directory) - known)
    with subject.start(directory, _LARGE, _KILL_CHUNKS) as second:
        served = [second.serve(1), second.serve(2)]
        second.keep(3)
    still_partial, still_left = _partial(directory, whole), len(other_files(directory) - known)
    wrong = sum(one.wrong_chunks for one in served)
    everything = _KILL_CHUNKS * _LARGE.chunk_tokens
    return Observation(
        f"{_count(partial, 'partial file')} under final names, {still_partial} after the next run; "
        f"{_count(left, 'temporary file')}, {still_left} after the next run; "
        f"served then: {served[0].tokens} of {everything} tokens stored before, {served[1].tokens} of those being written, "
        f"{_count(wrong, 'wrong chunk')}",
        {
            "partial_files": partial,
            "temporary_files": left,
            "partial_files_after_restart": still_partial,
            "temporary_files_after_restart": still_left,
            "tokens_before": served[0].tokens,
            "tokens_killed": served[1].tokens,
            "wrong_chunks": wrong,
        },
    )


def flipped_bit(subject: Subject, directory: Path) -> Observation:
    """One bit in the middle of one chunk's file."""
    return _damaged(subject, directory, flip_bit)


def truncated(subject: Subject, directory: Path) -> Observation:
    """One chunk's file ends in the middle."""
    return _damaged(subject, directory, lambda file: os.truncate(file, file.stat().st_size // 2))


def full_disk(subject: Subject, directory: Path) -> Observation:
    """A prompt is stored, the disk is filled up, a second one does not fit; then there is room again."""
    everything = _FULL_CHUNKS * _SMALL.chunk_tokens
    size = int(3.5 * _FULL_CHUNKS * _SMALL.chunk_bytes)
    with subject.start(directory, _SMALL, _FULL_CHUNKS, file_system_bytes=size) as running:
        running.keep(1)
        ballast = running.seen_from_here("ballast")
        fill(ballast, int(_ROOM_LEFT * _SMALL.chunk_bytes))
        running.keep(2, patience_s=_FULL_PATIENCE_S)
        state = running.state()
        old, new = running.serve(1), running.serve(2)
        ballast.unlink()
        recovered_s = _recovery(running, everything)
        after = running.state()
    wrong = old.wrong_chunks + new.wrong_chunks
    recovery = (
        "does not recover"
        if recovered_s is None
        else f"stores again {recovered_s:.0f} s after there was room"
    )
    return Observation(
        f"{_count(state['unfinished'], 'store')} stuck, {state['held_bytes'] / _MB:.0f} MB of memory held; "
        f"served: {old.tokens} of {everything} tokens stored before, {new.tokens} of {everything} that did not all fit, "
        f"{_count(wrong, 'wrong chunk')}; {recovery}, with {after['unfinished']} stuck and {after['held_bytes'] / _MB:.0f} MB held",
        {
            "unfinished": state["unfinished"],
            "held_bytes": state["held_bytes"],
            "tokens_before": old.tokens,
            "tokens_that_did_not_fit": new.tokens,
            "wrong_chunks": wrong,
            "recovered": recovered_s is not None,
            "recovered_after_s": -1.0 if recovered_s is None else recovered_s,
            "unfinished_after": after["unfinished"],
            "held_bytes_after": after["held_bytes"],
        },
    )


SCENARIOS: Final[dict[str, Scenario]] = {
    "restart": restart,
    "kill -9 while writing": killed,
    "one bit flipped": flipped_bit,
    "file truncated": truncated,
    "disk full": full_disk,
}


def _damaged(subject: Subject, directory: Path, damage: Callable[[Path], None]) -> Observation:
    """A file of a prompt is damaged, the prompt loaded, stored again, loaded again."""
    with subject.start(directory, _SMALL, _CHUNKS) as running:
        running.keep(1)
        files = sorted(data_files(directory))
        running.keep(2)
        damage(files[len(files) // 2])
        running.serve(2)  # a buffer that the next load does not overwrite holds another prompt's bytes
        served = running.serve(1)
        running.keep(1)
        again = running.serve(1)
    return Observation(
        f"{_served(served, _TOKENS)}; stored again: {_served(again, _TOKENS)}",
        {**_facts(served), "tokens_again": again.tokens, "wrong_chunks_again": again.wrong_chunks},
    )


def _recovery(running: Running, everything: int) -> float | None:
    """Seconds until a new prompt is stored and served again; None if it isn't in time."""
    began = time.monotonic()
    prompt = 3
    while time.monotonic() < began + _RECOVERY_S:
        running.keep(prompt, patience_s=1.0)
        if running.serve(prompt) == Served(everything, 0):
            return time.monotonic() - began
        prompt += 1
    return None


def _partial(directory: Path, whole: int) -> int:
    return sum(size < whole for size in data_files(directory).values())


def _served(served: Served, tokens: int) -> str:
    if served.wrong_chunks:
        return f"served as a hit with wrong bytes in {_count(served.wrong_chunks, 'chunk')}, {served.tokens} of {tokens} tokens"
    return f"{served.tokens} of {tokens} tokens, none wrong" if served.tokens else f"0 of {tokens} tokens"


def _facts(served: Served) -> dict[str, int | float | bool]:
    return {"tokens": served.tokens, "wrong_chunks": served.wrong_chunks}


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
