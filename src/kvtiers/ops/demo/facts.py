"""On what a figure was taken: cores, memory, versions. Nothing that names a machine or a path."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import kvtiers
from kvtiers.config import Machine
from kvtiers.ops.demo.options import default_threads

_PACKAGES: Final = ("torch", "transformers", "numpy", "safetensors", "xxhash", "zstandard", "matplotlib")
_CPUINFO: Final = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Facts:
    """The machine and the software."""

    processor: str
    cores: int
    """That this process may use."""
    memory_bytes: int
    system: str
    versions: dict[str, str]


def facts() -> Facts:
    """Of this process."""
    versions = {"kvtiers": kvtiers.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return Facts(
        processor=_processor(),
        cores=default_threads(),
        memory_bytes=Machine.probe().memory_total,
        system=f"{platform.system()} {platform.machine()}",
        versions=versions,
    )


def _processor() -> str:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
