"""The peer's side of the benchmark: what is missing is said, what is compared is the same work, damage never reaches an engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.peers.fault_scenarios import SCENARIOS
from benchmarks.peers.fault_subject import subjects
from benchmarks.peers.lmcache import LMCachePeer, available

from kvtiers.ops.bench.peer import PeerFailed
from kvtiers.ops.bench.shapes import SHAPES

WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
from benchmarks.peers.json_lines import answer_requests

class Worker:
    def do_good(self, request):
        print("noise")
        return {"seen": request["value"]}

    def do_bad(self, request):
        raise ValueError("no such thing")

answer_requests(Worker(), lambda: print("more noise"))
"""


def test_missing_peer_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTIERS_PEER_PYTHON", str(tmp_path / "python"))
    reason = available()
    assert reason is not None
    assert "make bench-peer-venv" in reason
    with pytest.raises(PeerFailed, match="bench-peer-venv"):
        LMCachePeer()


def test_interpreter_without_lmcache_is_told_from_one_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTIERS_PEER_PYTHON", sys.executable)
    reason = available()
    assert reason is not None
    assert "No package metadata was found for lmcache" in reason


def test_worker_answers_each_line_and_keeps_noise_off_stdout() -> None:
    requests = [{"op": "good", "value": 7}, {"op": "bad"}, {"op": "good", "value": 8}, {"op": "close"}]
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", WORKER, str(root)],
        input="".join(json.dumps(one) + "\n" for one in requests),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    answers = [json.loads(line) for line in ended.stdout.splitlines()]
    assert answers == [{"seen": 7}, {"error": "ValueError: no such thing"}, {"seen": 8}, {}]
    assert "noise" in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one bit flipped", "file truncated"])
def test_damaged_file_is_a_miss_that_the_next_store_heals(name: str, tmp_path: Path) -> None:
    ours = subjects()[0]
    facts = SCENARIOS[name](ours, tmp_path / "disk").facts
    assert facts["wrong_chunks"] == facts["wrong_chunks_again"] == 0
    assert facts["tokens"] < facts["tokens_again"] == 4096


@pytest.mark.slow
def test_peer_does_every_turn_it_offers(tmp_path: Path) -> None:
    if reason := available():
        pytest.skip(reason)
    with LMCachePeer() as peer:
        shape = SHAPES["smollm2-135m"]
        peer.open(shape, 2, tmp_path)
        for variant in peer.variants("cpu"):
            assert peer.store_cpu(variant).nbytes == peer.load_cpu(variant).nbytes == 2 * shape.chunk_bytes
        for variant in peer.variants("disk"):
            peer.store_disk(variant)
            assert peer.load_disk_cold(variant).seconds > 0
            assert peer.load_disk_hot(variant).seconds > 0
        for variant in peer.variants("lookup"):
            assert peer.lookup_hit(variant, 2048) > 0
            assert peer.lookup_miss(variant, 2048) > 0
        with pytest.raises(PeerFailed, match="no such way"):
            peer.store_cpu("no such way")
