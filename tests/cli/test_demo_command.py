"""`kvtiers demo` as a user meets it: wrong options, start-up, and one real run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvtiers.cli.app import run


def kvtiers(*arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("kvtiers")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KVTIERS_")}
    return subprocess.run(
        [script, *arguments], env=environ, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=/nonexistent"], "--model /nonexistent: no such directory"),
        (["--document=/nonexistent"], "--document /nonexistent: No such file"),
        (["--question="], "--question is empty"),
        (["--output=/dev/null"], "--output /dev/null"),
        (["--config=/nonexistent"], "/nonexistent"),
        (["--turns=1"], "--turns"),
        (["--turns=many"], "--turns"),
        (["--chunk-tokens=0"], "--chunk-tokens"),
        (["--max-new-tokens=0"], "--max-new-tokens"),
        (["--threads=0"], "--threads"),
        (["--tiers=2"], "--tiers"),
        (["surplus"], "surplus"),
    ],
)
def test_wrong_option_is_one_message_and_exit_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["demo", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


def test_help_imports_no_library_that_is_slow() -> None:
    code = (
        "import sys; from kvtiers.cli.app import run; run(['--help']); run(['demo', '--help']);"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy', 'msgspec', 'yaml'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--turns" in done.stdout
    assert "simulated" in done.stdout


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_model_answers_from_every_tier_and_checks_itself(tmp_path: Path) -> None:
    done = kvtiers(
        "demo",
        f"--output={tmp_path}",
        "--max-new-tokens=2",
        "--question=Where is the lost property office?",
        "--json",
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] is True
    assert all(check["passed"] and check["compared"] for check in report["checks"])
    runs = {run["source"]: run for run in report["runs"]}
    assert list(runs) == ["no_cache", "gpu", "cpu", "disk", "disk_after_restart"]
    assert {run["reused_tokens"] for source, run in runs.items() if source != "no_cache"} == {2048}
    assert len({run["answer"] for run in runs.values()}) == 1
    assert runs["disk_after_restart"]["tiers"] == {"disk": 8}
    assert report["gpu_tier"] == "simulated on host memory, no GPU"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["demo.json", "demo.png"]
