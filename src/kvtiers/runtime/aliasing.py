"""Whether arrays to load into share memory: K and V written to the same place would each be wrong, and no checksum would tell.

Strides and addresses decide it, in a few µs for the layouts there are; only arrays that lie in each other's gaps in an irregular way
are compared in pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtiers.model.errors import LayoutMismatch

Array = npt.NDArray[Any]


@lru_cache(maxsize=256)
def nests(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Whether each axis steps over all that the axes with smaller strides reach: then no two elements share memory."""
    reach = itemsize
    for stride, count in sorted((abs(stride), count) for stride, count in zip(strides, shape, strict=True)):
        if count > 1:
            if stride < reach and 0 not in shape:
                return False
            reach += stride * (count - 1)
    return True


def check_apart(arrays: Sequence[Array]) -> None:
    """Raise LayoutMismatch if two of the arrays, of one shape and each of which nests, share memory."""
    if len(arrays) < 2 or not arrays[0].size:
        return
    first = arrays[0]
    starts: list[int] = [array.__array_interface__["data"][0] for array in arrays]
    strides = [array.strides for array in arrays]
    ordered = sorted(starts)
    steps = {after - before for before, after in pairwise(ordered)}
    if (
        len(steps) == 1
        and len(set(strides)) == 1  # one array of a dimension more
        and nests((len(arrays), *first.shape), (steps.pop(), *first.strides), first.itemsize)
    ):
        return
    reaches = [_reach(first.shape, stride, first.itemsize) for stride in strides]
    spans = sorted(
        (start + low, start + high, number)
        for number, (start, (low, high)) in enumerate(zip(starts, reaches, strict=True))
    )
    for position, (_, end, number) in enumerate(spans, 1):
        for start, _, other in spans[position:]:
            if start >= end:
                break
            if np.shares_memory(arrays[number], arrays[other]):
                low, high = sorted((number, other))
                raise LayoutMismatch(
                    f"arrays {low} and {high} of those to load into (K and V of each layer, in order) share memory"
                )


@lru_cache(maxsize=256)
def _reach(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """The first byte and the one behind the last, counted from the first element."""
    steps = [stride * (count - 1) for stride, count in zip(strides, shape, strict=True)]
    return sum(min(0, step) for step in steps), sum(max(0, step) for step in steps) + itemsize
