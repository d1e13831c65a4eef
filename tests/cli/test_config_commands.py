"""`kvtiers config` as an operator meets it: real processes where exit codes and streams matter, in-process where only text does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvtiers.cli.app import run
from kvtiers.config import CacheConfig
from kvtiers.config.keys import settings_of

GOOD = "storage:\n  cpu:\n    buffer_size: 64Mi\n"
TOO_LARGE = "storage:\n  cpu:\n    buffer_size: 900Ti\n"


def kvtiers(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KVTIERS_")}
    script = Path(sys.executable).with_name("kvtiers")
    return subprocess.run(
        [script, *args], env={**clean, **environ}, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def good(tmp_path: Path) -> str:
    file = tmp_path / "good.yaml"
    file.write_text(GOOD)
    return str(file)


def test_check_prints_every_setting_with_its_source_and_exits_0(good: str) -> None:
    done = kvtiers("config", "check", good, KVTIERS_STORAGE__CHUNK_TOKENS="64")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = {
        line.split()[0]: line.split()
        for line in done.stdout.splitlines()
        if line.startswith(("storage.", "async.", "obs"))
    }
    assert set(rows) == {one.key for one in settings_of(CacheConfig)}
    assert rows["storage.cpu.buffer_size"][1:] == ["64Mi", f"{good}:3"]
    assert rows["storage.chunk_tokens"][1:] == ["64", "env", "KVTIERS_STORAGE__CHUNK_TOKENS"]
    assert rows["storage.gpu.device"][1:] == ["cuda", "default"]
    assert "It fits this machine" in done.stdout


def test_check_of_a_wrong_file_exits_2_with_one_message_on_stderr(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("storage:\n  cpu:\n    bufer_size: 1\nasync: {max_workers: 0}\n")
    done = kvtiers("config", "check", str(file))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {file}: 2 problems\n")
    assert "did you mean buffer_size?" in done.stderr
    assert "Traceback" not in done.stderr


def test_check_of_a_missing_file_exits_2() -> None:
    done = kvtiers("config", "check", "nowhere.yaml")
    assert done.returncode == 2
    assert "no such file" in done.stderr


def test_what_does_not_fit_here_is_a_warning_and_with_fit_a_failure(tmp_path: Path) -> None:
    file = tmp_path / "large.yaml"
    file.write_text(TOO_LARGE)
    done = kvtiers("config", "check", str(file))
    assert done.returncode == 0
    assert "does not fit this machine" in done.stderr
    assert "KVTIERS_STORAGE__CPU__BUFFER_SIZE=" in done.stderr
    assert kvtiers("config", "check", "--fit", str(file)).returncode == 2
    assert (
        kvtiers("config", "check", "--fit", str(file), KVTIERS_STORAGE__CPU__BUFFER_SIZE="64Mi").returncode
        == 0
    )


def test_json_is_json_in_every_case(good: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "check", "--json", good]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["valid"] is report["fits"] is True
    assert report["settings"]["storage.cpu.buffer_size"] == {
        "value": 64 << 20,
        "unit": "bytes",
        "source": f"{good}:3",
    }
    assert report["warnings"] == []
    assert report["bytes"]["cpu"] == 64 << 20

    large = tmp_path / "large.yaml"
    large.write_text(TOO_LARGE)
    assert run(["config", "check", "--json", "--fit", str(large)]) == 2
    report = json.loads(capsys.readouterr().out)
    assert (report["valid"], report["fits"]) == (True, False)
    assert "900Ti" in report["fit_problems"][0]

    large.write_text("x: 1")
    assert run(["config", "check", "--json", str(large)]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["valid"] is False
    assert report["problems"] == [
        f"x = 1 ({large}:1): unknown key; valid here: storage, async, observability"
    ]


REMOTE = 'remote: {enabled: true, backend: mooncake, endpoint: "cluster.local:8080"}'


@pytest.mark.parametrize("size", ["64Mi", "900Ti"], ids=["fits", "does not fit"])
def test_a_remote_that_no_cache_will_have_is_not_shown_as_a_tier(tmp_path: Path, size: str) -> None:
    file = tmp_path / "remote.yaml"
    file.write_text(f"storage:\n  cpu: {{buffer_size: {size}}}\n  {REMOTE}\n")
    done = kvtiers("config", "check", str(file))
    assert done.returncode == 0
    assert "warning: storage.remote.backend = mooncake: this version has no remote backend" in done.stderr
    fitting = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  ")]
    assert [value for key, value in fitting if key == "remote"] == ["none in this version"] * (size == "64Mi")
    (warning,) = json.loads(kvtiers("config", "check", "--json", str(file)).stdout)["warnings"]
    assert "runs without the remote tier" in warning


def test_a_gpu_pool_is_not_promised_where_nobody_looked_for_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gpu.yaml"
    file.write_text("storage: {gpu: {capacity: 1Gi}, cpu: {buffer_size: 64Mi}}\n")
    assert run(["config", "check", str(file)]) == 0
    said = capsys.readouterr()
    assert "on cuda" in said.out
    assert "is not checked here" in said.err


def test_a_password_in_an_endpoint_is_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "remote.yaml"
    file.write_text(
        'storage: {remote: {enabled: true, backend: redis, endpoint: "redis://me:secret@host:1"}}\n'
    )
    for options in ([], ["--json"]):
        assert run(["config", "check", str(file), *options]) == 0
        assert "secret" not in capsys.readouterr().out


def test_the_reference_is_a_configuration_of_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "reference"]) == 0
    text = capsys.readouterr().out
    assert CacheConfig.from_text(text, environ={}) == CacheConfig()
    for one in settings_of(CacheConfig):
        assert f"{one.path[-1]}:" in text


def test_the_reference_as_json_has_default_unit_and_effect_of_each(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["config", "reference", "--json"]) == 0
    reference = json.loads(capsys.readouterr().out)
    assert set(reference) == {one.key for one in settings_of(CacheConfig)}
    assert reference["storage.disk.max_size"]["unit"] == "size"
    assert reference["storage.cpu.low_watermark"]["default"] == "eviction_threshold - 0.05"


def test_the_reference_can_be_piped_into_check() -> None:
    reference = kvtiers("config", "reference").stdout
    script = Path(sys.executable).with_name("kvtiers")
    done = subprocess.run(
        [script, "config", "check", "-"],
        input=reference,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert "stdin:" in done.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["confg"], "Did you mean 'config'?"),
        (["config", "chek", "x"], "Did you mean 'check'?"),
        (["config", "check", "--jsn", "x"], "--json"),
        (["config", "check"], "FILE"),
    ],
)
def test_misspelt_commands_and_options_get_the_right_one(
    args: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(args) == 2
    assert says in capsys.readouterr().err
