"""How much memory this process may still take: the smallest of what the machine and each control group above it leave.

`MemAvailable` alone lies in a container: the kernel kills at the group's limit long before the machine is full.
A group's file cache counts as free, as the kernel drops it before it kills. Reads a few small files; any thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

_UNLIMITED: Final = 1 << 60  # v1 writes "no limit" as the largest page-aligned integer
_PROC: Final = Path("/proc")
_CGROUP: Final = Path("/sys/fs/cgroup")


class AvailableMemory(NamedTuple):
    """Bytes that may still be taken, and which file sets that bound."""

    nbytes: int
    bound_by: str


class _GroupFiles(NamedTuple):
    limits: tuple[str, ...]
    usage: str
    file_cache: str


_V2: Final = _GroupFiles(("memory.max", "memory.high"), "memory.current", "inactive_file")
_V1: Final = _GroupFiles(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def available_memory(proc: Path = _PROC, cgroup: Path = _CGROUP) -> AvailableMemory:
    """The tightest bound now. A file that can't be read bounds nothing; with no bound at all: 0 bytes, "unknown"."""
    bounds = [*_machine(proc), *_groups(proc, cgroup)]
    return min(bounds, default=AvailableMemory(0, "unknown: /proc/meminfo can't be read"))


def _machine(proc: Path) -> Iterator[AvailableMemory]:
    path = proc / "meminfo"
    for line in _read(path).splitlines():
        if line.startswith("MemAvailable:"):
            yield AvailableMemory(int(line.split()[1]) * 1024, f"MemAvailable in {path}")


def _groups(proc: Path, cgroup: Path) -> Iterator[AvailableMemory]:
    """Bounds by this process' control groups, v2 (`0::PATH`) and v1 (`N:memory:PATH`)."""
    for line in _read(proc / "self" / "cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            for root in (cgroup, cgroup / "unified"):
                yield from _walk_up(root, path, _V2)
        elif "memory" in controllers.split(","):
            yield from _walk_up(cgroup / "memory", path, _V1)


def _walk_up(root: Path, path: str, files: _GroupFiles) -> Iterator[AvailableMemory]:
    """Every group from the process' own up to the mount's root. In a container the path may be the host's and not exist."""
    group = root.joinpath(*(part for part in path.split("/") if part and part != ".."))
    while True:
        yield from _group(group, files)
        if group == root:
            return
        group = group.parent


def _group(group: Path, files: _GroupFiles) -> Iterator[AvailableMemory]:
    usage = _integer(group / files.usage)
    if usage is None:
        return
    cached = 0
    for line in _read(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == files.file_cache and value.isdigit():
            cached = int(value)
    for name in files.limits:
        limit = _integer(group / name)
        if limit is not None and limit < _UNLIMITED:
            yield AvailableMemory(max(0, limit - usage + cached), str(group / name))


def _integer(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
