"""Stores, loads and evicts on the main thread, into which another thread shoots SIGINT all the time; then says what is wrong.

Run by test_interrupts.py: `interrupt_child.py PATH SEED VALUES`, VALUES as JSON. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvtiers.runtime.cache import TieredCache
from kvtiers.testing.cache_oracle import SMALL_CHUNK, SMALL_LAYOUT, CacheOracle
from kvtiers.testing.chaos import namespace, small_config

ROUNDS: Final = 150
armed = False


def interrupt(*_: object) -> None:
    """As `signal.default_int_handler`, while the cache is at work: once a call."""
    global armed
    if armed:
        armed = False
        raise KeyboardInterrupt


def shoot(rng: random.Random, stop: threading.Event) -> None:
    while not stop.wait(rng.uniform(0.0001, 0.003)):
        os.kill(os.getpid(), signal.SIGINT)


def use(cache: TieredCache, oracle: CacheOracle, tokens: list[int], rng: random.Random) -> None:
    global armed
    kv, into = oracle.kv(tokens), np.zeros(SMALL_LAYOUT.shape(len(tokens)), np.uint16)
    match rng.randrange(6):
        case 0:
            armed = True
            cache.evict("cpu", rng.random())
        case 1:
            armed = True
            cache.lookup(tokens)
        case 2:
            armed = True
            loaded = cache.load(tokens).result()
            armed = False
            oracle.check(tokens, loaded.num_tokens, loaded.kv)
        case 3:
            armed = True
            loaded = cache.load(tokens, into=into).result()
            armed = False
            oracle.check(tokens, loaded.num_tokens, into[:, :, : loaded.num_tokens])
        case _:
            armed = True
            cache.store(tokens, kv)
    armed = False


def main() -> None:
    path, seed, values = sys.argv[1:]
    rng, oracle, stop = random.Random(int(seed)), CacheOracle(namespace()), threading.Event()
    signal.signal(signal.SIGINT, interrupt)
    cache = TieredCache(small_config(Path(path), json.loads(values)), SMALL_LAYOUT, namespace())
    shooter = threading.Thread(target=shoot, args=(random.Random(int(seed) + 1), stop))
    shooter.start()
    interrupts = 0
    documents = [list(range(n * 1000, n * 1000 + (1 + n % 9) * SMALL_CHUNK)) for n in range(40)]
    while interrupts < ROUNDS:
        try:
            use(cache, oracle, rng.choice(documents), rng)
        except KeyboardInterrupt:
            interrupts += 1
    stop.set()
    shooter.join()
    report: dict[str, Any] = {"problems": cache.check_integrity()}
    began = time.monotonic()
    report["closed"] = cache.close()
    report["in_time"] = time.monotonic() - began < 10
    print(json.dumps(report))


if __name__ == "__main__":
    main()
