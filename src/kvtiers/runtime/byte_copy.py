"""One copy between arrays of equal shape and type, around a trap that some processors set for `memcpy`.

glibc copies 2 to 512 KiB by `rep movsb` where the processor says that it is fast. On AMD's Zen 3 that is true unless the target lies
1 to 31 bytes behind the source, modulo a page: then it is four to nine times slower. numpy's own large arrays begin 16 bytes
behind a page and slots begin on one, so that every load into such an array is the case (docs/decisions/copying.md).

Any thread. Whether the machine has the trap is measured once a process, in a tenth of a millisecond. A wrong answer costs time only.
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

Plane: TypeAlias = "npt.NDArray[Any]"

_PAGE: Final = 4096
_ALIKE: Final = 64
"""Rows are multiples of it as a rule: then all pieces of a strided copy lie alike if the first do."""
_PROBE_BYTES: Final = 32 << 10
_PROBES: Final = 8
_TRAPPED: Final = 3.0
"""Nine with the trap, one without."""


def copy(target: Plane, source: Plane) -> None:
    """Copy every element; both of the same unsigned type and shape, strided or not. The GIL is given up meanwhile."""
    if memcpy_stumbles() and (address(target) - address(source)) % _ALIKE:
        np.positive(source, out=target)  # numpy's own loop: as fast as memcpy is elsewhere
    else:
        np.copyto(target, source)


@lru_cache(maxsize=1)
def memcpy_stumbles() -> bool:
    """Whether copies to 16 bytes behind a page are far slower here than copies to a page."""
    memory = np.ones(2 * _PROBE_BYTES + 3 * _PAGE, np.uint8)
    pages = memory[-address(memory) % _PAGE :]
    source, beyond = pages[:_PROBE_BYTES], pages[_PROBE_BYTES + _PAGE :]
    alike, behind = (_fastest(beyond[start : start + _PROBE_BYTES], source) for start in (0, 16))
    return behind > _TRAPPED * alike


def address(array: Plane) -> int:
    """Of its first element."""
    return int(array.__array_interface__["data"][0])


def _fastest(target: Plane, source: Plane) -> int:
    taken = []
    for _ in range(_PROBES):
        began = time.perf_counter_ns()
        np.copyto(target, source)
        taken.append(time.perf_counter_ns() - began)
    return min(taken)
