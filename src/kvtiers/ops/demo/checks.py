"""The demo judges itself: pure functions from what was measured to what was promised, and whether it held.

A check that compared nothing has not passed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kvtiers.model.reasons import Refusal
from kvtiers.ops.demo.measure import CLAIMED, Run, Source

Rows: TypeAlias = Sequence[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Check:
    """One promise."""

    name: str
    promise: str
    compared: int
    of_what: str
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether something was compared and nothing differed."""
        return self.compared > 0 and not self.failures


@dataclass(frozen=True, slots=True)
class Expected:
    """What had been stored when a question (or turn) came."""

    reused_tokens: int
    rows: Rows


def judge(
    runs: Sequence[Run],
    *,
    planned: Sequence[tuple[int, Source]],
    expected: Mapping[int, Expected],
    integrity: Sequence[tuple[str, Sequence[str]]],
    refusals: Sequence[Refusal],
    chunk_tokens: int,
) -> list[Check]:
    """`planned`: the runs there must be. `expected`: by question. `integrity`: for each process its name and its findings."""
    cached = [run for run in runs if run.source is not Source.NO_CACHE]
    checks = [
        _complete(runs, planned, refusals),
        _same_kv(cached, expected, chunk_tokens),
        _reuse(cached, expected),
        _same_answers(runs),
        _integrity(integrity),
    ]
    if any(run.source in CLAIMED for run in cached):
        checks.insert(2, _tiers(cached, chunk_tokens))
    return checks


def all_passed(checks: Iterable[Check]) -> bool:
    """Whether every promise held."""
    return all(check.passed for check in checks)


def same_logits(runs: Sequence[Run]) -> bool:
    """Whether the first token's logits are the same to the bit in every run of a question. Told, not required: it holds only
    while the rest of a prompt is computed in passes of the same shape.
    """
    reference = _without_cache(runs)
    return all(run.question in reference and run.logits == reference[run.question].logits for run in runs)


def _complete(
    runs: Sequence[Run], planned: Sequence[tuple[int, Source]], refusals: Sequence[Refusal]
) -> Check:
    done = {(run.question, run.source) for run in runs}
    failures = [
        f"{_name(question, source)}: did not take place"
        for question, source in planned
        if (question, source) not in done
    ]
    failures += [f"a store was cut short: {refusal}" for refusal in refusals]
    return Check(
        "complete", "every run took place, every store was accepted", len(done), "runs", tuple(failures)
    )


def _same_kv(cached: Sequence[Run], expected: Mapping[int, Expected], chunk_tokens: int) -> Check:
    compared = 0
    failures: list[str] = []
    for run in cached:
        stored = expected[run.question].rows if run.question in expected else ()
        whole = run.reused_tokens // chunk_tokens
        if len(run.rows) != whole or len(stored) < whole:
            failures.append(
                f"{_name(run.question, run.source)}: {whole} chunks were reused, {len(run.rows)} have digests, "
                f"{len(stored)} were stored"
            )
        for chunk, (got, wanted) in enumerate(zip(run.rows, stored, strict=False)):
            compared += len(wanted)
            if got == wanted:
                continue
            layers = [
                layer for layer, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b
            ] or "number of"
            failures.append(
                f"{_name(run.question, run.source)}: the KV of tokens {chunk * chunk_tokens} to "
                f"{(chunk + 1) * chunk_tokens - 1} is not what was stored (layers {layers})"
            )
    return Check(
        "kv",
        "KV loaded is bit-identical to the KV stored",
        compared,
        "digests, one for each layer of each chunk",
        tuple(failures),
    )


def _tiers(cached: Sequence[Run], chunk_tokens: int) -> Check:
    failures = []
    compared = 0
    for run in cached:
        claimed = CLAIMED.get(run.source)
        if claimed is None:
            continue
        compared += len(run.tiers)
        others = [tier for tier in run.tiers if tier is not claimed]
        if others:
            failures.append(
                f"{_name(run.question, run.source)}: {len(others)} of {len(run.tiers)} chunks came from "
                f"{', '.join(sorted(set(others)))}"
            )
        if len(run.tiers) * chunk_tokens < run.reused_tokens:
            failures.append(f"{_name(run.question, run.source)}: reused tokens have no tier")
    return Check("tier", "every reused chunk came from the tier named", compared, "chunks", tuple(failures))


def _reuse(cached: Sequence[Run], expected: Mapping[int, Expected]) -> Check:
    failures = []
    for run in cached:
        wanted = expected[run.question].reused_tokens if run.question in expected else None
        if run.reused_tokens != wanted:
            failures.append(
                f"{_name(run.question, run.source)}: {run.reused_tokens} tokens were reused, {wanted} had been stored "
                f"(stopped by: {run.stopped_by})"
            )
    return Check("reuse", "everything that had been stored was reused", len(cached), "runs", tuple(failures))


def _same_answers(runs: Sequence[Run]) -> Check:
    reference = _without_cache(runs)
    failures = []
    compared = 0
    for run in runs:
        if run.source is Source.NO_CACHE:
            continue
        without = reference.get(run.question)
        if without is None:
            continue  # reported as a run that did not take place
        compared += 1
        if run.answer_tokens != without.answer_tokens:
            failures.append(
                f"{_name(run.question, run.source)}: answered {run.answer!r}, without cache {without.answer!r}"
            )
    return Check(
        "answers",
        "greedy answers are those without cache, token by token",
        compared,
        "answers",
        tuple(failures),
    )


def _integrity(found: Sequence[tuple[str, Sequence[str]]]) -> Check:
    failures = [f"{process}: {problem}" for process, problems in found for problem in problems]
    return Check(
        "integrity",
        "index, arena, leases and disk agree (check_integrity)",
        len(found),
        "processes",
        tuple(failures),
    )


def _without_cache(runs: Sequence[Run]) -> dict[int, Run]:
    return {run.question: run for run in runs if run.source is Source.NO_CACHE}


def _name(question: int, source: Source) -> str:
    return f"question {question + 1}, {source.replace('_', ' ')}"
