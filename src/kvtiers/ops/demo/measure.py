"""One question, asked once: what it took, what came back, and what KV the model then worked on.

TTFT is from having the token ids to having the first token's id: lookup, load, computing the rest, argmax. Digests are taken
after that, and nothing is stored in it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier

if TYPE_CHECKING:
    from kvtiers.integrations.transformers import CachedCausalLM, Prefill
    from kvtiers.ops.demo.chat import Chat


class Source(StrEnum):
    """Where a run's prefix comes from."""

    NO_CACHE = "no_cache"
    CACHE = "cache"
    """Whatever tier has it."""
    GPU = "gpu"
    CPU = "cpu"
    DISK = "disk"
    RESTART = "disk_after_restart"
    REMOTE = "remote_second_instance"


CLAIMED: Final = {
    Source.GPU: Tier.GPU,
    Source.CPU: Tier.CPU,
    Source.DISK: Tier.DISK,
    Source.RESTART: Tier.DISK,
    Source.REMOTE: Tier.REMOTE,
}
"""The tier that every chunk of such a run must come from."""


@dataclass(frozen=True, slots=True)
class Run:
    """One answer to one question (or turn)."""

    question: int
    source: Source
    prompt_tokens: int
    reused_tokens: int
    tiers: tuple[Tier, ...]
    """Of each reused chunk."""
    stopped_by: MissReason | None
    ttft_s: float
    load_s: float
    compute_s: float
    answer_tokens: tuple[int, ...]
    answer: str
    logits: str
    """Digest of the first token's logits."""
    rows: tuple[tuple[str, ...], ...]
    """Digests of the KV of the full chunks that were reused; without cache: of all of the prompt's."""


def ask(
    lm: CachedCausalLM,
    chat: Chat,
    tokens: Sequence[int],
    *,
    question: int,
    source: Source,
    max_new_tokens: int,
    salt: str,
) -> tuple[Run, Prefill]:
    """Prefill, take the time, then generate the rest of the answer. The caller may store what is returned."""
    from kvtiers.integrations.transformers import Reuse
    from kvtiers.ops.demo.stored import kv_rows, logits_digest

    reuse = Reuse.RECOMPUTE if source is Source.NO_CACHE else Reuse.LOAD
    started = time.perf_counter()
    prefill = lm.prefill(tokens, salt=salt, reuse=reuse)
    int(prefill.logits.argmax())
    ttft = time.perf_counter() - started
    covered = prefill.prompt_tokens if source is Source.NO_CACHE else prefill.reused_tokens
    rows = kv_rows(prefill.past, covered, lm.cache.chunk_tokens)
    answer = lm.generate(prefill, max_new_tokens=max_new_tokens)
    run = Run(
        question=question,
        source=source,
        prompt_tokens=prefill.prompt_tokens,
        reused_tokens=prefill.reused_tokens,
        tiers=prefill.tiers,
        stopped_by=prefill.stopped_by,
        ttft_s=ttft,
        load_s=prefill.load_seconds,
        compute_s=ttft - prefill.load_seconds,
        answer_tokens=tuple(answer),
        answer=chat.text(answer),
        logits=logits_digest(prefill.logits),
        rows=rows,
    )
    return run, prefill
