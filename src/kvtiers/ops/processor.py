"""The processor's name, as figures name what they were taken on."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_CPUINFO: Final = Path("/proc/cpuinfo")


def processor() -> str:
    """The model; empty where it can't be told."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
