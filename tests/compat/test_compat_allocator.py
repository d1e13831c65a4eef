"""Counted pointers into pinned memory, and copies between it and a (simulated) GPU."""

from __future__ import annotations

import gc
import multiprocessing
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest

from kvtiers.compat import CPUPtr, GPUPtr, InvalidPointer, MemoryAllocator, OutOfMemoryError
from kvtiers.memory.cuda import CopyInFlight
from kvtiers.memory.mapping import CloseOutcome
from kvtiers.model.errors import CacheClosed, ConfigError, InvalidArgument, LayoutMismatch

MIB = 1 << 20
POOL_GB = 4 / 1024


@pytest.fixture
def allocator() -> Iterator[MemoryAllocator]:
    with MemoryAllocator(-1, POOL_GB) as allocator:
        yield allocator
        assert allocator.check_integrity() == []


def test_the_listing_works_as_it_stands() -> None:
    allocator = MemoryAllocator(device_id=0, pool_size_gb=POOL_GB)
    ptr = allocator.allocate(1000)
    assert isinstance(ptr, CPUPtr)
    assert (ptr.size, ptr.ref_count) == (1000, 1)
    assert (allocator.device_id, allocator.pool_size) == (0, 4 * MIB)
    assert allocator.allocated == 4096
    assert allocator.pool.nbytes == allocator.pool_size
    gpu_ptr = allocator.gpu_allocate(1000)
    copy = allocator.gpu_to_cpu_copy(gpu_ptr, 1000)
    assert isinstance(copy, CPUPtr)
    allocator.free(ptr)
    allocator.free(copy)
    assert allocator.allocated == 0
    assert CPUPtr(0x1000, 16).address == 0x1000
    assert GPUPtr(0x1000, 16).size == 16


def test_freed_memory_is_given_out_again_at_once(allocator: MemoryAllocator) -> None:
    """A pool that only moves on would be used up after the first four."""
    for _ in range(100):
        ptr = allocator.allocate(MIB)
        ptr.view()[:] = 1
        allocator.free(ptr)
    assert allocator.allocated == 0
    assert allocator.allocate(4 * MIB).size == 4 * MIB


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "x", None])
def test_what_is_no_size_is_refused(allocator: MemoryAllocator, size: Any) -> None:
    with pytest.raises(InvalidArgument, match="whole number of bytes from 1 on"):
        allocator.allocate(size)
    with pytest.raises(InvalidArgument, match="device_id"):
        MemoryAllocator("a", POOL_GB)  # type: ignore[arg-type]


def test_memory_stays_until_its_last_holder_has_freed_it(allocator: MemoryAllocator) -> None:
    ptr = allocator.allocate(100)
    ptr.view()[:] = 7
    ptr.ref_count += 1
    ptr.retain()
    assert ptr.ref_count == 3
    allocator.free(ptr)
    allocator.free(ptr)
    assert allocator.allocated == 4096
    assert bytes(ptr.data) == b"\7" * 100
    allocator.free(ptr)
    assert allocator.allocated == 0
    assert ptr.ref_count == 0


def test_a_freed_pointer_is_dead_also_when_its_address_is_given_out_anew(allocator: MemoryAllocator) -> None:
    old = allocator.allocate(100)
    allocator.free(old)
    new = allocator.allocate(100)
    assert new.address == old.address
    for call in (allocator.free, CPUPtr.view, CPUPtr.retain):
        with pytest.raises(InvalidPointer):
            call(old)
    assert new.ref_count == 1
    assert new.view().nbytes == 100


def test_pointers_of_others_are_refused(allocator: MemoryAllocator) -> None:
    ptr = allocator.allocate(100)
    with pytest.raises(InvalidPointer):
        allocator.free(CPUPtr(ptr.address, 100))
    with pytest.raises(InvalidPointer, match="not given out"):
        CPUPtr(ptr.address, 100).view()
    with MemoryAllocator(-1, POOL_GB) as other, pytest.raises(InvalidPointer):
        other.free(ptr)


