"""Runs `infinistore_inside.py` in a network namespace: the ports of InfiniStore's server listen on every address."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvtiers.testing.own_network import in_own_network
from kvtiers.testing.servers.infinistore import infinistore_environment
from kvtiers.testing.servers.needs import missing

INSIDE = Path(__file__).with_name("infinistore_inside.py")
LIMIT_S = 240


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 30)
def test_infinistore_over_tcp_in_a_network_of_its_own(tmp_path: Path) -> None:
    infinistore_environment()
    own = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "3",
        "-p",
        "no:cacheprovider",
        f"--basetemp={tmp_path / 'inner'}",
    ]
    command = in_own_network([*own, str(INSIDE)])
    if command is None:
        missing(
            "this needs a network namespace: root, user namespaces, or sudo without a password; and iproute2"
        )
    ran = subprocess.run(
        command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert ran.returncode == 0, ran.stdout[-20_000:] + ran.stderr[-5000:]
