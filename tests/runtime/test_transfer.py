"""Copies between callers' arrays and slots: every byte to its place, in every memory and form."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from kvtiers.memory.arena import Arena
from kvtiers.memory.cuda import DevicePool, with_index
from kvtiers.model.errors import LayoutMismatch
from kvtiers.model.layout import KVLayout, round_to_page
from kvtiers.runtime.kv_arrays import KVArrays, kv_arrays
from kvtiers.runtime.transfer import ArenaSlots, PoolSlots, SlotMemory

CHUNK = 4
LAYOUTS = {
    "bf16": KVLayout(3, 2, 6, "bfloat16"),
    "fp32": KVLayout(2, 1, 5, "float32"),
    "fp8": KVLayout(2, 3, 7, "float8_e4m3fn"),
    "mla": KVLayout.mla(3, 9, "bfloat16"),
}
TORCH = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float8_e4m3fn": torch.float8_e4m3fn}
SLOTS = 4


def values(layout: KVLayout, tokens: int) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(layout.bytes_per_token)
    return (
        rng.integers(0, 256, layout.nbytes(tokens), dtype=np.uint8)
        .view(f"u{layout.itemsize}")
        .reshape(layout.shape(tokens))
    )


def in_form(array: np.ndarray[Any, Any], layout: KVLayout, form: str) -> Any:
    tensor = torch.from_numpy(array.view(np.uint8)).view(TORCH[layout.dtype]).reshape(array.shape)
    match form:
        case "whole array":
            return array
        case "whole tensor":
            return tensor
        case "pairs":
            return [tuple(array[layer]) for layer in range(layout.num_layers)]
        case "pairs of tensors":
            return [tuple(tensor[layer]) for layer in range(layout.num_layers)]
        case _:  # heads first: the same memory order as transformers', so it is a copy
            heads_first = tensor.transpose(2, 3).contiguous()
            return [
                tuple(plane.transpose(0, 1) for plane in heads_first[layer])
                for layer in range(layout.num_layers)
            ]


def back(kv: Any, layout: KVLayout) -> np.ndarray[Any, Any]:
    planes = kv_arrays(kv, layout).planes
    return np.stack(planes).reshape(layout.shape(planes[0].shape[0]))


FORMS = ["whole array", "whole tensor", "pairs", "pairs of tensors", "heads first"]


class Memories:
    def __init__(self) -> None:
        self.nbytes = SLOTS * max(round_to_page(layout.nbytes(CHUNK)) for layout in LAYOUTS.values())
        self.arena = Arena(self.nbytes)
        self.pool = DevicePool(self.nbytes, "cpu")

    def of(self, name: str) -> SlotMemory:
        return ArenaSlots(self.arena) if name == "arena" else PoolSlots(self.pool)

    def bytes_at(self, name: str, offset: int, nbytes: int) -> np.ndarray[Any, Any]:
        if name == "arena":
            return self.arena.view(0, self.nbytes)[offset : offset + nbytes].copy()
        return self.pool.view(offset, nbytes).clone().numpy()

    def scribble(self) -> None:
        self.arena.view(0, self.nbytes)[:] = 0xEE
        self.pool.view(0, self.nbytes)[:] = 0xEE


@pytest.fixture
def memories() -> Iterator[Memories]:
    made = Memories()
    made.scribble()
    yield made
    made.pool.close()
    made.arena.close()


@pytest.mark.parametrize("where", ["arena", "pool"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_a_slot_holds_a_chunk_in_the_layouts_order_whatever_form_it_came_in(
    memories: Memories, where: str, name: str, form: str
) -> None:
    layout, slot = LAYOUTS[name], round_to_page(LAYOUTS[name].nbytes(CHUNK))
    array = values(layout, 3 * CHUNK)
    memories.of(where).write(slot, kv_arrays(in_form(array, layout, form), layout), CHUNK, CHUNK, layout)
    nbytes = layout.nbytes(CHUNK)
    expected = np.ascontiguousarray(array[:, :, CHUNK : 2 * CHUNK]).view(np.uint8).reshape(-1)
    np.testing.assert_array_equal(memories.bytes_at(where, slot, nbytes), expected)
    around = [memories.bytes_at(where, 0, slot), memories.bytes_at(where, slot + nbytes, slot)]
    assert all((part == 0xEE).all() for part in around), "it wrote beside its slot"


@pytest.mark.parametrize("where", ["arena", "pool"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_a_chunk_comes_back_into_any_form_and_nothing_beside_it_is_touched(
    memories: Memories, where: str, name: str, form: str
) -> None:
    layout, slot = LAYOUTS[name], round_to_page(LAYOUTS[name].nbytes(CHUNK))
    array = values(layout, CHUNK)
    memory = memories.of(where)
    memory.write(2 * slot, kv_arrays(array, layout), 0, CHUNK, layout)
    target = in_form(np.full_like(values(layout, 3 * CHUNK), 0x11), layout, form)
    arrays = kv_arrays(target, layout, writable=True)
    memory.read(2 * slot, arrays, CHUNK, CHUNK, layout)
    got = back(target, layout)
    np.testing.assert_array_equal(got[:, :, CHUNK : 2 * CHUNK], array)
    assert (got[:, :, :CHUNK] == 0x11).all()
    assert (got[:, :, 2 * CHUNK :] == 0x11).all()


@pytest.mark.parametrize("where", ["arena", "pool"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_layers_of_a_chunk_may_come_back_apart_and_no_other_layer_is_touched(
    memories: Memories, where: str, name: str, form: str
) -> None:
    layout, slot = LAYOUTS[name], round_to_page(LAYOUTS[name].nbytes(CHUNK))
    array = values(layout, CHUNK)
    memory = memories.of(where)
    memory.write(slot, kv_arrays(array, layout), 0, CHUNK, layout)
    target = in_form(np.full_like(array, 0x11), layout, form)
    arrays = kv_arrays(target, layout, writable=True)
    memory.read(slot, arrays, 0, CHUNK, layout, layers=range(1, layout.num_layers))
    got = back(target, layout)
    np.testing.assert_array_equal(got[1:], array[1:])
    assert (got[:1] == 0x11).all()


class _Ended:
    def __init__(self, flag: threading.Event) -> None:
        self.flag = flag

    def query(self) -> bool:
        return self.flag.is_set()


class LateOrder:
    """A device whose copies end when the test says so (there is no GPU here)."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.issued = threading.Event()

    def issue(self) -> AbstractContextManager[object]:
        return nullcontext()

    def record(self) -> _Ended:
        self.issued.set()
        return _Ended(self.ended)


