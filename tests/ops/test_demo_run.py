"""The demo as a whole on a toy model: it passes when all is well, and fails, with the place, when one bit of KV is not what was stored."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, MistralConfig

from kvtiers.cli.app import run
from kvtiers.model.errors import ConfigError
from kvtiers.model.tiers import Tier
from kvtiers.ops.demo.measure import Source
from kvtiers.ops.demo.options import BadOption, DemoOptions
from kvtiers.ops.demo.outcome import Outcome
from kvtiers.ops.demo.restart import RestartFailed, answer_in_new_process
from kvtiers.ops.demo.run import run_demo
from kvtiers.ops.demo.session import Session, Work
from kvtiers.runtime.transfer import ArenaSlots, PoolSlots

pytestmark = pytest.mark.slow


@pytest.fixture
def options(toy_model: Path, document: Path, tmp_path: Path) -> DemoOptions:
    return DemoOptions(
        model=toy_model,
        document=document,
        output=tmp_path / "out",
        chunk_tokens=32,
        max_new_tokens=6,
        threads=2,
    )


@pytest.fixture
def command(options: DemoOptions) -> list[str]:
    return [
        "demo",
        f"--model={options.model}",
        f"--document={options.document}",
        f"--output={options.output}",
        "--chunk-tokens=32",
        "--max-new-tokens=6",
    ]


def silent(_: str) -> None:
    pass


def failed(outcome: Outcome) -> list[str]:
    return [check.name for check in outcome.checks if not check.passed]


@pytest.fixture
def without_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process takes seconds to import its libraries; here it is not what is looked at."""
    monkeypatch.setattr("kvtiers.ops.demo.run.answer_in_new_process", no_second_process)


class NoSecondProcess(Exception):
    pass


def no_second_process(work: Work, directory: Path) -> Any:
    raise NoSecondProcess


def no_disk(tmp_path: Path) -> Path:
    """A configuration without disk: so without a second process."""
    file = tmp_path / "no-disk.yaml"
    file.write_text("storage: {disk: {enabled: false}}\n")
    return file


@pytest.mark.slow
def test_every_question_is_answered_from_every_tier_and_after_a_restart(options: DemoOptions) -> None:
    said: list[str] = []
    outcome = run_demo(options, said.append)
    assert outcome.passed, outcome.checks
    assert outcome.sources() == [Source.NO_CACHE, Source.GPU, Source.CPU, Source.DISK, Source.RESTART]
    assert len(outcome.runs) == 15
    assert len({run.answer_tokens for run in outcome.of(Source.NO_CACHE)}) > 1  # so that answers can differ
    for one in outcome.runs:
        claimed = {Source.NO_CACHE: set(), Source.RESTART: {Tier.DISK}}.get(one.source)
        assert set(one.tiers) == ({Tier(one.source)} if claimed is None else claimed)
    first = outcome.run(0, Source.RESTART)
    assert first is not None
    assert first.reused_tokens == first.prompt_tokens // 32 * 32
    assert outcome.restart["open_cache_s"] > 0
    assert list(options.output.iterdir()) == []  # nothing but what the command writes
    assert any("restart" in line for line in said)


def test_conversation_reuses_what_was_said(options: DemoOptions) -> None:
    outcome = run_demo(replace(options, turns=3), silent)
    assert outcome.passed, outcome.checks
    cached = outcome.of(Source.CACHE)
    assert cached[0].reused_tokens == 0
    for before, after in pairwise(cached):
        assert after.prompt_tokens > before.prompt_tokens
        assert after.reused_tokens >= before.prompt_tokens // 32 * 32
    assert list(options.output.iterdir()) == []


def test_conversation_ends_when_the_model_takes_no_more(options: DemoOptions) -> None:
    outcome = run_demo(replace(options, turns=100, questions=("Why? " * 60,), max_new_tokens=200), silent)
    assert outcome.passed, outcome.checks
    assert 1 < len(outcome.questions) < 10
    assert "the model takes 2,048" in outcome.notes[0]


def test_prompt_cached_to_its_last_token_passes(options: DemoOptions, tmp_path: Path) -> None:
    one_token = replace(options, chunk_tokens=1, config=no_disk(tmp_path), questions=("Why?", "Who?"))
    outcome = run_demo(one_token, silent)
    assert outcome.passed, outcome.checks
    first = outcome.run(0, Source.GPU)
    assert first is not None
    assert first.reused_tokens == first.prompt_tokens - 1


@pytest.mark.parametrize(("memory", "source"), [(PoolSlots, Source.GPU), (ArenaSlots, Source.CPU)])
def test_one_flipped_bit_in_one_tier_fails_there_and_only_there(
    options: DemoOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    memory: Any,
    source: Source,
) -> None:
    read = memory.read

    def read_wrong(self: Any, offset: int, kv: Any, start: int, tokens: int, *more: Any) -> None:
        read(self, offset, kv, start, tokens, *more)
        if start == 2 * tokens:
            kv.planes[3][start + 5, 1, 2] ^= 1  # V of layer 1

    monkeypatch.setattr(memory, "read", read_wrong)
    outcome = run_demo(replace(options, config=no_disk(tmp_path)), silent)
    assert not outcome.passed
    assert "kv" in failed(outcome)
    (check,) = [check for check in outcome.checks if check.name == "kv"]
    assert len(check.failures) == 3
    for failure in check.failures:
        assert f", {source}: " in failure
        assert "tokens 64 to 95" in failure
        assert "layers [1]" in failure


