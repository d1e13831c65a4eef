"""Pins the arena for the GPU pool's device, so that copies run at the speed of the bus and beside the engine's kernels.

On a thread of its own, piece by piece: 100 GB take many seconds, and the cache works from the start, through CUDA's own staging
buffer where a piece is not pinned yet. A refusal costs speed, never the cache. Nothing to do for a simulated pool. Not run on a
GPU: the tests stand a runtime of their own in for CUDA's.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from kvtiers.memory.arena import Arena
from kvtiers.model.errors import CacheClosed

if TYPE_CHECKING:
    from kvtiers.memory.cuda import DevicePool, HostRegistration

_log = logging.getLogger(__name__)
_MIB = 1 << 20


class ArenaPinning:
    """The registration of `arena` with the device of `pool`. One thread begins and closes it."""

    def __init__(self, arena: Arena, pool: DevicePool) -> None:
        self._arena = arena
        self._pool = pool
        self._stop = threading.Event()
        self._registration: HostRegistration | None = None
        self._thread = threading.Thread(target=self._pin, name="kvtiers-pin", daemon=True)
        self._thread.start()

    @property
    def nbytes(self) -> int:
        """Bytes pinned; 0 until all that is to be pinned is."""
        registration = self._registration
        return 0 if registration is None else registration.nbytes

    def close(self, timeout: float) -> bool:
        """Unpin, before the arena is unmapped and the pool closed. False, and it stays pinned and mapped, while a copy is in flight
        or CUDA has not returned at the time-out.
        """
        self._stop.set()
        self._thread.join(timeout)
        if self._thread.is_alive() or self._pool.in_flight():
            return False
        registration, self._registration = self._registration, None
        if registration is not None:
            registration.unregister()
        return True

    def _pin(self) -> None:
        from kvtiers.memory.cuda import HostRegisterError, host_register

        try:
            memory = self._arena.view(0, self._arena.nbytes)
            self._registration = host_register(memory, self._pool.device, stop=self._stop)
        except CacheClosed:
            return
        except (
            HostRegisterError,
            RuntimeError,
        ) as error:  # RuntimeError: what torch raises for every error of CUDA
            _log.warning(
                "the arena is not pinned for %s (%s): copies go through CUDA's own buffer, and are slower",
                self._pool.device,
                error,
            )
            return
        _log.info(
            "%.0f MiB of the arena are pinned for %s", self._registration.nbytes / _MIB, self._pool.device
        )
