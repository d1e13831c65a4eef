"""The script that installs what tests use from the distribution: quiet where all is there, clear where it can't help."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "tools" / "install-system-packages.sh"


THERE = {"ip": "exit 0", "glusterfs": "exit 0", "ldconfig": "echo libibverbs.so.1 libnuma.so.1 libcurl.so.4"}
"""What the remote tier's servers need."""


def run(folder: Path, **commands: str) -> subprocess.CompletedProcess[str]:
    """With nothing on the PATH but these, each a shell script."""
    for name, body in commands.items():
        (folder / name.replace("_", "-")).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name.replace("_", "-")).chmod(0o755)
    bash = shutil.which("bash")
    assert bash
    return subprocess.run(
        [bash, str(SCRIPT)],
        env={"PATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_where_everything_is_there_nothing_is_done(tmp_path: Path) -> None:
    done = run(tmp_path, **THERE, prometheus="exit 0", promtool="exit 0", apt_get="exit 9", id="exit 9")
    assert (done.returncode, done.stdout) == (0, "system packages: nothing to install\n")


def test_who_may_not_install_is_told_what_to_install(tmp_path: Path) -> None:
    done = run(tmp_path, **THERE, prometheus="exit 0", id="echo 1000", sudo="exit 1", apt_get="exit 9")
    assert done.returncode == 1
    assert done.stderr == (
        "system packages: promtool not found, and this is neither root nor may it use sudo without a password.\n"
        "As root, on Debian or Ubuntu: apt-get install -y --no-install-recommends prometheus libibverbs1 libnuma1 libcurl4 iproute2 glusterfs-client\n"
    )


def test_another_distribution_is_told_as_well(tmp_path: Path) -> None:
    done = run(tmp_path, id="echo 0")
    assert done.returncode == 1
    assert "prometheus promtool not found, and there is no apt-get" in done.stderr
