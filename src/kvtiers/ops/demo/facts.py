"""On what a figure was taken: cores, memory, versions. Nothing that names a machine or a path."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import kvtiers
from kvtiers.config import Machine
from kvtiers.ops.demo.options import default_threads
from kvtiers.ops.processor import processor

_PACKAGES: Final = ("torch", "transformers", "numpy", "safetensors", "xxhash", "zstandard", "matplotlib")


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
        processor=processor(),
        cores=default_threads(),
        memory_bytes=Machine.probe().memory_total,
        system=f"{platform.system()} {platform.machine()}",
        versions=versions,
    )
