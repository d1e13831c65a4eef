"""Namespaces: everything that makes KV bytes interchangeable, in one digest.

Two caches may exchange KV only if every field here is equal. The fingerprint covers the model's config and weights, so
that a path whose weights were replaced is another model.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from kvtiers.model.errors import KvtiersError
from kvtiers.model.layout import KVLayout

FORMAT_VERSION: Final = 1
"""Version of the record format and of the key derivation."""

_SAMPLES_PER_FILE: Final = 16
_SAMPLE_BYTES: Final = 64 * 1024
_MAX_HEADER_BYTES: Final = 100_000_000
_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
_CONFIG_FILES: Final = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "quantize_config.json",
)


class ModelNotFound(KvtiersError):
    """The model path has no weights or no config to take a fingerprint of."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """What must be equal for KV bytes to be interchangeable. `fingerprint` is required: a name alone proves nothing."""

    model: str
    fingerprint: str
    engine: str
    engine_version: str = ""
    attention_backend: str = ""
    physical_layout: str = ""
    quantization: str = ""
    rope: str = ""
    speculative: str = ""
    block_tokens: int = 0
    chunk_tokens: int = 0
    world_size: int = 1
    lossy_codec: str = ""
    hash_algorithm: str = "sha256"
    epoch: int = 0
    format_version: int = FORMAT_VERSION
    layout: KVLayout | None = field(default=None)

    def __post_init__(self) -> None:
        if not self.model or not self.fingerprint or not self.engine:
            raise KvtiersError(
                "a namespace needs model, fingerprint and engine; Namespace.for_model(path, engine=…) makes it"
            )

    def bind(self, layout: KVLayout, chunk_tokens: int) -> Namespace:
        """The namespace a cache really uses: with its layout and chunk size filled in."""
        return replace(self, layout=layout, chunk_tokens=chunk_tokens)

    @property
    def digest(self) -> bytes:
        """SHA-256 over all fields in canonical JSON; 32 bytes."""
        fields = asdict(self)
        fields["layout"] = self.layout.describe() if self.layout else ""
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(b"kvtiers-namespace\0" + canonical.encode()).digest()

    @classmethod
    def for_model(cls, path: str | Path, *, engine: str, **fields: Any) -> Namespace:
        """Namespace of the model in directory `path` (config and weights as files), with its fingerprint taken.

        Raises ModelNotFound if there is nothing to take a fingerprint of.
        """
        directory = Path(path)
        name = fields.pop("model", directory.resolve().name)
        return cls(model=name, fingerprint=fingerprint_model(directory), engine=engine, **fields)


def fingerprint_model(directory: Path) -> str:
    """Hex SHA-256 of config files, and of each weight file its size, its safetensors header and sampled bytes.

    Reads at most about 1 MiB + header per file, so a 100 GB model takes milliseconds; a swap of weights that keeps size,
    header and all sampled bytes would go unseen, which no retraining or re-quantisation does.
    """
    if not directory.is_dir():
        raise ModelNotFound(
            f"{directory} is not a directory; give the folder that holds config.json and the weights"
        )
    weights = sorted(p for p in directory.iterdir() if p.is_file() and p.suffix in _WEIGHT_SUFFIXES)
    if not weights:
        raise ModelNotFound(
            f"{directory} has no weights ({', '.join(_WEIGHT_SUFFIXES)}); give the model's own folder"
        )
    digest = hashlib.sha256()
    for name in _CONFIG_FILES:
        config = directory / name
        if config.is_file():
            digest.update(name.encode() + b"\0" + config.read_bytes())
    for file in weights:
        _update_with_weights(digest, file)
    return digest.hexdigest()


def _update_with_weights(digest: hashlib._Hash, file: Path) -> None:
    size = file.stat().st_size
    digest.update(f"{file.name}\0{size}\0".encode())
    with file.open("rb") as stream:
        if file.suffix == ".safetensors" and size >= 8:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            digest.update(stream.read(min(header_bytes, _MAX_HEADER_BYTES)))
        for index in range(_SAMPLES_PER_FILE):
            stream.seek(max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES_PER_FILE - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
