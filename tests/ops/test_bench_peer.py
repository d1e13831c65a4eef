"""A peer behind a pipe: what it answers counts, and whatever goes wrong with it costs its own figures only."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path

import pytest

from kvtiers.model.errors import DeadlineExceeded
from kvtiers.ops.bench import peer as peer_module
from kvtiers.ops.bench.figures import MS, Series
from kvtiers.ops.bench.measure import interleave
from kvtiers.ops.bench.peer import PeerFailed, PeerProcess, installed_peer
from kvtiers.ops.bench.peer_turns import lookup_turns, tier_turns
from kvtiers.ops.bench.shapes import SHAPES, TINY

PEER = """
import json, sys, time
calls = 0
for line in sys.stdin:
    request = json.loads(line)
    calls += 1
    op = request["op"]
    if op == "hello":
        answer = {"name": "Peer 1", "variants": {"cpu": ["good", "bad", "dies"], "lookup": ["one"]}}
    elif op == "open":
        shape = request["shape"]
        assert shape == {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "dtype": "bfloat16", "chunk_tokens": 16}
        answer = {}
    elif op == "close":
        print("{}", flush=True)
        break
    elif request["variant"] == "bad":
        answer = {"error": "it can't"}
    elif request["variant"] == "dies" and calls > 12:
        answer = {"seconds": "soon"}
    elif op == "lookup":
        answer = {"seconds": request["tokens"] / 1000 + request["hit"]}
    else:
        answer = {"seconds": {"store": 1.5, "load": 0.5}[op]}
    print(json.dumps(answer), flush=True)
"""


def started(script: str, tmp_path: Path) -> PeerProcess:
    file = tmp_path / "peer.py"
    file.write_text(script)
    return PeerProcess(shlex.join([sys.executable, str(file)]))


def test_what_the_peer_answers_is_what_a_turn_took(tmp_path: Path) -> None:
    with started(PEER, tmp_path) as peer:
        assert peer.name == "Peer 1"
        assert peer.variants("cpu") == ("good", "bad", "dies")
        assert peer.variants("disk") == ()
        peer.open(SHAPES[TINY], 2, tmp_path)
        assert peer.store("cpu", "good") == 1.5
        assert peer.load("cpu", "good") == 0.5
        assert peer.lookup("one", 2000, hit=True) == 3.0
        assert peer.lookup("one", 2000, hit=False) == 2.0
        with pytest.raises(PeerFailed, match="it can't"):
            peer.store("cpu", "bad")
        assert peer.load("cpu", "good") == 0.5, "an error is an answer: the next one is asked for"
    peer.close()


def test_a_variant_that_fails_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    with started(PEER, tmp_path) as peer:
        turns = tier_turns(peer, SHAPES[TINY], "cpu", tmp_path)
        taken = interleave(turns.contestants, 4)
    series = {name: Series(name, MS, tuple(values)) for name, values in taken.items()}
    assert [one.values for one in turns.series("load", series)] == [(0.5,) * 4]
    assert [one.name for one in turns.series("store", series)] == ["Peer 1 good store"]
    assert any(math.isnan(value) for value in taken["Peer 1 dies load"]), "it failed in the rounds"
    assert sorted(note.partition(" left out")[0] for note in turns.notes) == [
        "Peer 1 bad store",
        "Peer 1 dies load",
        "Peer 1 dies store",
    ]


def test_a_lookup_has_a_turn_that_hits_and_one_that_misses(tmp_path: Path) -> None:
    with started(PEER, tmp_path) as peer:
        turns = lookup_turns(peer, 1000)
    assert list(turns.contestants) == ["Peer 1 one hit", "Peer 1 one miss"]


def test_without_a_peer_there_is_a_note_and_no_turn() -> None:
    for turns in (tier_turns(None, SHAPES[TINY], "cpu", Path()), lookup_turns(None, 1)):
        assert turns.contestants == {}
        assert turns.notes == ["no peer took part (--peer)"]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("print('hello there', flush=True); input()", "no JSON"),
        ("pass", "has ended"),
        ("print('{}', flush=True); input()", "no 'name'"),
        ("print('[1]', flush=True); input()", "can't hello"),
        ('print(\'{"error": "no memory"}\', flush=True); input()', "no memory"),
    ],
)
def test_a_peer_that_makes_no_sense_is_one_error_and_is_ended(
    script: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(PeerFailed, match=message):
        started(script, tmp_path)


@pytest.mark.parametrize("command", ["/nonexistent/python", "''", ""])
def test_a_peer_that_can_not_be_started_says_how_to_leave_it_out(command: str) -> None:
    with pytest.raises(PeerFailed, match="--peer none"):
        PeerProcess(command)


def test_a_peer_that_hangs_is_ended_at_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_module, "_START_DEADLINE_S", 0.3)
    with pytest.raises(DeadlineExceeded, match="hello"):
        started("import time; time.sleep(600)", tmp_path)


def test_the_peer_of_a_checkout_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert installed_peer() is None
    for file in (peer_module.PYTHON, peer_module.SCRIPT):
        file.parent.mkdir(parents=True)
        file.touch()
    assert installed_peer() == f"{peer_module.PYTHON} {peer_module.SCRIPT}"
