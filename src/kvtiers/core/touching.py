"""What a request's use of its chunks means to the tiers: recency, a second chance for writes that failed, a place on the GPU."""

from __future__ import annotations

from collections.abc import Sequence

from kvtiers.core.eviction import MemoryEvictor
from kvtiers.core.index import Chunk, MemoryCopy, MemoryState
from kvtiers.core.ledger import Ledger
from kvtiers.core.moving import Mover
from kvtiers.core.policies.base import Standing
from kvtiers.core.state import State
from kvtiers.core.tickets import LoadTicket
from kvtiers.core.writing import StoreWriter
from kvtiers.model.tiers import Tier


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
        self._policies = [
            tier.policy for tier in (state.gpu, state.cpu, *state.stores.values()) if tier is not None
        ]

    def touch(self, chain: Sequence[Chunk]) -> None:
        """A request used these chunks: recent in every tier, touched from last to first; what failed to be kept is retried.

        What stands behind a chunk that no tier holds can't be reached, so it is not touched.
        """
        reachable = next((i for i, chunk in enumerate(chain) if not chunk.held), len(chain))
        now = self._state.now
        for index in range(reachable - 1, -1, -1):
            chunk = chain[index]
            for copy in (chunk.gpu, chunk.cpu):
                if copy is not None and copy.leaving:
                    self._ledger.stay(copy)
            for policy in self._policies:
                policy.touch(chunk, now)
        for chunk in chain[:reachable]:
            cpu, gpu = chunk.cpu, chunk.gpu
            if cpu is not None:
                if cpu.state is MemoryState.READY and cpu.checksums:
                    self._writer.schedule(chunk)
            elif gpu is not None and gpu.state is MemoryState.READY:
                self._mover.schedule_down(gpu)

    def settled(self, ticket: LoadTicket) -> None:
        """A load was answered: touch what it got, and bring what lay in the arena to the GPU pool.

        What is staged joins the cache when a second load is answered with it: so the staging share is never held longer than
        by one load, however popular a chunk is.
        """
        copies = [copy for copy in ticket.copies if copy is not None]
        self.touch([copy.chunk for copy in copies])
        for copy in reversed(copies):
            joins = copy.staged and copy.served and not copy.detached
            if joins and not self._cpu_evictor.keep(copy, Standing.ESTABLISHED):
                break
            copy.served = True
        self._bring_up(copies)

    def _bring_up(self, copies: Sequence[MemoryCopy]) -> None:
        gpu = self._state.gpu
        if gpu is None or self._gpu_evictor is None:
            return
        for copy in copies:
            if copy.tier is Tier.CPU and not self._mover.copy_up(copy, gpu, self._gpu_evictor):
                break
