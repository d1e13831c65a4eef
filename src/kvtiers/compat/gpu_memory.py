"""The device side of a `MemoryAllocator`: a pool on its GPU, and copies between it and the host pool.

Opened at the first call that needs it, because that imports torch. Without CUDA, or with a negative device id, host memory plays
the GPU: `simulated` and `describe` say so. On a GPU the host pool is registered with CUDA, so that copies are DMA; that part has
not been run on a GPU.
"""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING

from kvtiers.compat.pointers import GPUPtr, Heap
from kvtiers.memory.mapping import Bytes, CloseOutcome
from kvtiers.model.errors import DoesNotFit, KvtiersError, LayoutMismatch, OutOfMemoryError

if TYPE_CHECKING:
    from kvtiers.memory.cuda import DevicePool, HostRegistration

_log = logging.getLogger(__name__)


class NoTorch(KvtiersError):
    """The GPU side needs torch."""


class GPUMemory:
    """`nbytes` on a device, given out as `GPUPtr`s."""

    def __init__(self, nbytes: int, device_id: int, host: Bytes) -> None:
        """`host`: all of the host pool. Raises NoTorch, OutOfMemoryError."""
        self.pool = _open_pool(nbytes, device_id)
        self.heap = Heap(GPUPtr, self.pool.view(0, nbytes).data_ptr(), nbytes, name="GPU pool")
        self._registration = None if self.pool.simulated else _register(host, self.pool)
        self._end = weakref.finalize(self, _let_go, self.pool, self._registration)

    @property
    def simulated(self) -> bool:
        """Whether host memory plays the GPU."""
        return self.pool.simulated

    def copy_out(self, gpu_ptr: GPUPtr, host: Bytes) -> None:
        """Copy the first bytes of `gpu_ptr` into `host`; returns when they are there.

        Raises DeadlineExceeded while `idle()` is False: then both ranges may still be in use.
        """
        if gpu_ptr.tensor is None:
            self.pool.copy_to_host(self.heap.offset_of(gpu_ptr), host)
            return
        from kvtiers.memory.cuda import gather_to_host

        if host.nbytes != gpu_ptr.size:
            raise LayoutMismatch(
                f"a tensor is copied whole: it has {gpu_ptr.size} bytes, {host.nbytes} were asked for"
            )
        gather_to_host(host, [gpu_ptr.tensor])

    def copy_in(self, gpu_ptr: GPUPtr, host: Bytes) -> None:
        """Copy `host` to the first bytes of `gpu_ptr`; the same for the rest."""
        if gpu_ptr.tensor is None:
            self.pool.copy_from_host(self.heap.offset_of(gpu_ptr), host)
            return
        from kvtiers.memory.cuda import scatter_from_host

        if host.nbytes != gpu_ptr.size:
            raise LayoutMismatch(
                f"a tensor is filled whole: it has {gpu_ptr.size} bytes, {host.nbytes} were given"
            )
        scatter_from_host(host, [gpu_ptr.tensor])

    def idle(self) -> bool:
        """Whether no copy is under way."""
        return not self.pool.in_flight()

    def close(self) -> CloseOutcome:
        """LEAKED if copies are still under way: then the host memory must stay mapped, too."""
        outcome: CloseOutcome | None = self._end()
        return CloseOutcome.UNMAPPED if outcome is None else outcome


def _open_pool(nbytes: int, device_id: int) -> DevicePool:
    try:
        from kvtiers.memory.cuda import DevicePool
    except ImportError as error:
        raise NoTorch(
            f"GPU memory, simulated or not, needs torch ({error}): pip install 'kvtiers[torch]'"
        ) from error
    if device_id >= 0:
        try:
            return DevicePool(nbytes, f"cuda:{device_id}")
        except OutOfMemoryError:
            raise
        except (
            RuntimeError,
            DoesNotFit,
        ) as error:  # no driver, no device, or a torch without CUDA
            _log.warning("no CUDA device %d (%s): the GPU is simulated in host memory", device_id, error)
    return DevicePool(nbytes, "cpu")


def _register(host: Bytes, pool: DevicePool) -> HostRegistration | None:
    """Pin the host pool in one piece, as a copy must not cross pieces. Not run on a GPU."""
    from kvtiers.memory.cuda import HostRegisterError, host_register

    try:
        return host_register(host, pool.device, piece_bytes=host.nbytes)
    except HostRegisterError as error:
        _log.warning("the host pool is not pinned, copies take longer: %s", error)
        return None


def _let_go(pool: DevicePool, registration: HostRegistration | None) -> CloseOutcome:
    outcome = pool.close()
    if registration is not None and outcome is CloseOutcome.UNMAPPED:
        registration.unregister()
    return outcome
