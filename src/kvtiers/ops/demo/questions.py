"""The table: each question answered without cache, then from the GPU tier, the CPU tier, the disk, after a restart, by a second instance.

What the first question's prompt leaves is stored; everything after that reuses it, as questions about one document do. Before a
run "from the CPU" the GPU tier is emptied, before one "from disk" both. The last runs happen in processes of their own, after
this one has closed its cache: one that opens the same disk, and one that has nothing but the remote store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kvtiers.model.reasons import Refusal
from kvtiers.model.tiers import Tier
from kvtiers.ops.demo.measure import Run, Source
from kvtiers.ops.demo.session import Session

if TYPE_CHECKING:
    from kvtiers.ops.demo.stored import StoredKV

FROM_TIER: Final = {Tier.GPU: Source.GPU, Tier.CPU: Source.CPU, Tier.DISK: Source.DISK}
"""In the first process."""
IN_NEW_PROCESS: Final = {Tier.DISK: Source.RESTART, Tier.REMOTE: Source.REMOTE}


@dataclass(frozen=True, slots=True)
class Answered:
    """What one process did."""

    runs: tuple[Run, ...]
    integrity: tuple[str, ...]
    """What `check_integrity()` found."""
    refusal: Refusal | None
    """Why the store did not take everything."""
    stats: dict[str, Any]


def sources_of(tiers: Sequence[Tier]) -> list[Source]:
    """The runs of every question, in the order of the table."""
    here = [source for tier, source in FROM_TIER.items() if tier in tiers]
    elsewhere = [source for tier, source in IN_NEW_PROCESS.items() if tier in tiers]
    return [Source.NO_CACHE, *here, *elsewhere]


def answer_from_every_tier(session: Session, stored: StoredKV) -> Answered:
    """All runs of the first process. `stored` learns what was stored."""
    say, cache = session.say, session.lm.cache
    runs: list[Run] = []
    refusal = None
    for number, prompt in enumerate(session.work.prompts):
        say(f"question {number + 1}, no cache: computing {len(prompt):,} tokens")
        run, prefill = session.ask(number, Source.NO_CACHE)
        runs.append(run)
        say(f"  first token after {run.ttft_s:.2f} s")
        if number == 0:
            receipt = session.lm.store(prefill)
            refusal = receipt.refusal
            # The answer's chunks are in the cache as well, but no prompt of this table reaches them.
            stored.remember(prompt, run.rows)
            say(f"  stored {receipt.accepted_tokens:,} tokens; they are written to every tier")
        del prefill
    for tier in session.work.tiers:
        runs += answer_from(session, tier, FROM_TIER[tier])
    return Answered(tuple(runs), tuple(cache.check_integrity()), refusal, cache.stats())


def answer_from(session: Session, tier: Tier, source: Source) -> list[Run]:
    """Every question, with its prefix in `tier` and in no nearer one."""
    runs = []
    for number in range(len(session.work.prompts)):
        session.move_down(tier)
        run, _ = session.ask(number, source)
        runs.append(run)
        session.say(
            f"question {number + 1}, {source.replace('_', ' ')}: first token after {run.ttft_s:.2f} s, "
            f"{run.reused_tokens:,} of {run.prompt_tokens:,} tokens reused"
        )
    return runs
