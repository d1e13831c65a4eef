"""`kvtiers demo --remote`: a second instance loads what the first one has written, from a store that the demo starts, or is given."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from kvtiers.cli.app import run
from kvtiers.config import CacheConfig
from kvtiers.model.tiers import Tier
from kvtiers.ops import engines
from kvtiers.ops.demo.measure import Source
from kvtiers.ops.demo.options import BadOption, DemoOptions, read_material
from kvtiers.ops.demo.remote import check_remote, with_engine
from kvtiers.ops.demo.restart import Restarted, answer_in_new_process
from kvtiers.ops.demo.run import run_demo
from kvtiers.ops.demo.session import Work
from kvtiers.ops.engines import Engine, EngineUnavailable, startable, throw_away, wants_own_network, why_not
from kvtiers.runtime.remote_plan import what_is_missing
from kvtiers.testing.own_network import in_own_network
from kvtiers.testing.servers.needs import missing


@pytest.fixture
def options(toy_model: Path, document: Path, tmp_path: Path) -> DemoOptions:
    no_disk = tmp_path / "no-disk.yaml"
    no_disk.write_text("storage: {disk: {enabled: false}}\n")
    return DemoOptions(
        model=toy_model,
        document=document,
        output=tmp_path / "out",
        config=no_disk,
        chunk_tokens=32,
        max_new_tokens=6,
        threads=2,
    )


def records_below(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size > 4096]


def needs(backend: str) -> None:
    remote = CacheConfig.from_mapping(
        {"storage": {"remote": {"enabled": True, "backend": backend, "endpoint": "host:1"}}}, environ={}
    ).storage.remote
    if reason := what_is_missing(remote) or why_not(backend):
        missing(reason)
    if wants_own_network(backend) and in_own_network(["true"]) is None:
        missing(
            f"{backend} needs a network namespace: root, user namespaces, or sudo without a password; and iproute2"
        )


@pytest.mark.slow
@pytest.mark.parametrize("backend", startable())
def test_second_instance_answers_from_a_store_that_the_demo_starts_and_ends(
    options: DemoOptions, toy_model: Path, document: Path, backend: str, capfd: pytest.CaptureFixture[str]
) -> None:
    needs(backend)
    arguments = [
        f"--model={toy_model}",
        f"--document={document}",
        f"--output={options.output}",
        f"--config={options.config}",
        f"--remote={backend}",
        "--chunk-tokens=32",
        "--max-new-tokens=6",
        "--threads=2",
    ]
    code = run(["demo", *arguments])
    printed = capfd.readouterr()
    assert code == 0, printed.err
    assert "2nd instance" in printed.out
    assert "started for this run" in printed.out
    assert "started for this run" in printed.err
    report = json.loads((options.output / "demo.json").read_text())
    assert report["passed"] is True
    remote = [one for one in report["runs"] if one["source"] == Source.REMOTE]
    assert len(remote) == 3
    for one in remote:
        assert one["tiers"] == {"remote": one["reused_tokens"] // 32}
        assert one["reused_tokens"] > 0
    assert report["second_instance"]["open_cache_s"] > 0
    names = sorted(file.name for file in options.output.iterdir())
    assert names == ["demo.json", "demo.png"]  # the store is gone with the demo
    assert str(options.output) not in json.dumps(report)


@pytest.mark.slow
def test_a_store_that_runs_already_is_used_and_left_as_it_was(
    options: DemoOptions, toy_model: Path, document: Path, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    given = DemoOptions(
        model=toy_model,
        document=document,
        output=options.output,
        chunk_tokens=32,
        max_new_tokens=1,
        threads=2,
        remote="fs",
        endpoint=str(shared),
        questions=("Why?",),
    )
    outcome = run_demo(given, lambda _: None)
    assert outcome.passed, outcome.checks
    assert outcome.sources()[-2:] == [Source.RESTART, Source.REMOTE]
    assert set(outcome.of(Source.REMOTE)[0].tiers) == {Tier.REMOTE}
    assert outcome.stats["tiers"]["remote"]["stored"] > 0
    assert records_below(shared) == []
    assert list(options.output.iterdir()) == []


@pytest.mark.slow
def test_what_the_store_has_lost_fails_the_checks(
    options: DemoOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()

    def lose_one(work: Work, scratch: Path) -> Restarted:
        records = records_below(shared)
        assert records
        records[0].unlink()
        return answer_in_new_process(work, scratch)

    monkeypatch.setattr("kvtiers.ops.demo.run.answer_in_new_process", lose_one)
    given = replace(options, remote="fs", endpoint=str(shared), questions=("Why?",), max_new_tokens=1)
    outcome = run_demo(given, lambda _: None)
    assert [check.name for check in outcome.checks if not check.passed] == ["reuse"]
    assert f", {Source.REMOTE.replace('_', ' ')}: " in outcome.checks[3].failures[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--remote=reddis"], "--remote reddis: did you mean redis? There are "),
        (["--remote=valky"], "--remote valky: did you mean redis? There are "),
        (["--remote=xyzzy"], "--remote xyzzy: There are "),
        (["--remote=fs", "--turns=3"], "--remote: a conversation is held by one instance"),
        (["--endpoint=localhost:1"], "--endpoint: of which store?"),
        (["--remote=fs", "--endpoint=/nonexistent/shared"], "the remote store (fs, /nonexistent/shared): "),
        (["--remote=fs", "--endpoint=somewhere"], "must be the absolute path"),
    ],
)
def test_wrong_option_is_one_message_and_nothing_is_started(
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
    assert printed.err.count("\n") <= 2
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", [name for name in startable() if name != "fs"])
def test_server_that_is_not_installed_is_one_sentence_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: str
) -> None:
    monkeypatch.setattr(engines, "_version", lambda _: "")
    with pytest.raises(BadOption, match=f"--remote {backend}: there is no .* to start: pip install "):
        read_material(DemoOptions(output=tmp_path, remote=backend))
    with pytest.raises(EngineUnavailable, match="pip install "), throw_away(backend, tmp_path / "engine"):
        pass


def test_what_the_reader_says_of_a_server_is_not_meant_for_ours() -> None:
    said = {
        "storage": {
            "remote": {
                "password_file": "/secret",
                "compression": "none",
                "redis": {"ttl_s": 5},
                "endpoint": "a",
            }
        }
    }
    own = Engine("redis", "ours", "127.0.0.1:1", is_own=True)
    assert with_engine(said, own)["storage"]["remote"] == {
        "enabled": True,
        "backend": "redis",
        "endpoint": "127.0.0.1:1",
        "compression": "none",
    }
    given = with_engine(said, Engine("redis", "theirs", "host:1"))["storage"]["remote"]
    assert given["password_file"] == "/secret"
    assert given["redis"] == {"ttl_s": 5}


def test_backend_that_nobody_has_is_refused_before_a_model_is_loaded() -> None:
    remote = {"enabled": True, "backend": "nobodys", "endpoint": "x"}
    with pytest.raises(BadOption, match="nobody has registered it"):
        check_remote({"storage": {"remote": remote}})


def test_engine_ends_with_the_run(tmp_path: Path) -> None:
    needs_valkey()
    with throw_away("redis", tmp_path / "engine") as engine:
        from kvtiers.testing.servers.process import LOOPBACK

        assert engine.endpoint.startswith(f"{LOOPBACK}:")
        running = children()
        assert running
    assert not children() & running


def needs_valkey() -> None:
    if reason := why_not("redis"):
        missing(reason)


def children() -> set[int]:
    task = Path(f"/proc/{os.getpid()}/task")
    found = "".join((thread / "children").read_text() for thread in task.iterdir())
    return {int(pid) for pid in found.split()}
