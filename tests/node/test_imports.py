"""What an engine's process loads with the node client: numpy, msgspec, and little of kvtiers."""

from __future__ import annotations

import subprocess
import sys

FORBIDDEN = (
    "pydantic",
    "yaml",
    "torch",
    "typer",
    "rich",
    "zstandard",
    "xxhash",
    "prometheus_client",
    "kvtiers.core",
    "kvtiers.runtime",
    "kvtiers.config",
    "kvtiers.stores",
    "kvtiers.records",
)
ALLOWED = ("kvtiers.model", "kvtiers.node", "kvtiers.memory")


def test_client_needs_numpy_and_msgspec_only() -> None:
    script = "import sys, kvtiers.node.client; print(*sorted(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    loaded = set(result.stdout.split())
    assert "kvtiers.node.client" in loaded
    assert not loaded.intersection(FORBIDDEN)
    ours = {name for name in loaded if name.startswith("kvtiers.")}
    assert not {name for name in ours if not name.startswith(ALLOWED)}
    assert {name for name in ours if name.startswith("kvtiers.memory")} == {
        "kvtiers.memory",
        "kvtiers.memory.syscalls",  # ctypes, nothing else
    }
