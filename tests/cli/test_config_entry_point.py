"""The console script itself: names, versions, exit codes, and that help loads nothing heavy."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

import kvtiers
from kvtiers.cli import app as entry
from kvtiers.cli.output import print_json, print_table, progress, tracked
from kvtiers.model.errors import ConfigError, KvtiersError

HEAVY = {"torch", "transformers", "pydantic", "numpy", "matplotlib", "prometheus_client"}


@pytest.mark.parametrize("name", ["kvtiers", "lmcache-cli"])
def test_both_scripts_print_their_version(name: str) -> None:
    script = Path(sys.executable).with_name(name)
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, f"kvtiers {kvtiers.__version__}\n")


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from kvtiers.cli.app import run; rc = run(['--help']); "
        f"print('HEAVY', sorted({HEAVY!r} & set(sys.modules)), rc)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert "HEAVY [] 0" in done.stdout
    assert "config" in entry.command_names()
    assert all(name in done.stdout for name in entry.command_names())


def test_no_arguments_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run([]) == 2
    assert "Commands" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("error", "code"), [(KvtiersError("the disk is gone"), 1), (ConfigError(["a is wrong"], source="f"), 2)]
)
def test_an_error_of_ours_is_one_message_and_an_exit_code(
    error: KvtiersError, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = typer.Typer()

    @failing.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr(entry, "app", failing)
    assert entry.run([]) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {error}\n")


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = typer.Typer()

    @failing.command()
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(entry, "app", failing)
    with pytest.raises(ZeroDivisionError):
        entry.run([])


def test_a_closed_pipe_is_no_traceback() -> None:
    script = Path(sys.executable).with_name("kvtiers")
    done = subprocess.run(
        f"'{script}' config reference | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert len(done.stdout.splitlines()) == 1


@dataclass(frozen=True)
class Row:
    path: Path
    digest: bytes


def test_json_output_takes_values_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"rows": [Row(Path("/a"), b"\x01\xff")], "names": {"b", "a"}, "tier": kvtiers.Tier.CPU})
    assert json.loads(capsys.readouterr().out) == {
        "rows": [{"path": "/a", "digest": "01ff"}],
        "names": ["a", "b"],
        "tier": "cpu",
    }
    with pytest.raises(TypeError):
        print_json(object())


def test_a_table_in_a_pipe_keeps_long_cells_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name", "n"), [("x" * 120, 1), ("[bold]", 22)], right=("n",))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == "x" * 120 + "   1"
    assert lines[2].startswith("[bold]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_shows_on_a_terminal_once_it_takes_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, shown in ((0.1, False), (2.0, True)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        clock = iter([0.0, seconds, seconds]).__next__
        with progress("verifying", 2, clock=clock) as advance:
            advance(1)
        assert ("verifying" in terminal.getvalue()) is shown


def test_tracking_passes_items_through_and_is_silent_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(tracked([1, 2, 3], "counting")) == [1, 2, 3]
    assert "".join(capsys.readouterr()) == ""
