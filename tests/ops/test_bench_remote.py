"""`kvtiers bench remote` on real servers, at a size that measures nothing: every row is there, or the reason why it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvtiers.cli.app import run
from kvtiers.ops import engines
from kvtiers.ops.bench.loopback import Loopback
from kvtiers.ops.bench.peer_turns import remote_turns
from kvtiers.ops.bench.record_turns import RecordTurns
from kvtiers.ops.bench.remote_records import NAMES, why_not_measured
from kvtiers.ops.bench.shapes import SHAPES, TINY, Shape
from kvtiers.ops.engines import Engine, throw_away, wants_own_network
from kvtiers.testing.own_network import in_own_network
from kvtiers.testing.servers.needs import missing


def needs(backend: str) -> None:
    if reason := why_not_measured(backend):
        missing(reason)
    if wants_own_network(backend) and in_own_network(["true"]) is None:
        missing(
            f"{backend} needs a network namespace: root, user namespaces, or sudo without a password; and iproute2"
        )


def remote_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    arguments = ["--tiny", "--rounds=2", "--peer=none", f"--directory={tmp_path / 'disk'}", "--json"]
    assert run(["bench", "remote", f"--output={tmp_path / 'out'}", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list((tmp_path / "disk").iterdir()) == [], "what a run writes it removes"
    assert isinstance(report, dict)
    return report


@pytest.mark.slow
def test_every_engine_is_measured_against_its_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for backend in ("redis", *NAMES):
        needs(backend)
    report = remote_report(tmp_path, capsys)
    assert report["skipped"] == []
    figures = {one["name"]: one for one in report["figures"]}
    bounds = {
        name: [two["target"]["bound"] for two in one["comparisons"] if two["target"]]
        or (one["target"] and one["target"]["bound"])
        for name, one in figures.items()
    }
    assert bounds == {
        "Valkey, load": [0.7],
        "Valkey, store": [0.7],
        "Valkey, records read one by one": [0.7],
        "Valkey, records written one by one": [0.7],
        "Valkey, records read one by one, zstd": None,
        "Valkey, records written one by one, zstd": None,
        "CPU here: records read": 0.5,
        "CPU here: records written": 0.5,
        "CPU here: records read, zstd": None,
        "CPU here: records written, zstd": None,
        "CPU here: load by the whole cache": None,
        "CPU here: store by the whole cache": None,
        "Valkey, load of one chunk, p50": 50.0,
        "Valkey, load of one chunk, p99": 50.0,
        "Valkey, whether 512 keys are there": 3.0,
        "Mooncake, read": [0.85],
        "Mooncake, write": [0.85],
        "Mooncake, read, zstd": None,
        "Mooncake, write, zstd": None,
        "SeaweedFS (S3), read": [0.85],
        "SeaweedFS (S3), write": [0.85],
        "SeaweedFS (S3), read, zstd": None,
        "SeaweedFS (S3), write, zstd": None,
    }
    for one in figures.values():
        assert all(value > 0 for value in one["ours"]["values"]), one["name"]
        assert all(len(two["ratios"]) == 2 for two in one["comparisons"])


@pytest.mark.slow
def test_what_is_not_installed_is_said_with_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_version", lambda _: "")
    report = remote_report(tmp_path, capsys)
    assert report["figures"] == []
    assert len(report["skipped"]) == 1 + len(NAMES)
    assert all("pip install " in reason for reason in report["skipped"])
    written = (tmp_path / "out" / "bench-remote.md").read_text()
    assert written.count("Not measured: ") == 1 + len(NAMES)


def test_bare_socket_carries_all_pieces_both_ways() -> None:
    with Loopback(3_000_000, 3) as bare:
        for _ in range(2):
            assert bare.send() > 0
            assert bare.receive() > 0


def test_records_are_compared_with_what_was_written(tmp_path: Path) -> None:
    with throw_away("fs", tmp_path / "engine") as engine, RecordTurns(engine, SHAPES[TINY]) as turns:
        names = ["written", "read", "written, zstd", "read, zstd"]
        for name, turn in turns.contestants().items():
            assert turn() > 0, name
        assert {name: len(seconds) for name, seconds in turns.cpu_s.items()} == dict.fromkeys(names, 1)


class EmptiedByItsTurns:
    """A peer whose loads find only what its last store has left in the server."""

    name = "Peer"

    def __init__(self) -> None:
        self.server: set[str] = set()
        self.endpoint = ""

    def variants(self, subject: str) -> tuple[str, ...]:
        return ("one", "two") if subject == "redis" else ()

    def open(self, shape: Shape, chunks: int, directory: Path, *, endpoint: str = "") -> None:
        self.endpoint = endpoint

    def store(self, tier: str, variant: str) -> float:
        assert (tier, self.server) == ("redis", set()), "each store finds an empty server"
        self.server.add(variant)
        return 2.0

    def load(self, tier: str, variant: str) -> float:
        assert self.server == {variant}
        return 1.0

    def lookup(self, variant: str, tokens: int, *, hit: bool) -> float:
        raise AssertionError("loads and stores look nothing up")


def test_a_peer_s_load_follows_its_own_store_in_whatever_order(tmp_path: Path) -> None:
    peer = EmptiedByItsTurns()
    engine = Engine("redis", "a server", "host:1", clear=peer.server.clear)
    turns = remote_turns(peer, SHAPES[TINY], tmp_path, engine)
    assert peer.endpoint == "host:1"
    assert turns.notes == []
    for name in reversed(turns.contestants):
        assert turns.contestants[name]() == (1.0 if name.endswith("load") else 2.0)
