"""An outcome as a reader sees it in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvtiers.config import format_size
from kvtiers.model.tiers import Tier
from kvtiers.ops.demo.checks import Check, same_logits
from kvtiers.ops.demo.measure import CLAIMED, Run, Source
from kvtiers.ops.demo.outcome import SIMULATED_GPU, Outcome, duration, tier_name, tiers_text

_RUN_NAMES: Final = {
    Source.NO_CACHE: "no cache",
    Source.CACHE: "cache",
    Source.GPU: "GPU hit",
    Source.CPU: "CPU hit",
    Source.DISK: "disk hit",
    Source.RESTART: "restart",
    Source.REMOTE: "2nd instance",
}
_SHOWN_FAILURES: Final = 20


def render(outcome: Outcome) -> Group:
    """Everything: what was run, the table, the answers, the checks."""
    table = _conversation_table(outcome) if outcome.conversation else _question_table(outcome)
    return Group(*_head(outcome), Text(), table, Text(), *_answers(outcome), Text(), *_checks(outcome))


def _head(outcome: Outcome) -> Iterator[RenderableType]:
    setup = outcome.setup
    sizes = ", ".join(
        f"{tier_name(Tier(tier), simulated_gpu=setup.simulated_gpu)} {format_size(size)}"
        for tier, size in setup.tier_bytes.items()
    )
    yield Text(
        f"Time to first token (TTFT): {setup.model}, {setup.layout.dtype}, on {setup.machine}", style="bold"
    )
    yield Text(f"Document: {setup.document}")
    yield Text(
        f"{setup.layout.bytes_per_token / 1024:.1f} KiB of KV a token, chunks of {setup.chunk_tokens} tokens. Tiers: {sizes}"
    )
    if setup.remote:
        yield Text(f"Remote store: {setup.remote}")
    if setup.simulated_gpu:
        yield Text(SIMULATED_GPU, style="yellow")
    if setup.threads > setup.facts.cores:
        yield Text(
            f"{setup.threads} threads on {setup.facts.cores} cores: these figures say little.", style="yellow"
        )


def _question_table(outcome: Outcome) -> Table:
    table = _empty_table(
        ("question", "left"),
        ("run", "left"),
        ("prompt\ntokens", "right"),
        ("tokens\nreused", "right"),
        ("tier", "left"),
        ("TTFT", "right"),
        ("speed-up", "right"),
    )
    simulated = outcome.setup.simulated_gpu
    for number in range(len(outcome.questions)):
        for row, run in enumerate(run for run in outcome.runs if run.question == number):
            table.add_row(
                "" if row else str(number + 1),
                _RUN_NAMES[run.source],
                f"{run.prompt_tokens:,}",
                f"{run.reused_tokens:,}",
                tiers_text(run.tiers, simulated_gpu=simulated),
                duration(run.ttft_s),
                _times(outcome.speedup(run), run.source),
            )
    if len(outcome.questions) > 1:
        for row, source in enumerate(outcome.sources()):
            table.add_row(
                "" if row else "median",
                _RUN_NAMES[source],
                "",
                "",
                tiers_text([CLAIMED[source]] if source in CLAIMED else [], simulated_gpu=simulated),
                duration(outcome.median_ttft(source)),
                _times(outcome.median_speedup(source), source),
                style="bold",
            )
    return table


def _conversation_table(outcome: Outcome) -> Table:
    table = _empty_table(
        ("turn", "right"),
        ("prompt\ntokens", "right"),
        ("tokens\nreused", "right"),
        ("tier", "left"),
        ("TTFT\nno cache", "right"),
        ("TTFT\ncache", "right"),
        ("speed-up", "right"),
    )
    for turn in range(len(outcome.questions)):
        without, cached = outcome.run(turn, Source.NO_CACHE), outcome.run(turn, Source.CACHE)
        if without is not None and cached is not None:
            table.add_row(
                str(turn + 1),
                f"{cached.prompt_tokens:,}",
                f"{cached.reused_tokens:,}",
                tiers_text(cached.tiers, simulated_gpu=outcome.setup.simulated_gpu),
                duration(without.ttft_s),
                duration(cached.ttft_s),
                _times(outcome.speedup(cached), Source.CACHE),
            )
    return table


def _empty_table(*columns: tuple[str, Literal["left", "right"]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for header, justify in columns:
        table.add_column(header, justify=justify, no_wrap=True, vertical="bottom")
    return table


def _answers(outcome: Outcome) -> Iterator[RenderableType]:
    same = all(len({run.answer_tokens for run in runs}) == 1 for runs in _by_question(outcome))
    yield Text(
        "Answers" + (" (the same from every run)" if same else " (THEY DIFFER, see below)"), style="bold"
    )
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for number, (question, runs) in enumerate(zip(outcome.questions, _by_question(outcome), strict=True)):
        table.add_row(f"{number + 1}", question.text)
        answer = " ".join(runs[0].answer.split()) if runs else "(none)"
        table.add_row("", Text(answer + _verdict(outcome, number), style="italic"))
    yield table


def _verdict(outcome: Outcome, number: int) -> str:
    question = outcome.questions[number]
    found = [question.is_answered_by(run.answer) for run in outcome.runs if run.question == number]
    if question.expected is None or not found:
        return ""
    return f'  [{"has" if all(found) else "LACKS"} "{question.expected}", as the document says]'


def _by_question(outcome: Outcome) -> list[list[Run]]:
    return [
        [run for run in outcome.runs if run.question == number] for number in range(len(outcome.questions))
    ]


def _checks(outcome: Outcome) -> Iterator[RenderableType]:
    yield Text("Checks", style="bold")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for check in outcome.checks:
        mark = Text("ok", style="green") if check.passed else Text("FAILED", style="bold red")
        table.add_row(mark, check.promise, f"{check.compared:,}", check.of_what)
    if same_logits(outcome.runs):
        table.add_row("", "the first token's logits were the same to the bit as well", "", "")
    yield table
    for note in outcome.notes:
        yield Text(note, style="yellow")


def failures(checks: Sequence[Check]) -> list[str]:
    """What differed, a line each; long lists are cut."""
    lines: list[str] = []
    for check in checks:
        if check.passed:
            continue
        found = check.failures or ("nothing was compared",)
        lines += [f"{check.name}: {failure}" for failure in found[:_SHOWN_FAILURES]]
        if len(found) > _SHOWN_FAILURES:
            lines.append(f"{check.name}: and {len(found) - _SHOWN_FAILURES} more, see the JSON file")
    return lines


def _times(value: float, source: Source) -> str:
    return "" if source is Source.NO_CACHE else f"{value:.1f}×"
