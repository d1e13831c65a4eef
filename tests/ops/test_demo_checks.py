"""The demo's own judgement: each promise, broken on purpose, is reported; and a check that looked at nothing has not passed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.model.tiers import Tier
from kvtiers.ops.demo.checks import Check, Expected, all_passed, judge, same_logits
from kvtiers.ops.demo.measure import Run, Source

CHUNK = 4
ROWS = (("a0", "a1"), ("b0", "b1"))
PLANNED = [(0, source) for source in (Source.NO_CACHE, Source.GPU, Source.CPU, Source.DISK, Source.RESTART)]


def run(source: Source, tier: Tier | None = None) -> Run:
    reused = 0 if tier is None else 8
    return Run(
        question=0,
        source=source,
        prompt_tokens=11,
        reused_tokens=reused,
        tiers=() if tier is None else (tier, tier),
        stopped_by=None if tier is None else MissReason.PARTIAL_CHUNK,
        ttft_s=1.0,
        load_s=0.5,
        compute_s=0.5,
        answer_tokens=(7, 8),
        answer="yes",
        logits="l",
        rows=ROWS,
    )


def sound() -> list[Run]:
    return [
        run(Source.NO_CACHE),
        run(Source.GPU, Tier.GPU),
        run(Source.CPU, Tier.CPU),
        run(Source.DISK, Tier.DISK),
        run(Source.RESTART, Tier.DISK),
    ]


def judged(
    runs: list[Run],
    *,
    stored: Expected | None = None,
    integrity: list[tuple[str, list[str]]] | None = None,
    refusals: list[Refusal] | None = None,
) -> dict[str, Check]:
    checks = judge(
        runs,
        planned=PLANNED,
        expected={0: stored or Expected(8, ROWS)},
        integrity=[("one", []), ("two", [])] if integrity is None else integrity,
        refusals=refusals or [],
        chunk_tokens=CHUNK,
    )
    return {check.name: check for check in checks}


def failed(checks: dict[str, Check]) -> list[str]:
    return [name for name, check in checks.items() if not check.passed]


def test_sound_runs_pass_every_check() -> None:
    checks = judged(sound())
    assert list(checks) == ["complete", "kv", "tier", "reuse", "answers", "integrity"]
    assert all_passed(checks.values())
    assert checks["kv"].compared == 4 * 2 * 2
    assert checks["tier"].compared == 4 * 2


@pytest.mark.parametrize("which", [1, 2, 3, 4])
def test_one_layer_of_one_chunk_that_differs_is_named(which: int) -> None:
    runs = sound()
    runs[which] = replace(runs[which], rows=(ROWS[0], ("b0", "other")))
    checks = judged(runs)
    assert failed(checks) == ["kv"]
    (failure,) = checks["kv"].failures
    assert runs[which].source.replace("_", " ") in failure
    assert "tokens 4 to 7" in failure
    assert "layers [1]" in failure


@pytest.mark.parametrize("rows", [ROWS[:1], (), (*ROWS, ("c0", "c1")), (ROWS[0], ("b0",))])
def test_kv_without_a_digest_for_each_layer_and_chunk_fails(rows: tuple[tuple[str, ...], ...]) -> None:
    runs = sound()
    runs[1] = replace(runs[1], rows=rows)
    assert failed(judged(runs)) == ["kv"]


def test_more_reused_than_was_stored_fails() -> None:
    assert failed(judged(sound(), stored=Expected(4, ROWS[:1]))) == ["kv", "reuse"]


def test_less_reused_than_was_stored_fails_and_says_why() -> None:
    runs = sound()
    runs[3] = replace(
        runs[3], reused_tokens=4, tiers=(Tier.DISK,), rows=ROWS[:1], stopped_by=MissReason.CORRUPT
    )
    checks = judged(runs)
    assert failed(checks) == ["reuse"]
    assert "stopped by: corrupt" in checks["reuse"].failures[0]


def test_chunk_from_another_tier_fails() -> None:
    runs = sound()
    runs[3] = replace(runs[3], tiers=(Tier.CPU, Tier.DISK))
    checks = judged(runs)
    assert failed(checks) == ["tier"]
    assert checks["tier"].failures == ("question 1, disk: 1 of 2 chunks came from cpu",)


def test_reused_tokens_without_a_tier_fail() -> None:
    runs = sound()
    runs[3] = replace(runs[3], tiers=(Tier.DISK,))
    assert failed(judged(runs)) == ["tier"]


def test_another_answer_fails() -> None:
    runs = sound()
    runs[2] = replace(runs[2], answer_tokens=(7, 9), answer="no")
    checks = judged(runs)
    assert failed(checks) == ["answers"]
    assert "answered 'no', without cache 'yes'" in checks["answers"].failures[0]


@pytest.mark.parametrize("which", range(5))
def test_missing_run_fails(which: int) -> None:
    runs = sound()
    del runs[which]
    checks = judged(runs)
    assert "complete" in failed(checks)
    assert "did not take place" in checks["complete"].failures[0]


def test_refused_store_fails() -> None:
    assert failed(judged(sound(), refusals=[Refusal.NO_SLOT])) == ["complete"]


def test_finding_of_check_integrity_fails() -> None:
    checks = judged(sound(), integrity=[("one", []), ("two", ["disk: a file nobody knows"])])
    assert failed(checks) == ["integrity"]
    assert checks["integrity"].failures == ("two: disk: a file nobody knows",)


def test_nothing_compared_is_not_passed() -> None:
    checks = judged([run(Source.NO_CACHE)], integrity=[])
    assert failed(checks) == ["complete", "kv", "reuse", "answers", "integrity"]


def test_cold_first_turn_of_a_conversation_passes() -> None:
    first = replace(run(Source.CACHE), rows=())
    second = [replace(run(Source.NO_CACHE), question=1), replace(run(Source.CACHE, Tier.CPU), question=1)]
    checks = judge(
        [run(Source.NO_CACHE), first, *second],
        planned=[(turn, source) for turn in (0, 1) for source in (Source.NO_CACHE, Source.CACHE)],
        expected={0: Expected(0, ()), 1: Expected(8, ROWS)},
        integrity=[("one", [])],
        refusals=[],
        chunk_tokens=CHUNK,
    )
    assert all_passed(checks)
    assert "tier" not in {check.name for check in checks}  # no tier is claimed


def test_logits_are_compared_within_each_question() -> None:
    runs = sound()
    assert same_logits(runs)
    assert not same_logits([*runs[:-1], replace(runs[-1], logits="other")])
