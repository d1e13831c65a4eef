"""Eviction policies beside each other: what they keep of a trace, and what a call costs.

    python benchmarks/eviction_policies.py hits TRACE.jsonl[.xz] [--policies lru lfu fifo]
    python benchmarks/eviction_policies.py cost [--keys 65536] [--rounds 15]

`hits`: a trace has one JSON object a line, with `hash_ids`: the ids of a request's blocks, each chained to those before it (the
format of Mooncake's published traces). Printed is the share of all blocks found in one tier, a block counted only if all before
it were found; capacity as a share of the distinct blocks. A request does to the policy what it does in the cache: what was
found is used, from last to first; what is missing is inserted, while the whole chain is held; then the whole chain is used.

`cost`: microseconds a call in a full tier of chains of 64 keys, one thread, policies in turn; the median over the rounds with the
5 and 95 % quantiles.
"""

from __future__ import annotations

import argparse
import json
import lzma
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvtiers.core.policies import policy_for
from kvtiers.core.policies.base import EvictionPolicy, Standing

_SHARES = (0.01, 0.02, 0.05, 0.10, 0.25, 0.50)
_CHAIN = 64


def chains_of(trace: Path) -> list[list[int]]:
    """The block ids of each request."""
    with lzma.open(trace, "rt") if trace.suffix == ".xz" else trace.open() as lines:
        return [json.loads(line)["hash_ids"] for line in lines]


def hits_of(policy: EvictionPolicy[int], chains: Sequence[Sequence[int]], capacity: int) -> int:
    """Blocks found over the whole trace, in a tier of so many blocks."""
    hits = 0
    for now, chain in enumerate(chains):
        found = next((n for n, key in enumerate(chain) if key not in policy), len(chain))
        hits += found
        use(policy, chain[:found], now)
        kept = store(policy, chain, found, capacity, now)
        use(policy, chain[:kept], now)
    return hits


def use(policy: EvictionPolicy[int], chain: Sequence[int], now: float) -> None:
    """From last to first."""
    for key in reversed(chain):
        policy.touch(key, now)


def store(policy: EvictionPolicy[int], chain: Sequence[int], found: int, capacity: int, now: float) -> int:
    """Insert what is missing, evicting for it; returns how much of the chain lies there then."""
    held = set(chain)
    for index in range(found, len(chain)):
        if chain[index] in policy:
            continue
        if len(policy) >= capacity:
            victim = policy.victim(now, lambda key: key not in held)
            if victim is None:
                return index
            policy.remove(victim)
        policy.insert(chain[index], chain[index - 1] if index else None, 1, now, Standing.ESTABLISHED)
    return len(chain)


def print_hits(trace: Path, names: Sequence[str]) -> None:
    """A row for each policy."""
    chains = chains_of(trace)
    total = sum(map(len, chains))
    distinct = len({key for chain in chains for key in chain})
    print(f"{trace.name}: {len(chains)} requests, {total} blocks, {distinct} distinct")
    print("| policy |" + "".join(f" {share:.0%} |" for share in _SHARES))
    for name in names:
        rates = (
            hits_of(policy_for(name), chains, max(1, int(distinct * share))) / total for share in _SHARES
        )
        print(f"| {name} |" + "".join(f" {rate:.3f} |" for rate in rates), flush=True)


def times_of(policy: EvictionPolicy[int], size: int) -> dict[str, float]:
    """Microseconds a call, each over as many keys as the tier holds."""
    for key in ids(0, size):
        policy.insert(key, parent_of(key), 1, 0.0, Standing.ESTABLISHED)
    clock = time.thread_time  # of this thread alone: others may use the machine
    began = clock()
    for key in ids(0, size):
        policy.touch(key, 1.0)
    touched = clock()
    for key in ids(size, 2 * size):
        victim = policy.victim(2.0, lambda _: True)
        assert victim is not None
        policy.remove(victim)
        policy.insert(key, parent_of(key), 1, 2.0, Standing.ESTABLISHED)
    evicted = clock()
    return {"touch": (touched - began) / size * 1e6, "evict + insert": (evicted - touched) / size * 1e6}


def ids(first: int, last: int) -> Iterator[int]:
    """Chains one after another, each from its last key to its first."""
    for start in range(first, last, _CHAIN):
        yield from range(min(start + _CHAIN, last) - 1, start - 1, -1)


def parent_of(key: int) -> int | None:
    """The one before it in its chain."""
    return key - 1 if key % _CHAIN else None


def print_cost(names: Sequence[str], size: int, rounds: int) -> None:
    """A row for each policy and call."""
    taken: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for name in names:
            for call, micros in times_of(policy_for(name), size).items():
                taken.setdefault((name, call), []).append(micros)
    for (name, call), samples in sorted(taken.items(), key=lambda item: item[0][1]):
        steps = statistics.quantiles(samples, n=20)
        print(
            f"{call:16s} {name:5s} {statistics.median(samples):6.2f} µs  ({steps[0]:.2f} to {steps[-1]:.2f})"
        )


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("hits", "cost"))
    parser.add_argument("trace", type=Path, nargs="?")
    parser.add_argument("--policies", nargs="+", default=["lru", "lfu", "fifo"])
    parser.add_argument("--keys", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if options.what == "cost":
        print_cost(options.policies, options.keys, options.rounds)
    elif options.trace is None:
        parser.error("hits needs a trace")
    else:
        print_hits(options.trace, options.policies)


if __name__ == "__main__":
    main()
