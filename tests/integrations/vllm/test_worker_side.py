"""A rank's copies over a fake arena: the right bytes, each job reported once, and nothing waits behind what it need not."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from kvtiers.integrations.vllm import worker as worker_module
from kvtiers.integrations.vllm.blocks import Bytes, HostBlocks
from kvtiers.integrations.vllm.messages import ChunkCopy, LoadJob, StepJobs, StoreJob
from kvtiers.integrations.vllm.worker import WorkerSide
from kvtiers.node.framing import ProtocolError
from kvtiers.testing.chaos import wait_until

BLOCK_BYTES = 8
PER_CHUNK = 2
PART = PER_CHUNK * BLOCK_BYTES
ARENA = b"arena"
PATIENCE_S = 30.0


class FakeClient:
    """An arena in this process; `broken` offsets are none of its slots."""

    def __init__(self) -> None:
        self.connected = True
        self.arena: bytes | None = ARENA
        self.memory = np.arange(64 * PART, dtype=np.uint32).view(np.uint8)[: 64 * PART].copy()
        self.gone = set[int]()
        self.broken = set[int]()
        self.held: dict[int, threading.Event] = {}
        self.steps = 0

    def view(self, arena: bytes, offset: int, nbytes: int) -> Bytes | None:
        if offset in self.held:
            self.held[offset].wait(PATIENCE_S)
        if offset in self.broken:
            raise ProtocolError("outside the arena")
        if arena != self.arena or offset in self.gone:
            return None
        return self.memory[offset : offset + nbytes]

    def step(self) -> int:
        self.steps += 1
        return 0

    def hold(self, offset: int) -> threading.Event:
        self.held[offset] = threading.Event()
        return self.held[offset]


class Bench:
    """A worker of rank 1 with 16 blocks."""

    def __init__(self) -> None:
        self.client = FakeClient()
        self.blocks = np.random.default_rng(0).integers(0, 256, (16, BLOCK_BYTES), np.uint8)
        self.worker = WorkerSide(
            self.client,
            HostBlocks([self.blocks], PER_CHUNK),
            rank=1,
            part_bytes=PART,
            block_bytes=BLOCK_BYTES,
        )

    def load(self, name: str, *chunks: ChunkCopy) -> None:
        self.worker.begin_loads(StepJobs(loads=[LoadJob(name, ARENA, list(chunks))]))

    def store(self, number: int, *chunks: ChunkCopy) -> None:
        self.worker.begin_stores(StepJobs(stores=[StoreJob(number, ARENA, list(chunks))]))

    def idle(self) -> None:
        assert self.worker.wait_idle(PATIENCE_S)


@pytest.fixture
def bench() -> Iterator[Bench]:
    one = Bench()
    yield one
    for event in one.client.held.values():
        event.set()
    assert one.worker.close(PATIENCE_S)


def chunk(slot: int, *blocks: int, first: int = 0) -> ChunkCopy:
    """The other rank's slot is one that this rank must not touch."""
    return ChunkCopy((63 * PART, slot * PART), first, blocks)


def test_load_fills_its_blocks_and_is_reported_once(bench: Bench) -> None:
    before = bench.blocks.copy()
    bench.load("r", chunk(3, 5, 9), chunk(4, 2))
    bench.idle()
    slots = bench.client.memory.reshape(64, PER_CHUNK, BLOCK_BYTES)
    assert np.array_equal(bench.blocks[[5, 9, 2]], [slots[3, 0], slots[3, 1], slots[4, 0]])
    untouched = [block for block in range(16) if block not in {5, 9, 2}]
    assert np.array_equal(bench.blocks[untouched], before[untouched])
    assert bench.worker.take_loaded() == ({"r"}, set())
    assert bench.worker.take_loaded() == (set(), set())
    report = bench.worker.take_report()
    assert report is not None
    assert report.load_bytes == 3 * BLOCK_BYTES
    assert bench.worker.take_report() is None


def test_load_enters_a_chunk_in_the_middle(bench: Bench) -> None:
    bench.load("r", chunk(3, 7, first=1))
    bench.idle()
    assert np.array_equal(bench.blocks[7], bench.client.memory.reshape(64, PER_CHUNK, BLOCK_BYTES)[3, 1])


