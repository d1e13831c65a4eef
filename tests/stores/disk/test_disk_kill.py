"""`kill -9` at random moments: what was acknowledged is there bit-exact, nothing wrong is readable, nothing is left over.

This shows what survives a killed process. It is no power-cut test: the page cache survives a kill.
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvtiers.model.errors import RecordMissing
from kvtiers.records.codecs.registry import codec_for
from kvtiers.stores.disk import DiskStore
from kvtiers.testing.store_kit import make_part, slot

if TYPE_CHECKING:
    from tests.stores.disk.conftest import Disk

pytestmark = pytest.mark.slow

CHILD = Path(__file__).with_name("kill_child.py")
SIZES = (700, 20_000, 150_000)
NUMBERS = range(75)
ABSENT = 0


class Truth:
    """What may lie under each number: a version, or ABSENT."""

    def __init__(self) -> None:
        self.allowed: dict[int, set[int]] = defaultdict(lambda: {ABSENT})
        self.acknowledged = 0

    def hear(self, line: str) -> None:
        moment, what, number, version = line.split()
        if what == "open":
            return
        outcome = int(version) if what == "write" else ABSENT
        if moment == "begin":
            self.allowed[int(number)].add(outcome)
        else:
            self.allowed[int(number)] = {outcome}
            self.acknowledged += 1

    def settle(self, number: int, found: int) -> None:
        """What was found holds from now on."""
        self.allowed[number] = {found}


def run_until_killed(
    path: Path, truth: Truth, *, seed: int, durability: str, codec: str, after_s: float
) -> None:
    child = subprocess.Popen(
        [sys.executable, str(CHILD), str(path), str(seed), durability, codec],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    lines: list[str] = []
    begun = threading.Event()

    def listen() -> None:
        for line in child.stdout or ():
            lines.append(line)
            begun.set()
        begun.set()

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        assert begun.wait(60)
        time.sleep(after_s)
    finally:
        child.kill()
        child.wait(30)
        listener.join(30)
        errors = child.stderr.read()
        child.stdout.close()
        child.stderr.close()
    assert errors == ""
    for line in lines:
        truth.hear(line)


def check_everything(disk: Disk, truth: Truth, durability: str, codec: str) -> None:
    store = disk.open(durability=durability, codec=codec_for(codec))
    list(store.recover())
    list(store.reconcile())
    assert list((disk.path / "tmp").iterdir()) == []
    for number in NUMBERS:
        allowed = truth.allowed[number]
        found = version_read(store, number, allowed)
        assert found in allowed, f"record {number}: {found} is not one of {allowed}"
        truth.settle(number, found)
    present = {make_part(number, 1).ref for number in NUMBERS if truth.allowed[number] != {ABSENT}}
    assert {record.ref for record in store.scan()} == present
    assert store.usage().records == len(present)
    assert store.usage().used_bytes == disk.du()
    stats = store.stats()
    assert stats["corrupt"] == stats["foreign"] == stats["unreadable"] == 0
    assert list(store.check()) == []
    disk.close()


def version_read(store: DiskStore, number: int, allowed: set[int]) -> int:
    """The version that lies there; -1 for bytes that are none of the allowed ones."""
    nbytes = SIZES[number % 3]
    out = slot(nbytes)
    try:
        store.read_into(make_part(number, 1).ref, out, nbytes)
    except RecordMissing:
        return ABSENT
    got = np.frombuffer(out, np.uint8)[:nbytes]
    for version in allowed - {ABSENT}:
        if np.array_equal(got, np.frombuffer(make_part(number, nbytes, version=version).payload, np.uint8)):
            return version
    return -1


def kill_rounds(disk: Disk, rounds: int, rng: random.Random) -> None:
    truth = Truth()
    for seed in range(rounds):
        durability = rng.choice(["rename", "rename", "fsync"])
        codec = rng.choice(["none", "zstd"])
        run_until_killed(
            disk.path, truth, seed=seed, durability=durability, codec=codec, after_s=rng.uniform(0, 0.15)
        )
        check_everything(disk, truth, durability, codec)
    assert truth.acknowledged > rounds


def test_kill_at_20_random_moments_loses_and_leaves_nothing(disk: Disk) -> None:
    kill_rounds(disk, 20, random.Random())


@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_kill_at_500_random_moments_loses_and_leaves_nothing(disk: Disk) -> None:
    kill_rounds(disk, 500, random.Random())
