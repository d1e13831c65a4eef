"""`MemoryAllocator`: pointers of any size into one pool of pinned host memory, as the LMCache-compatible interface has them.

The pool is the cache's own arena: one mapping, prefaulted, on its NUMA nodes, locked where that is allowed, refused rather than
overcommitted. `free` really frees: at a count of 0 the range can be allocated again at once.

Threads: any may call. A copy that outlives its deadline keeps both its ranges until it has really ended, and only then does
the allocator give them out again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from kvtiers.compat.gpu_memory import GPUMemory
from kvtiers.compat.pointers import CPUPtr, GPUPtr, Heap
from kvtiers.memory.arena import Arena
from kvtiers.memory.mapping import Bytes, CloseOutcome
from kvtiers.model.errors import CacheClosed, ConfigError, LayoutMismatch
from kvtiers.model.layout import PAGE_BYTES
from kvtiers.runtime.arguments import whole

_GIB: Final = 1024**3
_GPU_POOL_BYTES: Final = 256 << 20
"""The GPU pool's size unless told otherwise, if the host pool is not smaller. A real engine owns its GPU memory itself."""


class MemoryAllocator:
    """A pool of `pool_size_gb` GiB of host memory, and beside it a pool on GPU `device_id` (simulated without CUDA)."""

    def __init__(self, device_id: int, pool_size_gb: float, *, gpu_pool_gb: float | None = None) -> None:
        """`device_id` negative: a simulated GPU. `gpu_pool_gb`: GiB of the GPU pool, which is made when first used.

        Raises ConfigError for a pool below 4 KiB, ArenaDoesNotFit if this machine has less memory left.
        """
        self.device_id: Final = whole(device_id, "device_id is a whole number", -(1 << 31))
        self.pool_size: Final = int(pool_size_gb * _GIB) // PAGE_BYTES * PAGE_BYTES
        gpu_bytes = min(self.pool_size, _GPU_POOL_BYTES) if gpu_pool_gb is None else int(gpu_pool_gb * _GIB)
        if self.pool_size < PAGE_BYTES or gpu_bytes < 1:
            raise ConfigError(
                [f"pool_size_gb={pool_size_gb}, gpu_pool_gb={gpu_pool_gb}: a pool has at least 4 KiB"],
                source="MemoryAllocator",
            )
        self._gpu_bytes = gpu_bytes
        self.pool: Final = Arena(self.pool_size)
        """The arena the pointers point into."""
        self._heap = Heap(
            CPUPtr,
            self.pool.view(0, PAGE_BYTES).ctypes.data,
            self.pool_size,
            name="CPU pool",
            view=self.pool.view,
        )
        self._lock = threading.Lock()
        self._gpu: GPUMemory | None = None
        self._late: list[tuple[CPUPtr, GPUPtr]] = []
        self._closed = False
        self._owner = os.getpid()

    @property
    def allocated(self) -> int:
        """Bytes taken now; each allocation counts with what rounding it up to 4 KiB adds."""
        return self._heap.allocated

    @property
    def simulated(self) -> bool:
        """Whether host memory plays the GPU. Opens the GPU side."""
        return self._gpu_memory().simulated

    def describe(self) -> str:
        """What was obtained, in one line."""
        gpu = self._gpu.pool.describe() if self._gpu is not None else "GPU side not used yet"
        return f"{self.pool.describe()}; {gpu}"

    # --- host memory --------------------------------------------------------------------------------------------------

    def allocate(self, size: int) -> CPUPtr:
        """`size` bytes with a count of 1; what they held before is undefined.

        Raises OutOfMemoryError if no hole is large enough, InvalidArgument for a size below 1, CacheClosed.
        """
        self._check_open()
        self._settle_late()
        return self._heap.allocate(size)

    def free(self, ptr: CPUPtr) -> None:
        """One holder less; the last one frees the memory at once. Raises InvalidPointer for what is not live here."""
        self._heap.release(ptr)

    # --- the GPU side -------------------------------------------------------------------------------------------------

    def gpu_to_cpu_copy(self, gpu_ptr: GPUPtr, size: int) -> CPUPtr:
        """The first `size` bytes of `gpu_ptr`, in fresh host memory; they are there when this returns.

        Raises LayoutMismatch if there are fewer, OutOfMemoryError, InvalidPointer, DeadlineExceeded, DeviceCopyError; a failed
        copy leaves nothing allocated.
        """
        _check_size(size, gpu_ptr)
        gpu = self._gpu_memory()
        cpu_ptr = self.allocate(size)
        self._carry_out(gpu, cpu_ptr, gpu_ptr, gpu.copy_out)
        return cpu_ptr

    def cpu_to_gpu_copy(self, cpu_ptr: CPUPtr, gpu_ptr: GPUPtr) -> None:
        """All bytes of `cpu_ptr` to the start of `gpu_ptr`; raises as `gpu_to_cpu_copy`."""
        _check_size(cpu_ptr.size, gpu_ptr)
        gpu = self._gpu_memory()
        self._carry_out(gpu, cpu_ptr.retain(), gpu_ptr, gpu.copy_in)
        cpu_ptr.release()

    def gpu_allocate(self, size: int) -> GPUPtr:
        """`size` bytes of the GPU pool. Raises as `allocate`, and NoTorch."""
        self._check_open()
        gpu = self._gpu_memory()
        self._settle_late()
        return gpu.heap.allocate(size)

    def gpu_free(self, ptr: GPUPtr) -> None:
        """As `free`."""
        ptr.release()

    # --- life ---------------------------------------------------------------------------------------------------------

    def check_integrity(self) -> list[str]:
        """What is wrong with the books of both pools; empty if nothing is."""
        gpu = self._gpu
        return [*self._heap.check_integrity(), *(gpu.heap.check_integrity() if gpu is not None else ())]

    def close(self) -> CloseOutcome:
        """Give the memory up; idempotent. LEAKED: it stays mapped while views are alive or copies under way."""
        with self._lock:
            self._closed = True
            gpu, self._gpu = self._gpu, None
        if gpu is not None and gpu.close() is CloseOutcome.LEAKED:
            return self.pool.leak()
        return self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise CacheClosed("the allocator is closed: make a new one")
        if os.getpid() != self._owner:
            raise CacheClosed("the allocator was made before this process was forked: make one here")

    def _gpu_memory(self) -> GPUMemory:
        self._check_open()
        with self._lock:
            if self._gpu is None:
                self._gpu = GPUMemory(self._gpu_bytes, self.device_id, self.pool.view(0, self.pool_size))
            return self._gpu

    def _carry_out(
        self, gpu: GPUMemory, cpu_ptr: CPUPtr, gpu_ptr: GPUPtr, copy: Callable[[GPUPtr, Bytes], None]
    ) -> None:
        """Copy with both ends held. On failure `cpu_ptr` is released, at once or when the device lets go of it."""
        try:
            if gpu_ptr.tensor is None:
                gpu.heap.retain(gpu_ptr)
        except BaseException:
            cpu_ptr.release()
            raise
        try:
            copy(gpu_ptr, cpu_ptr.view())
        except BaseException:  # also an interrupt: the device goes on copying
            with self._lock:
                self._late.append((cpu_ptr, gpu_ptr))
            self._settle_late()
            raise
        if gpu_ptr.tensor is None:
            gpu.heap.release(gpu_ptr)

    def _settle_late(self) -> None:
        """Release what failed copies held, if the device is idle by now."""
        with self._lock:
            if not self._late or (self._gpu is not None and not self._gpu.idle()):
                return
            late, self._late = self._late, []
        for cpu_ptr, gpu_ptr in late:
            cpu_ptr.release()
            if gpu_ptr.tensor is None:
                gpu_ptr.release()


def _check_size(size: int, gpu_ptr: GPUPtr) -> None:
    if size > gpu_ptr.size:
        raise LayoutMismatch(f"{size} bytes to be copied, but {gpu_ptr!r} has {gpu_ptr.size}")
