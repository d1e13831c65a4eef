"""The second half of a load: from leased slots into the caller's arrays, on the memory pool, then release.

Split over two threads where that is faster. With `verify_on_hit` each chunk's checksum is taken before it is copied; the first
one that is wrong ends the answer before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from kvtiers.core.messages import OpId, Priority
from kvtiers.core.tickets import LoadSlot
from kvtiers.memory.arena import Arena
from kvtiers.model.errors import CacheClosed
from kvtiers.model.layout import KVLayout
from kvtiers.model.tiers import Tier
from kvtiers.records.checksum import checksum
from kvtiers.runtime.kv_arrays import KVArrays
from kvtiers.runtime.loads import StagedLoad
from kvtiers.runtime.node import CacheNode
from kvtiers.runtime.pools import Job

_PARALLEL_BYTES = 4 << 20
"""From here on two threads are faster than one (measured in memory/copy.py)."""


class CopyOut:
    """Copies an answered load's chunks to `target`, gives its leases back, then calls `done(chunks)` or `failed(error)` once.

    On a pool thread; on the caller's if there is nothing to copy, or nobody to do it.
    """

    def __init__(
        self,
        *,
        node: CacheNode,
        load: StagedLoad,
        layout: KVLayout,
        chunk_tokens: int,
        target: KVArrays,
        done: Callable[[int], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._node = node
        self._load = load
        self._layout = layout
        self._chunk_tokens = chunk_tokens
        self._target = target
        self._done = done
        self._failed = failed
        self._slots = load.slots()
        self._lock = threading.Lock()
        self._left = 0
        self._good = len(self._slots)
        self._error: Exception | None = None

    def start(self) -> None:
        """Hand the work to the memory pool; never blocks."""
        count = len(self._slots)
        large = count > 1 and count * self._layout.nbytes(self._chunk_tokens) >= _PARALLEL_BYTES
        middle = count // 2 if large else count
        ranges = [span for span in (range(middle), range(middle, count)) if span]
        if not ranges:
            self._finish()
            return
        self._left = len(ranges)
        for span in ranges:
            job = Job(OpId(0), Priority.LOAD, partial(self._copy, span), partial(self._drop, span))
            if not self._node.engine.run_in_memory_pool(job):
                self._drop(span)

    def _copy(self, span: range) -> None:
        try:
            for index in span:
                slot = self._slots[index]
                if self._node.plan.verify_on_hit and not _is_intact(
                    self._node.arena, slot, self._layout.nbytes(self._chunk_tokens)
                ):
                    with self._lock:
                        self._good = min(self._good, index)
                    break
                start = index * self._chunk_tokens
                self._node.memory[slot.memory].read(
                    slot.slots[0], self._target, start, self._chunk_tokens, self._layout
                )
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller's arrays hold no answer, and is told so
            self._error = error
        self._part_ended()

    def _drop(self, span: range) -> None:
        self._error = CacheClosed("the cache was closed while this load was under way")
        self._part_ended()

    def _part_ended(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left:
                return
        self._finish()

    def _finish(self) -> None:
        try:
            if self._error is None and self._good < len(self._slots):
                self._node.cut(self._load.ticket, self._good)
            self._load.release()
            if self._error is None:
                self._done(self._good)
                return
            error = self._error
        except Exception as broken:  # noqa: BLE001 - somebody waits for this load
            error = broken
        self._failed(error)


def _is_intact(arena: Arena, slot: LoadSlot, nbytes: int) -> bool:
    if slot.memory is not Tier.CPU or not slot.checksums:
        return True
    return checksum(arena.buffer(slot.slots[0], nbytes)) == slot.checksums[0]
