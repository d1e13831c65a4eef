from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest
import torch

from kvtiers.memory import cuda
from kvtiers.memory.arena import Arena
from kvtiers.memory.cuda import (
    CopyInFlight,
    DeviceCopyError,
    DevicePool,
    HostRegisterError,
    bytes_tensor,
    host_register,
    tensor_bytes,
)
from kvtiers.memory.mapping import CloseOutcome
from kvtiers.model.errors import (
    CacheClosed,
    DeadlineExceeded,
    DoesNotFit,
    InvariantBroken,
    LayoutMismatch,
    OutOfMemoryError,
)

MIB = 1 << 20
PAGE = 4096


class StalledOrder:
    """Copies that say they have not ended until `ended` is set: a GPU that stands still."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def issue(self) -> AbstractContextManager[object]:
        return nullcontext()

    def record(self) -> StalledOrder:
        return self

    def query(self) -> bool:
        return self.ended.is_set()


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(MIB)
    yield made
    assert made.close() is CloseOutcome.UNMAPPED


def test_pool_on_a_cpu_says_it_is_simulated() -> None:
    pool = DevicePool(MIB, "cpu")
    assert pool.simulated
    assert "simulated on CPU" in pool.describe()
    assert not pool.view(0, MIB).any()


def test_bytes_go_to_the_pool_and_come_back_and_nothing_beside_them_changes(arena: Arena) -> None:
    pool = DevicePool(MIB)
    arena.view(0, 300)[:] = np.arange(300) % 251
    pool.copy_from_host(PAGE, arena.view(0, 300))
    pool.copy_to_host(PAGE, arena.view(PAGE, 300))
    assert np.array_equal(arena.view(PAGE, 300), arena.view(0, 300))
    assert not arena.view(PAGE + PAGE, PAGE).any()
    assert not pool.view(0, PAGE).any()
    assert not pool.view(PAGE + 300, PAGE).any()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8]
)
def test_strided_tensors_are_packed_in_c_order_and_unpacked(dtype: torch.dtype, arena: Arena) -> None:
    pool = DevicePool(MIB)
    made = torch.arange(2 * 3 * 8 * 4, dtype=torch.float32).remainder(200).to(dtype)
    keys = made.reshape(2, 3, 8, 4)[0].transpose(
        0, 1
    )  # [tokens, heads, dim] out of an engine's [heads, tokens, dim]
    values = made.reshape(2, 3, 8, 4)[1]
    nbytes = pool.copy_in(PAGE, keys, values)
    assert nbytes == made.numel() * made.element_size()
    pool.copy_to_host(PAGE, arena.view(0, nbytes))
    packed = [tensor_bytes(keys.contiguous()), tensor_bytes(values.contiguous())]
    assert arena.view(0, nbytes).tobytes() == b"".join(part.tobytes() for part in packed)
    back = torch.zeros_like(made).reshape(2, 3, 8, 4)
    assert pool.copy_out(PAGE, back[0].transpose(0, 1), back[1]) == nbytes
    assert np.array_equal(tensor_bytes(back), tensor_bytes(made.reshape(2, 3, 8, 4)))


def test_tensors_of_training_and_of_inference_mode_are_copied() -> None:
    pool = DevicePool(PAGE)
    pool.copy_in(0, torch.ones(4, requires_grad=True))
    with torch.inference_mode():
        frozen = torch.zeros(4)
    pool.copy_out(0, frozen)
    assert frozen.tolist() == [1, 1, 1, 1]


def test_what_does_not_fit_together_is_refused() -> None:
    pool = DevicePool(PAGE)
    with pytest.raises(InvariantBroken):
        pool.view(PAGE - 1, 2)
    with pytest.raises(InvariantBroken):
        pool.copy_in(PAGE - 8, torch.zeros(4))
    with pytest.raises(LayoutMismatch, match="not a multiple"):
        pool.copy_in(1, torch.zeros(4))
    with pytest.raises(LayoutMismatch, match="on meta"):
        pool.copy_in(0, torch.zeros(4, device="meta"))
    frozen = np.frombuffer(b"abcd", np.uint8)
    for wrong in (np.zeros((2, 2), np.uint8), np.zeros(4, np.uint16), np.zeros(8, np.uint8)[::2], frozen):
        with pytest.raises(LayoutMismatch, match="uint8 vector"):
            pool.copy_to_host(0, wrong)  # type: ignore[arg-type]


def test_pool_larger_than_the_machine_is_refused_with_the_numbers() -> None:
    with pytest.raises(OutOfMemoryError, match="MiB are free"):
        DevicePool(1 << 50)


def test_closed_pool_refuses_calls() -> None:
    pool = DevicePool(PAGE)
    assert pool.close() is CloseOutcome.UNMAPPED
    with pytest.raises(CacheClosed):
        pool.view(0, 1)


def test_copy_that_does_not_end_is_named_and_its_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[object] = []
    monkeypatch.setattr(cuda, "_PINNED", pinned)
    order = StalledOrder()
    pool = DevicePool(PAGE, deadline_s=0.01, order=order)
    arena = Arena(MIB)
    with pytest.raises(CopyInFlight, match=r"0\.01 s") as caught:
        pool.copy_to_host(0, arena.view(0, PAGE))
    assert isinstance(caught.value, DeadlineExceeded)
    ended = caught.value.ended
    del caught
    assert not ended()
    assert pool.in_flight() == 1
    assert arena.close() is CloseOutcome.LEAKED  # the device may still write there
    assert pool.close() is CloseOutcome.LEAKED
    order.ended.set()
    assert ended()
    assert pool.in_flight() == 0
    pinned.clear()
    assert arena.close() is CloseOutcome.UNMAPPED


def test_interrupted_wait_keeps_the_copys_memory() -> None:
    class Interrupted(StalledOrder):
        asked = 0

        def query(self) -> bool:
            self.asked += 1
            if self.asked == 2:
                raise KeyboardInterrupt
            return super().query()

    order = Interrupted()
    pool = DevicePool(PAGE, order=order)
    with pytest.raises(KeyboardInterrupt):
        pool.copy_in(0, torch.zeros(4))
    assert pool.in_flight() == 1
    order.ended.set()
    assert pool.in_flight() == 0


def test_what_the_device_refuses_is_named() -> None:
    class Broken(StalledOrder):
        def record(self) -> StalledOrder:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(DeviceCopyError, match="illegal memory access"):
        DevicePool(PAGE, order=Broken()).copy_in(0, torch.zeros(4))


@pytest.mark.parametrize(
    ("dtype", "unsigned"),
    [
        (torch.bfloat16, np.uint16),
        (torch.float16, np.uint16),
        (torch.float32, np.uint32),
        (torch.float8_e4m3fn, np.uint8),
        (torch.float8_e5m2, np.uint8),
        (torch.uint8, np.uint8),
        (torch.int64, np.uint64),
    ],
)
def test_tensor_bytes_is_the_same_memory_with_the_same_strides(dtype: torch.dtype, unsigned: type) -> None:
    tensor = torch.zeros(1, 3, 8, 4, dtype=dtype)[:, :, 2:5].transpose(1, 2)
    view = tensor_bytes(tensor)
    assert view.dtype == unsigned
    assert view.shape == (1, 3, 3, 4)
    assert view.strides == tuple(stride * tensor.element_size() for stride in tensor.stride())
    view[0, 1, 2, 3] = 60
    assert (
        tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[view.itemsize])[
            0, 1, 2, 3
        ]
        == 60
    )
    assert np.shares_memory(view, tensor_bytes(bytes_tensor(view, dtype)))
    assert bytes_tensor(view, dtype).dtype == dtype


def test_tensor_bytes_of_a_tensor_that_is_being_trained() -> None:
    assert tensor_bytes(torch.ones(2, requires_grad=True)).tolist() == [0x3F800000] * 2


def test_tensors_whose_bytes_are_not_their_values_are_refused() -> None:
    lazy = torch.zeros(2, dtype=torch.complex64).conj()
    for tensor in (
        torch.zeros(2, device="meta"),
        torch.eye(2).to_sparse(),
        lazy,
        torch.zeros(2, dtype=torch.complex128),
    ):
        with pytest.raises(LayoutMismatch):
            tensor_bytes(tensor)
    with pytest.raises(LayoutMismatch):
        bytes_tensor(np.zeros(4, np.uint16), torch.float32)
    with pytest.raises(LayoutMismatch):
        bytes_tensor(np.frombuffer(b"abcd", np.uint16), torch.bfloat16)


class Cudart:
    """Counts what is registered; refuses one address. Stands in for CUDA, which a machine without a GPU can't have."""

    def __init__(self, refuse_register_after: int = 1 << 30, refuse_unregister: int = -1) -> None:
        self.pieces: dict[int, int] = {}
        self.refuse_register_after = refuse_register_after
        self.refuse_unregister = refuse_unregister

    def cudaHostRegister(self, address: int, nbytes: int, flags: int, /) -> int:  # noqa: N802
        if len(self.pieces) >= self.refuse_register_after:
            return 2
        self.pieces[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int, /) -> int:  # noqa: N802
        if len(self.pieces) == self.refuse_unregister:
            return 1
        del self.pieces[address]
        return 0


