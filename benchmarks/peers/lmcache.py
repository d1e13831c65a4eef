"""LMCache beside kvtiers in one run: starts `lmcache_worker.py` with the peer's interpreter and talks to it.

    python -m benchmarks.peers.lmcache [--rounds 9]       from the checkout: LMCache alone, its figures printed

The interpreter is `.venv-peer/bin/python` of the checkout, or what KVTIERS_PEER_PYTHON names.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtiers.model.errors import KvtiersError
from kvtiers.ops.bench.peer import PeerFailed, PeerProcess
from kvtiers.ops.bench.shapes import SHAPES, TINY, Shape

CHECKOUT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("lmcache_worker.py")
LOOKUP_TOKENS = 131_072
CHUNKS = 8
"""Of a prompt of 2,048 tokens."""
_PROBE_DEADLINE_S = 30.0


def peer_python() -> Path:
    """The interpreter that has LMCache, or should."""
    return Path(os.environ.get("KVTIERS_PEER_PYTHON", CHECKOUT / ".venv-peer" / "bin" / "python"))


def available() -> str | None:
    """None if LMCache can be started, else why not and what to do. Takes a second."""
    python = peer_python()
    if not python.exists():
        return f"{python} is missing: `make bench-peer-venv` makes it"
    code = "import importlib.metadata as m; print(m.version('lmcache'), m.version('torch'))"
    try:
        probe = subprocess.run(  # noqa: S603 - the operator's own interpreter
            [python, "-P", "-c", code],
            capture_output=True,
            text=True,
            timeout=_PROBE_DEADLINE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{python} can't be run: {error}"
    if probe.returncode:
        return f"{python} has no LMCache: {probe.stderr.strip().splitlines()[-1]}"
    return None


@dataclass(frozen=True, slots=True)
class Work:
    """What a turn took, and how much KV it moved."""

    seconds: float
    nbytes: int

    @property
    def gb_per_s(self) -> float:
        """10⁹ bytes a second."""
        return self.nbytes / self.seconds / 1e9


class LMCachePeer(PeerProcess):
    """A `Peer`. Variants: see `variants("cpu" | "disk" | "lookup")`. Use it in a `with`; one thread calls.

    Every answer has a deadline. Raises PeerFailed, with the reason if it is not installed, and DeadlineExceeded.
    """

    def __init__(self) -> None:
        if reason := available():
            raise PeerFailed(reason)
        super().__init__(shlex.join([str(peer_python()), str(WORKER)]))

    def store_cpu(self, variant: str) -> Work:
        """A new prompt into its CPU tier."""
        return self._work("store", "cpu", variant)

    def load_cpu(self, variant: str) -> Work:
        """The prompt stored last, from its CPU tier into the engine's KV."""
        return self._work("load", "cpu", variant)

    def store_disk(self, variant: str) -> Work:
        """A new prompt, until its files are written (LMCache never calls fsync)."""
        return self._work("store", "disk", variant)

    def load_disk_cold(self, variant: str) -> Work:
        """The prompt stored last, into the engine's KV; its files are not in the page cache."""
        return self._work("load", "disk", variant)

    def load_disk_hot(self, variant: str) -> Work:
        """The same with the page cache left as it is."""
        return self._work("load", "disk", variant, hot=True)

    def lookup_hit(self, variant: str, tokens: int = LOOKUP_TOKENS) -> float:
        """Seconds for a prompt of which every chunk lies in its CPU tier."""
        return self.lookup(variant, tokens, hit=True)

    def lookup_miss(self, variant: str, tokens: int = LOOKUP_TOKENS) -> float:
        """Seconds for a prompt of which no chunk does."""
        return self.lookup(variant, tokens, hit=False)

    def _work(self, operation: str, tier: str, variant: str, **options: bool) -> Work:
        answer = self._ask({"op": operation, "tier": tier, "variant": variant, **options})
        return Work(float(answer["seconds"]), int(answer["bytes"]))


def figures_alone(peer: LMCachePeer, shape: Shape, rounds: int, directory: Path) -> dict[str, list[float]]:
    """GB/s by "tier variant turn", its variants interleaved; a first round is thrown away."""
    peer.open(shape, CHUNKS, directory)
    turns: dict[str, Callable[[str], Work]] = {
        "cpu store": peer.store_cpu,
        "cpu load": peer.load_cpu,
        "disk store": peer.store_disk,
        "disk cold load": peer.load_disk_cold,
        "disk hot load": peer.load_disk_hot,
    }
    taken: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for tier in ("cpu", "disk"):
            for variant in peer.variants(tier):
                for name, turn in turns.items():
                    if name.startswith(tier):
                        rate = turn(variant).gb_per_s
                        if number:
                            taken.setdefault(f"{variant}: {name}", []).append(rate)
    return taken


def main() -> None:
    """All of it, alone. The figures that count are taken beside kvtiers, by `kvtiers bench`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write medians here")
    arguments = parser.parse_args()
    medians: dict[str, Any] = {}
    try:
        with LMCachePeer() as peer, tempfile.TemporaryDirectory(prefix="bench-peer-") as directory:
            for shape in (shape for shape in SHAPES.values() if shape.name != TINY):
                for name, rates in figures_alone(peer, shape, arguments.rounds, Path(directory)).items():
                    medians[f"{shape.name}, {name}"] = _show(f"{shape.name}, {name}", rates, "GB/s")
            for variant in peer.variants("lookup"):
                for what, look in (("hit", peer.lookup_hit), ("miss", peer.lookup_miss)):
                    seconds = [look(variant) for _ in range(arguments.rounds + 1)][1:]
                    name = f"{variant}: lookup, {what}"
                    medians[name] = _show(name, [1e3 * one for one in seconds], "ms")
    except KvtiersError as error:
        sys.exit(str(error))
    if arguments.json:
        arguments.json.write_text(json.dumps(medians, indent=1) + "\n")


def _show(name: str, values: list[float], unit: str) -> float:
    median = statistics.median(values)
    print(f"{name:62} {median:6.2f} {unit}   ({min(values):.2f}-{max(values):.2f})")
    return median


if __name__ == "__main__":
    main()
