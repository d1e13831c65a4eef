"""Writes, replaces and removes records until it is killed, and says on stdout what it has begun and what has returned.

Run by test_disk_kill.py: `kill_child.py PATH SEED DURABILITY CODEC`. One line each: `begin|done write|delete NUMBER VERSION`.
"""

from __future__ import annotations

import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor

from kvtiers.records.codecs.registry import codec_for
from kvtiers.stores.disk import DiskSettings, DiskStore, Durability, index_log
from kvtiers.testing.sealed_parts import make_part

THREADS = 3
NUMBERS_EACH = 25
SIZES = (700, 20_000, 150_000)


def size_of(number: int) -> int:
    return SIZES[number % len(SIZES)]


def work(store: DiskStore, thread: int, seed: int) -> None:
    """Each thread has numbers of its own, so what it says is in the order of what it does."""
    rng = random.Random(seed * 1000 + thread)
    for version in range(1, 1_000_000):
        number = thread * NUMBERS_EACH + rng.randrange(NUMBERS_EACH)
        what = "write" if rng.random() < 0.8 else "delete"
        version += seed * 1_000_000
        say(f"begin {what} {number} {version}")
        if what == "write":
            store.write(make_part(number, size_of(number), version=version))
        else:
            store.delete(make_part(number, 1).ref)
        say(f"done {what} {number} {version}")


def say(line: str) -> None:
    os.write(
        1, line.encode() + b"\n"
    )  # one write: lines of several threads do not mix, and a kill does not cut one


def main() -> None:
    path, seed, durability, codec = sys.argv[1:]
    settings = DiskSettings(
        (path,), durability=Durability(durability), codec=codec_for(codec), min_free_bytes=0
    )
    setattr(index_log, "_SLACK", 32)  # noqa: B010 - it is Final for everybody else; so that the kill also meets compactions of the log
    store = DiskStore(settings)
    store.open()
    say("begin open 0 0")
    with ThreadPoolExecutor(THREADS + 1) as pool:
        threads = [pool.submit(work, store, thread, int(seed)) for thread in range(THREADS)]
        for _ in range(1_000_000):
            list(store.reconcile())
            if any(thread.done() for thread in threads):
                break
        for thread in threads:
            thread.result()


if __name__ == "__main__":
    main()
