"""KV as callers hand it over, brought to one form without copying: a list of planes `[tokens, num_kv_heads, head_dim]`.

Accepted: one array `[num_layers, planes, tokens, num_kv_heads, head_dim]`, or per layer a pair (K, V) (or one latent array for
MLA) of `[tokens, num_kv_heads, head_dim]`; numpy arrays or torch tensors, strided ones too. numpy has no bf16 and no fp8: such
KV may come as unsigned integers of the same size. torch is never imported here; a tensor brings it along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtiers.model.errors import LayoutMismatch
from kvtiers.model.layout import KVLayout

if TYPE_CHECKING:
    import torch

Plane: TypeAlias = "npt.NDArray[Any]"

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_PLANES = {1: "one array", 2: "a pair (K, V) of arrays"}
_NUMPY_NAMES = {"float32": "float32", "float16": "float16", "uint8": "uint8"}


@dataclass(frozen=True, slots=True)
class KVArrays:
    """KV of `tokens` tokens in the caller's memory."""

    tokens: int
    planes: tuple[Plane, ...]
    """Host memory: `num_layers * planes` arrays, K and V of layer 0 first. Empty if the KV lies on a device."""
    whole: Plane | None
    """Host memory: all planes in one array `[num_layers, planes, tokens, heads, dim]`, if they came as one."""
    tensors: tuple[torch.Tensor, ...]
    """The same planes as tensors, if they came as tensors."""


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
    return _from_planes(planes, None, layout, writable)


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
    planes = [kv[layer, plane] for layer in range(layout.num_layers) for plane in range(layout.planes)]
    return _from_planes(planes, kv, layout, writable)


def _from_planes(planes: list[Any], whole: Any, layout: KVLayout, writable: bool) -> KVArrays:
    tokens = int(planes[0].shape[0]) if len(planes[0].shape) else 0
    expected = (tokens, layout.num_kv_heads, layout.head_dim)
    for number, plane in enumerate(planes):
        if tuple(plane.shape) != expected:
            layer = number // layout.planes
            raise LayoutMismatch(
                f"layer {layer}: an array has shape {tuple(plane.shape)}; expected {expected}"
            )
    tensors: tuple[torch.Tensor, ...] = ()
    if all(_is_tensor(plane) for plane in planes):
        tensors = tuple(planes)
        if tensors[0].device.type != "cpu":
            for tensor in tensors:
                _check_dtype(str(tensor.dtype).removeprefix("torch."), layout)
            return KVArrays(tokens, (), None, tensors)
    host = tuple(_host(plane, layout, writable) for plane in planes)
    return KVArrays(tokens, host, None if whole is None else _host(whole, layout, writable), tensors)


def _host(array: Any, layout: KVLayout, writable: bool) -> Plane:
    """As unsigned integers of the layout's item size, so that numpy copies bytes and converts nothing."""
    _check_dtype(str(array.dtype).removeprefix("torch."), layout)
    if _is_tensor(array):
        from kvtiers.memory.cuda import tensor_bytes

        host: Plane = tensor_bytes(array)
    else:
        host = np.asarray(array).view(_UNSIGNED[layout.itemsize])
    if writable:
        if not host.flags.writeable:
            raise LayoutMismatch("the array to load into is read-only")
        if host.size and any(step == 0 and n > 1 for step, n in zip(host.strides, host.shape, strict=True)):
            raise LayoutMismatch("the array to load into is an expanded one: its elements share memory")
    return host


def _check_dtype(name: str, layout: KVLayout) -> None:
    opaque = f"uint{8 * layout.itemsize}"
    if name not in (layout.dtype, opaque):
        raise LayoutMismatch(f"kv has dtype {name}; the layout says {layout.dtype} (as raw bits: {opaque})")


def _is_tensor(value: Any) -> bool:
    """A `torch.Tensor`, or of a subclass of it."""
    return any(
        base.__name__ == "Tensor" and base.__module__.partition(".")[0] == "torch"
        for base in type(value).__mro__
    )


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or _is_tensor(value)


def _describe(layer: Any, pair: Sequence[Any]) -> str:
    return f"{type(layer).__name__} of {', '.join(type(item).__name__ for item in pair) or 'nothing usable'}"


def _shape_text(layout: KVLayout) -> str:
    return f"[{layout.num_layers}, {layout.planes}, tokens, {layout.num_kv_heads}, {layout.head_dim}]"
