"""Lookup: 131,072 tokens in 512 chunks, all of them in memory.

The whole call against hashing alone (`chunk_keys` on the same token ids), both for a Python list and for a numpy array; with
keys supplied, as an engine that hashes its blocks does; and a prompt that misses, which is hashed all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kvtiers.model.errors import InvariantBroken
from kvtiers.model.keys import TokenIds, chunk_keys, root_key
from kvtiers.model.parts import Parts
from kvtiers.ops.bench.caches import bench_cache, bench_config, prompt
from kvtiers.ops.bench.figures import MS, Figure, Series, at_most, best, compare, times
from kvtiers.ops.bench.measure import Contestant, interleave, repeated, seconds_of
from kvtiers.ops.bench.peer import Peer
from kvtiers.ops.bench.peer_turns import lookup_turns
from kvtiers.ops.bench.settings import BenchSettings
from kvtiers.ops.bench.shapes import Shape, bookkeeping, synthetic_kv

CHUNKS: Final = 512
TINY_CHUNKS: Final = 4
_REPEATS: Final = 5

HASHING_TARGET: Final = at_most(2.5)
PEER_TARGET: Final = at_most(0.7)
KEYS_TARGET_MS: Final = at_most(0.6)
MISS_TARGET: Final = at_most(1.0)


def bench_lookup(
    settings: BenchSettings,
    *,
    peer: Peer | None = None,
    advance: Callable[[], object] = lambda: None,
) -> list[Figure]:
    """Four figures; nothing is written."""
    shape = bookkeeping(TINY_CHUNKS if settings.is_tiny else CHUNKS)
    tokens = shape.tokens
    known, unknown = prompt(0, tokens), prompt(1, tokens)
    known_list, unknown_list = known.tolist(), unknown.tolist()
    config = bench_config(shape, arena_bytes=4 * shape.nbytes + (4 << 20))
    with bench_cache(config, shape) as cache:
        receipt = cache.store(known, synthetic_kv(shape, tokens))
        if receipt.accepted != shape.chunks:
            raise InvariantBroken(
                f"{receipt.accepted} of {shape.chunks} chunks were stored: {receipt.refusal}"
            )
        cache.flush()
        # `attach` is idempotent: it gives the id of the namespace that the cache itself has declared.
        space = cache.node.attach(
            cache.namespace.digest,
            Parts.single(shape.layout, shape.chunk_tokens),
            chunk_tokens=shape.chunk_tokens,
            itemsize=shape.layout.itemsize,
        )
        root = root_key(cache.namespace.digest)
        keys = chunk_keys(root, known, shape.chunk_tokens)

        def lookup(ids: TokenIds, found: int) -> Contestant:
            if cache.lookup(ids).num_tokens != found:
                raise InvariantBroken(f"a lookup found {cache.lookup(ids).num_tokens} of {found} tokens")
            return repeated(lambda: seconds_of(lambda: cache.lookup(ids)), _REPEATS)

        def hashing(ids: TokenIds) -> Contestant:
            return repeated(lambda: seconds_of(lambda: chunk_keys(root, ids, shape.chunk_tokens)), _REPEATS)

        if len(cache.node.lookup(space, keys).tiers) != shape.chunks:
            raise InvariantBroken("a lookup by keys did not find every chunk")
        contestants: dict[str, Contestant] = {
            "hashing, list": hashing(known_list),
            "hit, list": lookup(known_list, tokens),
            "miss, list": lookup(unknown_list, 0),
            "hashing, array": hashing(known),
            "hit, array": lookup(known, tokens),
            "keys supplied": repeated(lambda: seconds_of(lambda: cache.node.lookup(space, keys)), _REPEATS),
        }
        turns = lookup_turns(peer, tokens)
        taken = interleave(contestants | turns.contestants, settings.rounds, advance=advance)
    series = {name: times(name, seconds, MS) for name, seconds in taken.items()}
    return _figures(
        shape, series, turns.series("hit", series), turns.series("miss", series), tuple(turns.notes)
    )


def _figures(
    shape: Shape,
    series: dict[str, Series],
    peer_hits: list[Series],
    peer_misses: list[Series],
    notes: tuple[str, ...],
) -> list[Figure]:
    tokens = f"{shape.tokens:,} tokens"
    hit, miss = series["hit, list"], series["miss, list"]
    return [
        Figure(
            "lookup",
            f"{tokens}, all hit (list of ints)",
            hit,
            comparisons=(
                compare(hit, series["hashing, list"], HASHING_TARGET),
                *(compare(hit, one, PEER_TARGET if one is best(peer_hits) else None) for one in peer_hits),
            ),
            notes=notes,
        ),
        Figure(
            "lookup",
            f"{tokens}, all hit (numpy array)",
            series["hit, array"],
            comparisons=(compare(series["hit, array"], series["hashing, array"], HASHING_TARGET),),
        ),
        Figure(
            "lookup", f"{shape.chunks} keys supplied, all hit", series["keys supplied"], target=KEYS_TARGET_MS
        ),
        Figure(
            "lookup",
            f"{tokens}, miss (list of ints)",
            miss,
            comparisons=(
                compare(miss, hit, MISS_TARGET),
                *(compare(miss, one) for one in peer_misses),
            ),
        ),
    ]
