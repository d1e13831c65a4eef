"""What the core counts. Plain numbers that only grow; the runtime copies them under its mutex."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from kvtiers.model.tiers import Tier


@dataclass(slots=True)
class TierCounters:
    """Per tier."""

    lookups: int = 0
    """Chunks for which the tier was consulted, nearest tier first."""
    hits: int = 0
    """Chunks it gave."""
    hit_tokens: int = 0
    hit_bytes: int = 0
    stored: int = 0
    """Chunks that came to lie there."""
    present: int = 0
    """Chunks that were not written because somebody else had."""
    evicted: int = 0
    """Chunks pushed out by capacity or on demand."""
    demoted: int = 0
    """Of these, chunks that were first brought to the next tier."""
    dropped_dirty: int = 0
    """Of these, chunks that no other tier had."""
    promoted: int = 0
    """Chunks brought up from a slower tier."""
    failed: int = 0
    """Operations that failed: reads, writes and deletes."""
    corrupt: int = 0
    """Chunks that failed their check."""


@dataclass(slots=True)
class Counters:
    """All of a core's counters."""

    tiers: dict[Tier, TierCounters] = field(default_factory=lambda: {tier: TierCounters() for tier in Tier})
    requests: int = 0
    """Loads answered, and released by whoever took what they had."""
    unused: int = 0
    """Chunks that lay ready for a load and were not taken: no hits."""
    misses: Counter[str] = field(default_factory=Counter)
    """Loads that stopped short, by MissReason."""
    refusals: Counter[str] = field(default_factory=Counter)
    """Chunks not stored, by Refusal."""
    deferred_writes: Counter[str] = field(default_factory=Counter)
    """Background writes put off, by Refusal."""
    abandoned_writes: Counter[str] = field(default_factory=Counter)
    """Background writes given up because the store can't hold the chunk whatever is deleted, by Refusal."""

    def snapshot(self) -> dict[str, Any]:
        """A deep copy as plain dicts."""
        return {
            "tiers": {
                str(tier): {name: getattr(counters, name) for name in TierCounters.__slots__}
                for tier, counters in self.tiers.items()
            },
            "requests": self.requests,
            "unused": self.unused,
            "misses": dict(self.misses),
            "refusals": dict(self.refusals),
            "deferred_writes": dict(self.deferred_writes),
            "abandoned_writes": dict(self.abandoned_writes),
        }
