"""What a request's use of its chunks means to the tiers: recency, a second chance for writes that failed, a place on the GPU."""

from __future__ import annotations

from collections.abc import Sequence

from kvtiers.core.eviction import MemoryEvictor
from kvtiers.core.index import Chunk, MemoryState
from kvtiers.core.moving import Mover
from kvtiers.core.state import State
from kvtiers.core.tickets import LoadTicket
from kvtiers.core.writing import StoreWriter
from kvtiers.model.tiers import Tier


class Toucher:
    """Touches chains of chunks."""

    def __init__(self, state: State, writer: StoreWriter, mover: Mover, gpu_evictor: MemoryEvictor | None) -> None:
        self._state = state
        self._writer = writer
        self._mover = mover
        self._gpu_evictor = gpu_evictor

    def touch(self, chain: Sequence[Chunk]) -> None:
        """A request used these chunks: recent in every tier, touched from last to first; what failed to be kept is retried."""
        state = self._state
        policies = [tier.policy for tier in (state.gpu, state.cpu, *state.stores.values()) if tier is not None]
        for chunk in reversed(chain):
            for policy in policies:
                policy.touch(chunk, state.now)
            copy = chunk.cpu
            if copy is not None and copy.checksums and copy.state is MemoryState.READY:
                self._writer.schedule(chunk)
            elif copy is None and chunk.gpu is not None and not self._mover.is_clean(chunk.gpu):
                self._mover.copy_down(chunk.gpu)

    def settled(self, ticket: LoadTicket) -> None:
        """A load was answered: touch what it got and bring what lay in the arena to the GPU pool."""
        self.touch([copy.chunk for copy in ticket.copies if copy is not None])
        gpu = self._state.gpu
        if gpu is None or self._gpu_evictor is None:
            return
        for copy in ticket.copies:
            if copy is not None and copy.tier is Tier.CPU and not self._mover.copy_up(copy, gpu, self._gpu_evictor):
                break
