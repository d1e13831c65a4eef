"""What was stored, as digests: the yardstick for what a load brings.

One xxh3-128 digest for each chunk and layer, over K and V. Taken from the model's own cache, not through any code of ours that
stores or loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from kvtiers.memory.cuda import tensor_bytes
from kvtiers.model.keys import ChunkKey, chunk_keys, root_key
from kvtiers.records.checksum import checksum

Row: TypeAlias = tuple[str, ...]
"""One chunk: a digest for each layer."""


def kv_rows(past: Any, tokens: int, chunk_tokens: int) -> tuple[Row, ...]:
    """Digests of the full chunks among the first `tokens` tokens in a `DynamicCache`."""
    ends = range(chunk_tokens, tokens + 1, chunk_tokens)
    return tuple(
        tuple(_digest(layer, end - chunk_tokens, end) for layer in past.layers)  # reads one layer at a time
        for end in ends
    )


def logits_digest(logits: torch.Tensor) -> str:
    """Digest of one vector of logits."""
    return _hex(logits)


class StoredKV:
    """Digests of all chunks stored so far, found again by the tokens they stand for."""

    def __init__(self, chunk_tokens: int) -> None:
        self._chunk_tokens = chunk_tokens
        self._rows: dict[ChunkKey, Row] = {}

    def remember(self, tokens: Sequence[int], rows: Sequence[Row]) -> None:
        """The chunks of `tokens` were stored; those stored before stay as they were, as in the cache."""
        for key, row in zip(self._keys(tokens), rows, strict=False):
            self._rows.setdefault(key, row)

    def known(self, tokens: Sequence[int]) -> tuple[Row, ...]:
        """The rows of the longest prefix of `tokens` that was stored."""
        rows: list[Row] = []
        for key in self._keys(tokens):
            row = self._rows.get(key)
            if row is None:
                break
            rows.append(row)
        return tuple(rows)

    def reusable(self, tokens: Sequence[int]) -> int:
        """Tokens a prefill of `tokens` should reuse: the last one is always computed."""
        return min(len(self.known(tokens)) * self._chunk_tokens, len(tokens) - 1)

    def _keys(self, tokens: Sequence[int]) -> list[ChunkKey]:
        return chunk_keys(root_key(b""), tokens, self._chunk_tokens)


def _digest(layer: Any, start: int, end: int) -> str:
    return _hex(torch.stack((layer.keys[0, :, start:end], layer.values[0, :, start:end])))


def _hex(tensor: torch.Tensor) -> str:
    return checksum(tensor_bytes(tensor.cpu().contiguous()).data.cast("B")).hex()
