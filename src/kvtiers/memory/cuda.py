"""The GPU tier's memory, and the only file that knows torch or CUDA.

`DevicePool` is one uint8 tensor on a device; slots are ranges of it. With `device="cpu"` the same code runs on host memory and
`simulated` says so. On CUDA, copies run on a stream of the pool's own, ordered after what the calling thread's current stream
has queued; the call returns when they have ended, or raises `CopyInFlight` at its deadline. Lines marked "not run on a GPU"
have only been read against torch's documentation: no GPU was at hand.

Threads: any thread may copy; ranges are the core's to keep apart. One thread opens and closes a pool.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from kvtiers.memory.available import available_memory
from kvtiers.memory.mapping import Bytes, CloseOutcome
from kvtiers.model.errors import (
    CacheClosed,
    DeadlineExceeded,
    DoesNotFit,
    InvariantBroken,
    KvtiersError,
    LayoutMismatch,
    OutOfMemoryError,
)

_MIB: Final = 1 << 20
_POLL_S: Final = 1e-4
_PINNED: Final[list[object]] = []  # what a pool closed with copies in flight keeps until the process ends
_UNSIGNED: Final = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Array = npt.NDArray[np.uint8 | np.uint16 | np.uint32 | np.uint64]


class Event(Protocol):
    """Something that ends, as `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether it has ended; never blocks."""
        ...


class Order(Protocol):
    """In what order, and on what, copies run."""

    def issue(self) -> AbstractContextManager[object]:
        """Copies made inside run after what the calling thread has queued before."""
        ...

    def record(self) -> Event:
        """Ends when all copies issued so far have ended."""
        ...


class CopyInFlight(DeadlineExceeded):
    """A copy has not ended at its deadline. Both its ranges may be read or written until `ended()`: don't reuse them."""

    def __init__(self, message: str, ended: Callable[[], bool]) -> None:
        super().__init__(message)
        self.ended: Final = ended


class DeviceCopyError(KvtiersError):
    """The device refused a copy; on CUDA its context may be lost."""


class HostRegisterError(KvtiersError):
    """CUDA refused to pin the arena. Copies still work, through CUDA's own staging buffer."""


class _Flight:
    """Copies under way; their memory must outlive them."""

    def __init__(self, event: Event, tensors: list[torch.Tensor]) -> None:
        self.event: Final = event
        self.tensors: Final = tensors


class DevicePool:
    """`nbytes` on `device`. Raises OutOfMemoryError with the numbers if the device has less, DoesNotFit if it is not there."""

    def __init__(
        self,
        nbytes: int,
        device: str | torch.device = "cpu",
        *,
        deadline_s: float = 30.0,
        order: Order | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.nbytes: Final = nbytes
        self.device, free = _device_named(device)
        self._deadline_s: Final = deadline_s
        self._clock: Final = clock
        self._order: Final = order or (_HostOrder() if self.simulated else _StreamOrder(self.device))
        self._flights: Final[set[_Flight]] = set()
        self._flights_lock: Final = threading.Lock()
        if nbytes > free:
            raise OutOfMemoryError(
                f"a GPU pool of {nbytes / _MIB:.0f} MiB on {self.device}: {free / _MIB:.0f} MiB are free; make it smaller"
            )
        try:
            # zeros written, not only promised: on a CPU a first touch on the data path costs a page fault
            self._memory: torch.Tensor | None = torch.empty(
                nbytes, dtype=torch.uint8, device=self.device
            ).fill_(0)
        except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU allocator raises it plain
            raise OutOfMemoryError(
                f"a GPU pool of {nbytes / _MIB:.0f} MiB on {self.device}: {error}"
            ) from error

    @property
    def simulated(self) -> bool:
        """Whether host memory plays the GPU."""
        return self.device.type == "cpu"

    def describe(self) -> str:
        """One line for the log and for every output that names the tier."""
        kind = "GPU tier is simulated on CPU" if self.simulated else f"GPU tier on {self.device}"
        return f"{kind}, {self.nbytes / _MIB:.0f} MiB"

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        """The bytes `[offset, offset + nbytes)` as they lie there, uint8."""
        memory = self._memory
        if memory is None:
            raise CacheClosed("the GPU pool is closed: open a new cache")
        if not 0 <= offset <= offset + nbytes <= self.nbytes:
            raise InvariantBroken(f"view of {nbytes} bytes at {offset}: the GPU pool has {self.nbytes}")
        return memory[offset : offset + nbytes]

    def copy_to_host(self, offset: int, dst: Bytes) -> None:
        """Copy `dst.nbytes` from `offset` into `dst`, a uint8 vector (of the arena, registered on CUDA)."""
        host = _host_tensor(dst)
        device = self.view(offset, host.numel())
        self._copy([(host[span], device[span]) for span in _spans(host)])

    def copy_from_host(self, offset: int, src: Bytes) -> None:
        """Copy `src`, a uint8 vector (of the arena, registered on CUDA), to `offset`."""
        host = _host_tensor(src)
        device = self.view(offset, host.numel())
        self._copy([(device[span], host[span]) for span in _spans(host)])

    def copy_in(self, offset: int, *tensors: torch.Tensor) -> int:
        """Copy tensors of this device, strided ones too, one behind the other to `offset`, each in C order; returns the bytes."""
        places = self._places(offset, tensors)
        self._copy(list(zip(places, tensors, strict=True)))
        return sum(place.nbytes for place in places)

    def copy_out(self, offset: int, *tensors: torch.Tensor) -> int:
        """Fill the tensors with what `copy_in` put there from tensors of the same shapes; returns the bytes."""
        places = self._places(offset, tensors)
        self._copy(list(zip(tensors, places, strict=True)))
        return sum(place.nbytes for place in places)

    def in_flight(self) -> int:
        """Copies that have not ended, those that outlived their deadline included."""
        with self._flights_lock:
            self._flights.difference_update([flight for flight in self._flights if flight.event.query()])
            return len(self._flights)

    def close(self) -> CloseOutcome:
        """Give the memory up. Leaked, with whatever it is copied from or to, if copies are still in flight."""
        memory, self._memory = self._memory, None
        if not self.in_flight():
            return CloseOutcome.UNMAPPED
        if memory is not None:
            _PINNED.append((memory, tuple(self._flights)))
        return CloseOutcome.LEAKED

    def _places(self, offset: int, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        places = []
        for tensor in tensors:
            if tensor.device != self.device:
                raise LayoutMismatch(f"tensor on {tensor.device}: the GPU pool is on {self.device}")
            if offset % tensor.element_size():
                raise LayoutMismatch(
                    f"{tensor.dtype} at byte {offset} of the GPU pool: not a multiple of its size"
                )
            nbytes = tensor.numel() * tensor.element_size()
            places.append(self.view(offset, nbytes).view(tensor.dtype).view(tensor.shape))
            offset += nbytes
        return places

    def _copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        try:
            with torch.inference_mode(), self._order.issue():
                for dst, src in pairs:
                    dst.copy_(src, non_blocking=True)
                flight = _Flight(self._order.record(), [tensor for pair in pairs for tensor in pair])
        except RuntimeError as error:  # what torch raises for every error of CUDA
            raise DeviceCopyError(f"copy on {self.device}: {error}") from error
        if flight.event.query():
            return
        with self._flights_lock:
            self._flights.add(flight)  # before waiting: an interrupt must not lose it
        deadline = self._clock() + self._deadline_s
        while not flight.event.query():
            if self._clock() >= deadline:
                message = f"a copy on {self.device} has not ended after {self._deadline_s} s"
                raise CopyInFlight(message, flight.event.query)
            time.sleep(_POLL_S)
        with self._flights_lock:
            self._flights.discard(flight)


class _Ended:
    def query(self) -> bool:
        return True


class _HostOrder:
    """Host copies have ended when the call returns."""

    def issue(self) -> AbstractContextManager[object]:
        return nullcontext()

    def record(self) -> Event:
        return _Ended()


class _StreamOrder:
    """A CUDA stream of our own, so that copies overlap with the engine's kernels. Not run on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device=device)  # type: ignore[no-untyped-call]

    @contextmanager
    def issue(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def record(self) -> Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event


def with_index(device: torch.device) -> torch.device:
    """Plain "cuda" means the current device; a tensor always names its own, and is compared with it. Not run on a GPU."""
    index: int | None = device.index
    if device.type == "cuda" and index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _device_named(name: str | torch.device) -> tuple[torch.device, int]:
    """A device and the bytes free on it. Raises DoesNotFit for a device that torch does not know, or that this machine or this build of torch has not."""
    try:
        device = with_index(torch.device(name))
        return device, available_memory().nbytes if device.type == "cpu" else _free_on(device)
    except (
        RuntimeError,
        AssertionError,
        ValueError,
    ) as error:  # torch raises AssertionError where it was built without CUDA
        first_line = str(error).partition("\n")[0]
        raise DoesNotFit(
            [
                f"storage.gpu.device = {name}: {first_line}",
                (
                    "install a torch that was built with CUDA, and its driver; or have host memory play the GPU: "
                    "KVTIERS_STORAGE__GPU__DEVICE=cpu; or leave storage.gpu.capacity out, for no GPU tier"
                ),
            ],
            source="the GPU tier does not fit this machine",
        ) from error


def _free_on(device: torch.device) -> int:
    """Bytes free on a CUDA device. Not run on a GPU."""
    return int(torch.cuda.mem_get_info(device)[0])


def _host_tensor(array: Bytes) -> torch.Tensor:
    if (
        array.dtype != np.uint8
        or array.ndim != 1
        or not array.flags.c_contiguous
        or not array.flags.writeable
    ):
        raise LayoutMismatch(
            f"host side of a copy: a writable uint8 vector is needed, not {array.dtype} {array.shape}"
        )
    return torch.from_numpy(array)


# --- torch tensors as plain bytes ----------------------------------------------------------------------------------------


def tensor_bytes(tensor: torch.Tensor) -> Array:
    """The tensor's memory as unsigned integers of the same size, shape and strides; no copy. It must be dense, on the CPU.

    bf16 → uint16, fp8 → uint8, fp32 → uint32: numpy has no bf16, and bytes are all a cache needs.
    """
    size = tensor.element_size()
    if (
        tensor.device.type != "cpu"
        or tensor.layout is not torch.strided
        or tensor.is_quantized
        or size not in _UNSIGNED
    ):
        raise LayoutMismatch(
            f"{tensor.dtype} tensor on {tensor.device}, {tensor.layout}: dense CPU tensors of 1 to 8 bytes only"
        )
    if tensor.is_conj() or tensor.is_neg():
        raise LayoutMismatch(
            "a lazily conjugated or negated tensor has other bytes than values: call resolve_conj/resolve_neg"
        )
    array: Array = tensor.detach().view(_SIGNED[size]).numpy().view(_UNSIGNED[size])
    return array


def bytes_tensor(array: Array, dtype: torch.dtype) -> torch.Tensor:
    """The inverse: a tensor of `dtype` over the array's memory, which must be writable and of the same item size; no copy."""
    if array.itemsize != dtype.itemsize or not array.flags.writeable:
        raise LayoutMismatch(f"{array.dtype} as {dtype}: the item sizes differ, or the array is read-only")
    signed = array if array.itemsize == 1 else array.view(f"i{array.itemsize}")
    return torch.from_numpy(signed).view(dtype)


def gather_to_host(dst: Bytes, tensors: Sequence[torch.Tensor]) -> None:
    """Copy device tensors one behind the other, each in C order, into `dst`, a uint8 vector of the arena.

    Returns when the bytes are there. Only CUDA tensors need it: not run on a GPU.
    """
    for place, tensor in _host_places(dst, tensors):
        spans = _spans(place)
        if len(spans) == 1:
            place.view(tensor.dtype).view(tensor.shape).copy_(tensor)
            continue
        packed = tensor.detach().contiguous().view(-1).view(torch.uint8)
        for span in spans:
            place[span].copy_(packed[span])


def scatter_from_host(src: Bytes, tensors: Sequence[torch.Tensor]) -> None:
    """Fill device tensors with what `gather_to_host` put into `src`. Not run on a GPU."""
    for place, tensor in _host_places(src, tensors):
        spans = _spans(place)
        if len(spans) == 1:
            tensor.copy_(place.view(tensor.dtype).view(tensor.shape))
            continue
        packed = torch.empty(place.numel(), dtype=torch.uint8, device=tensor.device)
        for span in spans:
            packed[span].copy_(place[span])
        tensor.copy_(packed.view(tensor.dtype).view(tensor.shape))


def _host_places(host: Bytes, tensors: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    memory, offset = _host_tensor(host), 0
    for tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        yield memory[offset : offset + nbytes], tensor
        offset += nbytes


# --- pinning the arena ---------------------------------------------------------------------------------------------------


class CudaRuntime(Protocol):
    """The two calls of the CUDA runtime that torch passes through; they return `cudaError`, 0 for success."""

    def cudaHostRegister(self, address: int, nbytes: int, flags: int, /) -> int: ...  # noqa: N802
    def cudaHostUnregister(self, address: int, /) -> int: ...  # noqa: N802


class HostRegistration:
    """Pinned pieces of host memory, each but the last `piece_bytes` long. Keeps the memory mapped until `unregister`."""

    def __init__(self, memory: Bytes, runtime: CudaRuntime, piece_bytes: int) -> None:
        self._memory: Bytes | None = memory
        self._runtime: Final = runtime
        self._pieces: Final[list[tuple[int, int]]] = []
        self._start: Final[int] = memory.ctypes.data
        self._end: Final[int] = self._start + memory.nbytes
        self._piece_bytes: Final = piece_bytes
        with _registrations_lock:
            _registrations.append(self)

    @property
    def nbytes(self) -> int:
        """Bytes pinned so far."""
        return sum(nbytes for _, nbytes in self._pieces)

    def borders(self, start: int, end: int) -> range:
        """Addresses strictly between these two where one piece ends and another begins, pinned yet or not."""
        start, end = max(start, self._start), min(end, self._end)
        return range(
            start + self._piece_bytes - (start - self._start) % self._piece_bytes, end, self._piece_bytes
        )

    def register(self, address: int, nbytes: int) -> None:
        """Pin one piece."""
        error = int(self._runtime.cudaHostRegister(address, nbytes, _PORTABLE))
        if error:
            raise HostRegisterError(
                f"cudaHostRegister of {nbytes / _MIB:.0f} MiB failed with cudaError {error}"
            )
        self._pieces.append((address, nbytes))

    def unregister(self) -> None:
        """Unpin everything; no copy may be in flight. Pieces that CUDA refuses to release stay, and keep the memory mapped."""
        self._pieces[:] = [piece for piece in self._pieces if int(self._runtime.cudaHostUnregister(piece[0]))]
        if self._pieces:
            _PINNED.append(self._memory)
        self._memory = None
        with _registrations_lock:
            if self in _registrations:
                _registrations.remove(self)


_registrations: Final[list[HostRegistration]] = []
_registrations_lock: Final = threading.Lock()


def _spans(host: torch.Tensor) -> list[slice]:
    """Cut a vector of host bytes where the pieces of a registration meet: CUDA does not promise to copy over such a border."""
    start = host.data_ptr()
    with _registrations_lock:
        borders = [
            border - start for one in _registrations for border in one.borders(start, start + host.numel())
        ]
    return [slice(*ends) for ends in pairwise((0, *sorted(borders), host.numel()))]


_PORTABLE: Final = 1  # cudaHostRegisterPortable: pinned for every CUDA context


class _NoCuda:
    """Nothing to pin for a simulated GPU."""

    def cudaHostRegister(self, address: int, nbytes: int, flags: int, /) -> int:  # noqa: N802
        return 0

    def cudaHostUnregister(self, address: int, /) -> int:  # noqa: N802
        return 0


def host_register(
    memory: Bytes,
    device: str | torch.device,
    *,
    piece_bytes: int = 1 << 30,
    stop: threading.Event | None = None,
    runtime: CudaRuntime | None = None,
) -> HostRegistration:
    """Pin `memory` (an arena's view of all of it) piece by piece; meant for a background thread, as 100 GB take many seconds.

    Copies of this file are cut where two pieces meet. `stop` ends it early, with what is pinned so far. Raises HostRegisterError
    with nothing pinned.
    """
    runtime = runtime or _runtime_of(torch.device(device))
    registration = HostRegistration(memory, runtime, piece_bytes)
    base = memory.ctypes.data
    try:
        for start in range(0, memory.nbytes, piece_bytes):
            if stop is not None and stop.is_set():
                break
            registration.register(base + start, min(piece_bytes, memory.nbytes - start))
    except HostRegisterError:
        registration.unregister()
        raise
    return registration


def _runtime_of(device: torch.device) -> CudaRuntime:
    if device.type == "cpu":
        return _NoCuda()
    runtime: CudaRuntime = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # not run on a GPU
    return runtime
