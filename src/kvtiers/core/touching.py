"""What a request's use of its chunks means to the tiers: recency, a second chance for writes that failed, a place on the GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final

from kvtiers.core.eviction import MemoryEvictor
from kvtiers.core.index import Chunk, MemoryCopy, MemoryState
from kvtiers.core.ledger import Ledger
from kvtiers.core.moving import Mover
from kvtiers.core.policies.base import Standing
from kvtiers.core.state import State
from kvtiers.core.tickets import LoadTicket
from kvtiers.core.writing import StoreWriter
from kvtiers.model.tiers import Tier

_ENDED: Final = object()


class Toucher:
    """Touches chains of chunks."""

    def __init__(
        self,
        state: State,
        ledger: Ledger,
        writer: StoreWriter,
        mover: Mover,
        *,
        cpu_evictor: MemoryEvictor,
        gpu_evictor: MemoryEvictor | None,
    ) -> None:
        self._state = state
        self._ledger = ledger
        self._writer = writer
        self._mover = mover
        self._cpu_evictor = cpu_evictor
        self._gpu_evictor = gpu_evictor
        self._under_way: deque[Iterator[None]] = deque()
        """Chains too long for one hold, in order of use; whoever used them goes on until they are done."""
        self._just_begun = False
        """The call that used the last of them has yet to return: its answer comes first."""
        self._policies = [
            tier.policy for tier in (state.gpu, state.cpu, *state.stores.values()) if tier is not None
        ]

    @property
    def has_more(self) -> bool:
        """Whether something long is still to be gone on with."""
        return bool(self._under_way)

    def go_on(self) -> None:
        """Go on with what is too long for one hold, at most `max_hold` chunks; not in the call that began with one."""
        if self._just_begun:
            self._just_begun = False
        elif self._under_way and next(self._under_way[0], _ENDED) is _ENDED:
            self._under_way.popleft()

    def touch(self, chain: Sequence[Chunk]) -> None:
        """A request used these chunks: recent in every tier, touched from last to first; what failed to be kept is retried.

        What stands behind a chunk that no tier holds can't be reached, so it is not touched. A chain longer than `max_hold`
        is touched in several steps (`go_on`).
        """
        self._begin(self._touching(chain), len(chain))

    def _begin(self, steps: Iterator[None], chunks: int) -> None:
        if chunks > self._state.settings.max_hold:
            self._under_way.append(steps)
            self._just_begun = True
            return
        for _ in steps:
            pass

    def _touching(self, chain: Sequence[Chunk]) -> Iterator[None]:
        most, ready = self._state.settings.max_hold, MemoryState.READY
        reachable = 0
        for chunk in chain:
            if not chunk.held:
                break
            reachable += 1
            cpu, gpu = chunk.cpu, chunk.gpu
            if cpu is not None:
                if cpu.state is ready and cpu.checksums:
                    self._writer.schedule(chunk)
            elif gpu is not None and gpu.state is ready:
                self._mover.schedule_down(gpu)
            if not reachable % most:
                yield
        now = self._state.now
        for index in range(reachable - 1, -1, -1):
            chunk = chain[index]
            for copy in (chunk.gpu, chunk.cpu):
                if copy is not None and copy.leaving:
                    self._ledger.stay(copy)
            for policy in self._policies:
                policy.touch(chunk, now)
            if not index % most:
                yield

    def settled(self, ticket: LoadTicket) -> None:
        """A load was answered: touch what it got, and bring what lay in the arena to the GPU pool.

        What is staged joins the cache when a second load is answered with it: so the staging share is never held longer than
        by one load, however popular a chunk is.
        """
        copies = [copy for copy in ticket.copies if copy is not None]
        self._begin(self._settling(copies), len(copies))

    def _settling(self, copies: Sequence[MemoryCopy]) -> Iterator[None]:
        most = self._state.settings.max_hold
        yield from self._touching([copy.chunk for copy in copies])
        for index in range(len(copies) - 1, -1, -1):
            copy = copies[index]
            joins = copy.staged and copy.served and not copy.detached
            if joins and not self._cpu_evictor.keep(copy, Standing.ESTABLISHED):
                break
            copy.served = True
            if not index % most:
                yield
        gpu = self._state.gpu
        if gpu is None or self._gpu_evictor is None:
            return
        for index, copy in enumerate(copies, 1):
            if copy.tier is Tier.CPU and not self._mover.copy_up(copy, gpu, self._gpu_evictor):
                break
            if not index % most:
                yield
