"""The second half of a load: from leased slots into the caller's arrays, then release.

A large load that has to read copies while it reads: whenever more chunks lie ready from the start, a thread of the memory pool
copies them. After the answer only the last ones are left. Until then the load is held: whoever gives it up meanwhile, its leases
go back when the piece under way has ended.

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
from kvtiers.core.tickets import LoadSlot
from kvtiers.model.errors import CacheClosed
from kvtiers.model.layout import KVLayout
from kvtiers.model.reasons import MissReason
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
    """Copies a load's chunks to `target`, gives its leases back, then calls `done(tiers)`, of each chunk, or `failed(error)` once.

    `begin(stop)` is asked once whether `target` may be written to; `stop` gives up what is not answered yet. `advance` may be called
    before the answer, `start` once behind it; both from any thread. It copies on a pool thread; on the caller's if there is little to
    copy, or nobody to do it. What lies on a device, or goes to one, is always left to the pool: the device may be slow.
    """

    def __init__(
        self,
        *,
        node: CacheNode,
        load: StagedLoad,
        layout: KVLayout,
        chunk_tokens: int,
        target: KVArrays,
        begin: Callable[[Callable[[], None]], bool],
        why: Callable[[int], MissReason | None],
        done: Callable[[tuple[Tier, ...], MissReason | None], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._node = node
        self._load = load
        self._layout = layout
        self._chunk_tokens = chunk_tokens
        self._target = target
        self._begin = begin
        self._why = why
        self._done = done
        self._failed = failed
        self._chunk_bytes = layout.nbytes(chunk_tokens)
        self._slots: list[LoadSlot] = []
        self._tiers: tuple[Tier, ...] = ()
        self._bad: int | None = None
        self._error: Exception | None = None
        self._lock = threading.Lock()
        self._claimed = 0  # in layers, chunk by chunk
        self._end = 0
        self._copying = 0
        self._workers = 0  # queued or at work
        self._begun = False
        self._answered = False
        self._over = False

    def advance(self) -> None:
        """More chunks lie ready and the answer is still to come: have one thread copy them. Never blocks."""
        if self._load.ticket.num_chunks * self._chunk_bytes <= _INLINE_BYTES:
            return
        with self._lock:
            if self._answered or self._over or not (self._begun or self._may_begin()):
                return
            self._extend(self._load.ready)
            if self._workers or self._claimed >= self._end:
                return
            self._workers = 1
        self._hand_over(1)

    def start(self) -> None:
        """The load was answered: copy what is left, or hand the work to the memory pool; never blocks."""
        with self._lock:
            if self._over:
                return
            self._answered = True
            if not self._begun and not self._begin(self.give_up):
                self._error = CacheClosed("this load was cancelled")
            else:
                self._tiers = self._load.tiers
                self._extend(len(self._tiers))
            left = max(0, self._end - self._claimed) * self._chunk_bytes // self._layout.num_layers
            here = not left or self._error is not None or (left <= _INLINE_BYTES and self._on_host())
            wanted = 1 if here else _THREADS - self._workers
            self._workers += wanted
        if here:
            self._work()
        else:
            self._hand_over(wanted)

    def give_up(self, error: Exception | None = None) -> None:
        """The load fails, at the latest when the piece under way has ended. An answered one goes on: it is about to end."""
        with self._lock:
            if self._answered or self._over:
                return
            self._error = self._error or error or CacheClosed("this load was cancelled")
            if self._copying:
                return
            self._over = True
        self._finish()

    def _may_begin(self) -> bool:
        self._begun = self._load.hold() and self._begin(self.give_up)
        return self._begun

    def _extend(self, count: int) -> None:
        """So many chunks may be copied."""
        self._slots += self._load.slots(len(self._slots), count)
        if self._bad is None:
            self._end = count * self._layout.num_layers

    def _hand_over(self, jobs: int) -> None:
        for _ in range(jobs):
            job = Job(OpId(0), Priority.LOAD, self._work, self._drop)
            if not self._node.engine.run_in_memory_pool(job):
                self._drop()

    def _on_host(self) -> bool:
        return self._target.on_host and all(slot.memory is Tier.CPU for slot in self._slots)

    def _work(self) -> None:
        """Copy pieces until none is left. After the answer the last one to end a piece finishes the load, whoever else is still
        waiting to begin.
        """
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
            if not self._over and self._error is None and self._claimed < self._end:
                self._copying += 1
                return self._cut()
            self._workers -= 1
            if self._over or self._copying or not (self._answered or self._error):
                return None
            self._over = True
        self._finish()
        return None

    def _cut(self) -> _Piece:
        """A quarter of what is left, or `_PIECE_BYTES`: few calls at first, and a short wait for the other thread at last."""
        count = self._layout.num_layers
        least = -(-_PIECE_BYTES * count // self._chunk_bytes)
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
                    self._bad = index if self._bad is None else min(self._bad, index)
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
            self._workers -= 1
            if self._workers or self._over:
                return
            self._over = True
            self._error = CacheClosed("the cache was closed while this load was under way")
        self._finish()

    def _finish(self) -> None:
        try:
            if self._error is None and self._bad is not None and self._bad < len(self._tiers):
                self._node.cut(self._load.ticket, self._bad)
                self._tiers = self._tiers[: self._bad]
            try:
                reason = self._why(len(self._tiers)) if self._error is None else None
            finally:
                self._load.release(used=range(len(self._tiers) if self._error is None else 0))
                self._load.let_go()
            if self._error is None:
                self._done(self._tiers, reason)
                return
            error = self._error
        except Exception as broken:  # noqa: BLE001 - somebody waits for this load
            error = broken
        self._failed(error)
