"""A conversation, turn by turn: every prompt holds all that was said before. Each turn is answered without and with the cache.

Both get the same prompt; the history goes on with the answer out of the cache, whose KV, that of generated tokens included, is
kept for the next turn. Between turns the background work is waited for, as a user reads for longer than it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvtiers.model.reasons import Refusal
from kvtiers.ops.demo.document import Document, Message
from kvtiers.ops.demo.measure import Run, Source
from kvtiers.ops.demo.session import Session

if TYPE_CHECKING:
    from kvtiers.ops.demo.stored import Row, StoredKV


@dataclass(frozen=True, slots=True)
class Conversation:
    """What was said and measured. `expected[turn]`: tokens that had been stored when the turn came, and their digests."""

    said: tuple[str, ...]
    runs: tuple[Run, ...]
    expected_tokens: tuple[int, ...]
    expected_rows: tuple[tuple[Row, ...], ...]
    refusals: tuple[Refusal, ...]
    integrity: tuple[str, ...]
    stats: dict[str, Any]
    ended_early: str
    """Why there are fewer turns than were asked for; empty if there are not."""


def converse(
    session: Session, document: Document, lines: Sequence[str], stored: StoredKV, *, context: int | None
) -> Conversation:
    """Up to `len(lines)` turns; fewer if the model's `context` (tokens) is used up."""
    from kvtiers.ops.demo.stored import kv_rows

    lm, work = session.lm, session.work
    messages: list[Message] = []
    runs: list[Run] = []
    expected_tokens: list[int] = []
    expected_rows: list[tuple[Row, ...]] = []
    refusals: list[Refusal] = []
    ended = ""
    for turn, line in enumerate(lines):
        messages += [Message(role="user", content=line)] if turn else document.messages(line)
        prompt = session.chat.prompt(messages)
        if context is not None and len(prompt) + work.max_new_tokens > context:
            ended = f"turn {turn + 1} would be {len(prompt):,} tokens long, and the model takes {context:,}"
            break
        session.say(f"turn {turn + 1}: {len(prompt):,} tokens")
        expected_tokens.append(stored.reusable(prompt))
        expected_rows.append(stored.known(prompt))
        for source in (Source.NO_CACHE, Source.CACHE):
            run, prefill = session.ask(turn, source, prompt)
            runs.append(run)
            if source is Source.NO_CACHE:
                del prefill
                continue
            receipt = lm.store(prefill)
            lm.cache.flush()
            if receipt.refusal is not None:
                refusals.append(receipt.refusal)
            kept = prefill.past.get_seq_length()
            stored.remember(prefill.tokens[:kept], kv_rows(prefill.past, kept, lm.cache.chunk_tokens))
            messages.append(Message(role="assistant", content=run.answer))
            del prefill
        without, cached = runs[-2:]
        session.say(
            f"  first token after {without.ttft_s:.2f} s without cache, {cached.ttft_s:.2f} s with it "
            f"({cached.reused_tokens:,} tokens reused)"
        )
    return Conversation(
        said=tuple(lines[: len(expected_tokens)]),
        runs=tuple(runs),
        expected_tokens=tuple(expected_tokens),
        expected_rows=tuple(expected_rows),
        refusals=tuple(refusals),
        integrity=tuple(lm.cache.check_integrity()),
        stats=lm.cache.stats(),
        ended_early=ended,
    )
