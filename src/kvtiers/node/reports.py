"""What engines report about themselves, and what is made of it for the operator.

Under a service the GPU tier is the engines' own prefix cache: of how full it is nobody knows but they. An alert is about the engine
that is worst off, so the tier is as full as the fullest engine's; its bytes are not known, and not guessed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from kvtiers.node.protocol import Report


class Savings:
    """Seconds of prefill that hits have made unnecessary. The control thread adds, any thread reads."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def add(self, tokens: int, report: Report | None) -> None:
        """So many tokens were served to an engine, and what that had reported by then."""
        if (
            report is not None
            and math.isfinite(report.prefill_tokens_per_s)
            and report.prefill_tokens_per_s >= 1
        ):
            self.seconds += tokens / report.prefill_tokens_per_s


class LocalHits:
    """What engines found in their own prefix caches, all that ever reported together. One thread adds, any reads."""

    def __init__(self) -> None:
        self.lookups = 0
        """Chunks."""
        self.hits = 0
        self.hit_tokens = 0

    def add(self, report: Report) -> None:
        """One more report. There are no more hits than lookups, whatever it says."""
        self.lookups += report.local_lookups
        self.hits += min(report.local_hits, report.local_lookups)
        self.hit_tokens += report.local_hit_tokens


class Books(NamedTuple):
    """What is made of all engines' reports."""

    savings: Savings
    local_hits: LocalHits


def gpu_tier(usages: Iterable[float], found: LocalHits) -> dict[str, Any]:
    """The engines' GPU tier as `stats()` shows a tier, of the share of its KV blocks that each has in use; empty if none told."""
    percent = max((100.0 * usage for usage in usages if 0 <= usage <= 1), default=None)
    counted = (
        {"lookups": found.lookups, "hits": found.hits, "hit_tokens": found.hit_tokens}
        if found.lookups
        else {}
    )
    if percent is None and not counted:
        return {}
    usage = {} if percent is None else {"usage_percent": percent}
    return {"enabled": True, "owner": "engines", **usage, **counted}
