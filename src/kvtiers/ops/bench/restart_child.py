"""The new process of `bench restart`: `python -m kvtiers.ops.bench.restart_child PATH CHUNKS` prints what it saw as JSON."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from kvtiers.model.errors import KvtiersError
from kvtiers.model.tiers import Tier
from kvtiers.ops.bench.caches import bench_cache, bench_config, prompt
from kvtiers.ops.bench.restart import PROMPT_CHUNKS, SHAPE, Restarted

_ARENA_BYTES: Final = 64 << 20
_POLL_SHARE: Final = 0.02
"""Asked again after so much of the time that has passed: rarely enough not to be in the way."""
_DEADLINE_S: Final = 120.0


class TooSlow(KvtiersError):
    """The chunks were not found in time."""


def look(path: Path, chunks: int) -> Restarted:
    """Open, look up until the first prompt hits, wait until all chunks are known and the comparison has ended."""
    tokens = prompt(0, PROMPT_CHUNKS * SHAPE.chunk_tokens)
    config = bench_config(
        SHAPE, arena_bytes=_ARENA_BYTES, directory=path, values={"disk.max_size": chunks * 4 * 8192}
    )
    began = time.perf_counter()

    def since() -> float:
        return time.perf_counter() - began

    def pause() -> None:
        if since() > _DEADLINE_S:
            raise TooSlow(f"not every chunk was known after {_DEADLINE_S:.0f} s")
        time.sleep(_POLL_SHARE * since())

    with bench_cache(config, SHAPE) as cache:
        opened = since()
        while cache.lookup(tokens).num_tokens < len(tokens):
            pause()
        first_hit = since()
        reconciling = not cache.node.wait_settled(0.0)
        entries = _entries(cache.stats())
        known = entries
        while known < chunks:
            pause()
            known = _entries(cache.stats())
        all_known = since()
        if not cache.node.wait_settled(_DEADLINE_S):
            raise TooSlow("disk and index were not compared in time")
        return Restarted(opened, first_hit, all_known, since(), entries, reconciling)


def _entries(stats: dict[str, object]) -> int:
    tiers = stats["tiers"]
    assert isinstance(tiers, dict)
    return int(tiers[Tier.DISK]["entries"])


def main(arguments: Sequence[str]) -> int:
    """Entry point."""
    path, chunks = arguments
    try:
        restarted = look(Path(path), int(chunks))
    except KvtiersError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.buffer.write(msgspec.json.encode(restarted))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
