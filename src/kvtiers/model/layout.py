"""The physical shape of KV, without any tensor library: numpy has no bf16, so KV is bytes plus this description."""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import Any, Final

from kvtiers.model.errors import LayoutMismatch

DTYPE_BYTES: Final[dict[str, int]] = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint8": 1,
}
"""Dtypes KV may have, with bytes per element. `uint8` is for opaque bytes whose meaning only the engine knows."""

PAGE_BYTES: Final = 4096
"""Slots are multiples of this: the unit of O_DIRECT and of the record's padding."""

_ALIASES: Final = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp8": "float8_e4m3fn",
}


def _dtype_name(dtype: Any) -> str:
    """A dtype object is known by its name, `torch.bfloat16` as "bfloat16", so that nothing has to be imported for it."""
    name = str(getattr(dtype, "name", None) or getattr(dtype, "__name__", dtype)).removeprefix("torch.")
    name = _ALIASES.get(name, name)
    if name not in DTYPE_BYTES:
        raise LayoutMismatch(f"dtype {dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
    return name


def _count(name: str, value: Any) -> int:
    try:
        number = index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise LayoutMismatch(f"{name} must be a whole number, at least 1, got {value!r}")
    return number


def round_to_page(nbytes: int) -> int:
    """The smallest multiple of 4 KiB that holds `nbytes`."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


@dataclass(frozen=True, slots=True)
class KVLayout:
    """KV of one token range as `[num_layers, planes, tokens, num_kv_heads, head_dim]`, C order.

    `dtype`: a name of `DTYPE_BYTES`, a usual short form ("bf16"), or a torch or numpy dtype. Raises LayoutMismatch.

    MHA and GQA have two planes, K and V. MLA (DeepSeek-V2, arXiv 2405.04434) keeps one latent vector per token and layer:
    one plane, one head, `head_dim` = latent rank + rotary dim; make it with `KVLayout.mla`.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    planes: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", _dtype_name(self.dtype))
        for name in ("num_layers", "num_kv_heads", "head_dim"):
            object.__setattr__(self, name, _count(name, getattr(self, name)))
        if isinstance(self.planes, bool) or self.planes not in (1, 2):
            raise LayoutMismatch(f"planes must be 2 (K and V) or 1 (MLA's latent), got {self.planes}")

    @classmethod
    def mla(cls, num_layers: int, latent_dim: int, dtype: str) -> KVLayout:
        """Layout of multi-head latent attention: one vector of `latent_dim` elements per token and layer."""
        return cls(num_layers=num_layers, num_kv_heads=1, head_dim=latent_dim, dtype=dtype, planes=1)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one token over all layers and planes."""
        return self.num_layers * self.planes * self.num_kv_heads * self.head_dim * self.itemsize

    def shape(self, tokens: int) -> tuple[int, int, int, int, int]:
        """Array shape of the KV of `tokens` tokens."""
        return (self.num_layers, self.planes, tokens, self.num_kv_heads, self.head_dim)

    def nbytes(self, tokens: int) -> int:
        """KV bytes of `tokens` tokens."""
        return self.bytes_per_token * tokens

    def describe(self) -> str:
        """One canonical line; part of a namespace's digest."""
        return (
            f"layers={self.num_layers},planes={self.planes},heads={self.num_kv_heads},"
            f"dim={self.head_dim},dtype={self.dtype}"
        )
