"""What this machine has, as a plain value: memory that may still be taken, and room on file systems. Looks, and changes nothing.

`Machine.probe` reads /proc, the control groups and the paths; any thread may call it. Tests make a `Machine` by hand.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from kvtiers.memory.available import available_memory

_MEMINFO: Final = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class PathSpace:
    """A directory for the cache, there or to be made, in bytes. `problem`: why it can't be used, empty if it can."""

    path: Path
    device: int = 0
    """Paths of one device share its room."""
    total: int = 0
    free: int = 0
    """What we may take: without the share a file system reserves for root."""
    own: int = 0
    """Allocated blocks of whatever lies below the path already: an earlier run's, and counted as the cache's."""
    problem: str = ""

    @classmethod
    def probe(cls, path: str | os.PathLike[str], *, count_own: bool = True) -> Self:
        """Counting takes about 4 s for a million files; without it `own` is 0."""
        try:
            absolute = Path(path).expanduser().absolute()
            nearest = _nearest_existing(absolute)
            problem = _why_not_writable(absolute, nearest)
            space = os.statvfs(nearest)
            return cls(
                path=absolute,
                device=nearest.stat().st_dev,
                total=space.f_blocks * space.f_frsize,
                free=space.f_bavail * space.f_frsize,
                own=_allocated(absolute) if count_own and not problem else 0,
                problem=problem,
            )
        except OSError as error:
            return cls(Path(path), problem=f"can't be used: {error.strerror}")
        except RuntimeError as error:  # ~ of an unknown user
            return cls(Path(path), problem=f"can't be used: {error}")


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes, at the time of looking."""

    memory_total: int
    memory_available: int
    """Smallest of what the machine and each control group (v1, v2) above this process leave."""
    memory_bound_by: str = "the machine"
    """Which of them that is."""
    hugetlb_free: int = 0
    """Reserved huge pages that are free: not part of the available memory."""
    paths: tuple[PathSpace, ...] = ()
    gpu_free: int | None = None
    """None: not known (only a CUDA library can tell), and not checked."""

    @classmethod
    def probe(
        cls,
        paths: Iterable[str | os.PathLike[str]] = (),
        *,
        count_own: bool = True,
        gpu_free: int | None = None,
    ) -> Self:
        """This machine now."""
        meminfo = _meminfo()
        available = available_memory()
        return cls(
            memory_total=meminfo.get("MemTotal", 0) * 1024,
            memory_available=available.nbytes,
            memory_bound_by=available.bound_by,
            hugetlb_free=meminfo.get("HugePages_Free", 0) * meminfo.get("Hugepagesize", 0) * 1024,
            paths=tuple(PathSpace.probe(path, count_own=count_own) for path in paths),
            gpu_free=gpu_free,
        )


def _meminfo() -> dict[str, int]:
    """The numbers as they stand there: kB, or counts of pages."""
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return {}
    parts = (line.replace(":", " ").split() for line in lines)
    return {part[0]: int(part[1]) for part in parts if len(part) >= 2 and part[1].isdigit()}


def _nearest_existing(path: Path) -> Path:
    for candidate in (path, *path.parents):
        try:
            candidate.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        return candidate
    return Path("/")


def _why_not_writable(path: Path, nearest: Path) -> str:
    if not stat.S_ISDIR(nearest.stat().st_mode):
        return "is not a directory" if nearest == path else f"can't be made: {nearest} is not a directory"
    if path != nearest:
        missing = nearest / path.relative_to(nearest).parts[0]
        if os.path.lexists(missing):
            return f"can't be made: {missing} is a broken link"
    if os.statvfs(nearest).f_blocks == 0:
        return f"can't be used: the file system of {nearest} holds no files"
    if os.access(nearest, os.R_OK | os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        return ""
    if os.statvfs(nearest).f_flag & os.ST_RDONLY:
        return f"can't be written: the file system of {nearest} is read-only"
    who = f"user {os.geteuid()}"
    return (
        f"can't be written by {who}"
        if nearest == path
        else f"can't be made: {nearest} can't be written by {who}"
    )


def _allocated(root: Path) -> int:
    """Bytes of allocated blocks below `root`. What vanishes or can't be read meanwhile counts nothing."""
    total = 0
    folders = [root]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
                    else:
                        total += _blocks(entry)
        except OSError:
            continue
    return total


def _blocks(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_blocks * 512
    except OSError:
        return 0