def test_an_exhausted_pool_says_what_there_is(allocator: MemoryAllocator) -> None:
    kept = [allocator.allocate(MIB) for _ in range(4)]
    with pytest.raises(OutOfMemoryError, match="CPU pool exhausted: 4096 bytes"):
        allocator.allocate(1)
    allocator.free(kept[0])
    allocator.free(kept[2])
    with pytest.raises(OutOfMemoryError, match="largest hole has 1048576 bytes"):
        allocator.allocate(2 * MIB)
    allocator.free(kept[1])
    assert allocator.allocate(3 * MIB).size == 3 * MIB


def test_a_pool_has_a_size() -> None:
    makers: list[Callable[[], MemoryAllocator]] = [
        lambda: MemoryAllocator(0, 0.0),
        lambda: MemoryAllocator(0, -1.0),
        lambda: MemoryAllocator(0, POOL_GB, gpu_pool_gb=0.0),
    ]
    for make in makers:
        with pytest.raises(ConfigError, match="at least 4 KiB"):
            make()


def test_pointers_never_overlap_whatever_the_order(allocator: MemoryAllocator) -> None:
    rng, live = random.Random(3), dict[int, tuple[CPUPtr, int]]()
    for turn in range(2000):
        if live and rng.random() < 0.5:
            ptr, mark = live.pop(rng.choice(list(live)))
            assert (ptr.view() == mark).all()
            allocator.free(ptr)
            continue
        try:
            ptr = allocator.allocate(rng.choice([1, 4096, 5000, 70_000, 400_000]))
        except OutOfMemoryError:
            continue
        ptr.view()[:] = turn % 251
        live[turn] = (ptr, turn % 251)
    for ptr, mark in live.values():
        assert (ptr.view() == mark).all()
        allocator.free(ptr)
    assert allocator.allocated == 0


def test_eight_threads_allocate_and_free(allocator: MemoryAllocator) -> None:
    errors: list[BaseException] = []

    def work(mark: int) -> None:
        rng = random.Random(mark)
        try:
            for _ in range(200):
                try:
                    ptr = allocator.allocate(rng.randrange(1, 200_000))
                except OutOfMemoryError:
                    continue
                ptr.view()[:] = mark
                ptr.retain()
                allocator.free(ptr)
                assert (ptr.view() == mark).all()
                allocator.free(ptr)
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert allocator.allocated == 0


# --- the GPU side --------------------------------------------------------------------------------------------------------


def test_without_cuda_the_gpu_is_simulated_and_says_so(allocator: MemoryAllocator) -> None:
    assert allocator.simulated
    assert "simulated" in allocator.describe()


def test_bytes_go_to_the_gpu_and_back(allocator: MemoryAllocator) -> None:
    source = allocator.allocate(5000)
    source.view()[:] = np.arange(5000) % 251
    gpu_ptr = allocator.gpu_allocate(6000)
    allocator.cpu_to_gpu_copy(source, gpu_ptr)
    copy = allocator.gpu_to_cpu_copy(gpu_ptr, 5000)
    assert np.array_equal(copy.view(), source.view())
    assert allocator.gpu_to_cpu_copy(gpu_ptr, 7).view().tolist() == list(range(7))
    assert (source.ref_count, gpu_ptr.ref_count) == (1, 1)
    allocator.gpu_free(gpu_ptr)
    with pytest.raises(InvalidPointer):
        allocator.gpu_to_cpu_copy(gpu_ptr, 7)


def test_a_tensor_is_copied_in_its_own_order(allocator: MemoryAllocator) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(60, dtype=torch.bfloat16).reshape(3, 20).T
    pointer = GPUPtr.of(tensor)
    assert pointer.size == 120
    copy = allocator.gpu_to_cpu_copy(pointer, 120)
    assert bytes(copy.data) == tensor.contiguous().view(torch.uint8).numpy().tobytes()
    back = torch.zeros_like(tensor)
    allocator.cpu_to_gpu_copy(copy, GPUPtr.of(back))
    assert torch.equal(back, tensor)
    with pytest.raises(LayoutMismatch, match="copied whole"):
        allocator.gpu_to_cpu_copy(pointer, 100)


