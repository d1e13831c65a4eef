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


REMOTE = 'remote: {enabled: true, backend: nobodys, endpoint: "cluster.local:8080"}'


@pytest.mark.parametrize("size", ["64Mi", "900Ti"], ids=["fits", "does not fit"])
def test_a_remote_that_no_cache_will_have_is_not_shown_as_a_tier(tmp_path: Path, size: str) -> None:
    file = tmp_path / "remote.yaml"
    file.write_text(f"storage:\n  cpu: {{buffer_size: {size}}}\n  {REMOTE}\n")
    done = kvtiers("config", "check", str(file))
    assert done.returncode == 0
    assert "warning: storage.remote.backend = nobodys: nobody has registered it" in done.stderr
    fitting = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  ")]
    assert [value for key, value in fitting if key == "remote"] == ["none: see the warning"] * (
        size == "64Mi"
    )
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
        assert run(["config", "check", str(file), *options]) == 2
        told = capsys.readouterr()
        assert "must not hold credentials" in told.out + told.err
        assert "secret" not in told.out + told.err


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
        (["config", "preset"], "NAME"),
        (["config", "preset", "shared", "--as-descriped"], "--as-described"),
    ],
)
def test_misspelt_commands_and_options_get_the_right_one(
    args: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(args) == 2
    assert says in capsys.readouterr().err


PRESETS = ("aggressive", "long-document", "shared", "cost-first")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_written_and_passes_check_with_fit_here(name: str, tmp_path: Path) -> None:
    file = tmp_path / "lmcache_config.yaml"
    disk = [] if name == "aggressive" else ["--path", str(tmp_path / "cache")]
    written = kvtiers("config", "preset", name, *disk, "--output", str(file))
    assert (written.returncode, written.stdout) == (0, ""), written.stderr
    assert written.stderr.startswith(f"wrote {file}\n")
    done = kvtiers("config", "check", "--fit", str(file))
    assert done.returncode == 0, done.stderr
    assert "It fits this machine" in done.stdout
    if name in {"shared", "cost-first"}:
        assert "needs its client: pip install 'kvtiers[" in file.read_text()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_as_described_is_valid_everywhere_and_the_same_in_a_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["config", "preset", name, "--as-described"]) == 0
    text = capsys.readouterr().out
    assert CacheConfig.from_text(text, environ={}).storage.cpu.buffer_size in {200 << 30, 100 << 30, 50 << 30}
    file = tmp_path / "described.yaml"
    assert run(["config", "preset", name, "--as-described", "--output", str(file)]) == 0
    assert file.read_text() == text


def test_a_preset_does_not_overwrite_a_file_unless_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD)
    command = ["config", "preset", "aggressive", "--output", str(file)]
    assert run(command) == 2
    said = capsys.readouterr()
    assert "--force" in said.err
    assert said.out == ""
    assert file.read_text() == GOOD
    assert run([*command, "--force"]) == 0
    assert "preset aggressive" in file.read_text()
    assert run(["config", "preset", "aggressive", "--output", str(tmp_path / "no" / "such")]) == 2
    assert run(["config", "preset", "aggressive", "--force"]) == 2
    assert "goes with --output" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["agressive", "long_document", "LONG-DOCUMENT", "x", ""])
def test_a_misspelt_preset_gets_the_names_that_exist(name: str) -> None:
    done = kvtiers("config", "preset", name)
    assert (done.returncode, done.stdout) == (2, "")
    said = " ".join(done.stderr.replace("│", " ").split())
    assert f"is not one of {', '.join(PRESETS)}" in said
    near = {"agressive": "aggressive", "long_document": "long-document", "LONG-DOCUMENT": "long-document"}
    assert ("did you mean" in said) is (name in near)
    assert near.get(name, "") in said


def test_a_preset_for_a_path_that_cannot_be_used_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = kvtiers("config", "preset", "shared", "--path", str(tmp_path / "file" / "cache"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "is not a directory; choose another with --path" in done.stderr
    done = kvtiers("config", "preset", "aggressive", "--path", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "has no disk tier" in done.stderr


def installed(folder: Path, group: str, name: str, code: str) -> str:
    """A package in `folder` that registers `name`; gives the PYTHONPATH to find it."""
    info = folder / "extra-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extra\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = extra:made\n")
    (folder / "extra.py").write_text(code)
    return str(folder)


LOSSY = """
from kvtiers.records.codecs.none import NoCodec
class made(NoCodec):
    name, lossy = "rounding", True
"""


def test_check_refuses_a_codec_that_a_cache_would_not_start_with(tmp_path: Path) -> None:
    where = installed(tmp_path / "site", "kvtiers.codecs", "rounding", LOSSY)
    file = tmp_path / "lossy.yaml"
    file.write_text(
        "storage:\n  cpu: {buffer_size: 64Mi}\n  disk:\n    enabled: true\n"
        f"    path: {tmp_path / 'cache'}\n    max_size: 64Mi\n    compression: rounding\n"
    )
    done = kvtiers("config", "check", str(file), PYTHONPATH=where)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"storage.disk.compression = rounding ({file}:7): a lossy codec changes the KV" in done.stderr
    started = kvtiers(
        "serve", "--no-http", "--config", str(file), "--socket", str(tmp_path / "s" / "s"), PYTHONPATH=where
    )
    assert started.returncode == 2
    assert "a lossy codec changes the KV" in started.stderr
    report = json.loads(kvtiers("config", "check", "--json", str(file), PYTHONPATH=where).stdout)
    assert report["valid"] is False
    assert "lossy" in report["problems"][0]
    without = kvtiers("config", "check", str(file), PYTHONPATH=where, KVTIERS_STORAGE__DISK__ENABLED="false")
    assert without.returncode == 0, "a codec that nothing uses is nobody's problem"


def test_check_refuses_a_policy_whose_package_is_broken(tmp_path: Path) -> None:
    where = installed(tmp_path / "site", "kvtiers.policies", "broken", "import nowhere_to_be_found\n")
    file = tmp_path / "broken.yaml"
    file.write_text("storage: {cpu: {buffer_size: 64Mi, eviction_policy: broken}}\n")
    done = kvtiers("config", "check", str(file), PYTHONPATH=where)
    assert (done.returncode, done.stdout) == (2, "")
    assert "storage.cpu.eviction_policy = broken" in done.stderr
    assert "No module named 'nowhere_to_be_found'" in done.stderr
    assert "Traceback" not in done.stderr
