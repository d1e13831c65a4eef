"""KV as callers hand it over, brought to one form without copying: a list of planes `[tokens, num_kv_heads, head_dim]`.

Accepted: one array `[num_layers, planes, tokens, num_kv_heads, head_dim]`, or per layer a pair (K, V) (or one latent array for
MLA) of `[tokens, num_kv_heads, head_dim]`; numpy arrays or torch tensors, strided ones too. numpy has no bf16 and no fp8: such
KV may come as unsigned integers of the same size. torch is never imported here; a tensor brings it along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtiers.model.errors import LayoutMismatch
from kvtiers.model.layout import KVLayout
from kvtiers.runtime.aliasing import check_apart, nests

if TYPE_CHECKING:
    import torch

Plane: TypeAlias = "npt.NDArray[Any]"

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_PLANES = {1: "one array", 2: "a pair (K, V) of arrays"}
_NUMPY_NAMES = {"float32": "float32", "float16": "float16", "uint8": "uint8"}


@dataclass(frozen=True, slots=True)
class KVArrays:
    """KV of `tokens` tokens in the caller's memory. Made once a call, so what only some copies need is made when it is asked for."""

    tokens: int
    whole: Plane | None = None
    """Host memory: all planes in one array `[num_layers, planes, tokens, heads, dim]`, if they came as one."""
    apart: tuple[Plane, ...] = ()
    """Host memory: `num_layers * planes` arrays, K and V of layer 0 first, if they came one by one."""
    source: torch.Tensor | tuple[torch.Tensor, ...] = ()
    """What they came as, if as one tensor or as tensors."""

    @property
    def on_host(self) -> bool:
        """Whether the KV lies in host memory, not on a device."""
        return self.whole is not None or bool(self.apart)

    @property
    def planes(self) -> Sequence[Plane]:
        """Host memory: the planes one by one, however they came. Empty if the KV lies on a device."""
        return self.apart if self.whole is None else [plane for layer in self.whole for plane in layer]

    @property
    def tensors(self) -> Sequence[torch.Tensor]:
        """The same planes as tensors, if they came as tensors."""
        if isinstance(self.source, tuple):
            return self.source
        return [plane for layer in self.source for plane in layer]

    @property
    def device(self) -> torch.device | None:
        """Of the tensors; None if they came as numpy arrays."""
        if isinstance(self.source, tuple):
            return self.source[0].device if self.source else None
        return self.source.device


def kv_arrays(kv: Any, layout: KVLayout, *, writable: bool = False) -> KVArrays:
    """View `kv` as planes. Raises LayoutMismatch with what was expected and what came."""
    if _is_array(kv):
        return _from_whole(kv, layout, writable)
    if not isinstance(kv, Sequence) or len(kv) != layout.num_layers:
        raise LayoutMismatch(
            f"kv must be one array of shape {_shape_text(layout)}, or {layout.num_layers} layers of (K, V) pairs; "
            f"got {type(kv).__name__}" + (f" of length {len(kv)}" if isinstance(kv, Sequence) else "")
        )
    planes: list[Any] = []
    for number, layer in enumerate(kv):
        pair = [layer] if _is_array(layer) else list(layer) if isinstance(layer, Sequence) else []
        if len(pair) != layout.planes or not all(map(_is_array, pair)):
            raise LayoutMismatch(
                f"layer {number} must be {_PLANES[layout.planes]} of shape [tokens, {layout.num_kv_heads}, "
                f"{layout.head_dim}]; got {_describe(layer, pair)}"
            )
        planes.extend(pair)
    return _from_planes(planes, layout, writable)


def empty_kv(layout: KVLayout, tokens: int) -> Plane:
    """Fresh host memory `[num_layers, planes, tokens, heads, dim]`; bf16 and fp8 as unsigned integers of the same size."""
    dtype = (
        np.dtype(_NUMPY_NAMES[layout.dtype])
        if layout.dtype in _NUMPY_NAMES
        else np.dtype(_UNSIGNED[layout.itemsize])
    )
    return np.empty(layout.shape(tokens), dtype=dtype)


def _from_whole(kv: Any, layout: KVLayout, writable: bool) -> KVArrays:
    shape = tuple(kv.shape)
    if len(shape) != 5 or (*shape[:2], *shape[3:]) != (
        layout.num_layers,
        layout.planes,
        layout.num_kv_heads,
        layout.head_dim,
    ):
        raise LayoutMismatch(f"kv has shape {shape}; expected {_shape_text(layout)}")
    source = kv if _is_tensor(kv) else ()
    return KVArrays(shape[2], whole=_host(kv, layout, writable), source=source)


def _from_planes(planes: list[Any], layout: KVLayout, writable: bool) -> KVArrays:
    tokens = int(planes[0].shape[0]) if len(planes[0].shape) else 0
    expected = (tokens, layout.num_kv_heads, layout.head_dim)
    for number, plane in enumerate(planes):
        if tuple(plane.shape) != expected:
            layer = number // layout.planes
            raise LayoutMismatch(
                f"layer {layer}: an array has shape {tuple(plane.shape)}; expected {expected}"
            )
    source = tuple(planes) if all(map(_is_tensor, planes)) else ()
    hosts = [_host(plane, layout, writable) for plane in planes]
    apart = tuple(host for host in hosts if host is not None)
    if apart and len(apart) < len(hosts):
        raise LayoutMismatch("some of the kv lies on a device and some in host memory: give it in one place")
    if writable:
        check_apart(apart)
    return KVArrays(tokens, apart=apart, source=source)


def _host(array: Any, layout: KVLayout, writable: bool) -> Plane | None:
    """As unsigned integers of the layout's item size, so that numpy copies bytes and converts nothing. None on a device."""
    _check_dtype(_dtype_name(array.dtype), layout)
    if _is_tensor(array):
        if array.device.type != "cpu":
            return None
        from kvtiers.memory.cuda import tensor_bytes

        host: Plane = tensor_bytes(array)
    else:
        host = np.asarray(array).view(_UNSIGNED[layout.itemsize])
    if writable:
        if not host.flags.writeable:
            raise LayoutMismatch("the array to load into is read-only")
        if not nests(host.shape, host.strides, host.itemsize):
            raise LayoutMismatch(
                "the array to load into is an expanded or overlapping view: its elements share memory"
            )
    return host


def _check_dtype(name: str, layout: KVLayout) -> None:
    opaque = f"uint{8 * layout.itemsize}"
    if name not in (layout.dtype, opaque):
        raise LayoutMismatch(f"kv has dtype {name}; the layout says {layout.dtype} (as raw bits: {opaque})")


@lru_cache(maxsize=64)
def _dtype_name(dtype: Any) -> str:
    """A load asks for every plane, and numpy takes 2 µs to spell a dtype."""
    return str(dtype).removeprefix("torch.")


def _is_tensor(value: Any) -> bool:
    """A `torch.Tensor`, or of a subclass of it."""
    return not isinstance(value, np.ndarray) and any(
        base.__name__ == "Tensor" and base.__module__.partition(".")[0] == "torch"
        for base in type(value).__mro__
    )


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or _is_tensor(value)


def _describe(layer: Any, pair: Sequence[Any]) -> str:
    return f"{type(layer).__name__} of {', '.join(type(item).__name__ for item in pair) or 'nothing usable'}"


def _shape_text(layout: KVLayout) -> str:
    return f"[{layout.num_layers}, {layout.planes}, tokens, {layout.num_kv_heads}, {layout.head_dim}]"