def test_arena_is_registered_in_pieces_and_stays_mapped_until_unregistered() -> None:
    arena = Arena(5 * MIB)
    base = arena.view(0, 1).ctypes.data
    runtime = Cudart()
    registration = host_register(arena.view(0, arena.nbytes), "cpu", piece_bytes=2 * MIB, runtime=runtime)
    assert runtime.pieces == {base: 2 * MIB, base + 2 * MIB: 2 * MIB, base + 4 * MIB: MIB}
    assert registration.nbytes == 5 * MIB
    assert arena.close() is CloseOutcome.LEAKED
    registration.unregister()
    assert runtime.pieces == {}
    assert arena.close() is CloseOutcome.UNMAPPED


def test_refused_registration_undoes_what_it_did() -> None:
    arena = Arena(5 * MIB)
    runtime = Cudart(refuse_register_after=2)
    with pytest.raises(HostRegisterError, match="cudaError 2"):
        host_register(arena.view(0, arena.nbytes), "cpu", piece_bytes=2 * MIB, runtime=runtime)
    assert runtime.pieces == {}
    assert arena.close() is CloseOutcome.UNMAPPED


def test_memory_that_cuda_does_not_release_stays_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[object] = []
    monkeypatch.setattr(cuda, "_PINNED", pinned)
    arena = Arena(2 * MIB)
    registration = host_register(arena.view(0, arena.nbytes), "cpu", runtime=Cudart(refuse_unregister=1))
    registration.unregister()
    del registration
    assert arena.close() is CloseOutcome.LEAKED
    pinned.clear()
    assert arena.close() is CloseOutcome.UNMAPPED


