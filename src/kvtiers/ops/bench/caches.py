"""The caches under test: made through the public API from a configuration, as a user would make them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtiers.config import CacheConfig
from kvtiers.model.namespace import Namespace
from kvtiers.ops.bench.shapes import Shape
from kvtiers.runtime.cache import TieredCache
from kvtiers.runtime.node import CacheNode

_MIB: Final = 1 << 20
LOAD_TIMEOUT_S: Final = 60.0
"""A benchmark would rather wait for a slow disk than measure a miss."""


def bench_config(
    shape: Shape, *, arena_bytes: int, directory: Path | None = None, values: Mapping[str, Any] | None = None
) -> CacheConfig:
    """`values`: settings by dotted key below `storage`. Raises ConfigError, and later DoesNotFit."""
    storage: dict[str, Any] = {
        "chunk_tokens": shape.chunk_tokens,
        "cpu": {"buffer_size": -(-arena_bytes // _MIB) * _MIB},
    }
    if directory is not None:
        storage["disk"] = {"enabled": True, "path": str(directory), "min_free_space": 64 * _MIB}
    for key, value in (values or {}).items():
        *above, last = key.split(".")
        below = storage
        for step in above:
            below = below.setdefault(step, {})
        below[last] = value
    work = {"load_timeout_ms": LOAD_TIMEOUT_S * 1000}
    return CacheConfig.from_mapping({"storage": storage, "async": work}, environ={})


@contextmanager
def bench_cache(config: CacheConfig, shape: Shape, *, node: CacheNode | None = None) -> Iterator[TieredCache]:
    """Closed at the end, with the node if it is its own."""
    with TieredCache(config, shape.layout, bench_namespace(), node=node) as cache:
        yield cache


def bench_namespace() -> Namespace:
    """The same in every process, so that a second one finds what the first has stored."""
    return Namespace(model="benchmark", fingerprint="synthetic KV", engine="kvtiers bench")


class Prompts:
    """Token ids of prompts that share no chunk."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._numbers = itertools.count()

    def new(self) -> npt.NDArray[np.uint32]:
        """One that was never given before."""
        return prompt(next(self._numbers), self._tokens)


def prompt(number: int, tokens: int) -> npt.NDArray[np.uint32]:
    """Token ids of prompt `number`: its first token differs from any other's, and with it every key of the chain."""
    ids = np.arange(tokens, dtype=np.uint32)
    ids[0] = 1_000_000 + number
    return ids
