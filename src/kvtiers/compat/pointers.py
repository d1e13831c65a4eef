"""Counted pointers into one range of memory, and the heap that gives them out.

`free` and `release` count down; at 0 the range is free again at once, merged with its neighbours. A pointer is dead from then on: every
call with it raises InvalidPointer, also after its address was given out anew (the heap knows its pointers by identity).

Threads: all methods may be called from any; one lock per heap, held for arithmetic only. `ref_count` may be raised by hand by
whoever is the only holder; from several threads use `retain`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from kvtiers.compat.errors import InvalidPointer
from kvtiers.compat.ranges import FreeRanges
from kvtiers.memory.mapping import Bytes
from kvtiers.model.errors import OutOfMemoryError
from kvtiers.model.layout import round_to_page
from kvtiers.runtime.arguments import whole

if TYPE_CHECKING:
    import torch

_MIB = 1 << 20


class Pointer:
    """`size` bytes at `address`."""

    __slots__ = ("_heap", "address", "ref_count", "size")

    def __init__(self, ptr: int, size: int, heap: Heap[Self] | None = None) -> None:
        """`heap`: who gave it out; without one it is just a pair of numbers that nobody vouches for."""
        self.address = ptr
        self.size = size
        self.ref_count = 1
        self._heap = heap

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address:#x}, {self.size}, ref_count={self.ref_count})"

    def retain(self) -> Self:
        """One more holder; the range stays until each has freed it. Raises InvalidPointer."""
        self._owner().retain(self)
        return self

    def release(self) -> None:
        """The same as the allocator's `free`. Raises InvalidPointer."""
        self._owner().release(self)

    def _owner(self) -> Heap[Self]:
        if self._heap is None:
            raise InvalidPointer(f"{self!r} was not given out by an allocator; use allocate()")
        return self._heap


class CPUPtr(Pointer):
    """Host memory of a `MemoryAllocator`."""

    __slots__ = ()

    def view(self) -> Bytes:
        """The bytes as they lie there, uint8, writable, no copy. Raises InvalidPointer; don't keep it past `free`."""
        return self._owner().view(self)

    @property
    def data(self) -> memoryview:
        """`view` as a buffer."""
        return self.view().data


class GPUPtr(Pointer):
    """Device memory: of the allocator's own GPU pool (`gpu_allocate`), or of someone's tensor (`GPUPtr.of`)."""

    __slots__ = ("tensor",)

    def __init__(self, ptr: int, size: int, heap: Heap[Self] | None = None) -> None:
        super().__init__(ptr, size, heap)
        self.tensor: torch.Tensor | None = None
        """The tensor it points to, which it keeps alive; None in the pool."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        """All bytes of a tensor, in C order; strided ones too. The tensor, not a count, keeps them alive."""
        pointer = cls(tensor.data_ptr(), tensor.numel() * tensor.element_size())
        pointer.tensor = tensor
        return pointer


P = TypeVar("P", bound=Pointer)


class Heap(Generic[P]):
    """Gives out pointers, made by `kind`, into `[base, base + nbytes)`, in multiples of 4 KiB."""

    def __init__(
        self,
        kind: Callable[[int, int, Heap[P]], P],
        base: int,
        nbytes: int,
        *,
        name: str,
        view: Callable[[int, int], Bytes] | None = None,
    ) -> None:
        self._kind = kind
        self._base = base
        self._name = name
        self._view = view
        self._ranges = FreeRanges(nbytes)
        self._live: dict[int, P] = {}
        self._lock = threading.Lock()
        self._owner = os.getpid()

    @property
    def allocated(self) -> int:
        """Bytes given out, with what rounding up to pages adds."""
        return self._ranges.taken_bytes

    def allocate(self, size: int) -> P:
        """A pointer with a count of 1. Raises OutOfMemoryError with the numbers, InvalidArgument for what is no size."""
        size = whole(size, "an allocation has a whole number of bytes", 1)
        needed = round_to_page(size)
        with self._lock:
            offset = self._ranges.take(needed)
            if offset is None:
                raise OutOfMemoryError(self._exhausted(needed))
            pointer = self._kind(self._base + offset, size, self)
            self._live[pointer.address] = pointer
        return pointer

    def retain(self, pointer: P) -> None:
        """One more holder."""
        with self._lock:
            self._check(pointer)
            pointer.ref_count += 1

    def release(self, pointer: P) -> None:
        """One holder less; the last one frees the range."""
        with self._lock:
            self._check(pointer)
            pointer.ref_count -= 1
            if pointer.ref_count <= 0:
                del self._live[pointer.address]
                self._ranges.give(pointer.address - self._base)

    def offset_of(self, pointer: P) -> int:
        """Where in the range it points. Raises InvalidPointer."""
        with self._lock:
            self._check(pointer)
        return pointer.address - self._base

    def view(self, pointer: P) -> Bytes:
        """Its bytes. Raises InvalidPointer."""
        offset = self.offset_of(pointer)
        if self._view is None:
            raise InvalidPointer(f"{pointer!r} points to device memory, which the host can't look at")
        if os.getpid() != self._owner:  # the memory is not mapped there: a touch would end the process
            raise InvalidPointer(f"{pointer!r} is of the parent of this forked process")
        return self._view(offset, pointer.size)

    def check_integrity(self) -> list[str]:
        """What is wrong with the books; empty if nothing is."""
        with self._lock:
            problems = self._ranges.check_integrity()
            live = sum(round_to_page(pointer.size) for pointer in self._live.values())
            if live != self._ranges.taken_bytes:
                problems.append(
                    f"{self._name}: live pointers have {live} bytes, {self._ranges.taken_bytes} are taken"
                )
        return problems

    def _check(self, pointer: P) -> None:
        if self._live.get(pointer.address) is not pointer:
            raise InvalidPointer(
                f"{pointer!r} is not a live pointer of this {self._name}: freed already, or another's"
            )

    def _exhausted(self, needed: int) -> str:
        total, taken, hole = self._ranges.capacity, self._ranges.taken_bytes, self._ranges.largest_hole
        return (
            f"{self._name} exhausted: {needed} bytes asked for; of {total / _MIB:.1f} MiB {taken / _MIB:.1f} are taken and the "
            f"largest hole has {hole} bytes. Free pointers, or make the pool larger"
        )
