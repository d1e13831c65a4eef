"""Slots near the engine, on a machine that seems to have two nodes: the borders and the affinity are made up, the rest is real."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtiers.memory.arena import Arena
from kvtiers.memory.numa import Segment, segment_near
from kvtiers.model.errors import DoesNotFit
from kvtiers.model.parts import Part, Parts
from kvtiers.model.tiers import Tier
from kvtiers.runtime import node as node_module

if TYPE_CHECKING:
    from tests.runtime.conftest import MakeCache

    from kvtiers.testing.cache_oracle import CacheOracle

MIB = 1 << 20
HALF = MIB // 2
TWO = (Segment(0, 0, HALF), Segment(1, HALF, HALF))


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Arena, "segments", TWO)


@pytest.mark.parametrize("near", [0, 1])
@pytest.mark.usefixtures("two_nodes")
def test_an_engine_gets_slots_of_its_node_as_long_as_there_are_any(
    near: int, make_cache: MakeCache, oracle: CacheOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_module, "segment_near", lambda *_: near)
    cache = make_cache()
    tokens = list(range(20 * 16))
    cache.store(tokens, oracle.kv(tokens))
    slots = [copy.slots[0] for copy in cache.node.inspect(lambda core: core.copies(Tier.CPU))]
    assert len(slots) == 20
    assert {slot // HALF for slot in slots} == {near}
    for start in range(10_000, 10_000 + 40 * 16, 16):
        more = list(range(start, start + 16))
        cache.store(more, oracle.kv(more))
    slots = [copy.slots[0] for copy in cache.node.inspect(lambda core: core.copies(Tier.CPU))]
    assert {slot // HALF for slot in slots} == {0, 1}
    assert not any(slot < HALF < slot + 12_288 for slot in slots)
    loaded = cache.load(tokens).result()
    oracle.check(tokens, loaded.num_tokens, loaded.kv)


@pytest.mark.usefixtures("two_nodes")
def test_a_slot_that_no_node_has_room_for_is_refused_when_it_is_declared(make_cache: MakeCache) -> None:
    cache = make_cache({"disk.enabled": False}, disk=False)
    with pytest.raises(DoesNotFit, match="NUMA_AWARE=false"):
        cache.node.attach(b"n" * 32, Parts([Part(0, 0, HALF + 4096)]), chunk_tokens=16, itemsize=2)


def test_the_node_is_that_of_all_cpus_a_process_may_run_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, cpus in ((0, "0-3"), (1, "4-7")):
        folder = tmp_path / "devices" / "system" / "node" / f"node{number}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus + "\n")

    def near(*cpus: int) -> int | None:
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(cpus))
        return segment_near(TWO, 0, tmp_path)

    assert (near(0, 3), near(5), near(4, 5, 6, 7)) == (0, 1, 1)
    assert near(3, 4) is None
    assert near(8) is None
    assert segment_near(TWO[:1]) is None


def test_a_process_that_has_ended_is_near_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: int) -> set[int]:
        raise ProcessLookupError

    monkeypatch.setattr("os.sched_getaffinity", gone)
    assert segment_near(TWO, 12345) is None