def test_more_than_there_is_can_t_be_copied(allocator: MemoryAllocator) -> None:
    gpu_ptr = allocator.gpu_allocate(100)
    with pytest.raises(LayoutMismatch, match="101 bytes"):
        allocator.gpu_to_cpu_copy(gpu_ptr, 101)
    with pytest.raises(LayoutMismatch):
        allocator.cpu_to_gpu_copy(allocator.allocate(101), gpu_ptr)


def test_a_failed_copy_leaves_nothing_allocated(allocator: MemoryAllocator) -> None:
    with pytest.raises(InvalidPointer):
        allocator.gpu_to_cpu_copy(GPUPtr(0x1000, 100), 100)
    assert allocator.allocated == 0
    gpu_ptr = allocator.gpu_allocate(5 * MIB // 2)
    kept = allocator.allocate(2 * MIB)
    with pytest.raises(OutOfMemoryError):
        allocator.gpu_to_cpu_copy(gpu_ptr, 5 * MIB // 2)
    allocator.free(kept)
    allocator.gpu_to_cpu_copy(gpu_ptr, 5 * MIB // 2)


def test_memory_of_a_copy_that_outlives_its_deadline_is_not_reused_before_it_ends(
    allocator: MemoryAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_ptr = allocator.gpu_allocate(100)
    gpu = allocator._gpu
    assert gpu is not None
    flying = [True]

    def hang(offset: int, dst: Any) -> None:
        raise CopyInFlight("a copy has not ended", lambda: not flying[0])

    monkeypatch.setattr(gpu.pool, "copy_to_host", hang)
    monkeypatch.setattr(gpu.pool, "in_flight", lambda: int(flying[0]))
    with pytest.raises(CopyInFlight):
        allocator.gpu_to_cpu_copy(gpu_ptr, 100)
    allocator.gpu_free(gpu_ptr)
    other = allocator.allocate(100)
    assert allocator.allocated == 2 * 4096  # the late one is still held
    assert gpu.heap.allocated == 4096
    flying[0] = False
    allocator.free(other)
    allocator.free(allocator.allocate(1))
    assert allocator.allocated == 0
    assert gpu.heap.allocated == 0


# --- life ----------------------------------------------------------------------------------------------------------------


def test_a_closed_allocator_refuses_and_its_views_stay_valid() -> None:
    allocator = MemoryAllocator(-1, POOL_GB)
    ptr = allocator.allocate(10)
    view = ptr.view()
    view[:] = 5
    assert allocator.close() is CloseOutcome.LEAKED
    assert view.tolist() == [5] * 10
    calls: list[Callable[[], object]] = [lambda: allocator.allocate(1), lambda: allocator.gpu_allocate(1)]
    for call in calls:
        with pytest.raises(CacheClosed):
            call()
    del view
    assert allocator.close() is CloseOutcome.UNMAPPED


def _in_child(allocator: MemoryAllocator, ptr: CPUPtr, pipe: Any) -> None:
    told: list[str] = []
    calls: list[Callable[[], object]] = [ptr.view, lambda: allocator.allocate(1)]
    for call in calls:
        try:
            call()
        except (InvalidPointer, CacheClosed) as error:
            told.append(str(error))
    pipe.send(told)
    pipe.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_refused_what_is_not_mapped_there(allocator: MemoryAllocator) -> None:
    ptr = allocator.allocate(10)
    mine, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(allocator, ptr, theirs))
    child.start()
    assert mine.poll(20)
    assert len(mine.recv()) == 2
    child.join(20)
    assert child.exitcode == 0
    mine.close()
    theirs.close()
    ptr.view()[:] = 1


def test_allocators_that_are_dropped_leave_no_descriptor_and_no_thread() -> None:
    process = psutil.Process()

    def use() -> None:
        allocator = MemoryAllocator(-1, POOL_GB)
        allocator.gpu_free(allocator.gpu_allocate(10))
        allocator.free(allocator.allocate(10))

    use()
    gc.collect()
    fds, threads = process.num_fds(), threading.active_count()
    for _ in range(8):
        use()
    gc.collect()
    assert process.num_fds() <= fds
    assert threading.active_count() <= threads
