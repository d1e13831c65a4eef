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

from kvtiers.model.keys import chunk_keys, root_key
from kvtiers.model.parts import RecordRef
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


def on_disk(cache: TieredCache, tokens: list[int]) -> int:
    """Chunks from the start of the prompt whose records the disk has published.

    Fewer than were stored if some were pushed out of memory before a write could begin: eviction never waits for a disk.
    """
    keys = chunk_keys(root_key(cache.namespace.digest), tokens, SMALL_CHUNK)
    refs = [RecordRef(cache.namespace.digest, key, 0) for key in keys]
    published = cache.node.guards[Tier.DISK].exists(refs)
    return next((count for count, there in enumerate(published) if not there), len(refs))


def main() -> None:
    path, seed, values = sys.argv[1:]
    rng = random.Random(int(seed))
    oracle = CacheOracle(namespace())
    config = small_config(Path(path), json.loads(values))
    writes_through = config.storage.disk.write_policy == "write_through"
    say("opening")
    cache = TieredCache(config, SMALL_LAYOUT, namespace())
    say("open")
    unflushed: list[int] = []
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
                for number in unflushed:
                    say(f"flushed {number} {on_disk(cache, document(number, LONGEST))}")
                unflushed.clear()
            case 2:
                say(f"flushed {number} {to_disk(cache, tokens)}")
            case _:
                cache.store(tokens, oracle.kv(tokens))
                unflushed.append(number)


if __name__ == "__main__":
    main()
