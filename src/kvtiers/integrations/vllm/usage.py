"""How full an engine's pool of blocks is: those that requests or stores refer to, and those that still hold what may be hit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

LOOKED_AT_A_SECOND: Final = 50_000
"""Blocks that may be looked at in a second: 5 ms of the engine's thread. A larger pool is reported less often."""


def usage_of(blocks: Iterable[Any]) -> float:
    """Share of a pool's `blocks` in use, each of them counted once; the null block is nobody's."""
    used = total = 0
    for block in blocks:
        if block.is_null:
            continue
        total += 1
        if block.ref_cnt or block.block_hash is not None:
            used += 1
    return used / total if total else 0.0


def report_every(num_blocks: int) -> float:
    """Seconds between two looks at all of them."""
    return max(1.0, num_blocks / LOOKED_AT_A_SECOND)
