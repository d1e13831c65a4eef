"""Layouts and parts: how many bytes of which shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtiers.model.errors import LayoutMismatch
from kvtiers.model.layout import DTYPE_BYTES, PAGE_BYTES, KVLayout, round_to_page
from kvtiers.model.parts import Part, Parts

SHAPES: dict[str, dict[str, Any]] = {
    "mha": {"num_layers": 32, "num_kv_heads": 32, "head_dim": 128, "dtype": "float16"},
    "gqa": {"num_layers": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"},
    "fp8": {"num_layers": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": "float8_e4m3fn"},
}


@pytest.mark.parametrize(("name", "per_token"), [("mha", 524_288), ("gqa", 131_072), ("fp8", 65_536)])
def test_bytes_per_token_of_known_models(name: str, per_token: int) -> None:
    layout = KVLayout(**SHAPES[name])
    assert layout.bytes_per_token == per_token
    assert layout.nbytes(256) == 256 * per_token


def test_mla_keeps_one_vector_per_token_and_layer() -> None:
    layout = KVLayout.mla(num_layers=61, latent_dim=512 + 64, dtype="bfloat16")
    assert layout.shape(10) == (61, 1, 10, 1, 576)
    assert layout.bytes_per_token == 61 * 576 * 2


@given(
    st.integers(1, 80),
    st.integers(1, 64),
    st.integers(1, 256),
    st.sampled_from(list(DTYPE_BYTES)),
    st.integers(1, 999),
)
def test_the_shape_has_as_many_bytes_as_are_counted(
    layers: int, heads: int, dim: int, dtype: str, tokens: int
) -> None:
    layout = KVLayout(layers, heads, dim, dtype)
    elements = 1
    for side in layout.shape(tokens):
        elements *= side
    assert elements * layout.itemsize == layout.nbytes(tokens)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.bfloat16, "bfloat16"),
        (torch.float8_e4m3fn, "float8_e4m3fn"),
        (np.float16, "float16"),
        (np.dtype("float32"), "float32"),
    ],
    ids=str,
)
def test_a_dtype_object_is_known_by_its_name(dtype: Any, name: str) -> None:
    layout = KVLayout(1, 1, 1, dtype)
    assert layout == KVLayout(1, 1, 1, name)
    assert layout.describe() == KVLayout(1, 1, 1, name).describe()


@pytest.mark.parametrize("dtype", [None, 2, b"float16", torch.int8, np.float64, []], ids=str)
def test_a_dtype_that_kv_has_not_is_refused_with_those_it_may_have(dtype: Any) -> None:
    with pytest.raises(LayoutMismatch, match="is not one of float32, bfloat16"):
        KVLayout(1, 1, 1, dtype)


@pytest.mark.parametrize("heads", [0, -1, True, 8.0, "8", None], ids=repr)
def test_a_count_that_is_no_whole_number_is_refused(heads: Any) -> None:
    with pytest.raises(LayoutMismatch, match="num_kv_heads must be a whole number, at least 1"):
        KVLayout(2, heads, 64, "bf16")


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("fp32", "float32"),
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("half", "float16"),
        ("fp8", "float8_e4m3fn"),
        ("torch.bfloat16", "bfloat16"),
        ("torch.float8_e5m2", "float8_e5m2"),
    ],
)
def test_aliases_of_dtypes(alias: str, name: str) -> None:
    assert KVLayout(1, 1, 1, alias) == KVLayout(1, 1, 1, name)
    assert KVLayout(1, 1, 1, alias).dtype == name


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "int4"},
        {"dtype": ""},
        {"num_layers": 0},
        {"num_kv_heads": -1},
        {"head_dim": 0},
        {"planes": 3},
        {"planes": 0},
    ],
    ids=str,
)
def test_a_layout_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(LayoutMismatch, match=str(next(iter(wrong.values()))) or "dtype"):
        KVLayout(**{**SHAPES["gqa"], **wrong})


@pytest.mark.parametrize(("nbytes", "rounded"), [(0, 0), (1, 4096), (4096, 4096), (4097, 8192)])
def test_slots_are_whole_pages(nbytes: int, rounded: int) -> None:
    assert round_to_page(nbytes) == rounded
    assert PAGE_BYTES == 4096


# --- parts --------------------------------------------------------------------------------------------------------------


def test_in_the_simple_case_a_chunk_has_one_part() -> None:
    layout = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16")
    parts = Parts.single(layout, 256)
    assert parts.slot_bytes == round_to_page(layout.nbytes(256))
    assert list(parts) == [Part(group=0, rank=0, nbytes=layout.nbytes(256))]


def test_every_part_has_its_own_pages() -> None:
    parts = Parts([Part(0, 0, 1), Part(0, 1, 4097), Part(1, 0, 4096)])
    assert [part.slot_bytes for part in parts] == [4096, 8192, 4096]
    assert parts.slot_bytes == 16_384
    assert parts == Parts(tuple(parts))


@pytest.mark.parametrize(
    "wrong",
    [[], [Part(0, 0, 0)], [Part(0, 0, -5)], [Part(0, 0, 1), Part(0, 0, 2)]],
    ids=["none", "empty", "negative", "twice"],
)
def test_parts_that_make_no_sense_are_refused(wrong: list[Part]) -> None:
    with pytest.raises(LayoutMismatch, match="part"):
        Parts(wrong)
