"""The second half of a load: from leased slots into the caller's arrays, then release.

A small answer is copied by whoever brings it: to wake another thread costs what two threads save, and milliseconds where Python
runs beside it. A large one is cut into pieces, which two threads of the memory pool claim in turns, large ones first: a thread that
is held up, or never gets to run, leaves its share to the other. A piece is one call of numpy for each chunk, as every call takes
the GIL again when it returns (docs/decisions/copying.md).

With `verify_on_hit` each chunk's checksum is taken before it is copied; the first one that is wrong ends the answer before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

from kvtiers.core.messages import OpId, Priority
from kvtiers.model.errors import CacheClosed
from kvtiers.model.layout import KVLayout
from kvtiers.model.tiers import Tier
from kvtiers.runtime.kv_arrays import KVArrays
from kvtiers.runtime.loads import StagedLoad
from kvtiers.runtime.node import CacheNode
from kvtiers.runtime.pools import Job

_INLINE_BYTES = 8 << 20
"""Up to here, .4 ms at 20 GB/s, the thread that brings the answer copies it."""
_PIECE_BYTES = 4 << 20
_THREADS = 2


class _Piece(NamedTuple):
    """Whole chunks, or some layers of one."""

    chunks: range
    layers: range | None = None


class CopyOut:
    """Copies an answered load's chunks to `target`, gives its leases back, then calls `done(chunks)` or `failed(error)` once.

    On a pool thread; on the caller's if there is little to copy, or nobody to do it. What lies on a device, or goes to one, is always
    left to the pool: the device may be slow.
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
        self._good = len(self._slots)
        self._error: Exception | None = None
        self._lock = threading.Lock()
        self._claimed = 0  # in layers, chunk by chunk
        self._end = self._good * layout.num_layers
        self._copying = 0
        self._queued = _THREADS
        self._over = False

    def start(self) -> None:
        """Copy, or hand the work to the memory pool; never blocks."""
        nbytes = len(self._slots) * self._layout.nbytes(self._chunk_tokens)
        if not nbytes or (nbytes <= _INLINE_BYTES and self._on_host()):
            self._work()
            return
        for _ in range(_THREADS):
            job = Job(OpId(0), Priority.LOAD, self._work, self._drop)
            if not self._node.engine.run_in_memory_pool(job):
                self._drop()

    def _on_host(self) -> bool:
        return self._target.on_host and all(slot.memory is Tier.CPU for slot in self._slots)

    def _work(self) -> None:
        """Copy pieces until none is left. The last one to end a piece finishes the load, whoever else is still waiting to begin."""
        piece = self._claim()
        while piece is not None:
            try:
                self._copy(piece)
            except Exception as error:  # noqa: BLE001 - whatever it is, the caller's arrays hold no answer, and is told so
                self._error = error
            piece = self._claim(ended=1)

    def _claim(self, *, ended: int = 0) -> _Piece | None:
        with self._lock:
            self._copying -= ended
            if self._over:
                return None
            if self._error is None and self._claimed < self._end:
                self._copying += 1
                return self._cut()
            if self._copying:
                return None
            self._over = True
        self._finish()
        return None

    def _cut(self) -> _Piece:
        """A quarter of what is left, or `_PIECE_BYTES`: few calls at first, and a short wait for the other thread at last."""
        count = self._layout.num_layers
        least = -(-_PIECE_BYTES * count // self._layout.nbytes(self._chunk_tokens))
        size = max(least, (self._end - self._claimed) // (2 * _THREADS))
        chunk, layer = divmod(self._claimed, count)
        if layer or (size < count and not self._node.plan.verify_on_hit):
            layers = range(layer, min(layer + size, count))
            self._claimed += len(layers)
            return _Piece(range(chunk, chunk + 1), layers)
        chunks = range(chunk, min(chunk + max(1, size // count), len(self._slots)))
        self._claimed += len(chunks) * count
        return _Piece(chunks)

    def _copy(self, piece: _Piece) -> None:
        for index in piece.chunks:
            if self._node.plan.verify_on_hit and not self._node.is_intact(self._load.ticket, index):
                with self._lock:
                    self._good = min(self._good, index)
                    self._end = min(self._end, self._claimed)
                return
            slot = self._slots[index]
            start = index * self._chunk_tokens
            where = (slot.slots[0], self._target, start, self._chunk_tokens, self._layout)
            if piece.layers is None:
                self._node.memory[slot.memory].read(*where)
            else:
                self._node.memory[slot.memory].read(*where, layers=piece.layers)

    def _drop(self) -> None:
        """A job will not run. Only if none does, nobody copies."""
        with self._lock:
            self._queued -= 1
            if self._queued or self._over:
                return
            self._over = True
            self._error = CacheClosed("the cache was closed while this load was under way")
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
