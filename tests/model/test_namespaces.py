"""Namespaces: everything that makes KV interchangeable is in the digest, and swapped weights are another model."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from kvtiers.model.errors import InvalidArgument
from kvtiers.model.layout import KVLayout
from kvtiers.model.namespace import FORMAT_VERSION, ModelNotFound, Namespace, fingerprint_model

LAYOUT = KVLayout(num_layers=2, num_kv_heads=3, head_dim=8, dtype="bfloat16")
NAMESPACE = Namespace(model="m", fingerprint="f", engine="e").bind(LAYOUT, 256)
MIB = 1 << 20

OTHER: dict[str, Any] = {
    "model": "other",
    "fingerprint": "other",
    "engine": "other",
    "engine_version": "1",
    "attention_backend": "flash",
    "physical_layout": "NHD",
    "quantization": "awq",
    "rope": "yarn",
    "speculative": "eagle",
    "block_tokens": 16,
    "chunk_tokens": 512,
    "world_size": 2,
    "lossy_codec": "int4",
    "hash_algorithm": "blake3",
    "epoch": 1,
    "format_version": FORMAT_VERSION + 1,
    "layout": replace(LAYOUT, head_dim=16),
}


def test_every_field_changes_the_digest() -> None:
    assert OTHER.keys() == {field.name for field in fields(Namespace)}
    digests = {replace(NAMESPACE, **{name: value}).digest for name, value in OTHER.items()}
    assert len(digests | {NAMESPACE.digest}) == len(OTHER) + 1


@pytest.mark.parametrize("name", ["num_layers", "num_kv_heads", "head_dim", "dtype", "planes"])
def test_every_field_of_the_layout_changes_the_digest(name: str) -> None:
    other: Any = {"dtype": "float16", "planes": 1}.get(name, 7)
    assert NAMESPACE.bind(replace(LAYOUT, **{name: other}), 256).digest != NAMESPACE.digest


def test_the_digest_is_32_bytes_and_the_same_everywhere() -> None:
    values = {field.name: getattr(NAMESPACE, field.name) for field in fields(Namespace)}
    values["layout"] = LAYOUT.describe()
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    assert NAMESPACE.digest == hashlib.sha256(b"kvtiers-namespace\0" + canonical.encode()).digest()
    assert len(NAMESPACE.digest) == 32


def test_values_do_not_run_into_each_other() -> None:
    assert (
        replace(NAMESPACE, model="ab", fingerprint="c").digest
        != replace(NAMESPACE, model="a", fingerprint="bc").digest
    )


def test_an_alias_of_a_dtype_is_the_same_layout() -> None:
    assert NAMESPACE.bind(replace(LAYOUT, dtype="bf16"), 256).digest == NAMESPACE.digest


@pytest.mark.parametrize("name", ["model", "fingerprint", "engine"])
def test_a_name_alone_proves_nothing(name: str) -> None:
    values: dict[str, Any] = {name: ""}
    with pytest.raises(InvalidArgument, match="fingerprint"):
        replace(NAMESPACE, **values)


# --- fingerprints -------------------------------------------------------------------------------------------------------


def safetensors(payload: bytes, header: bytes = b'{"w":{"dtype":"F32"}}') -> bytes:
    return struct.pack("<Q", len(header)) + header + payload


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "tiny"
    directory.mkdir()
    (directory / "config.json").write_text('{"hidden_size": 8}')
    (directory / "model.safetensors").write_bytes(safetensors(bytes(3 * MIB)))
    return directory


def test_the_fingerprint_is_stable_and_knows_no_paths(model: Path) -> None:
    before = fingerprint_model(model)
    assert fingerprint_model(model.rename(model.with_name("moved"))) == before
    assert len(bytes.fromhex(before)) == 32


@pytest.mark.parametrize("place", [0, MIB, 3 * MIB - 1], ids=["begin", "middle", "end"])
def test_a_swapped_weight_file_of_equal_size_is_another_model(model: Path, place: int) -> None:
    before = fingerprint_model(model)
    payload = bytearray(3 * MIB)
    start = max(0, place - 100_000)
    payload[start : place + 100_000] = b"\x01" * len(payload[start : place + 100_000])
    (model / "model.safetensors").write_bytes(safetensors(bytes(payload)))
    assert fingerprint_model(model) != before


def test_the_header_of_safetensors_is_read_whole(model: Path) -> None:
    entries = {f"layer.{n}": {"dtype": "F32"} for n in range(20_000)}
    (model / "model.safetensors").write_bytes(safetensors(bytes(MIB), json.dumps(entries).encode()))
    before = fingerprint_model(model)
    entries["layer.9999"] = {"dtype": "I32"}  # equal length, anywhere in the header
    (model / "model.safetensors").write_bytes(safetensors(bytes(MIB), json.dumps(entries).encode()))
    assert fingerprint_model(model) != before


def test_a_changed_config_is_another_model(model: Path) -> None:
    before = fingerprint_model(model)
    (model / "config.json").write_text('{"hidden_size": 9}')
    assert fingerprint_model(model) != before


def test_an_adapter_is_another_model(model: Path) -> None:
    seen = {fingerprint_model(model)}
    (model / "adapter_config.json").write_text("{}")
    seen.add(fingerprint_model(model))
    (model / "adapter_model.safetensors").write_bytes(safetensors(b"x"))
    seen.add(fingerprint_model(model))
    assert len(seen) == 3


def test_what_is_not_the_model_does_not_matter(model: Path) -> None:
    before = fingerprint_model(model)
    (model / "README.md").write_text("hello")
    (model / "onnx").mkdir()
    assert fingerprint_model(model) == before


@pytest.mark.parametrize("suffix", ["bin", "gguf", "pt", "pth"])
def test_other_formats_of_weights_count_too(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"weights.{suffix}"
    file.write_bytes(b"a" * 1000)
    before = fingerprint_model(tmp_path)
    file.write_bytes(b"a" * 999 + b"b")
    assert fingerprint_model(tmp_path) != before


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\xff" * 8, struct.pack("<Q", 2**60) + b"{}"])
def test_a_broken_safetensors_file_has_a_fingerprint_too(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert len(fingerprint_model(tmp_path)) == 64


def test_a_folder_without_weights_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFound, match="weights"):
        fingerprint_model(tmp_path)
    with pytest.raises(ModelNotFound, match="not a directory"):
        fingerprint_model(tmp_path / "nowhere")


def test_for_model_takes_name_and_fingerprint_from_the_folder(model: Path) -> None:
    made = Namespace.for_model(model, engine="transformers", rope="yarn")
    assert (made.model, made.engine, made.rope) == ("tiny", "transformers", "yarn")
    assert made.fingerprint == fingerprint_model(model)
    assert Namespace.for_model(str(model), engine="x", model="named").model == "named"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("model", Path("m")),
        ("fingerprint", b"f"),
        ("engine", None),
        ("rope", 1.0),
        ("world_size", "2"),
        ("layout", "x"),
    ],
)
def test_a_field_of_another_type_is_refused_where_it_was_given(name: str, wrong: Any) -> None:
    fields = {"model": "m", "fingerprint": "f", "engine": "e"}
    with pytest.raises(
        InvalidArgument, match=f"namespace's {name} is of type .*, got {type(wrong).__name__}"
    ):
        Namespace(**fields | {name: wrong})


def embedding(name: str, rows: int, changed: int | None = None) -> bytes:
    """A file whose one tensor has rows of 1 KiB, one of them changed."""
    payload = bytearray(rows << 10)
    if changed is not None:
        payload[changed << 10] = 1
    header = json.dumps({name: {"dtype": "F32", "data_offsets": [0, len(payload)]}}).encode()
    return safetensors(bytes(payload), header)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "transformer.wte.weight", "tok_embeddings.weight"]
)
def test_a_single_trained_row_of_the_embeddings_is_another_model(model: Path, name: str) -> None:
    seen = set()
    for changed in (None, 700, 2001):  # far from the start, the middle and the end of 3,000
        (model / "model.safetensors").write_bytes(embedding(name, 3000, changed))
        seen.add(fingerprint_model(model))
    assert len(seen) == 3


def test_a_header_that_promises_more_than_the_file_has_is_read_to_its_end(model: Path) -> None:
    header = json.dumps({"embed": {"dtype": "F32", "data_offsets": [0, 1 << 52]}}).encode()
    (model / "model.safetensors").write_bytes(safetensors(bytes(MIB), header))
    assert len(fingerprint_model(model)) == 64
