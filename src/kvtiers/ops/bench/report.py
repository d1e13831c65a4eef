"""A whole run as one value, and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from kvtiers.ops.bench.figures import Figure, Verdict, as_json
from kvtiers.ops.bench.machine import MachineReport

SCHEMA_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Report:
    """What one command measured."""

    command: str
    rounds: int
    shapes: tuple[str, ...]
    machine: MachineReport
    figures: tuple[Figure, ...]
    seconds: float
    """What the run took."""
    skipped: tuple[str, ...] = ()
    """What could not be measured here, and why."""
    peer: str = ""
    tiny: bool = False
    """For tests: its figures say nothing."""

    def count(self, verdict: Verdict) -> int:
        """How many targets ended so."""
        return sum(figure.verdicts().count(verdict) for figure in self.figures)

    def as_json(self) -> dict[str, Any]:
        """Plain values; `schema` counts up when a field changes its meaning."""
        return {
            "schema": SCHEMA_VERSION,
            "command": self.command,
            "rounds": self.rounds,
            "shapes": list(self.shapes),
            "peer": self.peer,
            "skipped": list(self.skipped),
            "tiny": self.tiny,
            "seconds": self.seconds,
            "machine": asdict(self.machine),
            "verdicts": {str(verdict): self.count(verdict) for verdict in Verdict},
            "figures": [as_json(figure) for figure in self.figures],
        }
