"""Copies KV between a caller's arrays and slots; in a slot a chunk lies as `[num_layers, planes, chunk_tokens, heads, dim]`.

Runs on the caller's thread (store) or on whichever brings or copies a load. numpy releases the GIL while it copies, and coalesces
what is contiguous on both sides: one call for a chunk in an array of all planes is within 3 % of one plain copy, a call for each
layer and plane 7 to 21 % slower, and takes the GIL again each time (docs/decisions/copying.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from kvtiers.memory.arena import Arena
from kvtiers.model.errors import DeadlineExceeded, LayoutMismatch
from kvtiers.model.layout import KVLayout
from kvtiers.runtime.byte_copy import copy
from kvtiers.runtime.kv_arrays import KVArrays, Plane

if TYPE_CHECKING:
    from kvtiers.memory.cuda import DevicePool

_COPY_POLL_S = 0.001
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


class SlotMemory(Protocol):
    """A tier's memory, as far as KV is copied in and out."""

    def write(self, offset: int, kv: KVArrays, start: int, tokens: int, layout: KVLayout) -> None:
        """Copy tokens `[start, start + tokens)` of `kv` into the slot at `offset`."""
        ...

    def read(
        self,
        offset: int,
        kv: KVArrays,
        start: int,
        tokens: int,
        layout: KVLayout,
        *,
        layers: range | None = None,
    ) -> None:
        """Copy the slot at `offset`, or these layers of it, to tokens `[start, start + tokens)` of `kv`."""
        ...


class ArenaSlots:
    """Slots in the arena."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena

    def write(self, offset: int, kv: KVArrays, start: int, tokens: int, layout: KVLayout) -> None:
        chunk = self._chunk(offset, tokens, layout)
        if kv.whole is not None:
            copy(chunk, kv.whole[:, :, start : start + tokens])
        elif kv.apart:
            for place, plane in zip(_planes(chunk), kv.apart, strict=True):
                copy(place, plane[start : start + tokens])
        else:
            from kvtiers.memory.cuda import gather_to_host

            gather_to_host(_bytes_of(chunk), [tensor[start : start + tokens] for tensor in kv.tensors])

    def read(
        self,
        offset: int,
        kv: KVArrays,
        start: int,
        tokens: int,
        layout: KVLayout,
        *,
        layers: range | None = None,
    ) -> None:
        layers = layers or range(layout.num_layers)
        chunk = self._chunk(offset, tokens, layout)[layers.start : layers.stop]
        planes = _planes_of(layers, layout)
        if kv.whole is not None:
            copy(kv.whole[layers.start : layers.stop, :, start : start + tokens], chunk)
        elif kv.apart:
            for place, plane in zip(_planes(chunk), kv.apart[planes], strict=True):
                copy(plane[start : start + tokens], place)
        else:
            from kvtiers.memory.cuda import scatter_from_host

            scatter_from_host(
                _bytes_of(chunk), [tensor[start : start + tokens] for tensor in kv.tensors[planes]]
            )

    def _chunk(self, offset: int, tokens: int, layout: KVLayout) -> Plane:
        raw = self._arena.view(offset, layout.nbytes(tokens))
        return raw.view(_UNSIGNED[layout.itemsize]).reshape(layout.shape(tokens))


class PoolSlots:
    """Slots in the GPU pool. KV that lies on another device goes through one chunk of host memory."""

    def __init__(self, pool: DevicePool) -> None:
        self._pool = pool

    def write(self, offset: int, kv: KVArrays, start: int, tokens: int, layout: KVLayout) -> None:
        pool = self._pool
        if self._on_device(kv):
            tensors = [tensor[start : start + tokens] for tensor in kv.tensors]
            wait_out(lambda: pool.copy_in(offset, *tensors))
            return
        scratch = _scratch(tokens, layout)
        for place, plane in zip(_planes(scratch), self._host(kv), strict=True):
            copy(place, plane[start : start + tokens])
        wait_out(lambda: pool.copy_from_host(offset, _bytes_of(scratch)))

    def read(
        self,
        offset: int,
        kv: KVArrays,
        start: int,
        tokens: int,
        layout: KVLayout,
        *,
        layers: range | None = None,
    ) -> None:
        layers = layers or range(layout.num_layers)
        pool, planes = self._pool, _planes_of(layers, layout)
        at = offset + layers.start * layout.nbytes(tokens) // layout.num_layers
        if self._on_device(kv):
            tensors = [tensor[start : start + tokens] for tensor in kv.tensors[planes]]
            wait_out(lambda: pool.copy_out(at, *tensors))
            return
        scratch = _scratch(tokens, layout)[: len(layers)]
        wait_out(lambda: pool.copy_to_host(at, _bytes_of(scratch)))
        for place, plane in zip(_planes(scratch), self._host(kv)[planes], strict=True):
            copy(plane[start : start + tokens], place)

    def _on_device(self, kv: KVArrays) -> bool:
        return kv.device == self._pool.device

    def _host(self, kv: KVArrays) -> Sequence[Plane]:
        if not kv.on_host:
            raise LayoutMismatch(
                f"kv lies on {kv.device}, the GPU pool on {self._pool.device}: give the KV of one device"
            )
        return kv.planes


def wait_out(copy: Callable[[], object]) -> None:
    """A device copy past its deadline still reads and writes both its sides: it has ended only when the device says so."""
    try:
        copy()
    except DeadlineExceeded as late:
        ended: Callable[[], bool] | None = getattr(late, "ended", None)
        if ended is None:
            raise
        while not ended():
            time.sleep(_COPY_POLL_S)


def _bytes_of(chunk: Plane) -> Plane:
    return chunk.view(np.uint8).reshape(-1)


def _scratch(tokens: int, layout: KVLayout) -> Plane:
    return np.empty(layout.shape(tokens), dtype=_UNSIGNED[layout.itemsize])


def _planes(layers: Plane) -> Iterator[Plane]:
    for layer in layers:
        yield from layer


def _planes_of(layers: range, layout: KVLayout) -> slice:
    return slice(layers.start * layout.planes, layers.stop * layout.planes)
