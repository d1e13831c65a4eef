"""What is moved: chunks of two models' KV, and how much of it a round moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtiers.model.errors import ConfigError
from kvtiers.model.layout import KVLayout

_MIB: Final = 1 << 20
BOTH: Final = "both"
TINY: Final = "tiny"


@dataclass(frozen=True, slots=True)
class Shape:
    """KV of one model: its layout and the chunk."""

    name: str
    layout: KVLayout
    chunk_tokens: int
    round_bytes: int
    """About what one round moves, in bytes."""

    @property
    def chunk_bytes(self) -> int:
        """KV bytes of a chunk."""
        return self.layout.nbytes(self.chunk_tokens)

    @property
    def chunks(self) -> int:
        """Chunks of the prompt that a round moves."""
        return max(2, self.round_bytes // self.chunk_bytes)

    @property
    def tokens(self) -> int:
        """Tokens of that prompt."""
        return self.chunks * self.chunk_tokens

    @property
    def nbytes(self) -> int:
        """KV bytes of that prompt."""
        return self.chunks * self.chunk_bytes

    def describe(self) -> str:
        """`llama3-8b: 8 chunks of 32.0 MiB`."""
        return f"{self.name}: {self.chunks} chunks of {self.chunk_bytes / _MIB:.3g} MiB"


SHAPES: Final = {
    "llama3-8b": Shape("llama3-8b", KVLayout(32, 8, 128, "bfloat16"), 256, 256 * _MIB),
    "smollm2-135m": Shape("smollm2-135m", KVLayout(30, 3, 64, "bfloat16"), 256, 256 * _MIB),
    TINY: Shape(TINY, KVLayout(2, 2, 16, "bfloat16"), 16, 64 << 10),
}
"""`tiny` is for tests: it measures nothing of interest."""


def shapes_named(name: str) -> tuple[Shape, ...]:
    """The shape, or both. Raises ConfigError for a name there is none for."""
    if name == BOTH:
        return tuple(shape for shape in SHAPES.values() if shape.name != TINY)
    if name not in SHAPES:
        known = ", ".join([*(known for known in SHAPES if known != TINY), BOTH])
        raise ConfigError([f"{name} is not one of {known}"], source="--shape")
    return (SHAPES[name],)


def bookkeeping(chunks: int) -> Shape:
    """Chunks of 256 tokens with 1 KiB of KV: what remains is the work in Python."""
    layout = KVLayout(1, 1, 1, "bfloat16")
    return Shape("bookkeeping", layout, 256, chunks * layout.nbytes(256))


def synthetic_kv(shape: Shape, tokens: int, *, seed: int = 0) -> npt.NDArray[Any]:
    """KV bits `[num_layers, planes, tokens, heads, dim]` as uint16: normal values with a scale for each channel, cut to bf16.

    It compresses like real KV (a third saved), unlike random bytes. One chunk is drawn, the others are its rotations.
    """
    rng = np.random.default_rng(seed)
    layout = shape.layout
    scale = np.exp(
        rng.normal(0.0, 0.7, (layout.num_layers, layout.planes, 1, layout.num_kv_heads, layout.head_dim))
    )
    values = rng.standard_normal(layout.shape(shape.chunk_tokens), dtype=np.float32) * scale.astype(
        np.float32
    )
    chunk = (values.view(np.uint32) >> 16).astype(np.uint16)
    kv = np.empty(layout.shape(tokens), np.uint16)
    for start in range(0, tokens, shape.chunk_tokens):
        part = kv[:, :, start : start + shape.chunk_tokens]
        np.copyto(part, np.roll(chunk, start // shape.chunk_tokens, axis=2)[:, :, : part.shape[2]])
    return kv
