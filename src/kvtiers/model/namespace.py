"""Namespaces: everything that makes KV bytes interchangeable, in one digest.

Two caches may exchange KV only if every field here is equal. The fingerprint covers the model's config and weights, so
that a path whose weights were replaced is another model.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

from kvtiers.model.errors import InvalidArgument, KvtiersError
from kvtiers.model.layout import KVLayout

FORMAT_VERSION: Final = 2
"""Version of the record format and of the key derivation."""

_SAMPLE_BYTES: Final = 4096
_BLOCK_BYTES: Final = 1 << 20
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
        for one in fields(self):
            value, default = getattr(self, one.name), one.default
            kind = int if isinstance(default, int) else KVLayout | None if default is None else str
            if not isinstance(value, kind):
                raise InvalidArgument(
                    f"a namespace's {one.name} is of type {one.type}, got {type(value).__name__}"
                )
        if not self.model or not self.fingerprint or not self.engine:
            raise InvalidArgument(
                "a namespace needs model, fingerprint and engine; Namespace.for_model(path, engine=…) makes it"
            )

    def bind(self, layout: KVLayout, chunk_tokens: int) -> Namespace:
        """The namespace a cache really uses: with its layout and chunk size filled in."""
        return replace(self, layout=layout, chunk_tokens=chunk_tokens)

    @property
    def digest(self) -> bytes:
        """SHA-256 over all fields in canonical JSON; 32 bytes."""
        values = asdict(self)
        values["layout"] = self.layout.describe() if self.layout else ""
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(b"kvtiers-namespace\0" + canonical.encode()).digest()

    @classmethod
    def for_model(cls, path: str | Path, *, engine: str, **more: Any) -> Namespace:
        """Namespace of the model in directory `path` (config and weights as files), with its fingerprint taken.

        Raises ModelNotFound if there is nothing to take a fingerprint of.
        """
        directory = Path(path)
        name = more.pop("model", directory.resolve().name)
        return cls(model=name, fingerprint=fingerprint_model(directory), engine=engine, **more)


def fingerprint_model(directory: Path) -> str:
    """Hex SHA-256 of the config files and of the weights.

    Of a safetensors file: its size, its header, its input embeddings whole (single rows of them are trained for new tokens), and the
    start, middle and end of every other tensor, 4 KiB each; so a merged adapter or a partial fine-tune shows, and a 100 GB model
    takes a second. An edit of a few rows elsewhere does not show: give such a model a name of its own. Files of other formats, whose
    tensors can't be found without their own reader, are hashed whole.
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
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            spans = _tensor_spans(stream, digest) if file.suffix == ".safetensors" else None
            if spans is None:
                stream.seek(0)
                while block := stream.read(_BLOCK_BYTES):
                    digest.update(block)
                continue
            for name, start, end in spans:
                if _is_embedding(name):
                    stream.seek(start)
                    for left in range(end - start, 0, -_BLOCK_BYTES):
                        block = stream.read(min(_BLOCK_BYTES, left))
                        if not block:  # the file ends before its header says
                            break
                        digest.update(block)
                    continue
                for position in (start, (start + end) // 2, max(start, end - _SAMPLE_BYTES)):
                    stream.seek(position)
                    digest.update(stream.read(min(_SAMPLE_BYTES, end - position)))
    return digest.hexdigest()


def _is_embedding(tensor: str) -> bool:
    """By the names that models give their input embeddings: `embed_tokens`, `word_embeddings`, `wte`, `tok_embeddings`."""
    return any(word in tensor.lower() for word in ("embed", "wte"))


def _tensor_spans(stream: BinaryIO, digest: hashlib._Hash) -> list[tuple[str, int, int]] | None:
    """Names and byte ranges of all tensors in a safetensors file, whose header goes into the digest; None if it has none that makes sense.

    Format: u64 little-endian length, JSON header with `data_offsets` relative to its end (github.com/huggingface/safetensors).
    """
    prefix = stream.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > _MAX_HEADER_BYTES:
        return None
    header = stream.read(length)
    digest.update(header)
    try:
        tensors = json.loads(header)
        spans = [
            (name, *map(int, value["data_offsets"]))
            for name, value in tensors.items()
            if name != "__metadata__"
        ]
        begin = 8 + length
        return sorted(
            ((name, begin + start, begin + end) for name, start, end in spans), key=lambda span: span[1:]
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