def test_store_fills_its_slots_and_is_reported_once(bench: Bench) -> None:
    before = bench.client.memory.copy()
    bench.store(4, chunk(0, 3, 8), chunk(2, 1, 0))
    bench.idle()
    slots = bench.client.memory.reshape(64, PER_CHUNK, BLOCK_BYTES)
    assert np.array_equal(slots[0], bench.blocks[[3, 8]])
    assert np.array_equal(slots[2], bench.blocks[[1, 0]])
    slots = slots.copy()
    slots[[0, 2]] = before.reshape(slots.shape)[[0, 2]]
    assert np.array_equal(slots.reshape(-1), before)
    report = bench.worker.take_report()
    assert report is not None
    assert (report.stored, report.failed, report.store_bytes) == ({4: 1}, set(), 4 * BLOCK_BYTES)
    assert bench.worker.take_report() is None


def test_behind_a_hole_nothing_counts(bench: Bench) -> None:
    bench.client.gone.add(4 * PART)
    before = bench.blocks.copy()
    bench.load("r", chunk(3, 0, 1), chunk(4, 2, 3), chunk(5, 4, 5))
    bench.idle()
    assert bench.worker.take_loaded() == ({"r"}, {2, 3, 4, 5})
    assert np.array_equal(bench.blocks[2:], before[2:])


def test_arena_that_is_gone_is_a_failure_and_no_wait(bench: Bench) -> None:
    bench.client.arena = b"another"
    bench.load("r", chunk(3, 0, 1))
    bench.store(1, chunk(4, 2, 3))
    bench.idle()
    assert bench.worker.take_loaded() == ({"r"}, {0, 1})
    report = bench.worker.take_report()
    assert report is not None
    assert (report.stored, report.failed, report.store_bytes) == ({1: 1}, {1}, 0)


def test_slot_that_makes_no_sense_ends_its_job_and_no_other(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.client.broken.add(3 * PART)
    bench.load("broken", chunk(3, 0, 1))
    bench.load("no rank", ChunkCopy((0,), 0, (2, 3)))
    bench.load("sound", chunk(4, 4, 5))
    bench.store(1, chunk(3, 0, 1))
    bench.store(2, chunk(5, 0, 1))
    bench.idle()
    assert bench.worker.take_loaded() == ({"broken", "no rank", "sound"}, {0, 1, 2, 3})
    report = bench.worker.take_report()
    assert report is not None
    assert (report.stored, report.failed) == ({1: 1, 2: 1}, {1})
    assert "could not be copied" in caplog.text


def test_loads_do_not_wait_behind_stores(bench: Bench) -> None:
    held = bench.client.hold(3 * PART)
    bench.store(1, chunk(3, 0, 1))
    bench.load("r", chunk(4, 4, 5))
    assert wait_until(lambda: bench.worker.take_loaded()[0] == {"r"}, PATIENCE_S)
    report = bench.worker.take_report()
    assert report is not None
    assert not report.stored
    held.set()
    bench.idle()


def test_nothing_is_reported_while_a_copy_is_under_way(bench: Bench) -> None:
    held = bench.client.hold(4 * PART)
    bench.load("r", chunk(3, 0, 1), chunk(4, 2, 3))
    assert not bench.worker.wait_idle(0.05)
    assert bench.worker.take_loaded() == (set(), set())
    held.set()
    bench.idle()
    assert bench.worker.take_loaded() == ({"r"}, set())


def test_close_waits_for_what_was_handed_over() -> None:
    bench = Bench()
    held = bench.client.hold(3 * PART)
    bench.store(1, chunk(3, 0, 1))
    bench.store(2, chunk(4, 2, 3))
    assert not bench.worker.close(0.05)
    held.set()
    assert bench.worker.close(PATIENCE_S)
    report = bench.worker.take_report()
    assert report is not None
    assert report.stored == {1: 1, 2: 1}


def test_rank_that_connects_late_copies_all_the_same(bench: Bench) -> None:
    bench.client.connected, bench.client.arena = False, None
    bench.load("r", chunk(3, 0, 1))
    assert not bench.worker.wait_idle(0.05)
    bench.client.arena, bench.client.connected = ARENA, True
    bench.idle()
    assert bench.worker.take_loaded() == ({"r"}, set())


def test_service_that_is_dead_is_waited_for_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    clock = [0.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds

    fake_time = type(
        "Time", (), {"sleep": sleep, "monotonic": lambda: clock[0], "perf_counter": lambda: clock[0]}
    )
    bench.client.connected, bench.client.arena = False, None
    monkeypatch.setattr(worker_module, "time", fake_time)
    for number in range(20):
        bench.load(f"r{number}", chunk(3, 0, 1))
    loaded = set[str]()

    def all_reported() -> bool:
        loaded.update(bench.worker.take_loaded()[0])
        return len(loaded) == 20

    assert wait_until(all_reported, PATIENCE_S)
    assert sum(slept) < 1.1
    monkeypatch.undo()
