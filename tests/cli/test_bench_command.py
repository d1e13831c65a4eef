"""`kvtiers bench` as a user meets it: wrong options, and every subject once at a size that measures nothing."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvtiers.cli.app import run
from kvtiers.ops.bench import settings as settings_module


def report_of(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> dict[str, Any]:
    subject, *options = arguments
    output = f"--output={tmp_path / 'out'}"
    assert run(["bench", subject, "--tiny", "--rounds=2", output, "--json", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert isinstance(report, dict)
    return report


def figures(report: dict[str, Any], subject: str) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in report["figures"] if one["subject"] == subject}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["tiers", "--shape=gpt-2"], 2, "gpt-2 is not one of llama3-8b, smollm2-135m, both"),
        (["tiers", "--directory=/dev/null"], 2, "/dev/null is not a directory"),
        (["tiers", "--directory=/dev/null/below"], 2, "/dev/null is not a directory"),
        (["tiers", "--output=/dev/null"], 2, "--output"),
        (["tiers", "--rounds=0"], 2, "--rounds"),
        (["lookup", "--rounds=many"], 2, "--rounds"),
        (["lookup", "--peer=/nonexistent/python"], 1, "--peer none leaves it out"),
        (["lookup", "--tiers=2"], 2, "--tiers"),
        (["speed"], 2, "speed"),
    ],
)
def test_what_is_wrong_with_the_command_line_is_one_message(
    *,
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["bench", *arguments]) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_a_disk_without_room_is_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings_module, "_RESERVE", 1 << 60)
    monkeypatch.chdir(tmp_path)
    assert run(["bench", "tiers", "--tiny"]) == 2
    printed = capsys.readouterr()
    assert "free, but this run writes 1 EiB" in printed.err
    assert "measuring" not in printed.err
    assert list((tmp_path / "bench-output").iterdir()) == []


def test_help_imports_no_library_that_is_slow() -> None:
    code = (
        "import sys; from kvtiers.cli.app import run; run(['bench', '--help']); run(['bench', 'tiers', '--help']);"
        "heavy = {'torch', 'matplotlib', 'numpy', 'msgspec', 'yaml'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "overhead" in done.stdout
    assert "--tiny" not in done.stdout


@pytest.mark.slow
def test_all_measures_every_subject_and_writes_json_table_and_plot(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = report_of(capsys, tmp_path, "all", "--peer=none", f"--directory={tmp_path / 'disk'}")
    assert (report["schema"], report["command"], report["rounds"]) == (1, "all", 2)
    assert report["tiny"] is True
    assert report["machine"]["cores"] >= 1
    assert set(figures(report, "cpu")) == {"load", "store, engine's thread", "store, sustained"}
    assert set(figures(report, "disk")) == {
        "cold load",
        "store, durability rename",
        "store, durability fsync",
        "cold load with zstd",
        "store with zstd",
    }
    assert {"cpu, p50", "cpu, p99", "disk, p50", "disk, p99"} <= set(figures(report, "latency"))
    assert len(figures(report, "lookup")) == 4
    assert len(figures(report, "restart")) == 4
    assert len(figures(report, "overhead")) == 8
    assert figures(report, "remote") or report["skipped"]
    for figure in report["figures"]:
        assert figure["ours"]["values"], figure["name"]
        assert all(value >= 0 for value in figure["ours"]["values"]), figure["name"]
        for one in figure["comparisons"]:
            assert len(one["ratios"]) == len(one["to"]["values"]) == 2
    assert sum(report["verdicts"].values()) == sum(
        (one["verdict"] is not None) + sum(two["verdict"] is not None for two in one["comparisons"])
        for one in report["figures"]
    )
    output = tmp_path / "out"
    assert {file.name for file in output.iterdir()} >= {"bench.json", "bench.md"}
    assert json.loads((output / "bench.json").read_text()) == report
    assert "figures say nothing" in (output / "bench.md").read_text()
    assert list((tmp_path / "disk").iterdir()) == [], "what a run writes it removes"


@pytest.mark.slow
def test_every_figure_with_a_limit_is_a_ratio_to_the_best_of_the_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = report_of(capsys, tmp_path, "tiers", "--peer=none", f"--directory={tmp_path}")
    store = figures(report, "disk")["store, durability fsync"]
    (limit,) = store["comparisons"]
    assert limit["target"] == {"bound": 0.85, "kind": "at least"}
    assert all(other["median"] <= limit["to"]["median"] for other in store["others"])
    assert all(name["name"].startswith("write ") for name in store["others"])
    load = figures(report, "disk")["cold load"]
    assert any("cold" in note.lower() for note in load["notes"])


@pytest.mark.slow
def test_the_engine_s_thread_waits_for_no_lock_that_is_held_across_io(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = figures(report_of(capsys, tmp_path, "overhead", f"--directory={tmp_path}"), "overhead")
    for name in (
        "waits of the engine's thread for a lock held across I/O",
        "store calls made with the node's mutex held",
    ):
        assert (found[name]["ours"]["values"], found[name]["verdict"]) == ([0.0], "met")


@pytest.mark.slow
def test_a_restart_knows_every_chunk_and_goes_on_comparing_behind_the_first_hit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = figures(report_of(capsys, tmp_path, "restart", f"--directory={tmp_path}"), "restart")
    (log,) = [one for name, one in found.items() if name.startswith("index log of 200 chunks")]
    assert len(log["ours"]["values"]) == 2
    assert any("went on behind the first hit" in note for note in log["notes"])
    (scan,) = [one for name, one in found.items() if name == "no log: by scan, until every chunk is known"]
    assert len(scan["ours"]["values"]) == 1


def test_a_table_is_printed_without_json_and_a_peer_takes_part(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = tmp_path / "peer.py"
    script.write_text(
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    op = json.loads(line)['op']\n"
        "    answer = {'name': 'Peer 1', 'variants': {'lookup': ['only']}} if op == 'hello' else {'seconds': 0.25}\n"
        "    print(json.dumps(answer), flush=True)\n"
        "    if op == 'close':\n"
        "        break\n"
    )
    peer = shlex.join([sys.executable, str(script)])
    assert run(["bench", "lookup", "--tiny", "--rounds=2", f"--peer={peer}", f"--output={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "Peer 1 only hit" in printed
    assert "≤ 0.7" in printed
    assert "bench-lookup.json" in printed
