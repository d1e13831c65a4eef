"""Stores, loads and evicts until it is killed, and says on stdout what has certainly reached the disk.

Run by test_cache_kill.py: `cache_kill_child.py PATH SEED VALUES`, VALUES as JSON. Lines: `opening`, `open`,
`flushed DOCUMENT CHUNKS`, and `wrong …` if it was ever served a wrong byte.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

from kvtiers.model.tiers import Tier
from kvtiers.runtime.cache import TieredCache
from kvtiers.testing.cache_oracle import SMALL_CHUNK, SMALL_LAYOUT, CacheOracle, WrongKV
from kvtiers.testing.chaos import namespace, small_config

DOCUMENTS = 60
LONGEST = 10


def document(number: int, chunks: int) -> list[int]:
    """Every second document continues the one before it from the fourth chunk on: chains branch."""
    tokens = list(range(number * 1000, number * 1000 + chunks * SMALL_CHUNK))
    if number % 2:
        shared = 4 * SMALL_CHUNK
        tokens[:shared] = range((number - 1) * 1000, (number - 1) * 1000 + len(tokens[:shared]))
    return tokens


def say(line: str) -> None:
    os.write(1, line.encode() + b"\n")  # one write: a kill does not cut a line


def to_disk(cache: TieredCache, tokens: list[int]) -> int:
    """Chunks of the prompt that certainly lie on the disk, after having seen to it."""
    for _ in range(LONGEST):
        cache.evict("cpu")
        cache.flush()
        tiers = cache.lookup(tokens).tiers
        if set(tiers) <= {Tier.DISK}:
            return len(tiers)
    return 0


def main() -> None:
    path, seed, values = sys.argv[1:]
    rng = random.Random(int(seed))
    oracle = CacheOracle(namespace())
    config = small_config(Path(path), json.loads(values))
    writes_through = config.storage.disk.write_policy == "write_through"
    say("opening")
    cache = TieredCache(config, SMALL_LAYOUT, namespace())
    say("open")
    unflushed: list[tuple[int, int]] = []
    while True:
        number, chunks = rng.randrange(DOCUMENTS), rng.randrange(1, LONGEST + 1)
        tokens = document(number, chunks)
        match rng.randrange(8):
            case 0:
                cache.evict("cpu", rng.random())
            case 1:
                loaded = cache.load(tokens).result()
                try:
                    oracle.check(tokens, loaded.num_tokens, loaded.kv)
                except WrongKV as error:
                    say(f"wrong {error}")
            case 2 if writes_through:
                cache.flush()
                for flushed in unflushed:
                    say("flushed {} {}".format(*flushed))
                unflushed.clear()
            case 2:
                say(f"flushed {number} {to_disk(cache, tokens)}")
            case _:
                receipt = cache.store(tokens, oracle.kv(tokens))
                unflushed.append((number, receipt.accepted + receipt.present))


if __name__ == "__main__":
    main()
