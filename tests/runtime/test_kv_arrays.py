"""Every form in which callers hand over KV, and every way to get it wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvtiers.model.errors import LayoutMismatch
from kvtiers.model.layout import KVLayout
from kvtiers.runtime.kv_arrays import empty_kv, kv_arrays

LAYERS, HEADS, DIM, TOKENS = 3, 2, 4, 5
FP32 = KVLayout(LAYERS, HEADS, DIM, "float32")
FP16 = KVLayout(LAYERS, HEADS, DIM, "float16")
BF16 = KVLayout(LAYERS, HEADS, DIM, "bfloat16")
FP8 = KVLayout(LAYERS, HEADS, DIM, "float8_e4m3fn")
FP8_E5M2 = KVLayout(LAYERS, HEADS, DIM, "float8_e5m2")
OPAQUE = KVLayout(LAYERS, HEADS, DIM, "uint8")
MLA = KVLayout.mla(LAYERS, DIM, "bfloat16")

TORCH = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "uint8": torch.uint8,
}
LAYOUTS = [FP32, FP16, BF16, FP8, FP8_E5M2, OPAQUE, MLA]
NAMES = [f"{layout.dtype}-{layout.planes}" for layout in LAYOUTS]


def raw(layout: KVLayout, tokens: int = TOKENS) -> np.ndarray[Any, Any]:
    """Bytes that differ everywhere, as unsigned integers of the item size."""
    shape = layout.shape(tokens)
    count = int(np.prod(shape)) * layout.itemsize
    values = (np.arange(count, dtype=np.uint32) * 2654435761 >> 7).astype(np.uint8)
    return values.view(f"u{layout.itemsize}").reshape(shape)


def as_tensor(array: np.ndarray[Any, Any], layout: KVLayout) -> torch.Tensor:
    return torch.from_numpy(array.copy().view(np.uint8)).view(TORCH[layout.dtype]).reshape(array.shape)


def planes_of(array: np.ndarray[Any, Any], layout: KVLayout) -> list[np.ndarray[Any, Any]]:
    return [array[layer, plane] for layer in range(layout.num_layers) for plane in range(layout.planes)]


def check(kv: Any, layout: KVLayout, expected: np.ndarray[Any, Any]) -> None:
    arrays = kv_arrays(kv, layout)
    assert arrays.tokens == expected.shape[2]
    assert len(arrays.planes) == layout.num_layers * layout.planes
    for plane, wanted in zip(arrays.planes, planes_of(expected, layout), strict=True):
        assert plane.dtype == wanted.dtype
        np.testing.assert_array_equal(plane, wanted)
    if arrays.whole is not None:
        np.testing.assert_array_equal(arrays.whole, expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
class TestAccepted:
    def test_one_numpy_array_of_raw_bits(self, layout: KVLayout) -> None:
        check(raw(layout), layout, raw(layout))

    def test_one_tensor(self, layout: KVLayout) -> None:
        check(as_tensor(raw(layout), layout), layout, raw(layout))

    def test_pairs_of_tensors_per_layer(self, layout: KVLayout) -> None:
        tensor = as_tensor(raw(layout), layout)
        check([tuple(tensor[layer]) for layer in range(LAYERS)], layout, raw(layout))

    def test_pairs_of_numpy_arrays_in_any_sequence(self, layout: KVLayout) -> None:
        array = raw(layout)
        check(tuple([*array[layer]] for layer in range(LAYERS)), layout, raw(layout))

    def test_tensors_and_numpy_arrays_mixed(self, layout: KVLayout) -> None:
        array, tensor = raw(layout), as_tensor(raw(layout), layout)
        mixed = [tuple(tensor[layer]) if layer % 2 else tuple(array[layer]) for layer in range(LAYERS)]
        check(mixed, layout, raw(layout))

    def test_transposed_tensors_as_transformers_keeps_them(self, layout: KVLayout) -> None:
        heads_first = as_tensor(raw(layout), layout).transpose(2, 3).contiguous()  # [.., heads, tokens, dim]
        layers = [
            tuple(plane.transpose(0, 1) for plane in heads_first[layer]) for layer in range(layout.num_layers)
        ]
        if layout.num_kv_heads > 1:
            assert not layers[0][0].is_contiguous()
        check(layers, layout, raw(layout))
        check(heads_first.transpose(2, 3), layout, raw(layout))

    def test_strided_slices(self, layout: KVLayout) -> None:
        twice = np.repeat(raw(layout), 2, axis=2)
        check(twice[:, :, ::2], layout, raw(layout))
        check(as_tensor(twice, layout)[:, :, ::2], layout, raw(layout))

    def test_no_tokens_at_all(self, layout: KVLayout) -> None:
        assert kv_arrays(raw(layout)[:, :, :0], layout).tokens == 0

    def test_nothing_is_copied(self, layout: KVLayout) -> None:
        tensor, array = as_tensor(raw(layout), layout), raw(layout).copy()
        for kv, view in ((tensor, tensor.view(torch.uint8).numpy()), (array, array.view(np.uint8))):
            plane = kv_arrays(kv, layout, writable=True).planes[-1]
            plane[...] = 0
            assert not view[-1, -1].any()
            assert view[0, 0].any()

    def test_what_is_empty_has_the_layouts_shape_and_can_be_loaded_into(self, layout: KVLayout) -> None:
        kv = empty_kv(layout, TOKENS)
        assert kv.shape == layout.shape(TOKENS)
        assert kv_arrays(kv, layout, writable=True).tokens == TOKENS


def test_mla_may_come_as_one_latent_array_per_layer() -> None:
    latents = [raw(MLA)[layer, 0] for layer in range(LAYERS)]
    check(latents, MLA, raw(MLA))
    check([as_tensor(latent, MLA) for latent in latents], MLA, raw(MLA))


def test_numpy_floats_are_taken_as_they_are() -> None:
    for layout, dtype in ((FP32, np.float32), (FP16, np.float16)):
        values = np.random.default_rng(0).standard_normal(layout.shape(TOKENS)).astype(dtype)
        planes = kv_arrays(values, layout).planes
        np.testing.assert_array_equal(planes[0].view(dtype), values[0, 0])
        assert empty_kv(layout, 1).dtype == dtype


def test_a_tensor_that_requires_a_gradient_and_a_parameter_are_tensors_too() -> None:
    tensor = as_tensor(raw(FP32), FP32).view(torch.float32).nan_to_num().requires_grad_()
    expected = tensor.detach().numpy().view(np.uint32)
    check(tensor, FP32, expected)
    check(torch.nn.Parameter(tensor.detach().clone()), FP32, expected)


def test_a_subclass_of_tensor_from_another_module_is_a_tensor() -> None:
    class Mine(torch.Tensor):
        pass

    check(as_tensor(raw(FP32), FP32).as_subclass(Mine), FP32, raw(FP32))


GOOD = raw(FP32)
PAIRS = [tuple(GOOD[layer]) for layer in range(LAYERS)]


def with_layer(number: int, layer: Any) -> list[Any]:
    pairs: list[Any] = list(PAIRS)
    pairs[number] = layer
    return pairs


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        (None, r"kv must be one array of shape \[3, 2, tokens, 2, 4\], or 3 layers of \(K, V\) pairs; got NoneType"),
        ("text", r"got str of length 4"),
        (PAIRS[:2], r"got list of length 2"),
        (iter(PAIRS), r"or 3 layers of \(K, V\) pairs; got list_iterator"),
        (GOOD[0], r"kv has shape \(2, 5, 2, 4\); expected \[3, 2, tokens, 2, 4\]"),
        (GOOD[:, :1], r"kv has shape \(3, 1, 5, 2, 4\)"),
        (GOOD[:, :, :, :1], r"kv has shape \(3, 2, 5, 1, 4\)"),
        (GOOD.transpose(0, 1, 3, 2, 4), r"kv has shape \(3, 2, 2, 5, 4\)"),
        (with_layer(1, PAIRS[1][:1]), r"layer 1 must be a pair \(K, V\) of arrays of shape \[tokens, 2, 4\]"),
        (with_layer(1, PAIRS[1][0]), r"layer 1 must be a pair .* got ndarray of ndarray"),
        (with_layer(2, None), r"layer 2 must be a pair .* got NoneType"),
        (with_layer(2, ([1.0], [2.0])), r"layer 2 must be a pair .* got tuple of list, list"),
        (with_layer(0, (PAIRS[0][0], PAIRS[0][1][:4])), r"layer 0: an array has shape \(4, 2, 4\); expected \(5, 2, 4\)"),
        (with_layer(2, (GOOD[2, 0, :, :1], GOOD[2, 1])), r"layer 2: an array has shape \(5, 1, 4\)"),
        (with_layer(0, (np.zeros((), np.uint32), GOOD[0, 1])), r"layer 0: an array has shape \(\)"),
        (GOOD.astype(np.float64), r"kv has dtype float64; the layout says float32 \(as raw bits: uint32\)"),
        (GOOD.astype(np.int32), r"kv has dtype int32"),
        (GOOD.astype(">u4"), r"kv has dtype >u4"),
        (torch.zeros(FP32.shape(5), dtype=torch.bfloat16), r"kv has dtype bfloat16; the layout says float32"),
    ],
)  # fmt: skip
def test_whatever_does_not_fit_is_refused_with_what_was_expected(kv: Any, message: str) -> None:
    with pytest.raises(LayoutMismatch, match=message):
        kv_arrays(kv, FP32)


def test_loading_into_what_cannot_be_written_is_refused() -> None:
    frozen = GOOD.copy()
    frozen.flags.writeable = False
    with pytest.raises(LayoutMismatch, match="read-only"):
        kv_arrays(frozen, FP32, writable=True)
    assert kv_arrays(frozen, FP32).tokens == TOKENS, "it can be stored from"


def test_loading_into_an_expanded_tensor_is_refused() -> None:
    expanded = torch.zeros((LAYERS, 2, 1, HEADS, DIM)).expand(-1, -1, TOKENS, -1, -1)
    with pytest.raises(LayoutMismatch, match="share memory"):
        kv_arrays(expanded, FP32, writable=True)
    assert kv_arrays(expanded, FP32).tokens == TOKENS


class TestAliases:
    """Arrays to load into must not share memory; to store from, they may."""

    def planes(self, tokens: int = TOKENS) -> list[np.ndarray[Any, Any]]:
        return [np.zeros((tokens, HEADS, DIM), np.uint32) for _ in range(2 * LAYERS)]

    def refused(self, planes: list[Any], message: str) -> None:
        kv = list(zip(planes[::2], planes[1::2], strict=True))
        with pytest.raises(LayoutMismatch, match=message):
            kv_arrays(kv, FP32, writable=True)
        assert kv_arrays(kv, FP32).tokens == TOKENS

    def test_one_array_for_k_and_v(self) -> None:
        planes = self.planes()
        planes[3] = planes[2]
        self.refused(planes, "arrays 2 and 3 .* share memory")

    def test_one_tensor_in_two_layers(self) -> None:
        planes: list[Any] = [torch.from_numpy(plane.view(np.float32)) for plane in self.planes()]
        planes[5] = planes[0]
        self.refused(planes, "arrays 0 and 5 .* share memory")

    def test_the_same_array_everywhere(self) -> None:
        self.refused([self.planes()[0]] * (2 * LAYERS), "share memory")

    def test_overlapping_views(self) -> None:
        base = np.zeros((TOKENS + 2, HEADS, DIM), np.uint32)
        self.refused([*self.planes()[2:], base[:TOKENS], base[2:]], "arrays 4 and 5 .* share memory")

    def test_views_that_overlap_at_every_step(self) -> None:
        base = np.zeros((TOKENS + 2 * LAYERS, HEADS, DIM), np.uint32)
        self.refused([base[first : first + TOKENS] for first in range(2 * LAYERS)], "share memory")

    def test_a_reversed_view_of_what_another_has(self) -> None:
        base = np.zeros((2 * TOKENS, HEADS, DIM), np.uint32)
        self.refused([*self.planes()[2:], base[:TOKENS], base[TOKENS + 1 : 1 : -1]], "share memory")

    def test_a_whole_array_whose_tokens_overlap(self) -> None:
        base = np.zeros(4096, np.uint32)
        step = base.itemsize
        strides = (512 * step, 256 * step, DIM * step, DIM * step, step)
        kv = np.lib.stride_tricks.as_strided(base, FP32.shape(TOKENS), strides)
        with pytest.raises(LayoutMismatch, match="share memory"):
            kv_arrays(kv, FP32, writable=True)

    @pytest.mark.parametrize("axes", [(0, 1, 2, 3, 4), (2, 0, 1, 3, 4), (0, 2, 1, 3, 4), (3, 1, 0, 2, 4)])
    def test_planes_that_interleave_without_sharing_an_element_are_accepted(
        self, axes: tuple[int, ...]
    ) -> None:
        whole = np.zeros([FP32.shape(TOKENS)[axis] for axis in axes], np.uint32).transpose(np.argsort(axes))
        assert kv_arrays(whole, FP32, writable=True).tokens == TOKENS
        pairs = [tuple(layer) for layer in whole]
        assert kv_arrays(pairs, FP32, writable=True).tokens == TOKENS
        assert kv_arrays(pairs[::-1], FP32, writable=True).tokens == TOKENS

    def test_planes_of_several_arrays_that_interleave_irregularly_are_accepted(self) -> None:
        base = np.zeros((TOKENS, 7, HEADS, DIM), np.uint32)
        planes = [base[:, place] for place in (0, 1, 3, 4, 5, 6)]
        assert (
            kv_arrays(list(zip(planes[::2], planes[1::2], strict=True)), FP32, writable=True).tokens == TOKENS
        )