def test_scribbled_arena_fails_the_audit_too(
    options: DemoOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    move_down = Session.move_down

    def scribble(self: Session, target: Tier) -> None:
        move_down(self, target)
        if target is Tier.CPU:
            self.lm.cache.node.arena.view(0, 8)[:] ^= 255

    monkeypatch.setattr(Session, "move_down", scribble)
    outcome = run_demo(replace(options, config=no_disk(tmp_path)), silent)
    assert {"kv", "integrity"} <= set(failed(outcome))


def test_wrong_tier_fails(options: DemoOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "move_down", lambda self, _: self.lm.cache.flush())
    outcome = run_demo(replace(options, config=no_disk(tmp_path)), silent)
    assert failed(outcome) == ["tier"]


def test_failed_check_is_exit_code_1_and_says_where(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = PoolSlots.read

    def read_wrong(self: Any, offset: int, kv: Any, start: int, *more: Any) -> None:
        read(self, offset, kv, start, *more)
        kv.planes[0][start, 0, 0] ^= 1

    monkeypatch.setattr(PoolSlots, "read", read_wrong)
    assert run([*command, "--turns=2"]) == 1
    printed = capsys.readouterr()
    assert "FAILED" in printed.out
    assert "error: the demo's checks failed:" in printed.err
    assert "question 2, cache: the KV of tokens 0 to 31 is not what was stored (layers [0])" in printed.err


def test_report_is_written_and_names_no_machine(
    command: list[str], options: DemoOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, "--turns=2"]) == 0
    printed = capsys.readouterr()
    assert "GPU tier is simulated" in printed.out
    written = options.output / "conversation.json"
    report = json.loads(written.read_text())
    assert report["passed"] is True
    assert report["gpu_tier"].startswith("simulated")
    assert report["setup"]["document"] == str(options.document)
    assert [run["ttft_s"] > 0 for run in report["runs"]] == [True] * 4
    text = written.read_text().replace(str(options.model), "").replace(str(options.document), "")
    assert str(options.output) not in text
    assert "/tmp" not in text
    picture = (options.output / "conversation.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_json_on_stdout_is_the_file(
    command: list[str], options: DemoOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, "--turns=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(
        (options.output / "conversation.json").read_text()
    )


def test_without_matplotlib_there_is_a_note_and_no_failure(
    command: list[str],
    options: DemoOptions,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run([*command, "--turns=2"]) == 0
    assert "no plot: matplotlib isn't installed" in capsys.readouterr().err
    assert [file.name for file in options.output.iterdir()] == ["conversation.json"]


@pytest.mark.usefixtures("without_restart")
def test_nothing_is_left_behind_if_it_breaks_off(options: DemoOptions) -> None:
    with pytest.raises(NoSecondProcess):
        run_demo(options, silent)
    assert list(options.output.iterdir()) == []


@pytest.mark.usefixtures("without_restart")
def test_disk_the_reader_names_keeps_its_records(options: DemoOptions, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"storage: {{disk: {{enabled: true, path: {tmp_path}/mine, min_free_space: 1Mi}}}}\n")
    for _ in range(2):  # records of the first run are not met by the second
        with pytest.raises(NoSecondProcess):
            run_demo(replace(options, config=file), silent)
    assert len(list((tmp_path / "mine").rglob("*.kv"))) >= 2 * 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_tokens": 4096}, r"a chunk has 4096.*--chunk-tokens 1"),
        ({"max_new_tokens": 5000}, "the model takes 2,048"),
        ({"questions": ("Why? " * 400,)}, "the model takes 2,048"),
    ],
)
def test_prompt_that_fits_neither_chunk_nor_model_is_refused(
    options: DemoOptions, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadOption, match=message):
        run_demo(replace(options, **changes), silent)


def test_model_that_cannot_be_cached_is_refused(
    options: DemoOptions, toy_model: Path, tmp_path: Path
) -> None:
    config = MistralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=16,
    )
    other = tmp_path / "mistral"
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    for file in toy_model.glob("tokenizer*"):
        (other / file.name).write_bytes(file.read_bytes())
    with pytest.raises(BadOption, match="only full attention"):
        run_demo(replace(options, model=other), silent)


@pytest.mark.parametrize("broken", ["model.safetensors", "config.json", "tokenizer.json"])
def test_model_that_cannot_be_read_is_one_error(
    options: DemoOptions, toy_model: Path, tmp_path: Path, broken: str
) -> None:
    other = tmp_path / "broken"
    other.mkdir()
    for file in toy_model.iterdir():
        (other / file.name).write_bytes(b"{nonsense" if file.name == broken else file.read_bytes())
    with pytest.raises(ConfigError, match=f"--model {other}"):
        run_demo(replace(options, model=other), silent)


@pytest.mark.slow
def test_second_process_that_fails_is_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    work = Work(
        model=str(tmp_path / "none"),
        settings={},
        device="cpu",
        threads=1,
        prompts=((1, 2),),
        tiers=(Tier.DISK,),
        max_new_tokens=1,
        salt="s",
    )
    with pytest.raises(RestartFailed, match="exit code 1"):
        answer_in_new_process(work, tmp_path)
    assert "finds no tokenizer" in capfd.readouterr().err


@pytest.mark.slow
def test_disk_figures_that_come_from_memory_are_said_to(options: DemoOptions, tmp_path: Path) -> None:
    file = tmp_path / "buffered.yaml"
    file.write_text("storage: {disk: {direct_io: 'off'}}\n")
    outcome = run_demo(replace(options, config=file, questions=("Why?",), max_new_tokens=1), silent)
    assert outcome.passed, outcome.checks
    assert outcome.restart["disk_read_past_page_cache"] is False
    assert any("page cache" in note for note in outcome.notes)