def test_registration_is_stopped_between_pieces(arena: Arena) -> None:
    stop = threading.Event()
    stop.set()
    registration = host_register(arena.view(0, arena.nbytes), "cpu", stop=stop)
    assert registration.nbytes == 0
    registration.unregister()


def test_simulated_gpu_has_nothing_to_pin(arena: Arena) -> None:
    registration = host_register(arena.view(0, arena.nbytes), "cpu", piece_bytes=PAGE)
    assert registration.nbytes == arena.nbytes
    registration.unregister()


def test_copies_are_cut_where_two_pieces_meet_and_carry_the_same_bytes() -> None:
    arena = Arena(4 * PAGE)
    made = np.random.default_rng(5).integers(0, 256, 3 * PAGE, dtype=np.uint8)
    spans: list[int] = []

    class Order(StalledOrder):
        def query(self) -> bool:
            return True

    counted = DevicePool(4 * PAGE, order=Order())
    copy = counted._copy

    def count(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        spans.append(len(pairs))
        copy(pairs)

    counted._copy = count  # type: ignore[method-assign]
    registration = host_register(arena.view(0, arena.nbytes), "cpu", piece_bytes=PAGE + 512, runtime=Cudart())
    arena.view(PAGE, 3 * PAGE)[:] = made
    counted.copy_from_host(0, arena.view(PAGE, 3 * PAGE))  # borders at 4608, 9216 and 13824 of the arena
    arena.view(0, 4 * PAGE)[:] = 0
    counted.copy_to_host(0, arena.view(0, 3 * PAGE))
    assert np.array_equal(arena.view(0, 3 * PAGE), made)
    assert spans == [4, 3]
    counted.copy_to_host(0, arena.view(0, PAGE))
    counted.copy_to_host(0, np.empty(3 * PAGE, np.uint8))  # memory that is none of ours
    assert spans[2:] == [1, 1]
    registration.unregister()
    counted.copy_to_host(0, arena.view(0, 3 * PAGE))
    assert spans[-1] == 1
    assert arena.close() is CloseOutcome.UNMAPPED


def test_tensors_gathered_and_scattered_over_the_border_of_two_pieces_keep_their_bytes(arena: Arena) -> None:
    registration = host_register(arena.view(0, arena.nbytes), "cpu", piece_bytes=PAGE, runtime=Cudart())
    made = torch.arange(6 * 512, dtype=torch.float32).to(torch.bfloat16).reshape(6, 512)
    tensors = [made[0:5].transpose(0, 1), made[5:].clone()]  # strided, 5 KiB; then 1 KiB
    cuda.gather_to_host(arena.view(0, 6 * 1024), tensors)
    expected = b"".join(tensor_bytes(tensor.contiguous()).tobytes() for tensor in tensors)
    assert arena.view(0, 6 * 1024).tobytes() == expected
    back = torch.zeros_like(made)
    cuda.scatter_from_host(arena.view(0, 6 * 1024), [back[0:5].transpose(0, 1), back[5:]])
    assert torch.equal(back, made)
    registration.unregister()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "no-such-device"])
def test_a_device_that_is_not_there_is_named_with_what_to_do(device: str) -> None:
    with pytest.raises(
        DoesNotFit, match=rf"storage\.gpu\.device = {device}[\s\S]*KVTIERS_STORAGE__GPU__DEVICE=cpu"
    ):
        DevicePool(1 << 20, device)
