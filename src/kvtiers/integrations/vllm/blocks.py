"""A worker's blocks, and copying them to and from a chunk's part in the arena.

A part is `[region][block]`: of each region the chunk's blocks in order. So neighbouring blocks are one copy, and a request may
enter or leave a chunk at any block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


class Blocks(Protocol):
    """The blocks of one rank, wherever they lie. Any thread may copy; blocks must not be in use by the engine meanwhile."""

    def fence(self) -> Any:
        """On the engine's thread: what the engine has computed by now. `read` waits for it."""
        ...

    def read(self, ids: Sequence[int], part: Bytes, first: int, fence: Any) -> None:
        """Copy blocks to places `first`, `first + 1`, … of a part."""
        ...

    def write(self, part: Bytes, first: int, ids: Sequence[int]) -> None:
        """The reverse; returns when the blocks hold it."""
        ...


class HostBlocks:
    """Blocks in host memory: of the CPU backend."""

    def __init__(self, regions: Sequence[Bytes], blocks_per_chunk: int) -> None:
        """`regions`: each `[blocks, bytes]`, contiguous."""
        self._regions = list(regions)
        self._per_chunk = blocks_per_chunk

    def fence(self) -> None:
        """Nothing: the CPU backend has computed when its forward pass returns."""

    def read(self, ids: Sequence[int], part: Bytes, first: int, fence: Any = None) -> None:
        for region, places in zip(self._regions, self.places(part), strict=True):
            for begin, count, block in runs(ids):
                place = first + begin
                np.copyto(places[place : place + count], region[block : block + count])

    def write(self, part: Bytes, first: int, ids: Sequence[int]) -> None:
        for region, places in zip(self._regions, self.places(part), strict=True):
            for begin, count, block in runs(ids):
                place = first + begin
                np.copyto(region[block : block + count], places[place : place + count])

    def places(self, part: Bytes) -> Iterator[Bytes]:
        """A part's blocks in each region, `[blocks of a chunk, bytes]`."""
        start = 0
        for region in self._regions:
            nbytes = self._per_chunk * region.shape[1]
            yield part[start : start + nbytes].reshape(self._per_chunk, region.shape[1])
            start += nbytes


def runs(ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Blocks that lie one behind the other: place of the first in `ids`, how many, id of the first."""
    begin = 0
    for index in range(1, len(ids) + 1):
        if index == len(ids) or ids[index] != ids[index - 1] + 1:
            yield begin, index - begin, ids[begin]
            begin = index
