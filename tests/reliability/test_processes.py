"""Several processes: one directory has one owner, and a process that is stopped and continued serves nothing wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtiers.model.errors import DirectoryInUse
from kvtiers.runtime.cache import TieredCache
from kvtiers.testing.cache_oracle import SMALL_LAYOUT, CacheOracle
from kvtiers.testing.chaos import namespace, small_config

pytestmark = pytest.mark.slow

OWNER = """
    import sys
    from pathlib import Path
    from kvtiers.runtime.cache import TieredCache
    from kvtiers.testing.cache_oracle import SMALL_LAYOUT, CacheOracle
    from kvtiers.testing.chaos import namespace, small_config

    oracle, tokens = CacheOracle(namespace()), list(range(100))
    cache = TieredCache(small_config(Path(sys.argv[1])), SMALL_LAYOUT, namespace())
    cache.store(tokens, oracle.kv(tokens))
    cache.flush()
    print("open", flush=True)
    sys.stdin.readline()
    cache.close()
"""

LOADER = """
    import json, sys, time
    from pathlib import Path
    from kvtiers.testing.chaos import chaos
    from kvtiers.testing.faulty_store import Delay
    from kvtiers.stores.guard import Operation

    one = chaos(Path(sys.argv[1]), {"async.load_timeout_ms": 400})
    prompts = [list(range(number * 1000, number * 1000 + 100)) for number in range(20)]
    for tokens in prompts:
        one.cache.store(tokens, one.oracle.kv(tokens))
        one.cache.flush()
    one.disk.inject(Delay(0.01), Operation.READ, times=None)  # so that most of the time some read is under way
    print("open", flush=True)
    ends, reasons, stop_at = [], {}, time.monotonic() + float(sys.argv[2])
    while time.monotonic() < stop_at or ends[-1] != 96:
        for tokens in prompts:
            one.cache.evict("cpu")
            loaded = one.cache.load(tokens).result()
            one.oracle.check(tokens, loaded.num_tokens, loaded.kv)
            ends.append(loaded.num_tokens)
            reasons[str(loaded.stopped_by)] = reasons.get(str(loaded.stopped_by), 0) + 1
    print(json.dumps({"loads": len(ends), "reasons": reasons, "problems": one.node.check_integrity()}), flush=True)
    one.cache.close()
    one.node.close()
"""


class Child:
    def __init__(self, program: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> str:
        """Let it go on and end; returns what it wrote to stderr."""
        _, errors = self.process.communicate("\n", timeout=60)
        return errors

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def children() -> Iterator[list[Child]]:
    started: list[Child] = []
    yield started
    for child in started:
        child.kill()


def test_the_second_process_on_a_directory_is_told_who_owns_it(
    tmp_path: Path, children: list[Child], oracle: CacheOracle
) -> None:
    path, tokens = tmp_path / "cache", list(range(100))
    owner = Child(OWNER, str(path))
    children.append(owner)
    assert owner.line() == "open"
    for _ in range(2):
        with pytest.raises(DirectoryInUse) as caught:
            TieredCache(small_config(path), SMALL_LAYOUT, namespace())
        assert str(caught.value) == (
            f"{path} is in use by process {owner.process.pid}; close that cache, or give this one another path"
        )
    assert owner.end() == ""
    with TieredCache(small_config(path), SMALL_LAYOUT, namespace()) as cache:
        loaded = cache.load(tokens).result()
        assert loaded.num_tokens == 96
        oracle.check(tokens, 96, loaded.kv)


def test_a_killed_owner_does_not_keep_its_directory(tmp_path: Path, children: list[Child]) -> None:
    path = tmp_path / "cache"
    owner = Child(OWNER, str(path))
    children.append(owner)
    assert owner.line() == "open"
    owner.kill()
    with TieredCache(small_config(path), SMALL_LAYOUT, namespace()) as cache:
        assert cache.lookup(list(range(100))).num_tokens == 96


def test_a_stopped_owner_keeps_it(tmp_path: Path, children: list[Child]) -> None:
    path = tmp_path / "cache"
    owner = Child(OWNER, str(path))
    children.append(owner)
    assert owner.line() == "open"
    owner.signal(signal.SIGSTOP)
    with pytest.raises(DirectoryInUse):
        TieredCache(small_config(path), SMALL_LAYOUT, namespace())
    owner.signal(signal.SIGCONT)
    assert owner.end() == ""


def test_a_process_stopped_in_the_middle_of_its_loads_goes_on_with_right_bytes_and_recovers(
    tmp_path: Path, children: list[Child]
) -> None:
    loader = Child(LOADER, str(tmp_path / "cache"), "2.5")
    children.append(loader)
    assert loader.line() == "open"
    deadline = threading.Timer(90, loader.kill)
    deadline.start()
    try:
        for _ in range(3):
            time.sleep(0.2)
            loader.signal(signal.SIGSTOP)
            time.sleep(0.5)  # longer than loads wait and than the guard is patient
            loader.signal(signal.SIGCONT)
        line = loader.line()
        logged = {line.partition(":")[0] for line in loader.end().splitlines()}
    finally:
        deadline.cancel()
    assert logged <= {
        "the disk tier is out of order",
        "the disk tier works again",
    }
    told = json.loads(line)
    assert told["problems"] == []
    assert told["loads"] > 0
    assert set(told["reasons"]) <= {"partial_chunk", "staging_timeout", "tier_open", "no_slot", "evicted"}
