"""What every path of the peer is given to do, so that it is the work kvtiers does: prompts, their KV, files to be read cold.

Runs in the peer's interpreter.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch


class PeerError(Exception):
    """The peer did not do what it was asked; a figure taken from it would be worth nothing."""


@dataclass(frozen=True, slots=True)
class Shape:
    """KV of a model in bf16, in chunks."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    chunk_tokens: int

    @property
    def hidden(self) -> int:
        """Values of K (or V) of one token in one layer."""
        return self.num_kv_heads * self.head_dim

    @property
    def chunk_bytes(self) -> int:
        """KV bytes of a chunk."""
        return self.num_layers * 2 * self.chunk_tokens * self.hidden * 2


LOOKUP_SHAPE = Shape(num_layers=1, num_kv_heads=1, head_dim=8, chunk_tokens=256)
"""A lookup moves no KV: thousands of chunks may be small."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids that share no chunk with another number's."""

    number: int
    chunks: int
    shape: Shape
    token_ids: list[int]

    @classmethod
    def numbered(cls, number: int, chunks: int, shape: Shape) -> Prompt:
        """The first token differs from any other prompt's, and with it every key of the chain."""
        return cls(number, chunks, shape, [1_000_000 + number, *range(1, chunks * shape.chunk_tokens)])

    @property
    def nbytes(self) -> int:
        """KV bytes."""
        return self.chunks * self.shape.chunk_bytes

    def kv(self) -> torch.Tensor:
        """Its KV, `[num_layers, 2, tokens, hidden]`, as an engine holds it: a chunk is a strided part of it."""
        tokens = self.chunks * self.shape.chunk_tokens
        random = torch.Generator().manual_seed(self.number)
        size = (self.shape.num_layers, 2, tokens, self.shape.hidden)
        bits = torch.randint(-(2**15), 2**15, size, dtype=torch.int16, generator=random)
        return bits.view(torch.bfloat16)


class StoragePath(Protocol):
    """One of the peer's ways to keep KV. One thread calls. Raises PeerError."""

    def store(self, prompt: Prompt, kv: torch.Tensor, *, patience_s: float) -> int:
        """Until it is kept in the slowest tier there is; returns the tokens that were."""
        ...

    def load(self, prompt: Prompt, into: torch.Tensor) -> int:
        """From the nearest tier into a tensor like `Prompt.kv`; returns how many tokens."""
        ...

    def lookup(self, token_ids: list[int]) -> int:
        """How many of them it has, from the first on."""
        ...

    def forget_memory(self) -> None:
        """Only the disk has it afterwards."""
        ...

    def discard(self, prompt: Prompt) -> None:
        """No tier has it afterwards."""
        ...

    def files(self) -> list[Path]:
        """What lies on disk."""
        ...

    def state(self) -> dict[str, int]:
        """`unfinished` stores, `held_bytes` of memory, `disk_bytes` it believes to use."""
        ...

    def close(self) -> None:
        """Everything it has started ends."""
        ...


def chunk_of(kv: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Tokens of the engine's KV in the order the peer keeps them: `[2, num_layers, tokens, hidden]`."""
    return kv[:, :, start:end].transpose(0, 1)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """bf16 compared as bits: not every pattern equals itself as a number."""
    return torch.equal(one.view(torch.int16), other.view(torch.int16))


def wrong_chunks(prompt: Prompt, loaded: torch.Tensor, tokens: int) -> int:
    """Chunks among the first `tokens` that are not what was stored."""
    kv, step = prompt.kv(), prompt.shape.chunk_tokens
    return sum(
        not same_bits(loaded[:, :, at : at + step], kv[:, :, at : at + step]) for at in range(0, tokens, step)
    )


def seconds_of(work: Callable[[], object]) -> float:
    """What one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def wait_until(done: Callable[[], bool], patience_s: float) -> bool:
    """Ask every 0.2 ms; False if it is not done in time."""
    deadline = time.perf_counter() + patience_s
    while not done():
        if time.perf_counter() > deadline:
            return False
        time.sleep(2e-4)
    return True


def drop_page_cache(files: Iterable[Path]) -> None:
    """The next read of these comes from the disk. Needs no privilege; dirty pages are written first, or they would stay."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
