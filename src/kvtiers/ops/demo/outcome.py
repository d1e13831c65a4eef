"""What a demo brought, as values: for the tables, the plot and the JSON file, which all read this and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Final

from kvtiers.model.layout import KVLayout
from kvtiers.model.tiers import Tier
from kvtiers.ops.demo.checks import Check, all_passed, same_logits
from kvtiers.ops.demo.document import Question
from kvtiers.ops.demo.facts import Facts
from kvtiers.ops.demo.measure import Run, Source
from kvtiers.records.checksum import checksum

SIMULATED_GPU: Final = (
    "The GPU tier is simulated: it runs its real code on host memory. There is no GPU in these figures."
)
PAGE_CACHE: Final = "The disk was read through the page cache (no O_DIRECT on this file system, or switched off): its figures are those of memory."


@dataclass(frozen=True, slots=True)
class Setup:
    """What was run."""

    model: str
    document: str
    layout: KVLayout
    device: str
    threads: int
    chunk_tokens: int
    max_new_tokens: int
    tiers: tuple[Tier, ...]
    tier_bytes: dict[str, int]
    simulated_gpu: bool
    compression: str
    """Codec of the disk tier."""
    remote: str
    """Which store a second instance loads from, and how; empty for none."""
    facts: Facts

    @property
    def machine(self) -> str:
        """One line for titles."""
        where = self.facts.processor or self.facts.system
        if self.device != "cpu":
            return f"{self.device}, {where}"
        return f"{self.threads} CPU core{'s' if self.threads != 1 else ''}, {where}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that the demo found out. `restart`, `second_instance`: how these processes began; empty for one that there was not."""

    setup: Setup
    questions: tuple[Question, ...]
    """In a conversation: what was said."""
    runs: tuple[Run, ...]
    checks: tuple[Check, ...]
    conversation: bool
    restart: dict[str, Any]
    second_instance: dict[str, Any]
    stats: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every promise held."""
        return all_passed(self.checks)

    def run(self, question: int, source: Source) -> Run | None:
        """The run of a question from a source, if it took place."""
        return next((run for run in self.runs if (run.question, run.source) == (question, source)), None)

    def of(self, source: Source) -> list[Run]:
        """All runs from a source, in the order of the questions."""
        return [run for run in self.runs if run.source is source]

    def sources(self) -> list[Source]:
        """Those that took place, in the order of the table."""
        return [source for source in Source if self.of(source)]

    def speedup(self, run: Run) -> float:
        """How many times sooner the first token came than without cache."""
        without = self.run(run.question, Source.NO_CACHE)
        return without.ttft_s / run.ttft_s if without is not None else float("nan")

    def median_ttft(self, source: Source) -> float:
        """Seconds, over the questions."""
        return median(run.ttft_s for run in self.of(source))

    def median_speedup(self, source: Source) -> float:
        """Of the median without cache over the median from this source."""
        if not self.of(Source.NO_CACHE):
            return float("nan")
        return self.median_ttft(Source.NO_CACHE) / self.median_ttft(source)

    def as_json(self) -> dict[str, Any]:
        """Everything, raw. The digests of a run's chunks are drawn together in one; the checks say what they showed."""
        setup = asdict(self.setup)
        machine = setup.pop("facts")
        versions = machine.pop("versions")
        setup["kv_bytes_per_token"] = self.setup.layout.bytes_per_token
        return {
            "kind": "conversation" if self.conversation else "questions",
            "passed": self.passed,
            "gpu_tier": "none"
            if Tier.GPU not in self.setup.tiers
            else "simulated on host memory, no GPU"
            if self.setup.simulated_gpu
            else "real",
            "machine": machine,
            "versions": versions,
            "setup": setup,
            "runs": [self._run_json(run) for run in self.runs],
            "median": {
                source: {"ttft_s": self.median_ttft(source), "speedup": self.median_speedup(source)}
                for source in self.sources()
            },
            "restart": self.restart,
            "second_instance": self.second_instance,
            "checks": [asdict(check) | {"passed": check.passed} for check in self.checks],
            "logits_identical": same_logits(self.runs),
            "notes": self.notes,
            "stats": self.stats,
        }

    def _run_json(self, run: Run) -> dict[str, Any]:
        asked = self.questions[run.question]
        values = asdict(run)
        rows = values.pop("rows")
        return {
            **values,
            "kv_digest": checksum(json.dumps(rows).encode()).hex(),
            "tiers": {tier: run.tiers.count(tier) for tier in Tier if tier in run.tiers},
            "speedup": self.speedup(run),
            "asked": asked.text,
            "expected": asked.expected,
            "has_expected": asked.is_answered_by(run.answer),
        }


def source_name(source: Source, *, simulated_gpu: bool) -> str:
    """As a reader calls it."""
    names = {
        Source.NO_CACHE: "no cache",
        Source.CACHE: "cache",
        Source.GPU: "GPU (simulated)" if simulated_gpu else "GPU",
        Source.CPU: "CPU memory",
        Source.DISK: "disk",
        Source.RESTART: "disk, after a restart",
        Source.REMOTE: "remote, 2nd instance",
    }
    return names[source]


def tier_name(tier: Tier, *, simulated_gpu: bool) -> str:
    """As a reader calls it."""
    if tier is Tier.GPU:
        return "GPU (simulated)" if simulated_gpu else "GPU"
    return "CPU" if tier is Tier.CPU else tier.value


def duration(seconds: float) -> str:
    """Two or three digits that mean something: 5.61 s, 243 ms."""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def tiers_text(tiers: Sequence[Tier], *, simulated_gpu: bool) -> str:
    """The one tier, or how many chunks came from where."""
    found = [tier for tier in Tier if tier in tiers]
    if len(found) == 1:
        return tier_name(found[0], simulated_gpu=simulated_gpu)
    counted = (
        f"{list(tiers).count(tier)} × {tier_name(tier, simulated_gpu=simulated_gpu)}" for tier in found
    )
    return " + ".join(counted) or "–"
