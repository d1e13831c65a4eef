"""Where the time of `store` and `load` goes, function by function: a sampling profile at both shapes.

    .venv/bin/python benchmarks/profile_paths.py [--shape smollm2-135m] [--prompts 40]

The KV is moved for real, between arrays and memory, without a disk. What copies bytes and what waits stands first; what is left is the
work in Python, in microseconds per chunk on the caller's thread. Sampling makes the rest of the code slower by a few per cent; the
figures are shares of a call, not the call's time.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from pyinstrument import Profiler

from kvtiers.ops.bench.caches import Prompts, bench_cache, bench_config
from kvtiers.ops.bench.shapes import BOTH, Shape, bookkeeping, shapes_named, synthetic_kv

INTERVAL_S: Final = 50e-6
KEPT: Final = 3
"""Prompts that the arena holds: every store evicts."""
SHOWN: Final = 8
MOVES: Final = frozenset({"copyto", "copy_threads", "memmove", "write", "read", "_copy", "wait", "acquire"})
"""Where bytes are copied or a thread waits: no cost of Python."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default=BOTH)
    parser.add_argument("--prompts", type=int, default=40)
    options = parser.parse_args()
    for shape in (*shapes_named(options.shape), bookkeeping(512)):
        profile(shape, options.prompts)


def profile(shape: Shape, prompts: int) -> None:
    """Print both calls' profiles."""
    print(f"\n{shape.describe()}, {prompts} prompts")
    config = bench_config(shape, arena_bytes=(KEPT + 3) * shape.nbytes * 5 // 4)
    kv, into = synthetic_kv(shape, shape.tokens), np.ones(shape.layout.shape(shape.tokens), np.uint16)
    given = Prompts(shape.tokens)
    stored: list[Any] = []
    with bench_cache(config, shape) as cache:

        def store() -> None:
            stored.append(given.new())
            assert cache.store(stored[-1], kv).accepted == shape.chunks

        def load() -> None:
            assert cache.load(stored[-1], into=into).result().num_tokens == shape.tokens

        for _ in range(KEPT + 3):
            store()
            cache.flush(60)
        for name, call in (("store", store), ("load", load)):
            show(name, call, lambda: cache.flush(60), prompts, shape.chunks)


def show(name: str, call: Callable[[], None], between: Callable[[], None], prompts: int, chunks: int) -> None:
    """Sample `prompts` calls, `between` aside; print the functions with the most time of their own."""
    spent: defaultdict[tuple[str, str], float] = defaultdict(float)
    for _ in range(prompts):
        profiler = Profiler(interval=INTERVAL_S)
        with profiler:
            call()
        between()
        session = profiler.last_session
        assert session is not None
        for stack, seconds in session.frame_records:
            spent[owner(stack)] += seconds
    each = 1e6 / (prompts * chunks)
    print(f"  {name}: {sum(spent.values()) * each:.1f} us a chunk")
    for (where, function), seconds in sorted(spent.items(), key=lambda one: -one[1])[:SHOWN]:
        print(f"    {seconds * each:8.2f}  {function}  ({where})")


def owner(stack: list[str]) -> tuple[str, str]:
    """The innermost function of a sample: file and name."""
    function, path, *_ = stack[-1].split("\x00")
    inner = [part.split("\x00") for part in stack if "kvtiers" in part.split("\x00")[1]]
    if "kvtiers" not in path and inner:
        mine, file, *_ = inner[-1]
        return Path(file).name, f"{mine} > {function}"
    return Path(path).name, function


if __name__ == "__main__":
    main()
