from __future__ import annotations

import pickle
import threading
from contextlib import ExitStack

import numpy as np
import pytest

from kvtiers.records.buffers import AlignedBuffers

MIB = 1 << 20


def address_of(view: memoryview) -> int:
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, 3 * MIB + 1])
def test_buffer_is_whole_pages_on_a_page(nbytes: int) -> None:
    with AlignedBuffers(4, 8 * MIB).take(nbytes) as view:
        assert len(view) == max(-(-nbytes // 4096), 1) * 4096
        assert address_of(view) % 4096 == 0
        assert not view.readonly
        view[-1] = 1


def test_buffer_is_used_again() -> None:
    pool = AlignedBuffers(4, 8 * MIB)
    seen = set()
    for nbytes in (MIB, MIB - 1, MIB - 50_000, MIB):
        with pool.take(nbytes) as view:
            seen.add(address_of(view))
    assert len(seen) == 1
    assert MIB <= pool.retained_bytes < 2 * MIB


def test_view_is_dead_after_its_block() -> None:
    with AlignedBuffers(4, 8 * MIB).take(100) as view:
        pass
    with pytest.raises(ValueError, match="released"):
        view[0] = 1


def test_no_two_blocks_share_a_buffer() -> None:
    pool = AlignedBuffers(2, 8 * MIB)
    with ExitStack() as stack:
        addresses = {address_of(stack.enter_context(pool.take(MIB))) for _ in range(6)}
        assert len(addresses) == 6
        assert pool.lent_bytes >= 6 * MIB
    assert pool.lent_bytes == 0


def test_retained_memory_is_bounded_by_number_and_by_bytes() -> None:
    for max_buffers, max_bytes in ((3, 100 * MIB), (100, 3 * MIB + MIB // 2)):
        pool = AlignedBuffers(max_buffers, max_bytes)
        with ExitStack() as stack:
            for _ in range(8):
                stack.enter_context(pool.take(MIB))
        assert pool.retained_bytes == 3 * MIB


def test_what_is_lent_counts_towards_the_bound() -> None:
    pool = AlignedBuffers(2, 8 * MIB)
    with pool.take(MIB), pool.take(MIB):
        with pool.take(MIB):
            pass
        assert pool.retained_bytes == 0


def test_buffer_larger_than_the_bound_is_lent_and_not_kept() -> None:
    pool = AlignedBuffers(2, MIB)
    with pool.take(4 * MIB) as view:
        view[-1] = 1
    assert pool.retained_bytes == 0


def test_new_sizes_replace_those_no_longer_asked_for() -> None:
    pool = AlignedBuffers(2, 100 * MIB)
    for nbytes in (4096, 8192, 5 * MIB, 5 * MIB):
        with pool.take(nbytes):
            pass
    with pool.take(5 * MIB) as first:
        kept = address_of(first)
    with pool.take(5 * MIB) as again:
        assert address_of(again) == kept


def test_one_page_does_not_occupy_a_large_buffer() -> None:
    pool = AlignedBuffers(8, 100 * MIB)
    with pool.take(8 * MIB) as view:
        large = address_of(view)
    with pool.take(4096) as small, pool.take(8 * MIB) as view:
        assert address_of(small) != large
        assert address_of(view) == large


def test_buffer_that_is_still_exported_is_never_lent_again() -> None:
    pool = AlignedBuffers(4, 8 * MIB)
    with pool.take(MIB) as view:
        held = pickle.PickleBuffer(view)  # holds the view as a system call in another thread does
        view[5] = 7
    for _ in range(3):
        with pool.take(MIB) as other:
            other[:] = bytes(MIB)
    assert held.raw()[5] == 7
    assert pool.lent_bytes == 0


def test_error_in_the_block_gives_the_buffer_back() -> None:
    pool = AlignedBuffers(4, 8 * MIB)
    with pytest.raises(KeyError), pool.take(MIB):
        raise KeyError
    assert (pool.lent_bytes, pool.retained_bytes) == (0, MIB)


def test_system_without_memory_is_an_os_error_and_nothing_stays_lent() -> None:
    pool = AlignedBuffers(4, 8 * MIB)
    with pytest.raises(OSError, match="Cannot allocate"), pool.take(1 << 60):
        pass
    assert (pool.lent_bytes, pool.retained_bytes) == (0, 0)


def test_threads_never_see_each_others_bytes() -> None:
    pool = AlignedBuffers(3, 2 * MIB)
    wrong: list[int] = []

    def work(mark: int) -> None:
        for turn in range(200):
            with pool.take(4096 * (1 + (mark + turn) % 9)) as view:
                array = np.frombuffer(view, np.uint8)
                array[:] = mark
                if not (array == mark).all():
                    wrong.append(mark)
                del array

    threads = [threading.Thread(target=work, args=(mark,), daemon=True) for mark in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    assert pool.lent_bytes == 0
    assert 0 < pool.retained_bytes <= 2 * MIB
