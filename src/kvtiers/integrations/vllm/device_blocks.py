"""Blocks in a GPU's memory. **Written with care and not run on a GPU yet**: `make test-gpu` is where it is to be accepted.

Copies run on a stream of their own with a low priority, from and to the arena as it is mapped. It is not registered with CUDA in
the workers, so the driver stages each copy through its own pinned buffer: correct, and slower than the bus.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kvtiers.integrations.vllm.blocks import Bytes, runs


class DeviceBlocks:
    """One rank's blocks on a CUDA device."""

    def __init__(self, regions: Sequence[torch.Tensor], blocks_per_chunk: int) -> None:
        """`regions`: each int8 `[blocks, bytes]` on the device."""
        self._regions = list(regions)
        self._per_chunk = blocks_per_chunk
        self._device = regions[0].device
        low, _ = torch.cuda.Stream.priority_range()  # type: ignore[call-arg]
        self._stores = torch.cuda.Stream(device=self._device, priority=low)  # type: ignore[no-untyped-call]
        self._loads = torch.cuda.Stream(device=self._device, priority=low)  # type: ignore[no-untyped-call]

    def fence(self) -> Any:
        """An event behind everything that the engine has put on its stream."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def read(self, ids: Sequence[int], part: Bytes, first: int, fence: Any = None) -> None:
        """Returns when the bytes are in the part."""
        with torch.cuda.stream(self._stores):
            if fence is not None:
                self._stores.wait_event(fence)
            for region, places in zip(self._regions, self._places(part), strict=True):
                for begin, count, block in runs(ids):
                    place = first + begin
                    places[place : place + count].copy_(region[block : block + count], non_blocking=True)
        self._stores.synchronize()

    def write(self, part: Bytes, first: int, ids: Sequence[int]) -> None:
        """Returns when the blocks hold it, for every stream."""
        with torch.cuda.stream(self._loads):
            for region, places in zip(self._regions, self._places(part), strict=True):
                for begin, count, block in runs(ids):
                    place = first + begin
                    region[block : block + count].copy_(places[place : place + count], non_blocking=True)
        self._loads.synchronize()

    def _places(self, part: Bytes) -> list[torch.Tensor]:
        flat, start, found = torch.from_numpy(part.view(np.int8)), 0, []
        for region in self._regions:
            nbytes = self._per_chunk * region.shape[1]
            found.append(flat[start : start + nbytes].view(self._per_chunk, region.shape[1]))
            start += nbytes
        return found
