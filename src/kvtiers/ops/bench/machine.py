"""On what, and beside what load, the figures were taken. Nothing that names a machine or a path."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import kvtiers
from kvtiers.config import Machine, format_size
from kvtiers.ops.processor import processor

_PACKAGES: Final = ("numpy", "xxhash", "zstandard", "torch")
_MOUNTS: Final = Path("/proc/self/mountinfo")
_HUGE: Final = Path("/sys/kernel/mm/transparent_hugepage")


@dataclass(frozen=True, slots=True)
class MachineReport:
    """The machine, the software, and how busy it was."""

    processor: str
    cores: int
    """That this process may use."""
    memory_bytes: int
    kernel: str
    filesystem: str
    """Type of the file system that the disk figures were taken on."""
    huge_pages: str
    """Transparent huge pages: for anonymous memory, and for shared memory such as the arena."""
    load_average: float
    """Of the last minute, at the start."""
    versions: dict[str, str]

    def describe(self) -> list[str]:
        """Two lines for a reader."""
        software = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        hardware = (
            f"{self.processor or 'unknown processor'}, {self.cores} cores, {format_size(self.memory_bytes)} of memory, "
            f"{self.kernel}, {self.filesystem}, huge pages: {self.huge_pages}, load average at the start {self.load_average:.2f}"
        )
        return [hardware, software]


def machine_report(directory: Path) -> MachineReport:
    """Of this process, with `directory`'s file system."""
    versions = {"kvtiers": kvtiers.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return MachineReport(
        processor=processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=Machine.probe().memory_total,
        kernel=f"{platform.system()} {platform.release()} {platform.machine()}",
        filesystem=filesystem_of(directory),
        huge_pages=f"{_chosen(_HUGE / 'enabled')}, shared {_chosen(_HUGE / 'shmem_enabled')}",
        load_average=os.getloadavg()[0],
        versions=versions,
    )


def filesystem_of(path: Path) -> str:
    """`ext4`, `tmpfs`, … of an existing path; `unknown` where the kernel does not say.

    Fields of mountinfo: proc(5); the type is the first one behind the separator.
    """
    try:
        device = path.stat().st_dev
        lines = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "unknown"
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:
        before, _, after = line.partition(" - ")
        if before.split()[2] == wanted and after:
            return after.split()[0]
    return "unknown"


def _chosen(file: Path) -> str:
    """`madvise` of `always [madvise] never`."""
    try:
        text = file.read_text(encoding="ascii")
    except OSError:
        return "unknown"
    return text.partition("[")[2].partition("]")[0] or "unknown"