@pytest.mark.parametrize("form", ["whole array", "whole tensor"])
@pytest.mark.parametrize("what", ["write", "read"])
def test_a_device_copy_past_its_deadline_keeps_its_slot_until_it_has_ended(form: str, what: str) -> None:
    order = LateOrder()
    pool = DevicePool(1 << 16, "cpu", deadline_s=0.01, order=order)
    layout = LAYOUTS["bf16"]
    kv = kv_arrays(in_form(values(layout, CHUNK).copy(), layout, form), layout)
    copy = PoolSlots(pool).write if what == "write" else PoolSlots(pool).read
    returned = threading.Event()

    def run() -> None:
        copy(0, kv, 0, CHUNK, layout)
        returned.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert order.issued.wait(20)
    assert not returned.wait(0.1), "the caller would give the slot back while the device still uses it"
    order.ended.set()
    assert returned.wait(20)
    thread.join(20)


def test_kv_on_another_device_than_the_pool_is_refused_with_both_names() -> None:
    pool = DevicePool(1 << 16, "cpu")
    layout = LAYOUTS["bf16"]
    elsewhere = torch.zeros((CHUNK, 2, 6), dtype=torch.bfloat16, device="meta")
    kv = KVArrays(CHUNK, source=(elsewhere,) * 6)
    with pytest.raises(LayoutMismatch, match="kv lies on meta, the GPU pool on cpu"):
        PoolSlots(pool).write(0, kv, 0, CHUNK, layout)


def test_cuda_without_a_number_means_the_current_device_as_tensors_name_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert with_index(torch.device("cuda")) == torch.device("cuda:3")
    assert with_index(torch.device("cuda:1")) == torch.device("cuda:1")
    assert with_index(torch.device("cpu")) == torch.device("cpu")
