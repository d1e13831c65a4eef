"""What a cache may answer, known without a cache: KV is a pure function of the prefix, so every byte can be checked.

A real model gives equal KV for equal prefixes; here the bytes of a chunk are drawn from its key, which names the whole prefix, the
salt and the namespace. So a chunk of another prompt, another model or another slot, half a chunk, or one never written is told
from the right one by its first bytes, and the oracle remembers nothing that it could get wrong itself.

`CacheOracle` speaks for one session; it is stateless, so any number of threads and processes may use equal ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtiers.model.keys import ChunkKey, chunk_keys, root_key
from kvtiers.model.layout import KVLayout
from kvtiers.model.namespace import Namespace

KV = npt.NDArray[Any]

SMALL_LAYOUT: Final = KVLayout(num_layers=3, num_kv_heads=2, head_dim=24, dtype="bfloat16")
"""9,216 bytes for a chunk of 16 tokens: several pages, the last one padded."""
SMALL_CHUNK: Final = 16

_UNSIGNED: Final = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_TAIL_FILL: Final = 0x5A


class WrongKV(AssertionError):
    """A cache served bytes that were not stored under that prefix."""


class CacheOracle:
    """The KV of every prompt under one namespace and layout."""

    def __init__(
        self, namespace: Namespace, layout: KVLayout = SMALL_LAYOUT, chunk_tokens: int = SMALL_CHUNK
    ) -> None:
        self.layout = layout
        self.chunk_tokens = chunk_tokens
        self.namespace = namespace
        self.digest = namespace.bind(layout, chunk_tokens).digest

    def keys(self, token_ids: Sequence[int], salt: str | None = None) -> list[ChunkKey]:
        """The chain a cache uses for this prompt."""
        return chunk_keys(root_key(self.digest, salt), token_ids, self.chunk_tokens)

    def kv(self, token_ids: Sequence[int], *, salt: str | None = None, start: int = 0) -> KV:
        """KV of `token_ids[start:]` as `[layers, planes, tokens, heads, dim]`, in unsigned integers of the layout's item size.

        What does not fill a chunk is filler.
        """
        step = self.chunk_tokens
        whole = np.full(self.layout.shape(len(token_ids)), _TAIL_FILL, dtype=_UNSIGNED[self.layout.itemsize])
        for index, key in enumerate(self.keys(token_ids, salt)):
            whole[:, :, index * step : (index + 1) * step] = self.chunk(key)
        return whole[:, :, start:]

    def chunk(self, key: ChunkKey) -> KV:
        """The KV of one chunk. It compresses like KV: some, not much."""
        nbytes = self.layout.nbytes(self.chunk_tokens)
        raw = np.frombuffer(bytearray(hashlib.shake_128(key).digest(nbytes)), np.uint8)
        if self.layout.itemsize == 2:
            raw[1::2] &= 0x83  # like the exponents of bf16
        return raw.view(_UNSIGNED[self.layout.itemsize]).reshape(self.layout.shape(self.chunk_tokens))

    def check(self, token_ids: Sequence[int], num_tokens: int, kv: Any, *, salt: str | None = None) -> None:
        """`kv` holds what a load of the prompt gave: whole chunks, from token 0 on. Raises WrongKV."""
        if num_tokens % self.chunk_tokens or num_tokens > len(token_ids):
            raise WrongKV(
                f"{num_tokens} tokens of a prompt of {len(token_ids)} in chunks of {self.chunk_tokens}"
            )
        expected = self.kv(token_ids[:num_tokens], salt=salt)
        got = np.asarray(kv)[:, :, :num_tokens].view(_UNSIGNED[self.layout.itemsize])
        if got.shape != expected.shape:
            raise WrongKV(f"shape {got.shape} instead of {expected.shape}")
        if not np.array_equal(got, expected):
            wrong = np.argwhere((got != expected).any(axis=(0, 1, 3, 4)))[:, 0]
            raise WrongKV(f"wrong bytes at tokens {wrong[:8].tolist()} of {num_tokens} (salt {salt!r})")
