"""KV on its way through an offload: held, viewed as plain bytes, and noticed if it changes on the way.

`bytes` can't change and are passed on as they are. Anything else may be written to by its owner between `submit` and the write,
which would put bytes under a key that are not its own. So its checksum is taken at once (about .06 ms for each MiB), and what is
stored must still have it.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtiers.compat.pointers import CPUPtr
from kvtiers.model.errors import KvtiersError, LayoutMismatch
from kvtiers.records.checksum import checksum

MemoryObj: TypeAlias = bytes | bytearray | memoryview | npt.NDArray[Any] | CPUPtr
"""What may be offloaded: bytes, a contiguous buffer or array, memory of a `MemoryAllocator`; also a dense CPU tensor."""


class PayloadChanged(KvtiersError):
    """The data was written to between `submit` and its being stored."""


class Payload:
    """One thing to store. A pointer among them is retained until `let_go`."""

    __slots__ = ("_data", "_digest", "_pointer", "view")

    def __init__(self, data: MemoryObj) -> None:
        """Raises LayoutMismatch for what is no contiguous run of bytes, InvalidPointer for a dead pointer."""
        self._pointer = data.retain() if isinstance(data, CPUPtr) else None
        try:
            self.view = bytes_of(data)
            """The bytes, format "B"."""
            self._data = data if isinstance(data, bytes) else None
            self._digest = None if self._data is not None else checksum(self.view)
        except BaseException:
            self.let_go()
            raise

    @property
    def digest(self) -> bytes:
        """xxh3-128 of the bytes that were submitted."""
        if self._digest is None:
            self._digest = checksum(self.view)
        return self._digest

    def snapshot(self) -> bytes:
        """The bytes that were submitted, as `bytes`: no copy if they are. Raises PayloadChanged."""
        if self._data is not None:
            return self._data
        copy = bytes(self.view)
        if checksum(copy) != self.digest:
            raise PayloadChanged(
                "the data changed after it was submitted: leave it alone until the task has ended"
            )
        return copy

    def let_go(self) -> None:
        """Nobody reads it any more; idempotent."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            pointer.release()


def bytes_of(data: Any) -> memoryview:
    """Any contiguous buffer as a view of its bytes, no copy. Raises LayoutMismatch."""
    if isinstance(data, CPUPtr):
        return data.data
    if type(data).__module__.partition(".")[0] == "torch":
        from kvtiers.memory.cuda import tensor_bytes

        data = tensor_bytes(data)
    if isinstance(data, np.ndarray):
        if not data.flags.c_contiguous or data.dtype.hasobject:
            raise LayoutMismatch(
                f"a {data.dtype} array of shape {data.shape} is not one run of bytes: pass a contiguous copy"
            )
        return data.reshape(-1).view(np.uint8).data
    try:
        view = memoryview(data)
        return view.cast("B") if view.nbytes else memoryview(b"")
    except (TypeError, ValueError) as error:
        raise LayoutMismatch(
            f"{type(data).__name__} is not a contiguous run of bytes ({error}): pass bytes, a buffer or an array"
        ) from error
